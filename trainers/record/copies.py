"""A reader's copy of a run in an object store, in a folder of its own."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from absl import logging

from trainers.record import carriers, reading
from trainers.world import files, transfers
from trainers.world.stores import PIECE_BYTES, Store

# A store is asked no more often.
LOOK_SECONDS = 5.0
_TRIES = 3
# Folders of a run that TensorBoard has no use for.
_NOT_SHOWN = {reading.CHECKPOINTS, reading.EXPORT}
_YOUNG_SECONDS = 60
_SMALL = (reading.METRICS, reading.TRACKER, "flags.txt", f"{reading.EXPORT}/{reading.METADATA}")
# What a killed attempt has told last, for its goodput.
_SMALL += (reading.worker_file(Path(), 0).as_posix(), f"{reading.WORKERS}/{reading.HANG}", reading.RUN)


def manifest_name(step: int) -> str:
    """The object whose being there makes a checkpoint be there."""
    return f"{reading.CHECKPOINTS}/step-{step:010d}/{reading.MANIFEST}"


def manifests(store: Store) -> dict[int, str]:
    """Steps of the checkpoints in a store, with the tags of their manifests."""
    tags = store.tags(reading.CHECKPOINTS)
    steps = {name: reading.step_of(name.split("/")[1]) for name in tags if name.endswith(f"/{reading.MANIFEST}")}
    return {step: tags[name] for name, step in steps.items() if step is not None and name == manifest_name(step)}


def fetch_small(store: Store, folder: Path) -> None:
    """Brings run.json, flags.txt, metrics, what the chief told last and what is told of an export; run.json last."""
    for name in _SMALL:
        path = folder / name
        try:
            content = store.read(name)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            continue
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.aside(path) as place:
                place.write_bytes(content)


def fetch_manifest(store: Store, folder: Path, step: int) -> bytes | None:
    """Brings a manifest alone: the checkpoint's files come when they are asked for. None: it is gone."""
    try:
        content = store.read(manifest_name(step))
    except FileNotFoundError:
        return None
    place = reading.checkpoint_folder(folder, step)
    place.mkdir(parents=True, exist_ok=True)
    with files.aside(place / reading.MANIFEST) as aside:
        aside.write_bytes(content)
    return content


def bring(store: Store, folder: Path, step: int) -> None:
    """Brings the files that a step's manifest names and that are not in its folder, and compares their digests.

    One that stays wrong is left as it is: who reads it tells.

    Raises:
      FileNotFoundError: it was removed from the store meanwhile.
    """
    place = reading.checkpoint_folder(folder, step)
    try:
        named = json.loads((place / reading.MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError):
        return
    for name, digest in named.items():
        path = place / Path(name).name
        for _ in range(0 if path.exists() else _TRIES):
            try:
                store.fetch(f"{reading.CHECKPOINTS}/{place.name}/{path.name}", path)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            if files.digest(path) == digest:
                break
            logging.warning("%s of step %d came with another digest", name, step)


def bring_fed(address: str, folder: Path, step: int, feed: Callable[[str], None], patience: float) -> None:
    """As `bring`; `feed` is called with what is waited for. Raises StoreLost: nothing moves for `patience` seconds."""

    def work(moved: Callable[[], None], stop: threading.Event) -> None:
        bring(Store(address, patience, stop, moved), folder, step)

    transfers.awaited(work, feed, f"reading the checkpoint of step {step} from {address}", patience)


def follow(store: Store, folder: Path, seen: dict[str, str]) -> int:
    """Brings what TensorBoard shows of all runs under an address up to date. Returns how many files have changed.

    `seen`: tags of what is here, which this keeps. An event file only grows, and who reads it keeps it open, so what is
    new is appended.
    """
    changed = 0
    for name, (tag, size) in store.entries().items():
        parts, path = name.split("/"), folder / name
        if seen.get(name) == tag or _NOT_SHOWN & set(parts) or any(part.startswith(".") for part in parts):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if ".tfevents." in parts[-1]:
                with open(path, "ab") as file:
                    while (length := min(size - file.tell(), PIECE_BYTES)) > 0:
                        file.write(store.piece(name, file.tell(), length))
            else:
                store.fetch(name, path)
            seen[name], changed = tag, changed + 1
    return changed


class Copy:
    """A copy of a run, in a new folder under `parent`. Within the context it is one that `carriers` knows."""

    def __init__(self, address: str, parent: Path, patience: float):
        self.address, self._store, self._patience = address, Store(address, patience), patience
        parent.mkdir(parents=True, exist_ok=True)
        _clear(parent)
        self._home = parent / f"{os.getpid()}-{secrets.token_hex(4)}"
        self._home.mkdir()
        self._guard = open(self._home / ".lock", "w")  # noqa: SIM115 - held as long as the copy
        fcntl.flock(self._guard, fcntl.LOCK_EX)
        self.folder = self._home / Path(address).name
        self.folder.mkdir()
        self._tags: dict[int, str] = {}
        self._looked = float("-inf")

    def __enter__(self) -> "Copy":
        try:
            self.refresh(at_once=True)
        except BaseException:
            shutil.rmtree(self._home, ignore_errors=True)
            raise
        carriers.register(self.folder, self)
        return self

    def refresh(self, at_once: bool = False) -> None:
        """Brings the copy up to date: run.json, metrics, and which checkpoints there are."""
        if not at_once and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        small = self._home / "small"
        shutil.rmtree(small, ignore_errors=True)
        small.mkdir()
        # Read before the steps are listed, and put in place after them: what a run writes last is there when run.json
        # says that it has ended.
        fetch_small(self._store, small)
        tags = manifests(self._store)
        for step in self._tags.keys() | tags.keys():
            if self._tags.get(step) != tags.get(step):
                shutil.rmtree(reading.checkpoint_folder(self.folder, step), ignore_errors=True)
            if step in tags and self._tags.get(step) != tags[step]:
                fetch_manifest(self._store, self.folder, step)
        self._tags = tags
        for path in (small / name for name in _SMALL):
            if path.exists():
                place = self.folder / path.relative_to(small)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
        self._looked = time.monotonic()

    def bring(self, step: int, feed: Callable[[str], None] = lambda what: None) -> None:
        """Brings the files of a checkpoint, if they are not here. One that is not known may be on its way.

        Raises:
          FileNotFoundError: it went while it was read. Who reads one that is not there finds out.
        """
        place, began, known = reading.checkpoint_folder(self.folder, step), time.monotonic(), step in self._tags
        self.refresh(at_once=True)
        while not place.exists() and not known and time.monotonic() - began < self._patience / 2:
            feed(f"waiting for the checkpoint of step {step}")
            time.sleep(LOOK_SECONDS / 4)
            self.refresh()
        try:
            bring_fed(self.address, self.folder, step, feed, self._patience)
        except FileNotFoundError:
            shutil.rmtree(place, ignore_errors=True)
            raise

    def check(self) -> None:
        """Nothing: a reader owns nothing."""

    def settle(self, feed: Callable[[str], None]) -> None:
        """Nothing: a reader writes nothing."""

    def bring_export(self) -> None:
        """Brings everything, if the address is that of an export: it holds the file that tells of one."""
        with contextlib.suppress(FileNotFoundError):
            self._store.read(reading.METADATA)
            for name in self._store.tags():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._store.fetch(name, path)

    def __exit__(self, *exception: object) -> None:
        carriers.forget(self.folder)
        self._guard.close()
        shutil.rmtree(self._home, ignore_errors=True)


def _clear(parent: Path) -> None:
    """Removes copies of processes that were killed."""
    for home in parent.iterdir():
        with contextlib.suppress(OSError), open(home / ".lock") as guard:
            if time.time() - home.stat().st_mtime < _YOUNG_SECONDS:
                continue  # perhaps not locked yet
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(home, ignore_errors=True)
