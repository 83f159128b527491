"""Is the mathematics the same at every size, and if not, why not? On this machine, for a model, its data and its flags.

    python launch/prove.py --model=resnet
    python launch/prove.py --model=mine --dataset=csv:rows.csv --label=price --optimizer=momentum
    python launch/prove.py --rows=replicas,resume --model=mlp
    python launch/prove.py --trainer=distillation_loop --teacher=runs/first

Run it after a change of the model, the loss or the loop, before the machines are paid for. It trains a few steps on
virtual devices (or the GPUs that are here) and with real processes for workers, compares, and where a row fails it runs
variants that isolate the cause, and names it. Exit code 0: every row holds; 1: one does not; 2: a flag is wrong.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements()

import argparse
import shutil
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

from launch.proof.prover import Prover, Stopped
from launch.proof.rows import ROWS, Scope, judge, scope_of
from launch.proof.verdicts import Verdict
from launch.workers import visible_gpus
from trainers.record import carriers
from trainers.run.command import config_from
from trainers.settings import paths
from trainers.settings.exit_codes import OK, PREEMPTED, BadConfiguration
from trainers.settings.pages import SUPERVISED, Page, page_of, shipped
from trainers.settings.rules import MOST, finds_parts
from trainers.show.tables import table
from trainers.world import files, process

FAILED = 1
MARKS = {True: "holds", False: "FAILS", None: "–"}


class Settings(NamedTuple):
    """The command line: the script's own options, the loop, its flags, and what they amount to on this machine."""

    options: argparse.Namespace
    page: Page
    flags: list[str]
    scope: Scope


def settings_from(argv: Sequence[str]) -> Settings:
    """Reads a command line; `argv[0]` is the program.

    Raises:
      BadConfiguration: a flag is wrong, or a row needs more devices than there are.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--trainer", default=SUPERVISED, help=f"the loop: {', '.join(shipped())}, a path or a module")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which to judge (default: {','.join(ROWS)})")
    parser.add_argument("--steps", type=int, default=50, help="updates of each run (default: 50)")
    parser.add_argument("--json", default="runs/prove.json", help="the verdicts' file (default: runs/prove.json)")
    parser.add_argument("--keep", action="store_true", help="keep what was run")
    options, flags = parser.parse_known_args(argv[1:])
    if options.steps < 2:
        raise BadConfiguration(f"--steps {options.steps} is below 2; pass 2 or more")
    if options.steps > MOST:
        raise BadConfiguration(f"--steps {options.steps} is above {MOST}; pass fewer")
    options.json = paths.place("--json", options.json)
    page = page_of(options.trainer)
    config = config_from(["prove", *flags], "", page.settings)
    if finds_parts(config):
        raise BadConfiguration("--accumulate=auto may find another number for each run that is compared; pass one")
    return Settings(options, page, flags, scope_of(config, options.rows.split(","), len(visible_gpus())))


def prove(settings: Settings) -> list[Verdict]:
    """Makes the runs that the rows need, judges them and removes what was run, unless it is to be kept."""
    prover = Prover(settings.flags, settings.options.steps, process.say, settings.page)
    try:
        return judge(prover, settings.scope)
    finally:
        prover.stop()
        if settings.options.keep:
            process.say(f"everything that was run lies in {prover.folder}")
        else:
            shutil.rmtree(prover.folder, ignore_errors=True)


def report(verdicts: Sequence[Verdict]) -> str:
    """The table, and the causes under it."""
    rows = [[verdict.row, MARKS[verdict.holds], verdict.text] for verdict in verdicts]
    causes = [f"{verdict.row}: {verdict.cause}" for verdict in verdicts if verdict.cause]
    return "\n".join([table(["row", "", "found"], rows), *(["", *causes] if causes else [])])


def write(place: str, settings: Settings, holds: bool, verdicts: Sequence[Verdict]) -> None:
    """Writes the verdicts as JSON, to a path or an address.

    Raises:
      BadConfiguration: the file cannot be written.
      StoreLost: the store cannot be reached.
    """
    facts = {
        "trainer": settings.page.module,
        "flags": settings.flags,
        "holds": holds,
        "rows": [verdict.facts() for verdict in verdicts],
    }
    try:
        carriers.write_text(place, files.to_json(facts, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise BadConfiguration(f"--json {place} cannot be written: {error.strerror}; name another") from None


def main(settings: Settings) -> int:
    """Proves and prints. Returns the exit code."""
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        verdicts = prove(settings)
        holds = all(verdict.holds is not False for verdict in verdicts)
        rows = "every row that was judged" if settings.scope.skipped else "every row"
        print(report(verdicts))
        print(f"\n{f'{rows} holds' if holds else 'not every row holds'}; {time.monotonic() - began:.0f} s", flush=True)
        write(settings.options.json, settings, holds, verdicts)
    except (KeyboardInterrupt, Stopped):
        return PREEMPTED
    return OK if holds else FAILED


if __name__ == "__main__":
    process.main(settings_from, main)
