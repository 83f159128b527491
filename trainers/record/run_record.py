"""What a run leaves behind beside its checkpoints: flags.txt, run.json, metrics.jsonl, and the lock of run_dir.

Everything is written aside and renamed, or appended a whole line at a time, so a reader never sees half of it.
"""

import datetime
import errno
import platform
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from trainers.record import carriers, goodput, reading
from trainers.record.clock import Clock
from trainers.settings import options, paths
from trainers.settings.config import Config
from trainers.settings.exit_codes import CRASHED, NEVER_RETRIED, BadConfiguration, RunDirRemoved, RunEnded, StoreLost
from trainers.world import files, locks, machine, process

_LOCK = ".lock"
# In run.json: how the last attempt has ended.
ENDED = ("exit_code", "exit_reason")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class RunRecord:
    """The files of a run. Opening it takes run_dir for this process; `close` gives it back.

    `writes`: false for a worker that is not the chief. It reads what the chief writes, and writes nothing here. `feed`:
    told what is waited for at the end of a run in an object store. `clock`: that of a run whose goodput is told.

    Raises:
      BadConfiguration: run_dir is a file, cannot be written, is in use, or was begun with other fixed flags.
    """

    def __init__(
        self,
        config: Config,
        writes: bool = True,
        feed: Callable[[str], None] = lambda what: None,
        clock: Clock | None = None,
    ):
        self.config, self.directory, self.writes, self._feed = config, Path(config.run_dir), writes, feed
        # Whether it lies in an object store, and how it is shown.
        self.carried, self.shown = carriers.of(self.directory) is not None, carriers.shown(self.directory)
        self.metrics_path = self.directory / reading.METRICS
        self.facts: dict[str, Any] = {}
        self._lock = None
        self.begun, self.previous = False, {}
        # The last line of each split that this process has written.
        self.latest: dict[str, Mapping[str, Any]] = {}
        self.goodput = goodput.Goodput(clock) if clock else None
        if not writes:
            return
        self._open_directory()
        self.previous = reading.read_run(self.directory)
        self._check_same_run()
        options.warn_of_changes(self.previous.get(reading.SOURCES, {}), config.chosen, f"--run_dir {self.shown}")
        self.facts = {
            "started": self.previous.get("started", _now()),
            "ended": None,
            "exit_reason": None,
            "attempts": self.previous.get("attempts", 0) + 1,
            "loop": config.loop,
            "flags": config.values() | {"run_dir": self.shown},
            paths.DATASET_PATH: paths.location(config.dataset),
            reading.SOURCES: options.sources_of(config.chosen),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "host": platform.node(),
            **{name: self.previous[name] for name in ("initial", "rewinds", "accumulate") if name in self.previous},
        }
        if self.goodput:
            self.goodput.earlier = goodput.attempts_of(
                self.previous, reading.told_by(self.directory, 0), reading.read_hang(self.directory)
            )

    def _open_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / _LOCK, "a+")  # noqa: SIM115 - held for the life of the run
        except (FileExistsError, NotADirectoryError):
            raise BadConfiguration(f"--run_dir {self.directory} {paths.why_no_directory(self.directory)}") from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise BadConfiguration(
                f"--run_dir {self.directory} cannot be written: {error.strerror}; name one that can"
            ) from None
        try:
            without = locks.hold(self._lock, wait=False)
        except BlockingIOError:
            raise BadConfiguration(
                f"--run_dir {self.directory} is in use by another run; wait for it, end it, or name another directory"
            ) from None
        if without:
            logging.warning(
                "--run_dir %s cannot be locked (%s): see to it that no other run writes there", self.directory, without
            )

    def _check_same_run(self) -> None:
        """A run_dir belongs to one run: flags that decide the mathematics must be what they were."""
        if not reading.is_bound(self.previous, self.directory):
            return
        before = reading.begun_as(self.previous, type(self.config))
        for name, now in paths.identity(self.config).items():
            if not paths.differs(before, name, now):
                continue
            if name == "loop":
                raise BadConfiguration(
                    f"--run_dir {self.shown} was begun by the loop {before[name]!r}, and this is {now!r}; start "
                    "that loop's script, or name another --run_dir"
                )
            raise BadConfiguration(
                f"--{name} {now} differs from {before[name]}, with which --run_dir {self.shown} was begun; pass "
                "that, or name another --run_dir"
            )

    def is_gone(self) -> bool:
        """Whether somebody has removed run_dir: neither the file that this process has locked is there nor run.json."""
        return self.writes and not any((self.directory / name).exists() for name in (_LOCK, reading.RUN))

    def check_there(self) -> None:
        """Raises RunDirRemoved if run_dir is gone, StoreLost if its address in an object store is another run's."""
        if self.writes:
            carriers.check(self.directory)
        if self.is_gone():
            raise RunDirRemoved(f"--run_dir {self.directory} was removed while the run wrote to it")

    def make_again(self) -> None:
        """Makes a run_dir that was removed, with flags.txt and run.json. Raises as opening it does."""
        self._lock.close()
        self._open_directory()
        self.begin()

    def leave_goodput(self) -> None:
        """This attempt has nothing to do: the goodput is what it was."""
        self.goodput = None
        if goodput.FACT in self.previous:
            self.facts[goodput.FACT] = self.previous[goodput.FACT]

    def begin(self) -> None:
        """Writes flags.txt and the first run.json."""
        if self.writes:
            files.write_text(
                self.directory / "flags.txt", "\n".join(self.config.flag_lines(self.config.names("repeated"))) + "\n"
            )
            self.write()
        self.begun = True

    def card(self) -> dict[str, Any]:
        """What a person wants to know of a run first."""
        names = ("started", "host", "commit", "devices", "replicas", "parameters", "flops_per_step", "resumed_from")
        names += ("data_fingerprint",)
        card = {name: self.facts[name] for name in names if self.facts.get(name) is not None}
        flags = {f"--{name}": value for name, value in self.facts["flags"].items() if value is not None}
        return card | self.facts["versions"] | flags

    def write(self, **facts: Any) -> None:
        """Adds facts to run.json and writes it."""
        self.facts.update(facts)
        if self.writes:
            self.check_there()
            if self.goodput:
                code, reason = (self.facts[name] if self.facts["ended"] else None for name in ENDED)
                self.facts[goodput.FACT] = self.goodput.facts(code, reason)
            files.write_text(self.directory / reading.RUN, files.to_json(self.facts, indent=2) + "\n")

    def tell_goodput(self) -> None:
        """Prints what the time of all attempts went into."""
        if self.goodput and self.writes and goodput.FACT in self.facts:
            process.say(goodput.line(self.facts[goodput.FACT]))

    def end_by(self, error: BaseException, seconds: Mapping[str, float], more: str = "") -> None:
        """Completes run.json, if it can be written, for the error that ends the run. `more`: behind its words.

        Raises:
          StoreLost: it cannot be brought to the store, and the error is one after which the run is started again.
        """
        code = error.exit_code if isinstance(error, RunEnded) else CRASHED
        try:
            self.end(code, f"{type(error).__name__}: {error}{more}", seconds=seconds)
            self.tell_goodput()
        except (OSError, BadConfiguration):
            pass
        except StoreLost as lost:
            if isinstance(error, RunEnded) and code not in NEVER_RETRIED:
                raise lost from error
            logging.warning("%s", lost)

    def end(self, exit_code: int, reason: str, feed: Callable[[str], None] | None = None, **facts: Any) -> None:
        """Completes run.json. Of a run in an object store, returns when all of the run is there.

        `feed`: in place of the record's own.

        Raises:
          StoreLost: it cannot be brought there.
        """
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.write(
            ended=_now(), exit_code=exit_code, exit_reason=reason, peak_resident_mib=usage.ru_maxrss // 1024, **facts
        )
        if self.writes:
            carriers.settle(self.directory, feed or self._feed)

    def close(self) -> None:
        """Gives run_dir back."""
        if self._lock:
            self._lock.close()

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines to metrics.jsonl."""
        if not self.writes:
            return
        self.check_there()
        self.latest = self.latest | {line["split"]: line for line in lines if "split" in line}
        with open(self.metrics_path, "a") as file:
            file.write("".join(files.to_json(line) + "\n" for line in lines))

    def sync_metrics(self) -> None:
        """Brings metrics.jsonl to the disk, before a checkpoint covers its lines."""
        if self.writes and self.metrics_path.exists():
            files.sync(self.metrics_path)

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines after a step: the resumed run writes them again."""
        if self.writes and self.metrics_path.exists():
            kept = [line for line in reading.metric_lines(self.directory) if line["step"] <= step]
            files.write_text(self.metrics_path, "".join(files.to_json(line) + "\n" for line in kept))

    def last(self, split: str) -> dict[str, Any]:
        """The last line of a split, or an empty one."""
        return reading.last_line(self.directory, split)
