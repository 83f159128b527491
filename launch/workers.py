"""Start N workers of one run on this machine, each with its TF_CONFIG: a rehearsal of several machines.

    python launch/workers.py --workers=2 -- --model=mlp --run_dir=runs/two
    python launch/workers.py --workers=4 --restarts=3 -- --flagfile=flags.txt
    python launch/workers.py --trainer=contrastive_loop -- --run_dir=runs/views
    python launch/workers.py --workers=2 --dry_run -- --batch_size=128

Output is prefixed by worker. GPUs are divided among the workers. SIGTERM and SIGINT are passed on. When one worker
fails the others are ended and its code is returned; `--restarts=K` starts all again, up to K times, where the code says
that this helps (75, 143, or a crash). Standard library only.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainers.settings.exit_codes import NEVER_RETRIED, OK, PREEMPTED
from trainers.settings.pages import SUPERVISED, Page, page_of, shipped
from trainers.world import nvidia, process

GRACE_SECONDS = 30.0
MOST_WORKERS = 256
# Workers listen at ports from here to those that the system gives to connections (these, where it does not say).
FIRST_PORT, FIRST_PORT_OF_THE_SYSTEM = 10_000, 32_768


def free_ports(count: int) -> list[int]:
    """Ports that nothing on this machine listens at, and that the system gives to no connection.

    Workers listen seconds after they were started: of the system's own ports one may be taken by then.
    """
    first = FIRST_PORT_OF_THE_SYSTEM
    with contextlib.suppress(OSError, ValueError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    tried, sockets, found = [*range(FIRST_PORT, first)], [], []
    random.SystemRandom().shuffle(tried)
    for port in [*tried, *[0] * count]:
        if len(found) == count:
            break
        sockets.append(socket.socket())
        with contextlib.suppress(OSError):
            sockets[-1].bind(("127.0.0.1", port))
            found.append(sockets[-1].getsockname()[1])
    for each in sockets:
        each.close()
    return found


def visible_gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu not in ("", "-1")]
    return [str(i) for i in range(len(nvidia.listed()))]


def environments(count: int, ports: list[int]) -> list[dict[str, str]]:
    """What each worker's environment adds: its TF_CONFIG, and its share of the GPUs."""
    addresses, gpus = [f"127.0.0.1:{port}" for port in ports], visible_gpus()
    added = []
    for index in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        own = {"TF_CONFIG": json.dumps(config)}
        if gpus:
            share = len(gpus) // count
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * share : (index + 1) * share])
        added.append(own)
    return added


class Gang:
    """The workers of an attempt. `added`: what the environment of each adds."""

    def __init__(self, command: Sequence[str], added: Sequence[Mapping[str, str]]):
        self.processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(own),
                start_new_session=True,
                text=True,
                errors="replace",
            )
            for own in added
        ]
        self.readers = [threading.Thread(target=self._copy, args=(i,)) for i in range(len(added))]
        for reader in self.readers:
            reader.start()

    def _copy(self, index: int) -> None:
        for line in self.processes[index].stdout:
            # Read on where nobody reads us any more: a worker would wait for ever at a full pipe.
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.write(f"[{index}] {line}")
                sys.stdout.flush()

    def send(self, number: int) -> None:
        """Sends a signal to every worker that runs."""
        for worker in self.processes:
            if worker.poll() is None:
                worker.send_signal(number)

    def wait(self, grace: float) -> int:
        """Waits for all; once a worker has failed the others have `grace` seconds. The first failure's code, or 0."""
        first, ended_at = OK, None
        while any(worker.poll() is None for worker in self.processes):
            failed = [worker.returncode for worker in self.processes if worker.returncode]
            if failed and ended_at is None:
                first, ended_at = failed[0], time.monotonic()
                # Workers that were told to stop still save; those that lost a peer notice it themselves, but later.
                if first != PREEMPTED:
                    self.send(signal.SIGTERM)
            if ended_at is not None and time.monotonic() - ended_at > grace:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        for reader in self.readers:
            reader.join()
        codes = [worker.returncode for worker in self.processes]
        first = first or next((code for code in codes if code), OK)
        return 128 - first if first < 0 else first


def plan(page: Page, added: Sequence[Mapping[str, str]], flags: Sequence[str]) -> str:
    """What `--dry_run` prints: each worker's TF_CONFIG, and which examples of the global batch are its own.

    Raises:
      BadConfiguration: a flag is wrong, or the batch does not divide over the workers.
    """
    process.check_requirements("absl")
    from trainers.settings.flags import config_from
    from trainers.settings.rules import check_batch

    config = config_from(["workers", *flags], "", page.settings)
    replicas = sum(max(len(own.get("CUDA_VISIBLE_DEVICES", "").split(",")), 1) for own in added)
    share = check_batch(config, replicas) * replicas // len(added)
    lines = [f"global batch {config.batch_size} = {len(added)} workers × {share} examples, {replicas} replicas in all"]
    for index, own in enumerate(added):
        lines.append(f"[{index}] examples {index * share} to {(index + 1) * share - 1} of each batch")
        lines += [f"[{index}] {name}={value!r}" for name, value in own.items()]
    return "\n".join(lines)


def options_from(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line; `argv[0]` is the program. `flags`: those of the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="number of workers (default: 2)")
    parser.add_argument("--trainer", default=SUPERVISED, help=f"the loop: {', '.join(shipped())}, a path or a module")
    parser.add_argument("--restarts", type=int, default=0, help="how often all are started again (default: 0)")
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS, help="seconds that the others have to end")
    parser.add_argument("--dry_run", action="store_true", help="print each worker's TF_CONFIG and examples, and stop")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="-- and the flags of the loop")
    options = parser.parse_args(argv[1:])
    if options.workers < 1 or options.restarts < 0:
        parser.error(f"--workers {options.workers} --restarts {options.restarts}: pass 1 or more, and 0 or more")
    if options.workers > MOST_WORKERS:
        parser.error(f"--workers {options.workers} is above {MOST_WORKERS}, on one machine; use fewer")
    gpus = visible_gpus()
    if gpus and len(gpus) < options.workers:
        parser.error(f"--workers {options.workers} is above the {len(gpus)} GPUs; use {len(gpus)} or fewer")
    flags = options.flags[1:] if options.flags[:1] == ["--"] else options.flags
    # One name for all, each worker's default would be its own; first, so that a flag or a flagfile comes after it.
    name = f"runs/workers-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    options.flags = ["--strategy=multi_worker", f"--run_dir={name}", *flags]
    return options


def main(options: argparse.Namespace) -> int:
    """Runs the gang, and restarts it as asked. Returns the exit code."""
    page = page_of(options.trainer)
    if options.dry_run:
        print(plan(page, environments(options.workers, free_ports(options.workers)), options.flags))
        return OK
    process.check_requirements()
    stopped = []
    for attempt in range(options.restarts + 1):
        added = [page.environment | own for own in environments(options.workers, free_ports(options.workers))]
        gang = Gang([sys.executable, *page.command, *options.flags], added)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda n, _, gang=gang: (stopped.append(n), gang.send(n)))
        code = gang.wait(options.grace)
        if code in (OK, *NEVER_RETRIED) or stopped or attempt == options.restarts:
            return code
        print(f"launch/workers.py: the workers ended with {code}; start {attempt + 2} follows", flush=True)
    return code


if __name__ == "__main__":
    process.main(options_from, main)
