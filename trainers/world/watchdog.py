"""Ends the process when nothing moves: a collective whose peer is gone or frozen would wait for ever."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from trainers.settings.exit_codes import PEER_LOST
from trainers.world import last_resort
from trainers.world.private_api import remove_generated_sources

_TELLING_SECONDS = 10.0
# How much later than this watchdog the kernel's timer ends the process, where Python's lock is held all the while.
_LATER_SECONDS = 10.0


class Watchdog:
    """Ends the process with code 75 and every thread's stack if `feed` does not come within `seconds`. 0 = never.

    Time in which the process does not run (SIGSTOP, a debugger) does not count.
    """

    def __init__(self, seconds: float):
        self.seconds, self._allowed, self._what = seconds, seconds, ""
        self._fed, self._stop = time.monotonic(), threading.Event()
        # How often something has begun that all workers do together, and whether this one does such a thing now.
        self.met, self.meeting = 0, False
        # Called before the end, at most for some seconds.
        self.witness: Callable[[], None] | None = None
        self._deadline: last_resort.Deadline | None = None

    def feed(self, what: str, seconds: float | None = None, together: bool = False) -> None:
        """Something moved; `what` comes now, and may take `seconds` instead of the usual.

        `together`: all workers do it, in the same order.
        """
        self._what, self._fed = what, time.monotonic()
        self.met, self.meeting = self.met + together, together
        self._allowed = self.seconds if seconds is None else seconds

    @property
    def doing(self) -> tuple[str, float]:
        """What comes now, and for how many seconds already."""
        return self._what, time.monotonic() - self._fed

    def _message(self, waited: float) -> str:
        return (
            f"nothing has moved for {waited:.0f} s in: {self._what}; a peer is lost or stuck, or --step_timeout is too "
            "short; the stacks of all threads follow; start all workers again, the run continues"
        )

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(interval := min(self._allowed / 10, 1.0)):
            now = time.monotonic()
            late = now - looked - interval
            looked = now
            if late > _LATER_SECONDS / 2:
                # This thread did not run, and so the others did not, or could not.
                self._fed += late
                if self._deadline:
                    self._deadline.begin_again()
            waited = now - self._fed
            if self._deadline:
                self._deadline.move(max(self._allowed - waited, 0) + _LATER_SECONDS, self._message(self._allowed))
            if waited > self._allowed:
                # Come what may: who reads what we print may be gone, or stuck as well.
                last = threading.Timer(_TELLING_SECONDS, os._exit, [PEER_LOST])
                last.daemon = True
                last.start()
                self._tell(waited)
                os._exit(PEER_LOST)

    def _tell(self, waited: float) -> None:
        """Says what stands still, and where each thread is."""
        with contextlib.suppress(OSError, ValueError):
            print(self._message(waited), file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        if self.witness:
            with contextlib.suppress(Exception):
                self.witness()
        remove_generated_sources()

    def __enter__(self) -> "Watchdog":
        self.feed("start-up")
        if self.seconds:
            self._deadline = last_resort.deadline()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._deadline:
            self._thread.join()
            self._deadline.move(0, "")
