"""The GPUs of this machine as NVIDIA's driver has them, and whether TensorFlow sees them. Free of TensorFlow.

Python 3.9 and the standard library are enough: launch/doctor.py asks here before anything is installed.
"""

from __future__ import annotations  # launch/doctor.py runs on Python 3.9 too

import functools
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainers.world import process, programs

# What the loaded driver says of itself. It is the kernel's, so a container sees it too.
DRIVER = Path("/proc/driver/nvidia")
# The last field is unknown to drivers before 510.
_FIELDS = ("index", "name", "driver_version", "memory.total", "compute_cap")

# What `readings` has, and nvidia-smi's names of it.
_READ = {
    "gpu": "index",
    "utilization": "utilization.gpu",
    "memory_mib": "memory.used",
    "clock_mhz": "clocks.sm",
    "temperature": "temperature.gpu",
    "watts": "power.draw",
    "throttled": "clocks_throttle_reasons.active",
    "ecc_errors": "ecc.errors.uncorrected.volatile.total",
}
# Of the bits of that mask, those that say that a GPU is held back. Source: NVIDIA, NVML API, nvmlClocksEventReasons.
THROTTLED = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


class Gpu(NamedTuple):
    """A GPU as nvidia-smi lists it: `memory_mib` in MiB, `capability` as `9.0`, or empty where it is not told."""

    index: int
    name: str
    memory_mib: int
    capability: str


class Driver(NamedTuple):
    """What is known of the driver.

    `version`: of the loaded kernel module, or as nvidia-smi tells it; empty: no driver. `models`: names of the GPUs
    that the kernel lists. `program`: the path of nvidia-smi, empty without one. `gpus`: what it lists. `complaint`:
    what it said where it has failed.
    """

    version: str
    models: tuple[str, ...]
    program: str
    gpus: tuple[Gpu, ...]
    complaint: str


def loaded_version(driver: Path = DRIVER) -> str:
    """The version of the kernel's module, as `550.54.14`; empty where none is loaded."""
    try:
        text = (driver / "version").read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r"Kernel Module\b[^\n]*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else "unknown"


def models(driver: Path = DRIVER) -> tuple[str, ...]:
    """Names of the GPUs that the kernel's module drives."""
    names = []
    for path in sorted(driver.glob("gpus/*/information")):
        try:
            found = re.search(r"^Model:\s*(.*?)\s*$", path.read_text(errors="replace"), re.MULTILINE)
        except OSError:
            continue
        names.append(found.group(1) if found else "unknown")
    return tuple(names)


def ask(program: str, *words: str) -> tuple[str, str]:
    """What nvidia-smi prints, and what it says where it fails: one of the two is empty."""
    answer = programs.ask([program, *words])
    if answer.code == 0 and answer.output.strip():
        return answer.output, ""
    return "", answer.said or f"nvidia-smi ended with code {answer.code}"


def listed() -> list[str]:
    """Names of the GPUs that `nvidia-smi -L` lists; empty where it is not here or fails."""
    program = shutil.which("nvidia-smi")
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID: .*)?$", ask(program, "-L")[0], re.MULTILINE) if program else []


def look(driver: Path = DRIVER) -> Driver:
    """Asks the kernel and nvidia-smi."""
    version, program = loaded_version(driver), shutil.which("nvidia-smi") or ""
    if not program:
        return Driver(version, models(driver), "", (), "")
    for fields in (_FIELDS, _FIELDS[:-1]):
        text, complaint = ask(program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        if text or "not a valid field" not in complaint:
            break
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    gpus = [
        Gpu(int(row[0]), row[1], int(row[3]) if row[3].isdigit() else 0, row[4] if len(row) > 4 else "")
        for row in rows
        if len(row) >= 4 and row[0].isdigit()
    ]
    return Driver(version or (rows[0][2] if gpus else ""), models(driver), program, tuple(gpus), complaint)


def readings(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What each GPU is at, of those that CUDA_VISIBLE_DEVICES names; none where nvidia-smi does not tell.

    `gpu` (its index), `utilization` (percent of the time in which it computed), `memory_mib`, `clock_mhz`,
    `temperature` (°C), `watts`, `throttled` (reasons by which it is slower than it could be), `ecc_errors` (not
    corrected, since the driver was loaded). A number that is not told is None.
    """
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
    chosen = [f"--id={visible}"] if visible else []
    text, _ = ask(program, *chosen, f"--query-gpu={','.join(_READ.values())}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    found = [dict(zip(_READ, row, strict=True)) for row in rows if len(row) == len(_READ) and row[0].isdigit()]
    return [
        {name: _number(value) for name, value in one.items() if name != "throttled"}
        | {"throttled": _reasons(one["throttled"])}
        for one in found
    ]


def _number(text: str) -> float | int | None:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return None  # [N/A], [Not Supported]


def _reasons(mask: str) -> list[str]:
    try:
        bits = int(mask, 16)
    except ValueError:
        return []
    return [name for bit, name in THROTTLED.items() if bits & bit]


def hidden(environment: Mapping[str, str]) -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU, which is how a person asks for the CPU."""
    value = environment.get("CUDA_VISIBLE_DEVICES")
    return value is not None and value.split(",")[0].strip() in ("", "-1", "NoDevFiles", "none", "void")


def unseen(environment: Mapping[str, str], driver: Path = DRIVER) -> str:
    """A line for a process whose TensorFlow sees no GPU, where the driver has some; empty where all is as it should be.

    The kernel is asked first, which takes no time; nvidia-smi only where the kernel lists none.
    """
    if hidden(environment):
        return ""
    names = models(driver) or listed()
    if not names:
        return ""
    value = environment.get("CUDA_VISIBLE_DEVICES")
    with_value = "" if value is None else f", with CUDA_VISIBLE_DEVICES={value}"
    return (
        f"TensorFlow sees no GPU, but the NVIDIA driver has {len(names)} ({', '.join(dict.fromkeys(names))})"
        f"{with_value}: computing on the CPU; python launch/doctor.py says why"
    )


@functools.cache
def warn_of_unseen() -> None:
    """Prints that line, once in a process."""
    line = unseen(os.environ)
    if line:
        process.say(f"warning: {line}")
