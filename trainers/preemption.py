"""SIGTERM and SIGINT: the first asks for a checkpoint at the end of the running call, a second ends at once."""

import os
import signal
import threading
import time
from types import FrameType

from trainers.exit_codes import PREEMPTED

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_at_once_on_signal() -> None:
    """Until a run has begun there is nothing to save; and as process 1 of a container, no handler would mean deaf."""
    for number in _SIGNALS:
        signal.signal(number, lambda *_: os._exit(PREEMPTED))


class Preemption:
    """Context in which the two signals are caught; `requested` tells the loop. Outside the main thread: inactive."""

    def __init__(self):
        self.signal_name = ""
        self.requested_at = 0.0
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self.signal_name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(PREEMPTED)
        self.signal_name, self.requested_at = signal.Signals(number).name, time.monotonic()

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
