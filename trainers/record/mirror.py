"""Brings what the owner of a run writes into a folder to an object store, beside the training: when, and by whom.

`uploads` says in which order. The store decides: a folder that another attempt has left here is worked on only if
nobody has written to the store from another one since; else it is emptied, and what a resume needs is brought.

A store that cannot be reached delays what is written and nothing else. Only the end of a run waits for it.
"""

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from absl import logging

from trainers.record import carriers, copies, reading
from trainers.record.store_lock import StoreLock
from trainers.record.uploads import Uploads
from trainers.settings.exit_codes import BadConfiguration, StoreLost
from trainers.world import files, locks, transfers
from trainers.world.stores import Store

_LOOK_SECONDS = 0.5
# Within a pass that is given up, a request is tried for so long; then comes the next pass.
_PATIENCE = 30.0
_LONGEST_PAUSE = 30.0
# Which folder of which machine has written to the store last; the same in that folder.
_WRITER = ".writer"


class Mirror:
    """The owner's folder of a run at an address. Within the context it holds the lock of both, and carries.

    `patience`: seconds that the end waits for a store that takes nothing.

    Entering raises:
      BadConfiguration: the address is in use by another run, or the store refuses.
      StoreLost: the store cannot be reached.
    """

    def __init__(self, address: str, folder: Path, patience: float):
        self.address, self.folder, self._patience = address, folder, patience
        self._end, self._wake = threading.Event(), threading.Condition()
        # Its own: that the lock is kept alive does not mean that anything else moves.
        self._store, self._motion = Store(address, _PATIENCE, self._end), transfers.Motion()
        sending = Store(address, _PATIENCE, self._end, self._motion.moved)
        self._uploads = Uploads(sending, folder, self._fence, self._end)
        # Passes that were asked for, and that are done.
        self._asked = self._done = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    # The begin ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Mirror":
        self._hold()
        try:
            self._lock.take()
            try:
                self._begin()
            except BaseException:
                self._lock.give_back()
                raise
        except BaseException:
            self._held.close()
            raise
        carriers.register(self.folder, self)
        self._thread.start()
        return self

    def _hold(self) -> None:
        """Takes the folder for this process: a second run on this machine is refused at once."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        guard = self.folder.with_name(f".{self.folder.name}.lock")
        self._held = open(guard, "a+")  # noqa: SIM115 - held as long as the mirror
        try:
            without = locks.hold(self._held, wait=False)
        except BlockingIOError:
            self._held.close()
            raise BadConfiguration(
                f"--run_dir {self.address} is in use by another run on this machine; wait for it, end it, or name "
                "another address"
            ) from None
        self._lock = StoreLock(self._store, None if without else guard)

    def _begin(self) -> None:
        """Makes the folder one that the run can go on in."""
        try:
            last = self._store.read(_WRITER)
        except FileNotFoundError:
            last = b""
        mark = self.folder / _WRITER
        if not (last and mark.exists() and mark.read_bytes() == last):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            copies.fetch_small(self._store, self.folder)
            if (self.folder / reading.EXPORT / reading.METADATA).exists():
                self._fetch_export()
            for step in copies.manifests(self._store):
                copies.fetch_manifest(self._store, self.folder, step)
            self._fetch_late_events()
            self._uploads.are_sent()
            last = secrets.token_hex(8).encode()
            self._store.write(_WRITER, last)
            with files.aside(mark) as place:
                place.write_bytes(last)
        self._uploads.find()

    def _fetch_export(self) -> None:
        for name in self._store.tags(reading.EXPORT):
            path = self.folder / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._store.fetch(name, path)

    def _fetch_late_events(self) -> None:
        """Brings event files whose names stand after those that will be made here: a clock was, or is, another.

        `trainers.show.summaries` gives them names that stand before.
        """
        for name in self._store.tags():
            stamp = name.rpartition("/")[2].removeprefix("events.out.tfevents.").partition(".")[0]
            if stamp.isdecimal() and int(stamp) >= time.time():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._store.fetch(name, path)

    # What readers in this process ask ---------------------------------------------------------------------------

    def refresh(self, at_once: bool = False) -> None:
        """Nothing: what is in the folder is what there is."""

    def bring(self, step: int, feed: Callable[[str], None]) -> None:
        """Brings the files of a checkpoint of which only the manifest is here. Who reads it finds what is missing."""
        with contextlib.suppress(FileNotFoundError):
            copies.bring_fed(self.address, self.folder, step, feed, self._patience)

    def check(self) -> None:
        """Raises StoreLost if another process has taken the address over, or the folder was removed."""
        if isinstance(self._error, _Over):
            raise StoreLost(str(self._error))
        self._check_there()
        if self._lock.lost:
            self._lock.check()

    def _check_there(self) -> None:
        if not (self.folder / _WRITER).exists():
            raise _Over(f"{self.folder}, in which {self.address} was worked on, was removed; start again")

    def _fence(self) -> bool:
        """Raises unless this process still owns the address. Returns whether everything is to be written again."""
        self._check_there()
        try:
            self._lock.check()
        except StoreLost:
            if self._lock.lost:
                raise _Over(f"{self._lock.lost}; this run ends, the other goes on") from None
            raise
        if not self._lock.was_removed.is_set():
            return False
        # Somebody has removed the run, or its lock, from the store.
        self._lock.was_removed.clear()
        self._store.write(_WRITER, (self.folder / _WRITER).read_bytes())
        return True

    # The thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        last, pause, seen = time.monotonic(), 0.0, set(self._uploads.steps)
        while True:
            with self._wake:
                self._wake.wait(max(pause, _LOOK_SECONDS))
                asked = self._asked
            if self._end.is_set():
                return
            try:
                due = time.monotonic() - last > carriers.EVERY_SECONDS or asked > self._done
                steps = set(reading.checkpoint_steps(self.folder))
                if due or self._error or steps != seen:
                    complete = self._uploads.bring(everything=asked > self._done)
                    last, pause, seen = time.monotonic(), 0.0, steps
                    self._settled(asked if complete else None, None)
            except BaseException as error:
                pause = min(2 * pause + 0.5, _LONGEST_PAUSE)
                self._settled(None, error)

    def _settled(self, asked: int | None, error: BaseException | None) -> None:
        """Tells who waits, and the user when it begins and when it is over."""
        with self._wake:
            before, self._error = self._error, error
            self._done = self._done if asked is None else asked
            self._wake.notify_all()
        if error and not before and not self._end.is_set() and not isinstance(error, _Over):
            logging.warning("%s: %s; until then what the run writes is kept on this machine", self.address, error)
        if before and not error:
            logging.warning("%s: the store takes what is written again", self.address)

    def settle(self, feed: Callable[[str], None]) -> None:
        """Returns when all that is in the folder now is in the store. `feed` is called as long as that takes.

        Raises:
          StoreLost: nothing has moved for `patience` seconds, or another process has taken the address over.
        """
        with self._wake:
            self._asked += 1
            wanted = self._asked
            self._motion.moved()
            self._wake.notify_all()
            while self._done < wanted:
                self._wake.wait(transfers.LOOK_SECONDS)
                feed(f"writing to {self.address}")
                if isinstance(self._error, _Over) or self._lock.lost:
                    break
                if self._motion.still > self._patience:
                    raise StoreLost(
                        f"what was written last could not be brought to {self.address}: nothing has moved for "
                        f"{self._patience:g} s (--step_timeout)"
                        + (f": {self._error}" if self._error else "")
                        + f"; it is kept in {self.folder}; start again"
                    )
        self.check()

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        with self._wake:
            self._wake.notify_all()
        self._thread.join(5.0)
        carriers.forget(self.folder)
        self._lock.give_back()
        self._held.close()


class _Over(BadConfiguration):
    """This process is the owner no more, or has nothing to own."""
