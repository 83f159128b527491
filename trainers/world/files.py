"""Files that are whole or not there: written aside, brought to the disk, then renamed. And what JSON can hold.

Also what lies in a folder, and the digest of a file.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Brings a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk(folder: Path) -> Iterator[Path]:
    """Files at any depth of folders that are not hidden, links followed, and links that lead nowhere; in order.

    Raises:
      OSError: a folder cannot be read.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        where = os.path.realpath(place)
        if where in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(where)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names))


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place beside `path`, for a file or a folder that becomes `path` when the block ends.

    A reader sees the old content or the new. After an error in the block nothing is left of the new one. A file is
    brought to the disk before it is renamed; of a folder that is here already, all is replaced: a process that is
    killed between two renames leaves none, and never a part of one.
    """
    # Containers that share a folder may share the numbers of processes too.
    place = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}")
    old = place.with_name(f"{place.name}.old")
    try:
        yield place
        if not place.is_dir():
            sync(place)
        elif os.path.lexists(path):
            os.rename(path, old)
        try:
            os.replace(place, path)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, path)
            raise
    finally:
        for left in (place, old):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8."""
    with aside(path) as place:
        place.write_text(text, encoding="utf-8")


def without_nan(value: Any) -> Any:
    """A value as JSON can hold it: None for each number that is not finite, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nan(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, **layout: Any) -> str:
    """JSON that every reader takes, which knows no NaN: it has null there. `layout`: arguments of `json.dumps`.

    `trainers.record.reading.numbers` is the way back.
    """
    return json.dumps(without_nan(value), allow_nan=False, **layout)
