"""The file system of `run_dir`: whether what the trainers do to files works there, and whether machines share it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from launch.health.machine import nearest
from launch.health.rows import BAD, NOT_HERE, OK, WARNING, Row
from trainers.world import files

MOUNTS = Path("/proc/mounts")
SHARED = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "9p",
    "virtiofs",
    "afs",
    "pvfs",
    "wekafs",
)
# Stores of objects behind a file system: a rename copies, and is not one step.
OBJECTS = ("s3fs", "gcsfuse", "goofys", "mountpoint-s3", "mount-s3", "blobfuse", "rclone", "juicefs", "geesefs")
# What is lost with the machine or the container.
PASSING = ("tmpfs", "ramfs", "overlay")
# Clocks of a file server and of this machine that differ by more confuse who reads times of files.
MOST_SKEW = 2.0


def mount_of(path: Path, mounts: Path = MOUNTS) -> tuple[str, str]:
    """Where the file system that holds a path is mounted, and its type; empty where that is not known."""
    place, found = nearest(path).resolve(), ("", "")
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal.group(1), 8)), fields[1])
        # Of two mounts at one point the later one is seen.
        inside = place == Path(point) or Path(point) in place.parents
        if inside and len(point) >= len(found[0]):
            found = (point, fields[2])
    return found


def is_shared(kind: str) -> bool:
    """Whether a type of file system is one that several machines see."""
    name = kind.partition("fuse.")[2] or kind
    return name.startswith((*SHARED, *OBJECTS, "sshfs"))


def sharing_row(path: Path, machines: int, mounts: Path = MOUNTS) -> Row:
    """Whether other machines see the path. `machines`: over how many the run goes, as far as it is known."""
    point, kind = mount_of(path, mounts)
    if not kind:
        return Row("file system", NOT_HERE, f"{mounts} does not tell")
    name = kind.partition("fuse.")[2] or kind
    text = f"{kind} at {point}: {'machines can share it' if is_shared(kind) else 'of this machine alone'}"
    if name.startswith(OBJECTS):
        remedy = "name the address itself: --run_dir=s3://…, gs://… or az://…"
        return Row("file system", WARNING, f"{text}; a store of objects, where a rename is not one step", remedy)
    if machines > 1 and not is_shared(kind):
        remedy = "name a --run_dir that all workers see, on NFS say"
        return Row("file system", BAD, f"{text}, and {machines} machines are named", remedy)
    if name in PASSING:
        what = "the container" if name == "overlay" else "the machine's memory"
        return Row("file system", WARNING, f"{text}; runs are lost with {what}", "mount a volume for --run_dir")
    return Row("file system", OK, text)


def store_row(address: str) -> Row:
    """What is known of a run's address in an object store without asking it: whether the package for it is here."""
    if importlib.util.find_spec("obstore") is None:
        remedy = "run python3 launch/environment.py storage"
        text = f"{address} needs the package obstore, which this Python does not have"
        return Row("object store", WARNING, text, remedy)
    return Row("object store", OK, f"{address}: obstore is installed; the store itself was not asked")


# ----------------------------------------------------------------------------------------------------------------------
# What is tried in a folder of its own.


def _rename(folder: Path) -> None:
    for text in ("old", "new"):
        files.write_text(folder / "renamed", text)
    if (folder / "renamed").read_text() != "new" or [path.name for path in folder.iterdir()] != ["renamed"]:
        raise OSError(0, "a file that was renamed over another is not the new one")


def _rename_folder(folder: Path) -> None:
    with files.aside(folder / "checkpoint") as place:
        place.mkdir()
        (place / "values").write_bytes(b"1")
    (folder / "checkpoint/values").read_bytes()


def _lock(folder: Path) -> None:
    with open(folder / "locked", "a+") as one, open(folder / "locked", "a+") as other:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise OSError(0, "a lock that is held was given a second time")


def _append(folder: Path) -> None:
    with open(folder / "appended", "a") as one, open(folder / "appended", "a") as other:
        for stream, text in ((one, "1\n"), (other, "2\n"), (one, "3\n")):
            stream.write(text)
            stream.flush()
    if (folder / "appended").read_text() != "1\n2\n3\n":
        raise OSError(0, "lines that were appended are missing or in another order")


def _sync(folder: Path) -> None:
    (folder / "synced").write_bytes(b"1" * 4096)
    files.sync(folder / "synced")
    files.sync(folder)


_NO_STEP = "runs would be torn there: name a --run_dir on another file system"
# Name, what is tried, how bad it is where it fails, and what to do.
TRIALS: tuple[tuple[str, Callable[[Path], None], str, str], ...] = (
    ("rename", _rename, BAD, _NO_STEP),
    ("rename of a folder", _rename_folder, BAD, _NO_STEP),
    ("append", _append, BAD, _NO_STEP),
    ("fsync", _sync, BAD, _NO_STEP),
    (
        "lock",
        _lock,
        WARNING,
        "two runs in one --run_dir are not noticed there: give each its own, or mount it with locks",
    ),
)


def trial_rows(path: Path) -> list[Row]:
    """Renames, appends, syncs and locks, in a folder that is made beside the runs and removed."""
    place, found = nearest(path), []
    for name, trial, severity, remedy in TRIALS:
        try:
            folder = Path(tempfile.mkdtemp(prefix=".doctor.", dir=place))
        except OSError as error:
            return [Row("files", BAD, f"{place}: {error.strerror}", "name a --run_dir that can be written")]
        began = time.monotonic()
        try:
            trial(folder)
            found.append(Row(name, OK, f"works in {place}, {(time.monotonic() - began) * 1e3:.1f} ms"))
        except OSError as error:
            full = error.errno in (28, 122)  # ENOSPC, EDQUOT
            found.append(
                Row(
                    name,
                    BAD if full else severity,
                    f"{place}: {error.strerror}",
                    "free space there" if full else remedy,
                )
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return found


def clock_row(path: Path, mounts: Path = MOUNTS) -> Row:
    """The clock of the file server against this machine's, by the time that it gives a new file."""
    _, kind = mount_of(path, mounts)
    if not is_shared(kind):
        return Row("clock of the file server", NOT_HERE, "not measured: no server gives the files their times")
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor.", dir=nearest(path)) as file:
            before = time.time()
            file.write(b"1")
            file.flush()
            os.fsync(file.fileno())
            skew = os.stat(file.name).st_mtime - (before + time.time()) / 2
    except OSError as error:
        return Row("clock of the file server", WARNING, f"not measured: {error.strerror}", "see the rows of the files")
    text = f"{skew:+.2f} s from this machine's"
    if abs(skew) > MOST_SKEW:
        return Row("clock of the file server", WARNING, text, "run chrony or systemd-timesyncd on both")
    return Row("clock of the file server", OK, text)
