"""The one reader of what a run leaves: run.json, metrics.jsonl, and which checkpoints there are. Free of TensorFlow."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainers.record import carriers
from trainers.settings import paths
from trainers.settings.config import EPOCHS, Config
from trainers.settings.exit_codes import BAD_CONFIGURATION, NEVER_RETRIED, OK, BadConfiguration, PeerLost

RUN = "run.json"
METRICS = "metrics.jsonl"
TRACKER = "tracker.json"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
EXPORT = "export"
METADATA = "metadata.json"
# What each worker writes while it goes on.
WORKERS = "workers"
# In it: that all are to write the stacks of their threads, and what came of it.
HANG = "hang.json"
# In run.json: the files of what the user has brought, by the kind of what they define.
SOURCES = "sources"
# In an evaluator's environment: a time. An end of the run before it does not count, since it was submitted again.
RUN_AFTER = "RUN_AFTER"
# Of metrics.jsonl, where a last line is looked for first.
_TAIL_BYTES = 1 << 16
_STEP_FOLDER = re.compile(r"step-(\d{10})$")


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON; empty if there is no such file. Raises ValueError and OSError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def read_run(run_dir: Path) -> dict[str, Any]:
    """A run's run.json; empty if it has none.

    Raises:
      BadConfiguration: it cannot be read.
    """
    carriers.refresh(run_dir)
    path = run_dir / RUN
    try:
        return read_json(path)
    except (ValueError, OSError) as error:
        raise BadConfiguration(f"{path} cannot be read: {error}; move it away or name another --run_dir") from None


def run_at(place: str) -> dict[str, Any]:
    """As `read_run`, of a path or an address. Raises StoreLost too."""
    return carriers.facts(place) if paths.is_address(place) else read_run(Path(place))


def worker_file(run_dir: Path, worker: int) -> Path:
    """Where a worker tells what it is doing, see `trainers.record.beats`."""
    return run_dir / WORKERS / f"worker-{worker}.json"


def stacks_file(run_dir: Path, worker: int) -> Path:
    """Where a worker writes the stacks of its threads before it ends with code 75."""
    return run_dir / WORKERS / f"stacks-{worker}.txt"


def read_hang(run_dir: Path) -> dict[str, Any]:
    """What the workers have found when nothing moved, see `trainers.record.beats`; empty where nothing can be read."""
    with contextlib.suppress(ValueError, OSError):
        return read_json(run_dir / WORKERS / HANG)
    return {}


def told_by(run_dir: Path, worker: int) -> dict[str, Any]:
    """What a worker has told last; empty where it has told nothing that can be read."""
    with contextlib.suppress(ValueError, OSError):
        return read_json(worker_file(run_dir, worker))
    return {}


def numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics as it was measured: what is not finite is null in JSON, and not a number here."""
    return {name: math.nan if value is None else value for name, value in line.items()}


def begun_as(facts: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    """The flags and the identity that a run.json names, as `trainers.settings.paths.differs` takes them.

    `kind`: the class of the configuration that it is compared with.
    """
    more = {name: facts[name] for name in ("loop", paths.DATASET_PATH) if name in facts}
    return paths.completed(dict(facts.get("flags", {})) | more, kind)


def begun_with(config: Config) -> dict[str, Any]:
    """The flags of the run that `--run_dir` holds; empty if it holds none that can be read."""
    if not config.run_dir:
        return {}
    place = paths.place("--run_dir", config.run_dir)
    if paths.is_address(place):
        return begun_as(carriers.facts(place), type(config))
    with contextlib.suppress(ValueError, OSError):
        return begun_as(read_json(Path(place) / RUN), type(config))
    return {}


def is_bound(facts: Mapping[str, Any], run_dir: Path) -> bool:
    """Whether what a run.json says binds whoever goes on in its run_dir.

    A run that ended before its first step, for a flag perhaps that is another now, binds nobody.
    """
    begun = (run_dir / METRICS).exists() or checkpoint_steps(run_dir)
    return bool(facts) and (begun or facts.get("exit_code") != BAD_CONFIGURATION)


def found_with(config: Config, name: str) -> Any:
    """What the run in `--run_dir` has for a flag of `trainers.settings.config.FOUND`; None if there is none.

    A run.json may be lost. Checkpoints have it too.
    """
    if paths.is_address(config.run_dir):  # of a dry run; any other works in a folder
        return carriers.facts(config.run_dir).get("flags", {}).get(name)
    run_dir = paths.local("--run_dir", config.run_dir)
    with contextlib.suppress(ValueError, OSError):
        facts = read_json(run_dir / RUN)
        if facts:
            return facts.get("flags", {}).get(name) if is_bound(facts, run_dir) else None
    for step in reversed(checkpoint_steps(run_dir)):
        with contextlib.suppress(ValueError, OSError, KeyError):
            return manifest(run_dir, step)["identity"].get(name)
    return None


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. One that a killed process left unfinished is left out."""
    carriers.refresh(run_dir)
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(numbers(json.loads(line)))
    return lines


def last_line(run_dir: Path, split: str) -> dict[str, Any]:
    """The last line of a split, or an empty one. Of a long file the end alone is read."""
    size = _TAIL_BYTES
    while True:
        lines, whole = _tail(run_dir, size)
        for text in reversed(lines):
            with contextlib.suppress(ValueError):
                line = numbers(json.loads(text))
                if line["split"] == split:
                    return line
        if whole:
            return {}
        size *= 8


def _tail(run_dir: Path, size: int) -> tuple[list[str], bool]:
    """The whole lines in the last so many bytes of metrics.jsonl, and whether that is all of it."""
    try:
        with open(run_dir / METRICS, "rb") as file:
            begin = max(file.seek(0, os.SEEK_END) - size, 0)
            file.seek(begin)
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return [], True
    return lines[1:] if begin else lines, not begin


def is_timing(metric: str) -> bool:
    """Whether a name in metrics.jsonl stands for something that a clock decides."""
    return metric.endswith(("per_second", "utilization")) or metric.startswith("share_")


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where a step's checkpoint lies."""
    return run_dir / CHECKPOINTS / f"step-{step:010d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None if the name is not that of one."""
    match = _STEP_FOLDER.match(name)
    return int(match[1]) if match else None


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints on disk, oldest first. Their contents are not verified."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    steps = (step_of(path.name) for path in folder.iterdir())
    return sorted(step for step in steps if step is not None)


def has_checkpoint(run_dir: Path, step: int) -> bool:
    """Whether a step's checkpoint is there; it is not verified.

    A shared file system may show a folder as it was a minute ago, but not a file that is opened.
    """
    manifest_path = checkpoint_folder(run_dir, step) / MANIFEST
    if not manifest_path.exists():
        carriers.refresh(run_dir, at_once=True)
    return manifest_path.exists()


def manifest(run_dir: Path, step: int) -> dict[str, Any]:
    """The manifest of a step's checkpoint. Raises OSError and ValueError."""
    return json.loads((checkpoint_folder(run_dir, step) / MANIFEST).read_text(encoding="utf-8"))


def has_ended(facts: Mapping[str, Any], after: str = "") -> bool:
    """Whether run.json says that the run has ended for good: with a code after which it is not started again.

    `after`: a time as run.json has it. An end before it does not count, since the run was started again.
    """
    return (facts.get("ended") or "") > after and facts.get("exit_code") in (OK, *NEVER_RETRIED)


def completed(config: Config) -> dict[str, Any]:
    """The run.json of `--run_dir` if its run is complete and `config` asks for nothing more of it; else empty."""
    directory = Path(config.run_dir)
    carriers.refresh(directory, at_once=True)
    try:
        facts = read_json(directory / RUN)
    except (ValueError, OSError):
        return {}
    before, flags = begun_as(facts, type(config)), facts.get("flags", {})
    # Steps that epochs stand for are known to the run alone.
    unknown = {one: epochs for one, epochs in EPOCHS.items() if getattr(config, one) is None}
    equal = [one for one, each in unknown.items() if one in flags and flags.get(each) == getattr(config, each)]
    config = dataclasses.replace(config, **{one: flags[one] for one in equal})
    same = bool(before) and not any(paths.differs(before, *part) for part in paths.identity(config).items())
    done = facts.get("exit_code") == OK and facts.get("step", 0) >= (config.train_steps or math.inf)
    exported = not config.export or is_exported(directory, config.export, facts.get("step", 0))
    return facts if same and done and exported and config.resume == "auto" else {}


def is_exported(run_dir: Path, formats: str, step: int) -> bool:
    """Whether a run has written what `--export` names, of a step. A file, somebody's own loop wrote."""
    folder = run_dir / EXPORT
    if folder.is_file():
        return True
    try:
        facts = read_json(folder / METADATA)
    except (ValueError, OSError):
        return False
    return facts.get("step") == step and set(formats.split(",")) <= set(facts.get("formats", ()))


def dataset_of(before: Mapping[str, Any]) -> str:
    """The data set of a record of `begun_as`, as this process finds it.

    The run may have begun in another directory, to which its path is relative.
    """
    name, where = before.get("dataset", Config.dataset), before.get(paths.DATASET_PATH)
    if where and where != paths.location(name) and os.path.exists(where):
        return f"{name.partition(':')[0]}:{where}"
    return name


def config_of_run(config: Config, given: Collection[str]) -> Config:
    """`config` with the values of the run that `--run_dir` holds, for a process that follows it. Waits for the run.

    `given`: names of the flags that the user has given.

    Raises:
      BadConfiguration: one of them decides the mathematics, and is not the run's; or the run names an object
        `module:object`, and they do not.
      PeerLost: no run began in `--run_dir` within `--startup_timeout`.
    """
    if not config.run_dir:
        raise BadConfiguration("--mode=evaluate needs --run_dir, the run that it follows; name it")
    run_dir, began = paths.place("--run_dir", config.run_dir), time.monotonic()
    while not (facts := run_at(run_dir)):
        if time.monotonic() - began > config.startup_timeout:
            raise PeerLost(f"no run began in --run_dir {config.run_dir} within --startup_timeout; start it again later")
        time.sleep(2.0 if paths.is_address(run_dir) else 0.2)
    before = begun_as(facts, type(config))
    if before["loop"] != config.loop:
        raise BadConfiguration(
            f"--run_dir {config.run_dir} was begun by the loop {before['loop']!r}, and this is {config.loop!r}; start "
            "that loop's script"
        )
    flags = {name: before.get(name, getattr(config, name)) for name in (*config.names("fixed"), "train_steps")}
    for name in given:
        if name in flags and paths.differs(before, name, getattr(config, name)):
            raise BadConfiguration(
                f"--{name} {getattr(config, name)} differs from {flags[name]} of --run_dir {config.run_dir}; "
                "leave it out: --mode=evaluate takes the run's own"
            )
    if "dataset" in given:
        flags["dataset"] = config.dataset  # as it is written for this place
    elif before.get(paths.DATASET_PATH):
        flags["dataset"] = dataset_of(before)
    if "data_dir" not in given:
        flags["data_dir"] = before["data_dir"]
    followed = dataclasses.replace(config, **flags)
    _check_named(followed, given)
    return followed


def _check_named(config: Config, given: Collection[str]) -> None:
    """A run.json may be anybody's: what it alone names is not imported. `given`: flags of the command line."""
    if missing := [flag for flag in config.own_objects if flag not in given]:
        words = " ".join(map(shlex.quote, config.flag_lines(missing)))
        raise BadConfiguration(
            f"--run_dir {config.run_dir} names code of its own, which is imported from a command line alone; if you "
            f"trust it, add {' '.join(words.split())}"
        )
