"""What each worker is doing, in a file of its own that it writes again each second: `run_dir/workers/worker-N.json`.

A thread writes it, so that nothing waits for it. It is written aside and renamed, but not brought to the disk: it is
for those who look, and for the attempt that follows one that was killed.
"""

import contextlib
import os
import platform
import threading
import time
from typing import Any

from trainers.record import reading
from trainers.record.goodput import FACT
from trainers.record.run_record import RunRecord
from trainers.world import files
from trainers.world.watchdog import Watchdog

# Seconds between two of a worker; with many workers, as many more as one file system can take.
BEAT_SECONDS = 1.0
_WORKERS_A_SECOND = 50


class Beats:
    """Context in which a worker tells what it is doing, from the moment that the run has begun (`RunRecord.begin`)."""

    def __init__(self, record: RunRecord, watchdog: Watchdog, worker: int, workers: int):
        self.record, self.watchdog, self.worker = record, watchdog, worker
        self.path = reading.worker_file(record.directory, worker)
        self.seconds = max(BEAT_SECONDS, workers / _WORKERS_A_SECOND)
        self._stop, self._one = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name="beats", daemon=True)

    def facts(self) -> dict[str, Any]:
        """What is told."""
        doing, since = self.watchdog.doing
        goodput = self.record.goodput
        facts = {
            "worker": self.worker,
            "host": platform.node(),
            "pid": os.getpid(),
            "time": round(time.time(), 3),
            "every": self.seconds,
            "doing": doing,
            "for_seconds": round(since, 3),
        }
        if goodput and self.record.writes:
            facts |= {"attempt": self.record.facts["attempts"], FACT: goodput.entry()}
        return facts

    def beat(self) -> None:
        """Writes it now. A folder that is not there is not made again, and what cannot be written is left."""
        with self._one, contextlib.suppress(OSError):
            if self.record.begun and self.record.directory.is_dir():
                self.path.parent.mkdir(exist_ok=True)
                aside = self.path.with_name(f".{self.path.name}")
                aside.write_text(files.to_json(self.facts()) + "\n", encoding="utf-8")
                os.replace(aside, self.path)

    def _work(self) -> None:
        while not self._stop.wait(self.seconds if self.record.begun else 0.05):
            self.beat()

    def __enter__(self) -> "Beats":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.beat()
