"""GPUs as the driver has them against those that TensorFlow sees, why they differ, and how they are linked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from launch.health.computing import Seen
from launch.health.libraries import CODES, DRIVER_LIBRARY, Loaded
from launch.health.packages import NOT_INSTALLED
from launch.health.rows import BAD, NOT_HERE, OK, WARNING, Row
from trainers.world import nvidia
from trainers.world.nvidia import Driver
from trainers.world.programs import ask, one_line

# The oldest driver that a version of CUDA runs with, for Linux (NVIDIA, "CUDA minor version compatibility").
OLDEST_DRIVER = {"11": (450, 80), "12": (525, 60), "13": (580, 65)}
INSTALL_DRIVER = "install NVIDIA's driver (Debian: nvidia-driver; Ubuntu: ubuntu-drivers install) and restart"
TOOLKIT = (
    "install nvidia-container-toolkit on the machine, then docker run --gpus all, or podman run "
    "--device nvidia.com/gpu=all"
)
BLACKWELL = "https://github.com/tensorflow/tensorflow/issues/89272"
_NVIDIA, _DISPLAY = "0x10de", "0x03"


class Places(NamedTuple):
    """Where the kernel tells of devices; tests plant theirs."""

    driver: Path = nvidia.DRIVER
    dev: Path = Path("/dev")
    pci: Path = Path("/sys/bus/pci/devices")
    root: Path = Path("/")


HERE = Places()


class Facts(NamedTuple):
    """All that explains why TensorFlow does not see a GPU. `cuda`: the version that the locks install, as `12.9`."""

    driver: Driver
    seen: Seen
    loaded: Loaded | None
    cuda: str
    environment: Mapping[str, str]
    places: Places = HERE


def in_container(root: Path = Path("/")) -> bool:
    """Whether this process runs in a container."""
    if any((root / name).exists() for name in (".dockerenv", "run/.containerenv")):
        return True
    try:
        return "kubepods" in (root / "proc/1/cgroup").read_text()
    except OSError:
        return False


def cards_in_slots(pci: Path) -> list[str]:
    """PCI addresses of NVIDIA's GPUs, driven or not."""
    found = []
    for device in sorted(pci.glob("*")):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(_DISPLAY):
            found.append(device.name)
    return found


def driver_row(driver: Driver, places: Places = HERE) -> Row:
    """Whether a driver is here, and whether nvidia-smi can talk to it."""
    if driver.complaint:
        said = one_line(driver.complaint, 200)
        if "version mismatch" in said:
            return Row("driver", BAD, said, "the driver was updated and the old one still runs: restart the machine")
        if driver.version:
            return Row(
                "driver", BAD, f"{driver.version} is loaded, and nvidia-smi fails: {said}", "restart the machine"
            )
        slots = cards_in_slots(places.pci)
        if slots:
            return Row("driver", BAD, f"no driver for the GPU {slots[0]}: {said}", INSTALL_DRIVER)
        return Row("driver", WARNING, f"nvidia-smi is here, and finds no driver or GPU: {said}", INSTALL_DRIVER)
    if driver.gpus:
        return Row("driver", OK, driver.version)
    if driver.version and in_container(places.root):
        text = f"{driver.version} runs on the machine, and nothing of it is in this container"
        return Row("driver", BAD, text, TOOLKIT)
    if driver.version:
        return Row(
            "driver",
            BAD,
            f"{driver.version} is loaded, and nvidia-smi is missing",
            "install nvidia-utils of that version",
        )
    slots = cards_in_slots(places.pci)
    if slots:
        return Row(
            "driver", BAD, f"an NVIDIA GPU is in the machine ({', '.join(slots)}), and no driver", INSTALL_DRIVER
        )
    return Row("driver", NOT_HERE, "no NVIDIA GPU and no driver")


def cuda_row(driver: Driver, cuda: str) -> Row | None:
    """The driver's version against the CUDA of the locks; None without a driver."""
    found = re.match(r"(\d+)\.(\d+)", driver.version)
    least = OLDEST_DRIVER.get(cuda.partition(".")[0])
    if not found or not least:
        return None
    text = f"driver {driver.version}; CUDA {cuda} of requirements/gpu.txt needs {least[0]}.{least[1]} or newer"
    if (int(found.group(1)), int(found.group(2))) < least:
        return Row("driver and CUDA", BAD, text, f"install a driver {least[0]} or newer and restart")
    return Row("driver and CUDA", OK, text)


def _binary(name: str) -> tuple[str, int, int]:
    """`sm_89` → ("sm", 8, 9); `compute_120` → ("compute", 12, 0); letters after the digits are left out."""
    kind, _, digits = name.partition("_")
    number = re.match(r"\d+", digits)
    value = int(number.group()) if number else 0
    return kind, value // 10, value % 10


def capability_row(driver: Driver, capabilities: list[str]) -> Row | None:
    """Whether the wheels hold kernels for each GPU. None where that is not known.

    A binary runs on the same major capability and a minor at least its own. TensorFlow's builds mean by `compute_90` a
    binary and PTX, which the driver compiles for anything newer: that takes minutes, and fails on Blackwell.
    """
    known = [gpu for gpu in driver.gpus if re.fullmatch(r"\d+\.\d+", gpu.capability)]
    if not known or not capabilities:
        return None
    binaries, held = [_binary(name) for name in capabilities], ", ".join(capabilities)
    for gpu in known:
        major, minor = (int(part) for part in gpu.capability.split("."))
        if any(major == high and minor >= low for _, high, low in binaries):
            continue
        text = f"{gpu.name} has {gpu.capability}, and TensorFlow's wheel holds {held}"
        if any(kind == "compute" and (major, minor) >= (high, low) for kind, high, low in binaries):
            text += f": its kernels are compiled from PTX, which takes minutes or fails ({BLACKWELL})"
            remedy = (
                "NVIDIA's own image of TensorFlow, or a wheel that holds the capability; CUDA_CACHE_MAXSIZE=4294967296"
            )
            return Row("compute capability", BAD if major >= 10 else WARNING, text, remedy)
        return Row(
            "compute capability", BAD, f"{text}: it cannot run", "use a newer GPU, or CUDA_VISIBLE_DEVICES without it"
        )
    has = ", ".join(dict.fromkeys(gpu.capability for gpu in known))
    return Row("compute capability", OK, f"{has}; TensorFlow's wheel holds {held}")


def _wrong_devices(facts: Facts) -> tuple[str, str] | None:
    """What CUDA_VISIBLE_DEVICES names that is not there: CUDA stops at the first."""
    value, count = facts.environment.get("CUDA_VISIBLE_DEVICES"), len(facts.driver.gpus)
    if value is None:
        return None
    if nvidia.hidden(facts.environment):
        return f"CUDA_VISIBLE_DEVICES={value!r} hides all GPUs", "unset CUDA_VISIBLE_DEVICES"
    for name in value.split(","):
        if name.strip().isdigit() and int(name) >= count:
            return (
                f"CUDA_VISIBLE_DEVICES={value} names GPU {name.strip()}, and nvidia-smi lists {count}: it and those "
                "after it are left out",
                "name GPUs that nvidia-smi -L lists, or unset CUDA_VISIBLE_DEVICES",
            )
    return None


def _devices(facts: Facts) -> tuple[str, str] | None:
    """What is wrong with the files in /dev by which a process reaches the driver."""
    dev = facts.places.dev
    control = dev / "nvidiactl"
    if not control.exists() and not (dev / "dxg").exists():
        if in_container(facts.places.root):
            return f"this container has no {control}", TOOLKIT
        return f"{control} is not there", "run nvidia-smi once as root, or nvidia-modprobe -u -c=0"
    closed = [str(path) for path in sorted(dev.glob("nvidia[0-9c]*")) if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        return f"this user cannot open {closed[0]}", "join the group that owns it (ls -l /dev/nvidia*; often video)"
    return None


def _libraries(facts: Facts) -> list[tuple[str, str]]:
    """Libraries that do not load, and what the driver says to CUDA."""
    loaded, causes = facts.loaded, []
    if loaded is None:
        return []
    errors = dict(loaded.errors)
    if DRIVER_LIBRARY in errors:
        container = in_container(facts.places.root)
        remedy = TOOLKIT if container else "install libcuda of the driver's version (Debian: libcuda1), then ldconfig"
        causes.append((f"{DRIVER_LIBRARY}: {errors.pop(DRIVER_LIBRARY)}", remedy))
    elif loaded.code:
        text, remedy = CODES.get(loaded.code, ("CUDA does not start", "look at dmesg, and restart the machine"))
        causes.append((f"cuInit returns {loaded.code}: {text}", remedy))
    missing = [name for name, error in errors.items() if "No such file" in error]
    if missing:
        remedy = "LOCKSTEP_DEVICE=gpu launch/local.sh installs requirements/gpu.txt"
        causes.append((f"not installed: {', '.join(missing)}", remedy))
    for name, error in errors.items():
        if name not in missing:
            causes.append((f"{name} does not load: {error}", "rm -r .venv && launch/local.sh"))
    return causes


def causes(facts: Facts) -> list[tuple[str, str]]:
    """Why TensorFlow sees fewer GPUs than the driver has: each cause that was found, and its remedy."""
    found = [_wrong_devices(facts)]
    if facts.seen.build and not facts.seen.build.get("is_cuda_build"):
        found.append(
            ("this TensorFlow was built without CUDA", "install tensorflow, not tensorflow-cpu: launch/local.sh")
        )
    found += [_devices(facts), *_libraries(facts)]
    for row in (cuda_row(facts.driver, facts.cuda), capability_row(facts.driver, facts.seen.capabilities)):
        if row is not None and row.status == BAD:
            found.append((row.found, row.remedy))
    return [cause for cause in found if cause is not None]


def _said(log: str) -> str:
    """The last lines of TensorFlow's log that speak of GPUs."""
    lines = [line for line in log.splitlines() if re.search(r"cuda|gpu|dlerror|dlopen", line, re.IGNORECASE)]
    return one_line(" / ".join(line.partition("] ")[2] or line for line in lines[-2:])) or "nothing"


def seen_rows(facts: Facts) -> list[Row]:
    """TensorFlow's GPUs against the driver's; a row for each cause where they differ."""
    title, has = "GPUs of TensorFlow", len(facts.driver.gpus) or len(facts.driver.models)
    seen = facts.seen.gpus
    if facts.seen.missing:
        return [Row(title, NOT_HERE, facts.seen.missing)]
    if seen is None:
        return [Row(title, BAD, f"TensorFlow does not start: {facts.seen.failure}", NOT_INSTALLED.partition(": ")[2])]
    names = ", ".join(dict.fromkeys(gpu["name"] for gpu in seen))
    text = f"{len(seen)} of the {has} that the driver has{': ' if names else ''}{names}"
    if len(seen) >= has:
        return [Row(title, OK, text) if seen else Row(title, NOT_HERE, "none, and the driver has none")]
    chosen = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if seen and chosen and len(seen) == len(chosen.split(",")):
        return [Row(title, OK, f"{text}, as CUDA_VISIBLE_DEVICES={chosen} chooses")]
    found = causes(facts)
    if nvidia.hidden(facts.environment):
        return [Row(title, WARNING, f"{text}: {found[0][0]}", found[0][1])]
    if not found:
        return [
            Row(title, BAD, f"{text}; TensorFlow said: {_said(facts.seen.log)}", "LOCKSTEP_DEVICE=gpu launch/local.sh")
        ]
    return [Row(title, BAD, f"{text}: {cause}", remedy) for cause, remedy in found]


def links(text: str) -> dict[tuple[str, str], str]:
    """The matrix of `nvidia-smi topo -m`: two GPUs → `NV18`, `PIX`, `PXB`, `PHB`, `NODE` or `SYS`."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split("\t") for line in text.splitlines()]
    lines = [[cell.strip() for cell in line] for line in lines]
    head = next((line for line in lines if "GPU0" in line and line[0] == ""), None)
    if head is None:
        return {}
    found = {}
    for line in lines:
        if re.fullmatch(r"GPU\d+", line[0]):
            for other, cell in zip(head[1:], line[1:]):  # noqa: B905 - Python 3.9; a row may be longer
                if re.fullmatch(r"GPU\d+", other) and int(other[3:]) > int(line[0][3:]):
                    found[line[0], other] = cell
    return found


def link_row(driver: Driver) -> tuple[Row, bool]:
    """How the GPUs are linked, and whether NVLink joins all of them."""
    if len(driver.gpus) < 2:
        return Row("links", NOT_HERE, "fewer than two GPUs"), False
    answer = ask([driver.program, "topo", "-m"])
    found = links(answer.output)
    if not found:
        return Row("links", WARNING, f"nvidia-smi topo -m: {answer.said or 'no table'}", "run it and look"), False
    pairs: dict[str, int] = {}
    for kind in found.values():
        pairs[kind] = pairs.get(kind, 0) + 1
    nvlink = all(kind.startswith("NV") for kind in pairs)
    said = ", ".join(f"{count} pair{'s' if count > 1 else ''} {kind}" for kind, count in sorted(pairs.items()))
    if nvlink:
        return Row("links", OK, f"NVLink: {said}"), True
    if any(kind.startswith("NV") for kind in pairs):
        apart = ", ".join(f"{a}–{b}" for (a, b), kind in found.items() if not kind.startswith("NV"))
        remedy = "for a run on some of them, choose GPUs that NVLink joins: CUDA_VISIBLE_DEVICES"
        return Row("links", WARNING, f"NVLink does not join all: {said}; without it {apart}", remedy), False
    across = "; SYS crosses the sockets of the CPUs" if "SYS" in pairs else ""
    return Row("links", OK, f"PCIe: {said}{across}"), False


def gpu_rows(facts: Facts) -> list[Row]:
    """The driver, its GPUs, and what TensorFlow sees of them."""
    driver = facts.driver
    found = [driver_row(driver, facts.places)]
    if found[0].status == NOT_HERE:
        return [*found, *seen_rows(facts)]
    seen = seen_rows(facts)
    # What is a cause already is not told a second time.
    others = [cuda_row(driver, facts.cuda), capability_row(driver, facts.seen.capabilities)]
    more = [row for row in others if row is not None and not any(row.found in each.found for each in seen)]
    if driver.gpus:
        names = ", ".join(f"{gpu.index}: {gpu.name} {gpu.memory_mib / 1024:.0f} GiB" for gpu in driver.gpus)
        found.append(Row("GPUs", OK, names))
    elif driver.models:
        found.append(Row("GPUs", WARNING, f"the kernel lists {', '.join(driver.models)}", "see the row of the driver"))
    return [*found, *seen, *more]
