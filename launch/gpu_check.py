"""Check a machine in at most 10 minutes: doctor, tensor_check, prove, benchmark, profile, in a folder with a page.

    launch/gpu_check.sh                     # installs what is missing, then calls this
    python launch/gpu_check.py runs/check   # a folder that is empty or not there; default: runs/gpu_check-<time>

Each part is a process with a bound on its time; one that fails does not stop the next. On a machine without GPUs the
sizes are small. `index.md` in the folder has the exit code, the time and the output of each part. Exit code 0: all
parts ended with 0; 1: one did not; 2: the folder cannot be used; 143: a signal came.
"""

from __future__ import annotations  # with the doctor, on Python 3.9 too

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

from trainers.settings.exit_codes import OK, PREEMPTED, BadConfiguration
from trainers.world import files, machine, nvidia, process

ROOT = Path(__file__).resolve().parent.parent
FAILED = 1
# Of all parts together.
MOST_SECONDS = 600.0
# What a part has to end after SIGTERM.
GRACE_SECONDS = 5.0
LINES_SHOWN = 60


class Part(NamedTuple):
    """A command of the check: `words` after the interpreter, and the seconds that it has."""

    name: str
    purpose: str
    words: tuple[str, ...]
    seconds: float


class Outcome(NamedTuple):
    """How a part has ended: `code` is None where its time was over. `products`: what it wrote beside its output."""

    part: Part
    code: int | None
    seconds: float
    products: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """A word for the page."""
        if self.code is None:
            return f"not done after {self.seconds:.0f} s"
        return "fine" if self.code == OK else "FAILED"


def parts(folder: Path, gpus: int) -> list[Part]:
    """What is run, for a number of GPUs. Their times add up to `MOST_SECONDS`."""
    size = "--size=1024 --repeats=5" if gpus else "--size=128 --repeats=2"
    # The small model first: the benchmark writes each row once it is measured.
    rows = "mlp:32:1"
    if gpus:
        rows = "mlp:128:1," + (f"resnet:{128 * gpus}:{gpus}," if gpus > 1 else "") + "resnet:128:1"
    model = f"--model={'resnet' if gpus else 'mlp'} --batch_size={128 * max(gpus, 1)}"
    steps = "--train_steps=60 --profile=30:40 --log_every=20 --eval_every=0 --checkpoint_every=0"

    def part(name: str, purpose: str, seconds: float, command: str) -> Part:
        return Part(name, purpose, tuple(word.replace("FOLDER", str(folder)) for word in command.split()), seconds)

    prove = "launch/prove.py --model=mlp --steps=20 --json=FOLDER/prove.json"
    benchmark = f"trainers/benchmark.py --rows={rows} --repeats=3 --seconds=0.3 --out_dir=FOLDER/benchmark"
    return [
        part("doctor", "the machine", 120, "launch/doctor.py --run_dir=FOLDER"),
        part(
            "tensor_check",
            "operations against NumPy",
            90,
            f"trainers/tensor_check.py {size} --json=FOLDER/tensor_check.json",
        ),
        part("prove", "the same mathematics at every size", 160, prove),
        part("benchmark", "the loop beside its peers", 140, benchmark),
        part(
            "profile", "what a step is made of", 90, f"trainers/custom_loop.py {model} {steps} --run_dir=FOLDER/profile"
        ),
    ]


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal has come."""


def run(part: Part, folder: Path, seconds: float) -> Outcome:
    """Runs a part, its output in `<name>.txt`, and ends it with all that it has started when its time is over."""
    began, before = time.monotonic(), set(folder.iterdir())
    with open(folder / f"{part.name}.txt", "wb") as output:
        child = subprocess.Popen(
            [sys.executable, *part.words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                end(child)
    written = set(folder.iterdir()) - before - {folder / f"{part.name}.txt"}
    products = sorted(str(path.relative_to(folder)) for place in written for path in shown(place))
    return Outcome(part, code, time.monotonic() - began, tuple(products))


def shown(place: Path) -> list[Path]:
    """What the page links of a file or folder: the pages and pictures in a folder that has some, else itself."""
    return [path for path in place.glob("*") if path.suffix in (".md", ".png", ".html")] or [place]


def end(child: subprocess.Popen) -> None:
    """Ends a part: it is asked first, then it and all that it has started are killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def page(outcomes: Sequence[Outcome], folder: Path, gpus: Sequence[str], remaining: int) -> str:
    """The page of what was found so far, in Markdown."""
    fine = sum(outcome.code == OK for outcome in outcomes)
    where = ", ".join(gpus) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    lines = [
        f"# Check of {os.uname().nodename}: {fine} of {len(outcomes) + remaining} parts are fine",
        f"\n{where}; {versions}; commit {machine.commit() or 'unknown'}; {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n",
        "| part | | exit code | seconds | output | files |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        name, code = outcome.part.name, "–" if outcome.code is None else outcome.code
        links = " ".join(f"[{product}]({product})" for product in outcome.products)
        cells = (
            f"{name}: {outcome.part.purpose}",
            outcome.verdict,
            code,
            f"{outcome.seconds:.0f}",
            f"[{name}.txt]({name}.txt)",
            links,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("\nThe profile in TensorBoard: `launch/tensorboard.sh " + str(folder) + "`")
    for outcome in outcomes:
        command = " ".join(("python", *outcome.part.words))
        lines += [
            f"\n## {outcome.part.name}: {outcome.verdict}",
            f"`{command}`\n",
            "```",
            tail(folder / f"{outcome.part.name}.txt"),
            "```",
        ]
    return "\n".join(lines) + "\n"


def tail(path: Path) -> str:
    """The last lines of an output."""
    lines = path.read_text(errors="replace").replace("```", "'''").splitlines()
    # Of a line that a progress bar has written again and again, what was seen last.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
    left_out = [f"… {len(lines) - LINES_SHOWN} lines before"] if len(lines) > LINES_SHOWN else []
    return "\n".join([*left_out, *lines[-LINES_SHOWN:]])


def folder_from(argv: Sequence[str]) -> Path:
    """The folder of a command line, made; `argv[0]` is the program.

    Raises:
      BadConfiguration: it holds something, or cannot be made.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = f"runs/gpu_check-{time.strftime('%Y%m%d-%H%M%S')}"
    parser.add_argument("folder", nargs="?", default=default, type=Path, help="where all goes")
    folder = parser.parse_args(argv[1:]).folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise BadConfiguration(f"{folder} holds something; name a folder that is empty or not there")
    except OSError as error:
        raise BadConfiguration(f"{folder} cannot be made: {error.strerror}; name another") from None
    return folder


def stop(number: int, frame: object) -> None:
    """Ends the check upon a signal, once."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped


def main(folder: Path) -> int:
    """Runs all parts and writes the page after each. Returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    gpus = [] if nvidia.hidden(os.environ) else nvidia.listed()
    until, planned, outcomes = time.monotonic() + MOST_SECONDS, parts(folder, len(gpus)), []
    try:
        for part in planned:
            print(f"{part.name}: {part.purpose} …", flush=True)
            outcomes.append(run(part, folder, min(part.seconds, until - time.monotonic() - GRACE_SECONDS)))
            print(f"{part.name}: {outcomes[-1].verdict}, {outcomes[-1].seconds:.0f} s", flush=True)
            files.write_text(folder / "index.md", page(outcomes, folder, gpus, len(planned) - len(outcomes)))
    except Stopped:
        return PREEMPTED
    print(f"read {folder / 'index.md'}", flush=True)
    return OK if all(outcome.code == OK for outcome in outcomes) else FAILED


if __name__ == "__main__":
    process.main(folder_from, main)
