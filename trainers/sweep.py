"""Many runs of one trainer: every combination of the values that flags name, or some of them at random, ranked.

python trainers/sweep.py --model=mlp --learning_rate=1e-3,3e-3 --weight_decay=0,1e-2 --sweep_dir=runs/sweep
python trainers/sweep.py --spec=sweep.json --random=8 --jobs=2

A flag with commas is swept; a word with `=` is an option of the name before it, as in `--model=mlp,vit,depth=2`.
`--spec` is a JSON file of flags and their values, `{"learning_rate": [0.001, 0.003], "model": "mlp"}`.
Each combination has a run_dir of its own under --sweep_dir. The same command continues; complete runs are not repeated.
`launch/tensorboard.sh SWEEP_DIR` compares them in its HParams tab.
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
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.options import split
from trainers.record import carriers, reading
from trainers.settings import paths
from trainers.settings.config import EPOCHS, NO_DIFFERENCE, Config
from trainers.settings.exit_codes import CRASHED, OK, PREEMPTED, BadConfiguration
from trainers.settings.flags import config_from
from trainers.show.tables import table
from trainers.world import files, process

_TRAINER = Path(__file__).resolve().parent / "custom_loop.py"
_NAMES = {field.name for field in dataclasses.fields(Config)}
# Bytes of a file's name; what is written aside beside it has a longer one.
_LONGEST_NAME = 200
# The name of a data set or a path may hold a comma of its own.
_NEVER_SWEPT = ("run_dir", "data_dir", "profile")


# ----------------------------------------------------------------------------------------------------------------------
# The runs that the command line asks for.


@dataclasses.dataclass(frozen=True)
class Run:
    """A combination: the name of its folder, its flags as they were written, and the configuration that they make."""

    name: str
    flags: tuple[str, ...]
    config: Config


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line asks for. `place`: a folder or an address. `swept`: flags that have several values."""

    place: str
    jobs: int
    swept: tuple[str, ...]
    runs: tuple[Run, ...]


def settings_from(argv: Sequence[str]) -> Settings:
    """The settings of a command line (`argv[0]` is the program).

    Raises:
      BadConfiguration: a value breaks a rule; nothing has been run or written.
      SystemExit: `--help` was given, or a flag of this script is malformed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sweep_dir", default="runs/sweep", help="where all runs lie (default: runs/sweep)")
    parser.add_argument("--spec", help="a JSON file of flags and their values")
    parser.add_argument("--random", type=int, default=0, help="this many combinations, drawn at random; 0 = all")
    parser.add_argument("--random_seed", type=int, default=0, help="seed of that draw (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    options, flags = parser.parse_known_args(argv[1:])
    if options.jobs < 1:
        raise BadConfiguration(f"--jobs {options.jobs} is below 1; pass 1 or more")
    if options.random < 0:
        raise BadConfiguration(f"--random {options.random} is below 0; pass 0 or more")
    values = values_of(flags, None if options.spec is None else paths.local("--spec", options.spec))
    swept = tuple(name for name, choices in values.items() if len(choices) > 1)
    runs = {}
    for combination in combinations(values, options.random, options.random_seed):
        words = tuple(f"--{name}={value}" for name, value in combination.items())
        name = name_of(combination, swept)
        runs[name] = Run(name, words, config_from(["sweep", *words], ""))
    return Settings(paths.place("--sweep_dir", options.sweep_dir), options.jobs, swept, tuple(runs.values()))


def values_of(flags: Sequence[str], spec: Path | None) -> dict[str, list[str]]:
    """The values of each flag, those of the command line before those of the file.

    Raises:
      BadConfiguration: a word is not a flag, a flag is unknown, or the file is unusable.
    """
    values = _values_of_file(spec) if spec is not None else {}
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            raise BadConfiguration(f"{flag!r} is not a flag; flags are written --name=value[,value…]")
        values[name] = [value] if name in _NEVER_SWEPT else split(value) if equals else ["true"]
    for name, choices in values.items():
        if name not in _NAMES:
            raise BadConfiguration(f"--{name} is not a flag of trainers/custom_loop.py; see its --help")
        if name == "run_dir":
            raise BadConfiguration("--run_dir is set for each run; name the folder of all runs with --sweep_dir")
        if not choices:
            raise BadConfiguration(f"--{name} has no values; write at least one")
        if "" in choices and len(choices) > 1:
            raise BadConfiguration(f"--{name} {','.join(choices)} has an empty value; write --{name}=a,b")
    return values


def _values_of_file(spec: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(spec.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadConfiguration(f"--spec {spec} cannot be read: {error}; name a file with a JSON object") from None
    if not isinstance(content, dict):
        raise BadConfiguration(f'--spec {spec} is not a JSON object; write e.g. {{"learning_rate": [0.001, 0.003]}}')
    return {
        name: [_text(choice) for choice in (value if isinstance(value, list) else [value])]
        for name, value in content.items()
    }


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def combinations(values: Mapping[str, Sequence[str]], at_random: int, seed: int) -> list[dict[str, str]]:
    """Every combination, in order; or `at_random` of them, drawn without repetition."""
    grid = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    if at_random and at_random < len(grid):
        places = sorted(random.Random(seed).sample(range(len(grid)), at_random))
        grid = [grid[place] for place in places]
    return grid


def name_of(combination: Mapping[str, str], swept: Sequence[str]) -> str:
    """The name of a run's folder: the values of the swept flags."""
    text = "-".join(f"{name}={combination[name]}" for name in swept) or "run"
    name = "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in text)
    if len(os.fsencode(name)) <= _LONGEST_NAME:
        return name
    return f"{swept[0]}-and-{len(swept) - 1}-more-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


# ----------------------------------------------------------------------------------------------------------------------
# Running them.


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. `facts`: its run.json."""

    name: str
    code: int
    facts: Mapping[str, Any]

    @property
    def metric(self) -> str:
        """The metric of the evaluation that decides which run is best, as the run's task says; empty if unknown."""
        return self.facts.get("best_metric", "")

    @property
    def largest_first(self) -> bool:
        """Whether a larger value of the metric is better."""
        return self.facts.get("best_mode") == "max"

    @property
    def score(self) -> float | None:
        """The value of the metric at the end of the run; None if it is not complete."""
        return (
            reading.numbers(self.facts.get("final", {}).get("eval", {})).get(self.metric) if self.code == OK else None
        )

    def __str__(self) -> str:
        if self.score is not None:
            return f"{self.metric} {self.score:.5g}"
        if self.code == OK:
            return "complete, but its run.json does not say how to rank it (older version); pass another --sweep_dir"
        return f"ended with code {self.code}"


def has_flags(facts: Mapping[str, Any], config: Config) -> bool:
    """Whether a run.json is of a run with the flags of `config`, except for those that make no run differ."""
    flags = facts.get("flags", {})
    unknown = {k for k in EPOCHS if None in (config.train_steps, getattr(config, k))} | set(NO_DIFFERENCE)  # of epochs
    return all(flags.get(k) == value for k, value in dataclasses.asdict(config).items() if k not in unknown)


class Sweep:
    """Runs combinations at a `place`, with their logs in a folder; a signal is passed on to them and ends the sweep."""

    def __init__(self, place: str, logs: Path):
        self.place, self.logs = place, logs
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self._guard = threading.Lock()

    def stop(self, number: int, frame: object) -> None:
        """Ends the runs in progress, each with a checkpoint; no other run begins."""
        self.stopped = True
        for trainer in list(self.running):
            trainer.send_signal(signal.SIGTERM)

    def run(self, run: Run) -> Outcome:
        """Trains, unless the run is complete with the same flags; the trainer decides what other flags mean."""
        before = Outcome(run.name, OK, reading.run_at(f"{self.place}/{run.name}"))
        if before.facts.get("exit_code") == OK and before.score is not None and has_flags(before.facts, run.config):
            print(f"{run.name}: complete already, {before}", flush=True)
            return before
        trainer = self._start(run)
        if trainer is None:
            return Outcome(run.name, PREEMPTED, {})
        code = trainer.wait()
        self.running.discard(trainer)
        outcome = Outcome(run.name, code, reading.run_at(f"{self.place}/{run.name}"))
        print(f"{run.name}: {outcome}", flush=True)
        return outcome

    def _start(self, run: Run) -> subprocess.Popen | None:
        """The trainer in a process of its own; None if the sweep was stopped."""
        logs = self.logs / run.name
        logs.mkdir(parents=True, exist_ok=True)
        with self._guard:
            if self.stopped:
                return None
            with open(logs / "log.txt", "a") as log:
                command = [sys.executable, str(_TRAINER), *run.flags, f"--run_dir={self.place}/{run.name}"]
                trainer = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            self.running.add(trainer)
        if self.stopped:
            trainer.send_signal(signal.SIGTERM)
        return trainer


# ----------------------------------------------------------------------------------------------------------------------
# Ranking them.


def ranked(outcomes: Sequence[Outcome]) -> list[tuple[int, Outcome]]:
    """Rank and outcome of the runs that have a score, best first; runs of another metric are ranked apart."""
    scored = [outcome for outcome in outcomes if outcome.score is not None]
    ranks = []
    for metric in dict.fromkeys(outcome.metric for outcome in scored):
        group = [outcome for outcome in scored if outcome.metric == metric]
        sign = -1 if group[0].largest_first else 1
        # What is not a number is worse than any.
        group.sort(key=lambda outcome: math.inf if math.isnan(outcome.score) else sign * outcome.score)
        ranks += enumerate(group, 1)
    return ranks


def ranking(outcomes: Sequence[Outcome], swept: Sequence[str]) -> str:
    """The table, best first; runs without a score come last."""
    ranks = ranked(outcomes)
    metrics = list(dict.fromkeys(outcome.metric for _, outcome in ranks))
    rows = []
    for rank, outcome in [*ranks, *(("–", outcome) for outcome in outcomes if outcome.score is None)]:
        score = f"code {outcome.code}" if outcome.score is None else f"{outcome.score:.5g}"
        if len(metrics) > 1 and outcome.score is not None:
            score = f"{outcome.metric} {score}"
        flags, seconds = outcome.facts.get("flags", {}), outcome.facts.get("seconds", {}).get("train", 0.0)
        cells = [score, f"{seconds:.1f} s", outcome.name]
        rows.append([str(rank), *(str(flags.get(name, "–")) for name in swept), *cells])
    metric = metrics[0] if len(metrics) == 1 else "metric"
    return table(["rank", *(f"--{name}" for name in swept), metric, "training", "run"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# The script.


def main(settings: Settings) -> int:
    """Runs all combinations, prints and writes the ranking.

    Returns 0 if every run is complete, 1 if a run failed, 143 after a signal.

    Raises:
      BadConfiguration: the folder cannot be made.
    """
    folder = carriers.folder_beside(settings.place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadConfiguration(f"--sweep_dir {folder} {paths.why_no_directory(folder)}") from None
    except OSError as error:
        raise BadConfiguration(f"--sweep_dir {folder} cannot be made: {error.strerror}; name a directory") from None
    print(f"{len(settings.runs)} runs, {settings.jobs} at a time, in {settings.place}", flush=True)
    sweep = Sweep(settings.place, folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, sweep.stop)
    with concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool:
        outcomes = list(pool.map(sweep.run, settings.runs))
    text = ranking(outcomes, settings.swept)
    facts = [{"run": o.name, "code": o.code} | ({o.metric: o.score} if o.metric else {}) for o in outcomes]
    for name, content in (("ranking.md", text), ("ranking.json", files.to_json(facts, indent=2))):
        carriers.write_text(f"{settings.place}/{name}", content + "\n")
    print(text)
    if sweep.stopped:
        print("stopped; the same command continues")
        return PREEMPTED
    return OK if all(outcome.code == OK for outcome in outcomes) else CRASHED


if __name__ == "__main__":
    process.main(settings_from, main)
