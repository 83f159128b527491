"""Many runs of one trainer: every combination of the values that flags name, or some of them at random, ranked.

python trainers/sweep.py --model=mlp --learning_rate=1e-3,3e-3 --weight_decay=0,1e-2 --sweep_dir=runs/sweep
python trainers/sweep.py --spec=sweep.json --random=8 --jobs=2

A flag with commas is swept; `--spec` is a JSON file of such flags, `{"learning_rate": [0.001, 0.003], "model": "mlp"}`.
Each combination is a run_dir of its own under --sweep_dir. The same command continues: complete runs are not run again.
`launch/tensorboard.sh SWEEP_DIR` compares them in its HParams tab.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import random
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

from trainers.record.run_record import NO_DIFFERENCE, write_atomically
from trainers.settings.config import Config
from trainers.settings.exit_codes import BAD_CONFIGURATION, CRASHED, OK, PREEMPTED, BadConfiguration
from trainers.settings.flags import config_from
from trainers.show.tables import table

_TRAINER = Path(__file__).resolve().parent / "custom_loop.py"
_NAMES = {field.name for field in dataclasses.fields(Config)}
# A data set or path may hold a comma of its own.
_NEVER_SWEPT = ("run_dir", "data_dir", "profile")


def values_of(flags: Sequence[str], spec: Path | None) -> dict[str, list[str]]:
    """The values of each flag, those of the command line before those of the file.

    Raises:
      BadConfiguration: a word is no flag, a flag is unknown, or the file is unusable.
    """
    found: dict[str, list[str]] = {}
    if spec is not None:
        try:
            given = json.loads(spec.read_text())
        except (OSError, ValueError) as error:
            raise BadConfiguration(f"--spec {spec} cannot be read: {error}; name a file with a JSON object") from None
        if not isinstance(given, dict):
            raise BadConfiguration(
                f'--spec {spec} holds no JSON object; write e.g. {{"learning_rate": [0.001, 0.003]}}'
            )
        for name, value in given.items():
            found[name] = [_text(one) for one in (value if isinstance(value, list) else [value])]
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            raise BadConfiguration(f"{flag!r} is not a flag; flags are written --name=value[,value…]")
        found[name] = [value] if name in _NEVER_SWEPT else value.split(",") if equals else ["true"]
    for name, values in found.items():
        if name not in _NAMES:
            raise BadConfiguration(f"--{name} is no flag of trainers/custom_loop.py; see its --help")
        if name == "run_dir":
            raise BadConfiguration("--run_dir is made for each run; name their parent with --sweep_dir")
        if not values:
            raise BadConfiguration(f"--{name} has no values; write at least one")
        if "" in values and len(values) > 1:
            raise BadConfiguration(f"--{name} {','.join(values)} has an empty value; write --{name}=a,b")
    return found


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def combinations(values: dict[str, list[str]], at_random: int, seed: int) -> list[dict[str, str]]:
    """Every combination, in order; or that many of them, drawn without repetition."""
    grid = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    if at_random and at_random < len(grid):
        places = sorted(random.Random(seed).sample(range(len(grid)), at_random))
        grid = [grid[place] for place in places]
    return grid


def name_of(combination: dict[str, str], swept: Sequence[str]) -> str:
    """A run's folder: the values of the swept flags."""
    text = "-".join(f"{name}={combination[name]}" for name in swept) or "run"
    return "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in text)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. `score`: the evaluation's metric by which the model is judged."""

    name: str
    code: int
    score: float | None
    facts: dict[str, Any]


class Sweep:
    """Runs combinations, some at a time; a signal is passed on and ends it."""

    def __init__(self, folder: Path, metric: str):
        self.folder, self.metric = folder, metric
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self._guard = threading.Lock()

    def stop(self, number: int, frame: object) -> None:
        """Ends what runs, each with a checkpoint; what has not begun does not begin."""
        self.stopped = True
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)

    def outcome(self, name: str, code: int) -> Outcome:
        """What a run_dir tells."""
        path = self.folder / name / "run.json"
        facts = json.loads(path.read_text()) if path.exists() else {}
        return Outcome(name, code, facts.get("final", {}).get("eval", {}).get(self.metric), facts)

    def run(self, name: str, flags: Sequence[str], config: Config) -> Outcome:
        """One run, unless it is complete already with these very flags: the trainer decides what others mean."""
        before = self.outcome(name, OK)
        wanted, had = dataclasses.asdict(config), before.facts.get("flags", {})
        same = all(had.get(flag) == value for flag, value in wanted.items() if flag not in NO_DIFFERENCE)
        if same and before.facts.get("exit_code") == OK and before.score is not None:
            print(f"{name}: complete already, {self.metric} {before.score:.5g}", flush=True)
            return before
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        with self._guard:
            if self.stopped:
                return Outcome(name, PREEMPTED, None, {})
            with open(self.folder / name / "log.txt", "a") as log:
                command = [sys.executable, str(_TRAINER), *flags, f"--run_dir={self.folder / name}"]
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            self.running.add(process)
        if self.stopped:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        self.running.discard(process)
        found = self.outcome(name, code)
        said = (
            f"{self.metric} {found.score:.5g}" if found.score is not None and code == OK else f"ended with code {code}"
        )
        print(f"{name}: {said}", flush=True)
        return found


def rank(outcomes: Sequence[Outcome], metric: str, largest_first: bool, swept: Sequence[str]) -> str:
    """The table, best first; runs without a score come last."""
    scored = [one for one in outcomes if one.score is not None and one.code == OK]
    ordered = sorted(scored, key=lambda one: -one.score if largest_first else one.score)
    ordered += [one for one in outcomes if one not in scored]
    rows = []
    for place, one in enumerate(ordered, 1):
        flags = one.facts.get("flags", {})
        said = f"{one.score:.5g}" if one in scored else f"code {one.code}"
        seconds = one.facts.get("seconds", {}).get("train", 0.0)
        rows.append([str(place), *(str(flags.get(name, "–")) for name in swept), said, f"{seconds:.1f} s", one.name])
    return table(["rank", *(f"--{name}" for name in swept), metric, "training", "run"], rows)


def sweep(options: argparse.Namespace, flags: Sequence[str]) -> tuple[int, str]:
    """Runs it all. Returns the exit code and the ranking."""
    values = values_of(flags, options.spec)
    grid = combinations(values, options.random, options.random_seed)
    swept = [name for name, choices in values.items() if len(choices) > 1]
    runs: dict[str, tuple[list[str], Config]] = {}
    for combination in grid:
        words = [f"--{name}={value}" for name, value in combination.items()]
        config = config_from(["sweep", *words], "")  # a wrong value is answered before anything runs
        runs[name_of(combination, swept)] = words, config
    metric, _ = config.card.quality
    folder = Path(options.sweep_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfiguration(f"--sweep_dir {folder} cannot be made: {error.strerror}; name a directory") from None
    largest_first = "bits" not in metric and "error" not in metric and metric != "loss"
    print(f"{len(runs)} runs, {options.jobs} at a time, in {folder}", flush=True)
    job = Sweep(folder, metric)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, job.stop)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(lambda item: job.run(item[0], *item[1]), runs.items()))
    text = rank(outcomes, metric, largest_first, swept)
    facts = [{"run": one.name, "code": one.code, metric: one.score} for one in outcomes]
    write_atomically(folder / "ranking.md", text + "\n")
    write_atomically(folder / "ranking.json", json.dumps(facts, indent=2) + "\n")
    if job.stopped:
        return PREEMPTED, f"{text}\nstopped; the same command continues"
    return (OK if all(one.code == OK for one in outcomes) else CRASHED), text


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and sweeps. Returns 0 if every run is complete, 1 if one failed, 143 on a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sweep_dir", default="runs/sweep", help="the runs' parent (default: runs/sweep)")
    parser.add_argument("--spec", type=Path, help="a JSON file of flags and their values")
    parser.add_argument("--random", type=int, default=0, help="this many combinations at random; 0 = all")
    parser.add_argument("--random_seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    options, flags = parser.parse_known_args(arguments)
    try:
        if options.jobs < 1 or options.random < 0:
            raise BadConfiguration(f"--jobs {options.jobs} --random {options.random}: pass 1 or more, and 0 or more")
        code, text = sweep(options, flags)
    except BadConfiguration as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
