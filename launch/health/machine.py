"""Space on disks, memory, shared memory and open files of this machine."""

from __future__ import annotations

import os
import re
import resource
import shutil
from pathlib import Path

from launch.health.rows import BAD, NOT_HERE, OK, WARNING, Row, gib

GIB = 2**30
# Below the first a run cannot be expected to end, below the second a long one may not.
DISK = (GIB, 5 * GIB)
MEMORY = (GIB, 4 * GIB)
# NCCL and tf.data share memory between processes; a container has 64 MiB unless it is told otherwise.
SHARED_MEMORY = GIB
OPEN_FILES = (256, 1024)
FEWEST_FREE_ENTRIES = 1000


def nearest(path: Path) -> Path:
    """The path, or the folder above it that exists."""
    path = Path(path).expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def disk(name: str, path: Path, limits: tuple[int, int] = DISK, writes: bool = True) -> Row:
    """Free space where a path lies or will lie, and whether it can be written. `limits`: bytes for bad and warning."""
    place = nearest(path)
    title = f"disk: {name}"
    try:
        free, entries = shutil.disk_usage(place).free, os.statvfs(place)
    except OSError as error:
        return Row(title, BAD, f"{place}: {error.strerror}", f"mount it again, or name another --{name}")
    found = f"{gib(free)} free in {place}"
    if writes and not os.access(place, os.W_OK | os.X_OK):
        return Row(title, BAD, f"{place} cannot be written", f"name another --{name}, or make it yours: chown")
    if free < limits[0]:
        return Row(title, BAD, found, f"free space there, or name another place; {gib(limits[0])} is the least")
    if entries.f_files and entries.f_favail < FEWEST_FREE_ENTRIES:
        return Row(title, BAD, f"{entries.f_favail} more files fit in {place}", "remove files there: df -i shows it")
    if free < limits[1]:
        return Row(title, WARNING, found, f"a long run may need {gib(limits[1])}: free space, or name another place")
    return Row(title, OK, found)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Row:
    """Memory that is available: of the machine, or of the container (control group) that holds this process."""
    try:
        text = (proc / "meminfo").read_text()
    except OSError:
        return Row("memory", NOT_HERE, f"{proc}/meminfo is not here")
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    total = int(found.get("MemTotal", 0)) * 1024
    free = int(found.get("MemAvailable", found.get("MemFree", 0))) * 1024
    where = ""
    pairs = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit_file, usage_file in pairs:
        limit, usage = _number(groups / limit_file), _number(groups / usage_file)
        if limit is not None and usage is not None and limit < total:
            where, total, free = " of this container's", limit, min(free, max(limit - usage, 0))
    text = (
        f"{gib(free)} available{where} of {gib(total)}"
        if not where
        else f"{gib(free)} of this container's {gib(total)}"
    )
    if free < MEMORY[0]:
        return Row("memory", BAD, text, "end what holds it (ps aux --sort=-rss), or raise the container's --memory")
    if free < MEMORY[1]:
        return Row("memory", WARNING, text, "enough for small models; end what holds it: ps aux --sort=-rss")
    return Row("memory", OK, text)


def shared_memory(gpus: int, place: Path = Path("/dev/shm")) -> Row:
    """Space in /dev/shm, through which NCCL moves data between the GPUs of a machine. `gpus`: how many there are."""
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return Row("shared memory", WARNING, f"{place} is not here", "mount it: mount -t tmpfs tmpfs /dev/shm")
    found = f"{gib(usage.free)} free of {gib(usage.total)} in {place}"
    if usage.free >= SHARED_MEMORY:
        return Row("shared memory", OK, found)
    remedy = "a container: --shm-size=1g (Kubernetes: an emptyDir with medium Memory); else remove files there"
    return Row("shared memory", BAD if gpus > 1 else WARNING, found, remedy)


def open_files() -> Row:
    """How many files a process may hold open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Row("open files", OK, "no limit")
    most = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
    found = f"at most {soft} (ulimit -n); it can be raised to {most}"
    if soft >= OPEN_FILES[1]:
        return Row("open files", OK, found)
    remedy = "ulimit -n 4096, or nofile in /etc/security/limits.conf"
    return Row("open files", BAD if soft < OPEN_FILES[0] else WARNING, found, remedy)
