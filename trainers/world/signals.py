"""SIGTERM, SIGINT, and SIGHUP of a terminal that closes.

The first asks for a checkpoint at the end of the running call, a second ends at once. A script's first statement is
`end_at_once_on_signal()`, so this imports nothing that takes time.
"""

from __future__ import annotations  # launch/doctor.py runs on Python 3.9 too

import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

from trainers.settings.exit_codes import PREEMPTED

if TYPE_CHECKING:
    from trainers.world.last_resort import SecondByte

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Those that have come since `unwind_on_signal`.
_came: list[int] = []


def end_at_once_on_signal() -> None:
    """Until a run has begun there is nothing to save; and as process 1 of a container, no handler would mean deaf."""
    for number in _heeded():
        signal.signal(number, lambda *_: os._exit(PREEMPTED))
    # What asks a running loop for a profile must not end a process that has none yet. It waits until it is asked for.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])


def unwind_on_signal() -> list[int]:
    """From now on a signal raises KeyboardInterrupt, so that what was begun is cleared away on the way out.

    A second one ends the process at once. Returns the signals that have come: on its way through TensorFlow the
    exception may become another.
    """
    _came.clear()

    def unwind(number: int, frame: FrameType | None) -> None:
        if _came:
            os._exit(PREEMPTED)
        _came.append(number)
        raise KeyboardInterrupt

    for number in _heeded():
        signal.signal(number, unwind)
    return _came


def raise_if_lost() -> None:
    """Raises KeyboardInterrupt again where one was raised and got lost: as another error, or in an object's removal."""
    if _came:
        raise KeyboardInterrupt


def _heeded() -> list[signal.Signals]:
    """The signals, without SIGHUP where it is ignored: nohup wants a process that outlives its terminal."""
    return [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class Preemption:
    """Context in which the signals are caught; `requested` tells the loop. Outside the main thread: inactive."""

    def __init__(self):
        self.signal_name = ""
        self.requested_at = 0.0
        self._previous: dict[int, object] = {}
        self._second: SecondByte | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self.signal_name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(PREEMPTED)
        self.signal_name, self.requested_at = signal.Signals(number).name, time.monotonic()

    def __enter__(self) -> Preemption:
        from trainers.world import last_resort

        if threading.current_thread() is threading.main_thread():
            for number in _heeded():
                self._previous[number] = signal.signal(number, self._handle)
            pipe, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            # Python's handler waits for an operation that may wait for ever; a second signal must not.
            if last_resort.available():
                self._second = last_resort.SecondByte(pipe)
            else:
                threading.Thread(target=self._count, args=(pipe,), name="signals", daemon=True).start()
        return self

    def _count(self, pipe: int) -> None:
        """Ends the process at the second signal, where the C library cannot."""
        received = 0
        while numbers := os.read(pipe, 16):
            received += len(numbers)
            if received >= 2:
                os._exit(PREEMPTED)
        os.close(pipe)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(-1)
            if self._second:
                self._second.call_off(self._pipe)
            os.close(self._pipe)
