"""Is this machine fit to train, and if not, what is to be done? Python 3.9 and its standard library are enough.

    python launch/doctor.py
    python launch/doctor.py --run_dir=/shared/runs --hosts=a:2222,b:2222
    python launch/doctor.py --json

Rows that need TensorFlow run in a process of their own, with .venv or the interpreter that runs this; where neither has
it they say so. It changes nothing: what it writes to try a file system is removed. Every question has a bound on its
time. Exit code 0: no row is bad; 1: one is, and says what to do; 2: a flag is wrong.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from launch.health import computing, engines, gpus, libraries, machine, network, packages, storage
from launch.health.rows import BAD, NOT_HERE, OK, WARNING, Row
from trainers.settings.exit_codes import OK as FINE
from trainers.settings.exit_codes import PREEMPTED
from trainers.world import nvidia, process, programs

ILL = 1
# What an environment takes on the disk: without CUDA and with it.
TO_INSTALL = {"cpu": (3 * machine.GIB, 4 * machine.GIB), "gpu": (9 * machine.GIB, 12 * machine.GIB)}


class Section(NamedTuple):
    """A group of rows."""

    title: str
    rows: list[Row]


def options_from(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line; `argv[0]` is the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--run_dir", default="runs", help="where runs are written (default: runs)")
    parser.add_argument("--data_dir", default="~/tensorflow_datasets", help="where prepared data lies")
    parser.add_argument("--hosts", default="", help="host:port of each worker; default: as the environment names them")
    return parser.parse_args(argv[1:])


def sections(options: argparse.Namespace, environment: Mapping[str, str]) -> Iterator[Section]:
    """Examines the machine, group after group."""
    driver, env = nvidia.look(), packages.environment()
    count, stored = len(driver.gpus) or len(driver.models), "://" in options.run_dir
    # A run in an object store is worked on in a folder of the machine.
    run_dir = Path("~/.cache/lockstep") if stored else Path(options.run_dir)
    room = machine.DISK if env else TO_INSTALL["gpu" if count else "cpu"]
    yield examine("Python and packages", lambda: [packages.python_row()], lambda: packages.lock_rows(env, count))
    yield examine(
        "machine",
        lambda: [machine.disk("repository", packages.ROOT, room, writes=env is None)],
        lambda: [machine.disk("data_dir", Path(options.data_dir)), machine.disk("run_dir", run_dir)],
        lambda: [machine.memory(), machine.shared_memory(count), machine.open_files()],
    )
    seen, cuda = computing.look(env), packages.cuda_of_lock()
    loaded = libraries.load(cuda, env.folders) if env and driver.version else None
    link, nvlink = gpus.link_row(driver)
    facts = gpus.Facts(driver, seen, loaded, cuda, environment)
    yield examine("GPUs", lambda: gpus.gpu_rows(facts), lambda: [link])
    yield examine("speed", lambda: computing.speed_rows(seen, nvlink))
    machines = network.machines(options.hosts, environment)
    yield examine(
        "files of runs",
        lambda: [storage.store_row(options.run_dir) if stored else storage.sharing_row(run_dir, machines)],
        lambda: storage.trial_rows(run_dir),
        lambda: [storage.clock_row(run_dir)],
    )
    yield examine("workers", lambda: network.network_rows(options.hosts, environment))
    yield examine("containers and clusters", lambda: engines.engine_rows(count))


def examine(title: str, *questions: Callable[[], list[Row]]) -> Section:
    """A section of what the questions find. One that fails becomes a row, so that the others are still answered."""
    found = []
    for question in questions:
        try:
            found += question()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            found.append(
                Row("doctor", BAD, f"{where}: {error!r}", "the doctor itself has failed here; look at that line")
            )
    return Section(title, found)


def text_of(section: Section) -> str:
    """A section as lines: a row, and its remedy where it has one."""
    width = max(len(row.name) for row in section.rows)
    lines = [section.title]
    for row in section.rows:
        lines.append(f"  {row.status:<8}  {row.name:<{width}}  {row.found}")
        if row.remedy and row.status != OK:
            lines.append(f"  {'':<8}  {'':<{width}}  → {row.remedy}")
    return "\n".join(lines)


def summary(rows: Sequence[Row], seconds: float) -> str:
    """The last line."""
    counts = [(status, sum(row.status == status for row in rows)) for status in (BAD, WARNING, OK, NOT_HERE)]
    said = ", ".join(f"{count} {status}" for status, count in counts if count)
    return f"{said}; {seconds:.0f} s"


def end(number: int, frame: object) -> None:
    """Ends the doctor upon a signal, and the programs that it asks."""
    programs.end_all()
    process.leave(PREEMPTED)


def main(options: argparse.Namespace) -> int:
    """Examines and prints. Returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    began, found = time.monotonic(), []
    for section in sections(options, os.environ):
        found.append(section)
        if not options.json:
            print(text_of(section), flush=True)
    rows = [row for section in found for row in section.rows]
    fine = all(row.status != BAD for row in rows)
    if options.json:
        facts = [{"group": section.title, **row._asdict()} for section in found for row in section.rows]
        print(json.dumps({"fine": fine, "rows": facts}, indent=2, ensure_ascii=False))
    else:
        print(summary(rows, time.monotonic() - began), flush=True)
    return FINE if fine else ILL


if __name__ == "__main__":
    process.main(options_from, main)
