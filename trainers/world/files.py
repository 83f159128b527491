"""Files that are whole or not there: written aside, brought to the disk, then renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Brings a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place beside `path`, for a file or a folder that becomes `path` when the block ends.

    A reader sees the old content or the new. After an error in the block nothing is left of the new one. A file is
    brought to the disk before it is renamed; of a folder that is here already, all is replaced.
    """
    place = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield place
        if place.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            sync(place)
        os.replace(place, path)
    finally:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8."""
    with aside(path) as place:
        place.write_text(text, encoding="utf-8")
