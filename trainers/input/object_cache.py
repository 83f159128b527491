"""Data in object stores, `csv:s3://bucket/rows.csv`: brought to a folder of this machine, once for all its processes.

A file is whole or not there. What lies at an address at one time is a version, in a folder of its own: who runs keeps
what it began with. Files that a version shares with another are links to one file, by the tags of their objects. The
index of a folder holds each object's tag, and size, time and SHA-256 of the file: one that is not what it was comes
anew. Processes take turns to bring a data set; a version is not removed while one of them lives.
"""

import concurrent.futures
import contextlib
import glob
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from absl import logging

from trainers.input import uploads
from trainers.input.manifests import BESIDE, MADE_HERE
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files, locks, transfers
from trainers.world.stores import Store

FOLDER = "data"
# Other data sets are removed, the longest unused first, before less of the disk than this is free.
KEPT_FREE, MOST_KEPT_FREE = 0.1, 10 << 30
_AT_ONCE, _INDEX_SECONDS, _PATIENCE = 16, 20.0, 120.0
_INDEX = ".index.json"
# Versions that this process uses, by address and what of it is brought, with locks that are held until it ends.
_USED: dict[tuple[Path, str], tuple[Path, IO]] = {}

Moved = Callable[[], None]
# Tag and size in bytes of each object.
Entries = Mapping[str, tuple[str, int]]


def brought(
    what: str,
    argument: str,
    cache_dir: str,
    only: str = "",
    feed: Callable[[str], None] = lambda what: None,
    patience: float = 600.0,
) -> Path:
    """Where what lies at an address lies on this machine, after it was brought there.

    `what`: the kind of data; of `images` a folder, else a file; empty: a folder of prepared data, of which `only` is
    brought. `feed`: called with what is waited for, as long as it is.

    Raises:
      BadConfiguration: there is nothing, it does not fit, or the store refuses.
      StoreLost: the store cannot be reached, or nothing has moved for `patience` seconds.
    """
    address = paths.place(f"--dataset={what}:" if what else "--data_dir", argument)
    is_folder = what in ("", "images")
    base, name = (address, "") if is_folder else address.rsplit("/", 1)
    place = Path(cache_dir or paths.cache_dir("")) / FOLDER / paths.name_of(address)
    if (place, only) not in _USED:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.with_name(f".{place.name}.bring"), "a+") as turn:
            _take(turn, feed, f"waiting for another process that reads {address}")

            def work(moved: Moved, stop: threading.Event) -> tuple[Path, IO]:
                return _Bringing(Store(base, _PATIENCE, stop, moved), place, address, moved, stop).bring(name, only)

            _USED[place, only] = transfers.awaited(work, feed, f"reading {address}", patience)
    folder = _USED[place, only][0]
    return folder / name if name else folder


def _take(turn: IO, feed: Callable[[str], None], what: str) -> None:
    """Takes a lock, however long another holds it: that ends if nothing moves."""
    while True:
        with contextlib.suppress(BlockingIOError):
            locks.hold(turn, wait=False)
            return
        feed(what)
        time.sleep(transfers.LOOK_SECONDS)


def _use_lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _used(folder: Path) -> IO:
    """The lock of a version, which nobody removes while it is held."""
    used = open(_use_lock(folder), "a+")  # noqa: SIM115 - held until the process ends
    locks.share(used)
    folder.mkdir(exist_ok=True)
    return used


def _version_of(place: Path, only: str, wanted: Entries) -> Path:
    """The folder for what is at an address."""
    digest = hashlib.sha256(json.dumps(sorted(wanted.items())).encode()).hexdigest()[:12]
    return place.with_name(f"{place.name}+{only}+{digest}")  # no name of an address has a plus


def _other_versions(folder: Path) -> list[Path]:
    """The folders of what was at the same address before, the last used first."""
    name = folder.name.rpartition("+")[0]
    found = [path for path in folder.parent.glob(f"{glob.escape(name)}+*") if path.is_dir() and path != folder]
    return sorted(found, key=_last_used, reverse=True)


class _Bringing:
    """Brings what lies at an address into a folder beside `place`, which is for what is prepared here."""

    def __init__(self, store: Store, place: Path, address: str, moved: Moved, stop: threading.Event):
        self.store, self.place, self.address, self.moved, self.stop = store, place, address, moved, stop
        self.index: dict[str, list[Any]] = {}

    def bring(self, name: str, only: str) -> tuple[Path, IO]:
        """Brings what is there now, and removes versions that nobody uses. Returns its folder, and its lock."""
        wanted = _wanted(self.store, name, only, self.address)
        if not wanted and only:
            return self.place, _used(self.place)  # it is prepared here
        if not wanted or (name and name not in wanted):
            raise BadConfiguration(f"{self.address} is not there; name what is")
        folder = _version_of(self.place, only, wanted)
        used = _used(folder)
        try:
            self.fill(folder, wanted)
        except BaseException:
            used.close()
            raise
        for other in _other_versions(folder):
            _remove_unused(other)
        return folder, used

    def fill(self, folder: Path, wanted: Entries) -> None:
        """Brings the files of a version: those that are missing, or are not what they were."""
        known = _read_index(folder)
        missing = {each: entry for each, entry in wanted.items() if not self.is_here(folder, each, entry, known)}
        for path in list(_files(folder)):
            if path.relative_to(folder).as_posix() not in wanted or path.name.startswith("."):
                path.unlink()
        self.index = {each: known[each] for each in wanted if each not in missing}
        for other in _other_versions(folder) if missing else ():
            self.link(other, folder, missing)
        _make_room(folder, sum(size for _, size in missing.values()), self.address)
        self.fetch(folder, missing)

    def is_here(self, folder: Path, each: str, entry: tuple[str, int], known: Mapping[str, list[Any]]) -> bool:
        """Whether a folder, of which an index is known, has an object as it is now."""
        self.moved()
        return _is_here(folder / each, entry, known.get(each))

    def link(self, other: Path, folder: Path, missing: dict[str, tuple[str, int]]) -> None:
        """Links what another version has of the missing files, and drops that from them."""
        known = _read_index(other)
        for each in list(missing.keys() & known.keys()):
            if self.is_here(other, each, missing[each], known):
                (folder / each).parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):  # a file system without links
                    (folder / each).unlink(missing_ok=True)
                    os.link(other / each, folder / each)
                    self.index[each] = [missing.pop(each)[0], *_stamp(folder / each), known[each][3]]

    def fetch(self, folder: Path, missing: Entries) -> None:
        """Brings objects, several at a time, and writes the index, now and then and at the end."""
        guard, kept = threading.Lock(), time.monotonic()

        def bring(each: str) -> None:
            nonlocal kept
            path = folder / each
            path.parent.mkdir(parents=True, exist_ok=True)
            self.store.fetch(each, path)
            entry = [missing[each][0], *_stamp(path), files.digest(path)]
            with guard:
                self.index[each] = entry
                if time.monotonic() - kept > _INDEX_SECONDS:
                    files.write_text(folder / _INDEX, files.to_json(self.index))
                    kept = time.monotonic()

        try:
            with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
                futures = [pool.submit(bring, each) for each in missing]
                for future in concurrent.futures.as_completed(futures):
                    if future.exception():
                        self.stop.set()
                        pool.shutdown(cancel_futures=True)
                        _raise(future.exception(), self.address)
        finally:
            files.write_text(folder / _INDEX, files.to_json(self.index))


def _raise(error: BaseException, address: str) -> None:
    if isinstance(error, FileNotFoundError):
        raise BadConfiguration(f"{address} changes while it is read ({error}); start again when it does not") from None
    raise error


def _wanted(store: Store, name: str, only: str, address: str) -> dict[str, tuple[str, int]]:
    """Tags and sizes of the objects of a data set: of a folder all that is not hidden; a file, and what describes it.

    What is still being brought there counts as not there.

    Raises:
      BadConfiguration: an upload to it has not ended.
    """
    if name:
        looked = (name, *(name + suffix for suffix in BESIDE), uploads.marker(name, uploads.INCOMING))
        entries = {each: entry for each in looked if (entry := store.entry(each))}
    else:
        entries = store.entries(only)
    incoming = [each.removesuffix(uploads.INCOMING) for each in entries if each.endswith(uploads.INCOMING)]
    if incoming and not only:
        raise BadConfiguration(
            f"{address} is not whole: an upload to it has not ended; repeat that: launch/k8s.py data --from=…"
        )
    for each in incoming:
        logging.warning("%s/%s is not whole, so it does not count: an upload to it has not ended", address, each)
    return {
        each: entry
        for each, entry in entries.items()
        if (name or not any(part.startswith(".") for part in each.split("/"))) and not each.startswith(tuple(incoming))
    }


def _files(folder: Path) -> Iterator[Path]:
    """Those that a store may have given; not what is made of them here and lies beside them."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != _INDEX and not path.name.endswith(MADE_HERE):
            yield path


def _read_index(folder: Path) -> dict[str, list[Any]]:
    with contextlib.suppress(OSError, ValueError):
        index = json.loads((folder / _INDEX).read_text())
        return index if isinstance(index, dict) else {}
    return {}


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _is_here(path: Path, entry: tuple[str, int], known: list[Any] | None) -> bool:
    """Whether a file is that of the object as it is now. One whose time has changed is read and compared."""
    if not known or len(known) != 4 or known[0] != entry[0] or not path.is_file():
        return False
    size, modified = _stamp(path)
    if size != entry[1]:
        return False
    return modified == known[2] or files.digest(path) == known[3]


def _make_room(folder: Path, needed: int, address: str) -> None:
    """Removes other data sets, the longest unused first, until there is room. What a process uses stays."""

    def fits() -> bool:
        disk = shutil.disk_usage(folder)
        return disk.free - needed >= min(KEPT_FREE * disk.total, MOST_KEPT_FREE) or not needed

    others = sorted((each for each in folder.parent.iterdir() if each.is_dir() and each != folder), key=_last_used)
    for other in others:
        if fits():
            return
        _remove_unused(other)
    if not fits():
        raise BadConfiguration(
            f"{address} needs {needed / 2**30:.3g} GiB in {folder.parent}, and a tenth of that disk stays free, "
            "at most 10 GiB; free space, or name another --cache_dir"
        )


def _remove_unused(folder: Path) -> None:
    """Removes a folder unless a process uses it."""
    with open(_use_lock(folder), "a+") as guard, contextlib.suppress(BlockingIOError):
        locks.hold(guard, wait=False)
        shutil.rmtree(folder, ignore_errors=True)


def _last_used(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / _INDEX).stat().st_mtime
    return 0.0


def localized(argument: str, what: str, cache_dir: str) -> Path:
    """The path of a user's argument: as it is, or where what lies at that address was brought to."""
    if paths.is_address(argument):
        return brought(what, argument, cache_dir)
    return paths.local(f"--dataset={what}:", argument)


def data_dir(
    named: str,
    kind: str,
    cache_dir: str,
    prepared: bool,
    feed: Callable[[str], None] = lambda what: None,
    patience: float = 600.0,
) -> str:
    """The folder of prepared data: as named, or that of this machine for an address.

    `prepared`: whether the set `kind` is one that is prepared there; else nothing is brought. `feed`, `patience`: as of
    `brought`.
    """
    if not paths.is_address(named):
        return named
    if prepared:
        return str(brought("", named, cache_dir, kind.partition("/")[0].partition(":")[0], feed, patience))
    return str(Path(cache_dir or paths.cache_dir("")) / FOLDER / paths.name_of(named))
