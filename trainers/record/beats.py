"""What each worker is doing, in a file of its own that it writes again each second: `run_dir/workers/worker-N.json`.

A thread writes it, so that nothing waits for it. It is written aside and renamed, but not brought to the disk: it is
for those who look, and for the attempt that follows one that was killed. Where a worker is about to end since nothing
moves, all write the stacks of their threads beside it.
"""

import contextlib
import faulthandler
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from trainers.record import fleet, reading
from trainers.record.goodput import FACT
from trainers.record.run_record import RunRecord
from trainers.world import files, host, process
from trainers.world.watchdog import Watchdog

# Seconds between two of a worker; with many workers, as many more as one file system can take.
BEAT_SECONDS = 1.0
_WORKERS_A_SECOND = 50
# Seconds between two looks at the machine, at the GPUs, and at who is slow.
_HOST_SECONDS, _GPU_SECONDS, _FLEET_SECONDS = 5.0, 30.0, 5.0
# How long who is about to end waits for the stacks of the others. It has ten seconds in all.
_STACKS_SECONDS = 5.0
# Of a demand for stacks: a later one is another.
_SAME_HANG_SECONDS = 120.0


class Beats:
    """Context in which a worker tells what it is doing, from the moment that the run has begun (`RunRecord.begin`).

    `sums`: tells how many sums over workers this one has come to, and how many it has left.
    """

    def __init__(
        self,
        record: RunRecord,
        watchdog: Watchdog,
        worker: int,
        workers: int,
        sums: Callable[[], tuple[int, int]] | None = None,
    ):
        self.record, self.watchdog, self.worker, self.workers, self.sums = record, watchdog, worker, workers, sums
        self.directory = record.directory / reading.WORKERS
        self.path = reading.worker_file(record.directory, worker)
        # In a store each worker has a folder of its own, where it does not see what the others tell.
        self.sees_others = workers > 1 and not record.carried
        self.seconds = max(BEAT_SECONDS, workers / _WORKERS_A_SECOND)
        self.ear = fleet.Ear()
        # When demands for stacks were seen first, by their id; the one for which this worker has written its own.
        self._demands: dict[str, float] = {}
        self._old = self._seen = self._hang().get("id")
        self._written: str | None = None
        self._machine: dict[str, Any] = {}
        self._looked: dict[str, float] = {}
        self._slow: int | None = None
        self._stop, self._one = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name="beats", daemon=True)
        # One of its own: a driver that does not answer must not make a worker seem silent.
        self._looking = threading.Thread(target=self._look, name="machine", daemon=True)

    def _is_time(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._looked.get(what, -1e9) < seconds:
            return False
        self._looked[what] = now
        return True

    def facts(self) -> dict[str, Any]:
        """What is told."""
        doing, since = self.watchdog.doing
        facts = {
            "worker": self.worker,
            "workers": self.workers,
            "host": platform.node(),
            "pid": os.getpid(),
            "processes": host.processes(),
            "time": round(time.time(), 3),
            "every": self.seconds,
            "doing": doing,
            "for_seconds": round(since, 3),
            "met": self.watchdog.met,
            "meeting": self.watchdog.meeting,
        }
        if self._written:
            facts["stacks"] = self._written
        if self.sums:
            facts["sums"] = self.sums()
        goodput = self.record.goodput
        if goodput and (pace := goodput.pace(fleet.STEPS, fleet.SECONDS)):
            facts["pace"] = pace
        if goodput and self.record.writes:
            facts |= {"attempt": self.record.facts["attempts"], FACT: goodput.entry()}
        return facts | self._machine

    def _look(self) -> None:
        """At the machine and its GPUs, now and then. What does not tell any more is not told any more."""
        known: dict[str, Any] = {}
        pause = 0.0
        while not self._stop.wait(pause):
            pause = _HOST_SECONDS
            with contextlib.suppress(Exception):
                facts = host.facts()
                self._machine = facts | known
                if self._is_time("gpus", _GPU_SECONDS):
                    known = {"gpus": gpus} if (gpus := host.gpus()) else {}
                    self._machine = facts | known

    def beat(self) -> None:
        """Writes it now. A folder that is not there is not made again, and what cannot be written is left."""
        with self._one, contextlib.suppress(OSError):
            if self.record.begun and self.record.directory.is_dir():
                self.directory.mkdir(exist_ok=True)
                self._write(self.path.name, files.to_json(self.facts()) + "\n")

    def _write(self, name: str, text: str) -> None:
        aside = self.directory / f".{name}.{self.worker}"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, self.directory / name)

    def _work(self) -> None:
        while not self._stop.wait(BEAT_SECONDS if self.record.begun else 0.05):
            if not self.record.begun:
                continue
            with contextlib.suppress(Exception):  # nobody trains worse for what only shows
                if self._is_time("beat", self.seconds * 0.9):
                    self.beat()
                if self.sees_others and self._listens() and self._is_time("fleet", _FLEET_SECONDS):
                    self._tell_slow()
                if self.sees_others and self._hang().get("id") not in (None, self._seen):
                    self._seen = self._hang().get("id")
                    self.write_stacks(self._seen)

    def _listens(self) -> bool:
        """The chief always; with many workers all others would be many readers, so they do when it may be the end."""
        allowed = self.watchdog.seconds
        return self.record.writes or (allowed > 0 and self.watchdog.doing[1] > allowed / 2)

    def _tell_slow(self) -> None:
        """Hears of all. The chief says it once when a worker has become slower than the others."""
        told = [one for one in fleet.told_by_all(self.record.directory, self.ear) if one["worker"] < self.workers]
        if not self.record.writes:
            return
        number, line = fleet.straggler([one for one in told if not fleet.state_of(one)]) or (None, "")
        if line and number != self._slow:
            process.say(line)
        self._slow = number

    # Before the end with code 75 --------------------------------------------------------------------------------

    def _hang(self) -> dict[str, Any]:
        hang = reading.read_hang(self.record.directory)
        if hang.get("id"):
            self._demands.setdefault(hang["id"], time.monotonic())
        return hang

    def write_stacks(self, demand: str | None = None) -> None:
        """Writes where all threads of this worker are, and tells that it has, and once more what it is doing."""
        if not (self.record.begun and self.record.directory.is_dir()):
            return
        self.beat()
        place = reading.stacks_file(self.record.directory, self.worker)
        aside = place.with_name(f".{place.name}")
        told = self.facts()
        with open(aside, "w", encoding="utf-8") as file:
            file.write(f"worker {self.worker} ({told['host']}, process {told['pid']}): {fleet.place(told)}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        os.replace(aside, place)
        self._written = demand or self._written
        self.beat()

    def _demand(self, reason: str) -> str:
        """Has all workers write their stacks. Returns the demand's id: of this one, or of one that is there."""
        known = self._hang()
        if self._is_new(known):
            return known["id"]
        asked = {"id": secrets.token_hex(8), "time": time.time(), "worker": self.worker, "reason": reason}
        # The attempt, as the chief tells it: who reads it later must not compare clocks.
        asked |= {"attempt": reading.told_by(self.record.directory, 0).get("attempt")}
        self._seen = asked["id"]
        self._write(reading.HANG, files.to_json(asked) + "\n")
        return asked["id"]

    def _is_new(self, hang: Mapping[str, Any]) -> bool:
        """Whether a demand is of this attempt, and of now."""
        seen = self._demands.get(hang.get("id"), -1e9)
        return hang.get("id") not in (None, self._old) and time.monotonic() - seen < _SAME_HANG_SECONDS

    def _have_written(self, demand: str) -> bool:
        """Whether all workers that can have written their stacks."""
        told = {one["worker"]: one for one in fleet.told_by_all(self.record.directory, self.ear)}
        wrote = {number for number, one in told.items() if one.get("stacks") == demand or fleet.state_of(one)}
        return wrote >= set(range(self.workers))

    def before_end(self, reason: str, others: bool = True) -> str:
        """Stacks of all threads, of `others` too, in run_dir. Says, and returns, which worker did not come."""
        if not (self.record.begun and self.record.directory.is_dir()):
            return ""
        demand, began = self._demand(reason) if others else None, time.monotonic()
        self.write_stacks(demand)
        if not self.sees_others:
            return ""
        while demand and not self._have_written(demand) and time.monotonic() - began < _STACKS_SECONDS:
            time.sleep(0.1)
        # Who has found it first has ended perhaps by now.
        found = self._hang().get("line") if self._is_new(self._hang()) else None
        line = found or fleet.who_did_not_come(self.record.directory, self.workers, self.ear)
        if line:
            process.say(line)
            if others and not found:
                self._write(reading.HANG, files.to_json(self._hang() | {"line": line}) + "\n")
        return line

    def _witness(self) -> None:
        self.before_end(f"nothing has moved in: {self.watchdog.doing[0]}")

    def __enter__(self) -> "Beats":
        self.watchdog.witness = self._witness
        self._thread.start()
        self._looking.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.watchdog.witness = None
        self._stop.set()
        self._thread.join(timeout=10 * BEAT_SECONDS)
        self.beat()
