"""What this machine and this process are at just now: load, memory, and the GPUs. Free of TensorFlow."""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

from trainers.world import machine, nvidia


def _kibibytes(path: str, name: str) -> int:
    """A number of a file of the kernel that has lines `Name:  123 kB`."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(name)


def facts() -> dict[str, Any]:
    """`cores`, `load` (of the last minute), `free_mib`, `resident_mib`: those of them that the kernel tells."""
    known: dict[str, Any] = {"cores": machine.cores()}
    with contextlib.suppress(OSError):
        known["load"] = round(os.getloadavg()[0], 2)
    with contextlib.suppress(OSError, ValueError):
        known["free_mib"] = _kibibytes("/proc/meminfo", "MemAvailable") >> 10
        known["resident_mib"] = _kibibytes("/proc/self/status", "VmRSS") >> 10
    return known


def gpus() -> list[dict[str, Any]]:
    """What nvidia-smi says of each GPU of this process, as `trainers.world.nvidia.readings`; none without it."""
    return [] if nvidia.hidden(os.environ) else nvidia.readings(os.environ)


@functools.cache
def processes() -> str:
    """Which processes the numbers of processes here are of: of this machine since its start, and of this container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def state_of_process(pid: int) -> str:
    """Of one of `processes`: `gone`, `stopped` (SIGSTOP, a debugger) or `runs`."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(state, "runs")
