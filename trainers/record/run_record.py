"""What a run leaves behind beside its checkpoints: flags.txt, run.json, metrics.jsonl, and the lock of run_dir.

Everything is written aside and renamed, or appended a whole line at a time, so a reader never sees half of it.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from trainers.settings.config import FIXED, Config
from trainers.settings.exit_codes import NEVER_RETRIED, OK, BadConfiguration, PeerLost

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "tensorboard", "numpy", "absl-py")
# Where a run lies and how it ends do not repeat it; everything else does.
_NOT_REPEATED = ("mode", "run_dir", "resume", "dry_run")
# And neither these nor where its data lies make one run differ from another.
NO_DIFFERENCE = (*_NOT_REPEATED, "data_dir")
# In an evaluator's environment: a time, before which an end of the run does not count: it was submitted again since.
RUN_AFTER = "RUN_AFTER"


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file aside, to the disk, and renames it: a reader sees the old text or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON; empty if there is no such file. Raises ValueError and OSError."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def has_ended(facts: Mapping[str, Any], after: str = "") -> bool:
    """Whether a run's run.json says that it has ended for good: by nothing after which it is to be started again.

    `after`: a time as run.json has it; an end before it does not count, for the run has been started again.
    """
    return (facts.get("ended") or "") > after and facts.get("exit_code") in (OK, *NEVER_RETRIED)


def completed(config: Config) -> dict[str, Any]:
    """The run.json of `--run_dir`, if its run is complete and `config` asks for nothing more of it; else empty."""
    directory = Path(config.run_dir)
    try:
        facts = read_json(directory / "run.json")
    except (ValueError, OSError):
        return {}
    flags = facts.get("flags", {})
    same = all(name in flags and flags[name] == getattr(config, name) for name in FIXED)
    done = facts.get("exit_code") == OK and facts.get("step", 0) >= config.train_steps
    exported = not config.export or (directory / "export").exists()
    return facts if same and done and exported and config.resume == "auto" else {}


def config_of_run(config: Config, given: Collection[str]) -> Config:
    """For a process that follows a run: `config` with the run's own values, once there is a run to follow.

    `given`: names of the flags that the user has given.

    Raises:
      BadConfiguration: one of them decides the mathematics, and is not the run's.
      PeerLost: no run began in `--run_dir` within `--startup_timeout`.
    """
    if not config.run_dir:
        raise BadConfiguration("--mode=evaluate needs --run_dir, the run that it is to follow; name it")
    path, began = Path(config.run_dir).expanduser() / "run.json", time.monotonic()
    while not (facts := _read_record(path)):
        if time.monotonic() - began > config.startup_timeout:
            raise PeerLost(f"no run began in --run_dir {config.run_dir} within --startup_timeout; start it again later")
        time.sleep(0.2)
    flags = {name: facts["flags"][name] for name in (*FIXED, "train_steps")}
    for name in given:
        if name in flags and flags[name] != getattr(config, name):
            raise BadConfiguration(
                f"--{name} {getattr(config, name)} differs from {flags[name]} of --run_dir {config.run_dir}; "
                "leave it out: --mode=evaluate takes the run's own"
            )
    if "data_dir" not in given:
        flags["data_dir"] = facts["flags"]["data_dir"]
    return dataclasses.replace(config, **flags)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (ValueError, OSError) as error:
        raise BadConfiguration(f"{path} cannot be read: {error}; move it away or name another --run_dir") from None


class Clock:
    """Seconds by phase. A phase inside another counts for the inner one alone."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.monotonic()

    def _settle(self) -> None:
        now = time.monotonic()
        if self._open:
            self.add(self._open[-1], now - self._since)
        self._since = now

    def add(self, phase: str, seconds: float) -> None:
        """Counts seconds measured elsewhere."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def move(self, phase: str, other: str, seconds: float) -> None:
        """Counts seconds of one phase for another."""
        self.add(phase, -seconds)
        self.add(other, seconds)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of a block for phase `name`."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()


class Shares:
    """What the wall time went into since the last question, as shares of 1.

    `input`: waiting for the next batch; `compute`: the compiled calls, without that; `evaluate`; `checkpoint`: what a
    save keeps training waiting; `python`: the rest.
    """

    PARTS = {"input": "input_wait", "compute": "train", "evaluate": "evaluate", "checkpoint": "checkpoint"}

    def __init__(self, clock: Clock):
        self._clock = clock
        self._began, self._before = time.monotonic(), dict(clock.seconds)

    def take(self) -> dict[str, float]:
        """The shares, `share_<part>`; begins anew."""
        now, seconds = time.monotonic(), self._clock.seconds
        wall = max(now - self._began, 1e-9)
        parts = {
            f"share_{part}": (seconds.get(phase, 0.0) - self._before.get(phase, 0.0)) / wall
            for part, phase in self.PARTS.items()
        }
        self._began, self._before = now, dict(seconds)
        return parts | {"share_python": max(1.0 - sum(parts.values()), 0.0)}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit of the checkout, with `-dirty` if it has changes; an image carries it in the file COMMIT."""
    with contextlib.suppress(OSError):
        return (_ROOT / "COMMIT").read_text().strip()
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.strip()
    return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class RunRecord:
    """The files of one run. Opening it takes run_dir for this process; `close` gives it back.

    Raises:
      BadConfiguration: run_dir is a file, cannot be written, is in use, or was begun with other fixed flags.
    """

    def __init__(self, config: Config):
        self.config, self.directory = config, Path(config.run_dir)
        self.metrics_path = self.directory / "metrics.jsonl"
        self._lock = None
        self._open_directory()
        self.previous = self._read_previous()
        self._check_same_run()
        self.facts: dict[str, Any] = {
            "started": self.previous.get("started", _now()),
            "ended": None,
            "exit_reason": None,
            "attempts": self.previous.get("attempts", 0) + 1,
            "flags": dataclasses.asdict(config),
            "versions": versions(),
            "commit": _commit(),
            "host": platform.node(),
        }

    def _open_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / ".lock", "a+")  # noqa: SIM115 - held for the life of the run
        except (FileExistsError, NotADirectoryError):
            raise BadConfiguration(f"--run_dir {self.directory} is, or lies under, a file; name a directory") from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise BadConfiguration(
                f"--run_dir {self.directory} cannot be written: {error.strerror}; name one that can"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadConfiguration(
                f"--run_dir {self.directory} is in use by another run; wait for it, end it, or name another directory"
            ) from None
        except OSError:
            pass  # a file system without locks: nothing to hold

    def _read_previous(self) -> dict[str, Any]:
        return _read_record(self.directory / "run.json")

    def _check_same_run(self) -> None:
        """A run_dir belongs to one run: flags that decide the mathematics must be what they were."""
        before = self.previous.get("flags", {})
        for name in FIXED:
            if name in before and before[name] != getattr(self.config, name):
                raise BadConfiguration(
                    f"--{name} {getattr(self.config, name)} differs from {before[name]}, with which --run_dir "
                    f"{self.directory} was begun; pass that, or name another --run_dir"
                )

    def begin(self) -> None:
        """Writes flags.txt and the first run.json."""
        names = [f.name for f in dataclasses.fields(Config) if f.name not in _NOT_REPEATED]
        write_atomically(self.directory / "flags.txt", "\n".join(self.config.flag_lines(names)) + "\n")
        self.write()

    def card(self) -> dict[str, Any]:
        """What a person wants to know of a run first."""
        names = ("started", "host", "commit", "devices", "replicas", "parameters", "flops_per_step", "resumed_from")
        names += ("data_fingerprint",)
        card = {name: self.facts[name] for name in names if self.facts.get(name) is not None}
        return card | self.facts["versions"] | {f"--{name}": value for name, value in self.facts["flags"].items()}

    def write(self, **facts: Any) -> None:
        """Adds facts to run.json and writes it."""
        self.facts.update(facts)
        write_atomically(self.directory / "run.json", json.dumps(self.facts, indent=2, allow_nan=True) + "\n")

    def end(self, exit_code: int, reason: str, **facts: Any) -> None:
        """Completes run.json."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.write(
            ended=_now(), exit_code=exit_code, exit_reason=reason, peak_resident_mib=usage.ru_maxrss // 1024, **facts
        )

    def close(self) -> None:
        """Lets go of run_dir."""
        self._lock.close()

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines to metrics.jsonl."""
        with open(self.metrics_path, "a") as file:
            file.write("".join(json.dumps(dict(line)) + "\n" for line in lines))

    def sync_metrics(self) -> None:
        """Brings metrics.jsonl to the disk, before a checkpoint covers its lines."""
        with contextlib.suppress(FileNotFoundError), open(self.metrics_path, "a") as file:
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a killed process left unfinished is left out."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.metrics_path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
        return lines

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines after a step: the resumed run writes them again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        if kept or self.metrics_path.exists():
            write_atomically(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))

    def last(self, split: str) -> dict[str, Any]:
        """The last line of a split, or an empty one."""
        return next((line for line in reversed(self.metrics()) if line["split"] == split), {})


class Observer(RunRecord):
    """The record of a worker that is not the chief: it reads what users read, and writes nothing."""

    def __init__(self, config: Config):
        self.config, self.directory, self.facts = config, Path(config.run_dir), {}
        self.metrics_path = self.directory / "metrics.jsonl"

    def begin(self) -> None:
        """Writes nothing."""

    def write(self, **facts: Any) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Holds nothing."""

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes nothing."""

    def sync_metrics(self) -> None:
        """Writes nothing."""

    def rewind_metrics(self, step: int) -> None:
        """Writes nothing."""
