"""Brings what the owner of a run writes into a folder to an object store, beside the training.

What is in the store can be resumed from at any moment, whatever is killed when:

- Metrics and events go first, then the files of a checkpoint, its manifest last: without a manifest there is no
  checkpoint. What is removed loses its manifest first. A run.json that says that the run has ended goes last of all.
- The store decides. A folder that another attempt has left here is worked on only if nobody has written to the store
  from another one since; else it is emptied, and what a resume needs is brought.

A store that cannot be reached delays what is written and nothing else. Only the end of a run waits for it.
"""

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from trainers.record import carriers, copies, reading
from trainers.record.store_lock import StoreLock
from trainers.settings.exit_codes import BadConfiguration, StoreLost
from trainers.world import files, locks
from trainers.world.stores import Store

# Checkpoints go at once; everything else when so much time has passed.
EVERY_SECONDS = 30.0
_LOOK_SECONDS = 0.5
# Within a pass that is given up, a request is tried for so long; then comes the next pass.
_PATIENCE = 30.0
_LONGEST_PAUSE = 30.0
# A larger file is read in pieces.
_MOST_AT_ONCE = 64 << 20
# Which folder of which machine has written to the store last; the same in that folder.
_WRITER = ".writer"
_MARKS = {reading.EXPORT: reading.METADATA}

Signature = tuple[int, int, int]


def _signature(path: Path) -> Signature:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _loose_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of what lies in a run's folder, without run.json, checkpoints, hidden files, the evaluator's."""
    for place, folders, names in os.walk(folder):
        top = Path(place) == folder
        left_out = (reading.CHECKPOINTS, carriers.EVALUATOR) if top else ()
        folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and not (top and name == reading.RUN):
                path = Path(place, name)
                yield path.relative_to(folder).as_posix(), path


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
        self._store = Store(address, _PATIENCE, self._end)
        self._sent: dict[str, Signature] = {}
        self._steps: dict[int, bytes] = {}
        # Passes that were asked for, and that are done; objects that were written, by which one sees that it moves.
        self._asked = self._done = self._moved = 0
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
            self._sent = {name: _signature(path) for name, path in _loose_files(self.folder)}
            last = secrets.token_hex(8).encode()
            self._store.write(_WRITER, last)
            with files.aside(mark) as place:
                place.write_bytes(last)
        for step in copies.manifests(self._store):
            with contextlib.suppress(FileNotFoundError):
                self._steps[step] = self._store.read(copies.manifest_name(step))
        self._clear_unfinished()

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

    def _clear_unfinished(self) -> None:
        """Removes files of checkpoints that have no manifest: what a killed process had begun to write or to remove."""
        whole = {reading.checkpoint_folder(Path(), step).name for step in self._steps}
        names = self._store.tags(reading.CHECKPOINTS)
        torn = [n for n in names if (place := n.split("/")[1]) not in whole and reading.step_of(place) is not None]
        self._store.remove(torn)

    # What readers in this process ask ---------------------------------------------------------------------------

    def refresh(self, at_once: bool = False) -> None:
        """Nothing: what is in the folder is what there is."""

    def bring(self, step: int) -> None:
        """Brings the files of a checkpoint of which only the manifest is here. Who reads it finds what is missing."""
        with contextlib.suppress(FileNotFoundError):
            copies.bring(Store(self.address, self._patience, self._end), self.folder, step)

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

    # The thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        last, pause, seen = time.monotonic(), 0.0, set(self._steps)
        while True:
            with self._wake:
                self._wake.wait(max(pause, _LOOK_SECONDS))
                asked = self._asked
            if self._end.is_set():
                return
            try:
                due = time.monotonic() - last > EVERY_SECONDS or asked > self._done
                steps = set(reading.checkpoint_steps(self.folder))
                if due or self._error or steps != seen:
                    self._pass()
                    last, pause, seen = time.monotonic(), 0.0, steps
                    self._settled(asked, None)
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
        """Returns when all that is in the folder now is in the store. `feed` is called as long as it moves.

        Raises:
          StoreLost: nothing was taken for `patience` seconds, or another process has taken the address over.
        """
        with self._wake:
            self._asked += 1
            wanted, moved, since = self._asked, self._moved, time.monotonic()
            self._wake.notify_all()
            while self._done < wanted:
                self._wake.wait(0.2)
                feed(f"writing to {self.address}")
                if moved != self._moved:
                    moved, since = self._moved, time.monotonic()
                if isinstance(self._error, _Over) or self._lock.lost:
                    break
                if time.monotonic() - since > self._patience:
                    raise StoreLost(
                        f"what was written last could not be brought to {self.address} within {self._patience:g} s "
                        f"(--step_timeout): {self._error}; it is kept in {self.folder}; start again"
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

    # A pass ------------------------------------------------------------------------------------------------------

    def _pass(self) -> None:
        """Brings everything that has changed to the store, in the order that keeps it whole."""
        self._fence()
        steps = self._local_steps()  # before the metrics are read: they cover these
        ended = self._has_ended()
        for name, path in _loose_files(self.folder):
            if name.partition("/")[0] not in _MARKS:
                self._send(name, path)
        for folder, mark in _MARKS.items():
            self._send_marked(folder, mark)
        if not ended:
            self._send(reading.RUN, self.folder / reading.RUN)
        for step, manifest in sorted(steps.items()):
            if self._steps.get(step) != manifest:
                self._send_checkpoint(step, manifest)
        self._remove_checkpoints()
        self._remove_loose()
        if ended:
            self._send(reading.RUN, self.folder / reading.RUN)

    def _fence(self) -> None:
        """Raises unless this process still owns the address."""
        self._check_there()
        try:
            self._lock.check()
        except StoreLost:
            if self._lock.lost:
                raise _Over(f"{self._lock.lost}; this run ends, the other goes on") from None
            raise
        if self._lock.was_removed.is_set():
            # Somebody has removed the run, or its lock, from the store. All of it is written again.
            self._lock.was_removed.clear()
            self._sent.clear()
            self._steps.clear()
            self._store.write(_WRITER, (self.folder / _WRITER).read_bytes())

    def _has_ended(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return bool(reading.read_json(self.folder / reading.RUN).get("ended"))
        return False

    def _local_steps(self) -> dict[int, bytes]:
        """The checkpoints in the folder, with their manifests."""
        steps = {}
        for step in reading.checkpoint_steps(self.folder):
            with contextlib.suppress(OSError):
                steps[step] = (reading.checkpoint_folder(self.folder, step) / reading.MANIFEST).read_bytes()
        return steps

    def _write(self, name: str, content: bytes | Path) -> None:
        if self._end.is_set():
            raise StoreLost(f"{self.address} is written to no more")
        self._store.write(name, content)
        with self._wake:
            self._moved += 1

    def _send(self, name: str, path: Path) -> bool:
        """Writes a file, if it is another than the one that was written last. Returns whether it was."""
        try:
            signature = _signature(path)
            if self._sent.get(name) == signature:
                return False
            content = path if signature[0] > _MOST_AT_ONCE else path.read_bytes()
            if name == reading.METRICS:
                whole = path.read_bytes()
                content = whole[: whole.rfind(b"\n") + 1]  # a line may be on its way
        except (FileNotFoundError, NotADirectoryError):
            return False
        self._write(name, content)
        self._sent[name] = signature
        return True

    def _send_marked(self, folder: str, mark: str) -> None:
        """Writes a folder that is there when a certain file is: that goes last, and is removed before a change."""
        last = f"{folder}/{mark}"
        inside = {n: p for n, p in _loose_files(self.folder) if n.startswith(f"{folder}/") or n == folder}
        changed = [n for n, p in inside.items() if p.exists() and self._sent.get(n) != _signature(p)]
        if not changed:
            return
        if last in self._sent:
            self._store.remove([last])
            del self._sent[last]
        for name in (*(name for name in inside if name != last), *([last] if last in inside else [])):
            self._send(name, inside[name])

    def _send_checkpoint(self, step: int, manifest: bytes) -> None:
        """Writes a checkpoint, its manifest last. One that was replaced or removed meanwhile waits for the next."""
        place, name = reading.checkpoint_folder(self.folder, step), copies.manifest_name(step)
        if step in self._steps:
            self._store.remove([name])
            del self._steps[step]
        folder = name.rpartition("/")[0]
        with contextlib.suppress(FileNotFoundError):
            for file in json.loads(manifest)["files"]:
                self._write(f"{folder}/{file}", place / file)
            if (place / reading.MANIFEST).read_bytes() == manifest:
                self._fence()
                self._write(name, manifest)
                self._steps[step] = manifest

    def _remove_checkpoints(self) -> None:
        """Removes those that the folder does not have any more, and what was begun of others.

        The folder always has the newest, or has set it aside. What there is, the store says: a request whose answer was
        lost may have been done.
        """
        names, left = self._store.tags(reading.CHECKPOINTS), set(self._local_steps())
        self._check_there()
        there = {reading.step_of(name.split("/")[1]) for name in names} - {None}
        whole = {step for step in there if copies.manifest_name(step) in names}
        self._steps = {step: self._steps.get(step, b"") for step in whole}
        for step in sorted(there - left):
            damaged = reading.checkpoint_folder(self.folder, step).with_suffix(".damaged").exists()
            if damaged or step < max(whole & left, default=-1):  # a newer one is in the store
                self._remove_checkpoint(step)

    def _remove_checkpoint(self, step: int) -> None:
        """Removes a checkpoint, its manifest first. One that was set aside as damaged is set aside there too."""
        name = copies.manifest_name(step)
        folder = name.rpartition("/")[0]
        names = [name, *(each for each in self._store.tags(folder) if each != name)]
        if reading.checkpoint_folder(self.folder, step).with_suffix(".damaged").exists():
            for each in names:
                self._store.rename(each, f"{folder}.damaged/{each.rpartition('/')[2]}")
        else:
            self._store.remove(names)
        self._steps.pop(step, None)

    def _remove_loose(self) -> None:
        """Removes what was written and is not in the folder any more."""
        gone = [name for name in self._sent if not (self.folder / name).exists()]
        self._check_there()  # else everything would be gone
        for name in gone:
            self._store.remove([name])
            del self._sent[name]


class _Over(BadConfiguration):
    """This process is the owner no more, or has nothing to own."""
