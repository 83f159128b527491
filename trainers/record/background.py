"""What can be written while training goes on: actions in a thread of their own, one after another, in their order."""

import queue
import threading
from collections.abc import Callable
from typing import Any

from absl import logging

# More than a checkpoint and the lines between two of them ever need; beyond it `do` waits.
_MOST_PENDING = 256


class Background:
    """Does actions in order, in one thread. After one has failed none is done any more, and the failure is raised.

    The order makes it safe: what a checkpoint covers is on the disk before it, since it was given before it.
    """

    def __init__(self):
        self._pending: queue.Queue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = queue.Queue(_MOST_PENDING)
        self._error: BaseException | None = None
        self._failed = False
        # A daemon: a disk that never answers must not keep a process that is to end.
        self._thread = threading.Thread(target=self._work, name="background", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (item := self._pending.get()) is not None:
            action, arguments = item
            try:
                if not self._failed:
                    action(*arguments)
            except BaseException as error:
                self._error, self._failed = error, True
            finally:
                self._pending.task_done()
        self._pending.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def do(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Gives an action; its arguments must not change afterwards. Raises what an earlier one has raised."""
        self._raise()
        self._pending.put((action, arguments))

    def wait(self) -> None:
        """Returns when everything is done. Raises what an action has raised."""
        self._pending.join()
        self._raise()

    def close(self) -> None:
        """Waits and ends the thread. A failure that nobody was told of is logged: the run ends by another already."""
        self._pending.put(None)
        self._thread.join()
        if self._error is not None:
            logging.error("%s", self._error)
