"""Waiting for what a thread transfers: as long as something moves, and for a time-out after that."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from trainers.settings.exit_codes import StoreLost

T = TypeVar("T")
# Between two looks.
LOOK_SECONDS = 0.2


class Motion:
    """Whether something moves. `moved` is called from any thread."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def moved(self) -> None:
        """Something has moved."""
        self._last = time.monotonic()

    @property
    def still(self) -> float:
        """For how many seconds nothing has moved."""
        return time.monotonic() - self._last


def awaited(
    work: Callable[[Callable[[], None], threading.Event], T], feed: Callable[[str], None], what: str, patience: float
) -> T:
    """What `work(moved, stop)` returns, which runs in a thread. `feed` is called with `what` all the time.

    `work` calls `moved` when bytes have moved, and tries nothing again once `stop` is set.

    Raises:
      StoreLost: nothing has moved for `patience` seconds. And what `work` raises.
    """
    motion, stop, results, errors = Motion(), threading.Event(), [], []

    def run() -> None:
        try:
            results.append(work(motion.moved, stop))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="transfer", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            feed(what)
            if thread.is_alive() and motion.still > patience:
                raise StoreLost(
                    f"{what}: nothing has moved for {patience:g} s (--step_timeout); start again when the store can be "
                    "reached, the run continues"
                )
    finally:
        stop.set()
    if errors:
        raise errors[0]
    return results[0]
