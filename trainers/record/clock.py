"""What the time of a run goes into."""

import contextlib
import threading
import time
from collections.abc import Iterator


class Clock:
    """Seconds by phase. A phase inside another counts for the inner one alone.

    One thread has phases; any may ask for a snapshot.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.monotonic()
        self._lock = threading.RLock()

    def _settle(self) -> None:
        now = time.monotonic()
        if self._open:
            self.add(self._open[-1], now - self._since)
        self._since = now

    def add(self, phase: str, seconds: float) -> None:
        """Counts seconds measured elsewhere."""
        with self._lock:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def move(self, phase: str, other: str, seconds: float) -> None:
        """Counts seconds of one phase for another."""
        with self._lock:
            self.add(phase, -seconds)
            self.add(other, seconds)

    def snapshot(self) -> dict[str, float]:
        """Seconds by phase until now, those of the open phase included."""
        with self._lock:
            seconds = dict(self.seconds)
            if self._open:
                seconds[self._open[-1]] = seconds.get(self._open[-1], 0.0) + time.monotonic() - self._since
            return seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of a block for phase `name`."""
        with self._lock:
            self._settle()
            self._open.append(name)
        try:
            yield
        finally:
            with self._lock:
                self._settle()
                self._open.pop()


class Shares:
    """What the wall time went into since the last question, as shares of 1.

    `input`: waiting for the next batch; `peers`: in sums over several workers; `compute`: the compiled calls, without
    these; `evaluate`; `checkpoint`: what a save keeps training waiting; `python`: the rest.
    """

    PARTS = {
        "input": "input_wait",
        "peers": "peers",
        "compute": "train",
        "evaluate": "evaluate",
        "checkpoint": "checkpoint",
    }

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
