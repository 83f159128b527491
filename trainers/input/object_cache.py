"""Data in object stores, `csv:s3://bucket/rows.csv`: brought to a folder of this machine, once for all its processes.

A file is whole or not there. The index of a folder holds each object's tag, and size, time and SHA-256 of the file:
what has changed in the store comes anew, and so does a file that is not what it was. Processes take turns to bring a
data set; it is not removed while one of them lives.
"""

import concurrent.futures
import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from absl import logging

from trainers.input import uploads
from trainers.input.manifests import BESIDE, MADE_HERE, digest_of
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files, locks
from trainers.world.stores import Store

FOLDER = "data"
# Other data sets are removed, the longest unused first, before less of the disk than this is free.
KEPT_FREE = 0.1
_AT_ONCE, _INDEX_SECONDS, _PATIENCE = 16, 20.0, 120.0
_INDEX = ".index.json"
# Locks of what this process uses, held until it ends.
_USED: dict[Path, IO] = {}


def brought(what: str, argument: str, cache_dir: str, only: str = "") -> Path:
    """Where what lies at an address lies on this machine, after it was brought there.

    `what`: the kind of data; of `images` a folder, else a file; empty: a folder of prepared data, of which `only` is
    brought.

    Raises:
      BadConfiguration: there is nothing, it does not fit, or the store refuses.
      StoreLost: the store cannot be reached.
    """
    address = paths.place(f"--dataset={what}:" if what else "--data_dir", argument)
    is_folder = what in ("", "images")
    base, name = (address, "") if is_folder else address.rsplit("/", 1)
    folder = Path(cache_dir or paths.cache_dir("")) / FOLDER / paths.name_of(address)
    if folder / only not in _USED:
        folder.parent.mkdir(parents=True, exist_ok=True)
        used = open(_use_lock(folder), "a+")  # noqa: SIM115 - held until the process ends
        locks.share(used)
        folder.mkdir(exist_ok=True)
        with open(folder.with_name(f".{folder.name}.bring"), "a+") as turn:
            locks.hold(turn, wait=True)
            _bring(Store(base, _PATIENCE), folder, name, only, address)
        _USED[folder / only] = used
    return folder / name if name else folder


def _use_lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _bring(store: Store, folder: Path, name: str, only: str, address: str) -> None:
    wanted = _wanted(store, name, only, address)
    if not wanted and only:
        return  # it is prepared here
    if not wanted or (name and name not in wanted):
        raise BadConfiguration(f"{address} is not there; name what is")
    index = _read_index(folder)
    missing = {each: entry for each, entry in wanted.items() if not _is_here(folder / each, entry, index.get(each))}
    for path in list(_files(folder / only)):
        if path.relative_to(folder).as_posix() not in wanted or path.name.startswith("."):
            path.unlink()
    _make_room(folder, sum(size for _, size in missing.values()), address)
    index = {each: entry for each, entry in index.items() if each not in missing}
    guard, kept = threading.Lock(), time.monotonic()

    def bring(each: str) -> None:
        nonlocal kept
        path, (tag, _) = folder / each, wanted[each]
        path.parent.mkdir(parents=True, exist_ok=True)
        store.fetch(each, path)
        entry = [tag, *_stamp(path), digest_of(path)]
        with guard:
            index[each] = entry
            if time.monotonic() - kept > _INDEX_SECONDS:
                files.write_text(folder / _INDEX, files.to_json(index))
                kept = time.monotonic()

    try:
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            futures = [pool.submit(bring, each) for each in missing]
            for future in concurrent.futures.as_completed(futures):
                if future.exception():
                    pool.shutdown(cancel_futures=True)
                    _raise(future.exception(), address)
    finally:
        files.write_text(folder / _INDEX, files.to_json(index))


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
    return modified == known[2] or digest_of(path) == known[3]


def _make_room(folder: Path, needed: int, address: str) -> None:
    """Removes other data sets, the longest unused first, until there is room. What a process uses stays."""

    def fits() -> bool:
        disk = shutil.disk_usage(folder)
        return disk.free - needed >= KEPT_FREE * disk.total or not needed

    others = sorted((each for each in folder.parent.iterdir() if each.is_dir() and each != folder), key=_last_used)
    for other in others:
        if fits():
            return
        with open(_use_lock(other), "a+") as guard, contextlib.suppress(BlockingIOError):
            locks.hold(guard, wait=False)
            shutil.rmtree(other, ignore_errors=True)
    if not fits():
        raise BadConfiguration(
            f"{address} needs {needed / 2**30:.3g} GiB in {folder.parent}, and a tenth of that disk stays free; free "
            "space, or name another --cache_dir"
        )


def _last_used(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / _INDEX).stat().st_mtime
    return 0.0


def localized(argument: str, what: str, cache_dir: str) -> Path:
    """The path of a user's argument: as it is, or where what lies at that address was brought to."""
    if paths.is_address(argument):
        return brought(what, argument, cache_dir)
    return paths.local(f"--dataset={what}:", argument)


def data_dir(named: str, kind: str, cache_dir: str, prepared: bool) -> str:
    """The folder of prepared data: as named, or that of this machine for an address.

    `prepared`: whether the set `kind` is one that is prepared there; else nothing is brought.
    """
    if not paths.is_address(named):
        return named
    if prepared:
        return str(brought("", named, cache_dir, kind.partition("/")[0].partition(":")[0]))
    return str(Path(cache_dir or paths.cache_dir("")) / FOLDER / paths.name_of(named))
