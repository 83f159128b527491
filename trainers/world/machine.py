"""What a run or a measurement was made on: versions, commit, device, cores. Free of TensorFlow until `facts`."""

from __future__ import annotations  # launch/gpu_check.py runs on Python 3.9 too

import contextlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "tensorboard", "numpy", "absl-py")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def commit() -> str | None:
    """The commit of the checkout, with `-dirty` if it has changes; an image carries it in the file COMMIT."""
    with contextlib.suppress(OSError):
        return (ROOT / "COMMIT").read_text().strip()
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.strip()
    return None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory of this machine, or of the container (control group) that holds this process if it has less.

    Whoever else uses it does not count: the number is the same whenever it is asked for.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        total = re.search(r"^MemTotal:\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
        found += [int(total[1]) * 1024] if total else []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # `max`: without a limit
            found.append(int((groups / name).read_text()))
    return min(found)


def facts() -> dict[str, Any]:
    """Device, cores, load average and versions, for measurements."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else "CPU"
    return {
        "device": f"GPU:0 ({name})" if gpus else "CPU:0",
        "cores": cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }
