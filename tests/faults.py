"""Faults as they are on real machines, planted: programs on the PATH, folders of the kernel, calls that are refused."""

import ctypes
import platform
import struct
import sys
import time
from pathlib import Path

# What nvidia-smi prints where it fails.
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running."
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54"
H100 = ("NVIDIA H100 80GB HBM3", "81559", "9.0")
RTX_5090 = ("NVIDIA GeForce RTX 5090", "32607", "12.0")
VERSION = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Oct 19 18:56:32 UTC 2023\n"
    "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
)
OPEN_VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U16-I3-B03-02-4)  "
    "Thu Feb 22 01:25:25 UTC 2024\n"
)


def write_program(folder, name, script):
    """A program of a shell script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def has_ended(pid, seconds=20):
    """Whether a process ends within some seconds; one that nobody has asked after yet has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def smi(cards, driver="550.54.14", topology=""):
    """A script that answers as nvidia-smi does on a machine with these cards (name, MiB, capability)."""
    rows = "\n".join(f"{i}, {name}, {driver}, {mib}, {cap}" for i, (name, mib, cap) in enumerate(cards))
    old = "\n".join(f"{i}, {name}, {driver}, {mib}" for i, (name, mib, _) in enumerate(cards))
    short = "\n".join(f"GPU {i}: {name} (UUID: GPU-{i}b1c)" for i, (name, _, _) in enumerate(cards))
    known = rows if all(cap for _, _, cap in cards) else ""
    return f"""case "$*" in
*compute_cap*) if [ -z '{known}' ]; then echo 'Field "compute_cap" is not a valid field to query.'; exit 2; fi
echo '{known}' ;;
*--query-gpu=*) echo '{old}' ;;
"topo -m") printf '%b' '{topology}' ;;
-L) echo '{short}' ;;
*) exit 1 ;;
esac"""


def failing(text, code):
    """A script that prints and ends with a code."""
    return f"cat <<'END'\n{text}\nEND\nexit {code}"


def kernel(folder, version, models=(), text=VERSION):
    """The folder /proc/driver/nvidia of a driver that is loaded."""
    folder.mkdir(parents=True)
    (folder / "version").write_text(text.format(version))
    for i, model in enumerate(models):
        card = folder / f"gpus/0000:{i:02x}:00.0"
        card.mkdir(parents=True)
        (card / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 24\nGPU UUID: \t GPU-{i}b1c\n")
    return folder


def topology(kinds, gpus):
    """The table of `nvidia-smi topo -m`: `kinds` gives each pair's link."""
    head = (
        "\\t\\033[4m"
        + "\\t".join(f"GPU{i}" for i in range(gpus))
        + "\\tCPU Affinity\\tNUMA Affinity\\tGPU NUMA ID\\033[0m\\n"
    )
    lines = [
        f"GPU{i}\\t"
        + "\\t".join(" X " if i == j else kinds[min(i, j), max(i, j)] for j in range(gpus))
        + "\\t0-31\\t0\\t\\tN/A\\n"
        for i in range(gpus)
    ]
    return head + "".join(lines) + "\\nLegend:\\n\\n  X    = Self\\n"


NUMBERS = {"x86_64": {"flock": 73, "fsync": 74, "rename": 82}, "aarch64": {"flock": 32, "fsync": 82, "rename": 38}}


def refuse(call, error):
    """From now on the kernel refuses a call in this process, as a file system without it does (seccomp)."""
    number = NUMBERS[platform.machine()][call]
    program = [
        struct.pack("HBBI", 0x20, 0, 0, 0),  # load the number of the call
        struct.pack("HBBI", 0x15, 0, 1, number),  # if it is that one
        struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | error),  # it returns the error
        struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000),  # else it is allowed
    ]
    code = ctypes.create_string_buffer(b"".join(program))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filters, 0, 0):
        sys.exit(f"seccomp: {ctypes.get_errno()}")
