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

    The order makes it safe: what a checkpoint covers is on the disk before it, since it was given before it. Actions
    wait until `start`: done at once, they would take the interpreter from the thread that gives them.
    """

    def __init__(self):
        self._pending: queue.Queue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = queue.Queue(_MOST_PENDING)
        self._error: BaseException | None = None
        self._failed = False
        self._held: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        # How many actions were given, and how many of them are done.
        self._given = self._done = 0
        self._changed = threading.Condition()
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
                with self._changed:
                    self._done += 1
                    self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def do(self, action: Callable[..., Any], *arguments: Any) -> int:
        """Gives an action and returns its number; its arguments must not change afterwards. Raises what failed."""
        self._raise()
        self._given += 1
        self._held.append((action, arguments))
        return self._given

    def start(self) -> None:
        """Lets the thread begin what was given: the caller has nothing to do in Python for a while."""
        for item in self._held:
            self._pending.put(item)
        self._held.clear()

    def wait(self, number: int | None = None) -> None:
        """Returns when everything is done, or the action of a number and those before. Raises what has failed."""
        number = self._given if number is None else number
        if number > self._given - len(self._held):
            self.start()
        with self._changed:
            self._changed.wait_for(lambda: self._done >= number)
        self._raise()

    def close(self) -> None:
        """Waits and ends the thread. A failure that nobody was told of is logged: the run ends by another already."""
        self.start()
        self._pending.put(None)
        self._thread.join()
        if self._error is not None:
            logging.error("%s", self._error)
