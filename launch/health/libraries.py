"""Which of CUDA's libraries load, and whether the driver answers CUDA: tried in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainers.world import programs

ROOT = Path(__file__).resolve().parents[2]
# Names of the libraries that TensorFlow opens, by CUDA's major version. A library comes after those that it needs.
SONAMES = {
    "12": (
        "libcudart.so.12",
        "libnvJitLink.so.12",
        "libcublasLt.so.12",
        "libcublas.so.12",
        "libcusparse.so.12",
        "libcusolver.so.11",
        "libcufft.so.11",
        "libcudnn.so.9",
    ),
    "13": (
        "libcudart.so.13",
        "libnvJitLink.so.13",
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libcusparse.so.12",
        "libcusolver.so.12",
        "libcufft.so.12",
        "libcudnn.so.9",
    ),
}
# The driver's own library, which no wheel holds.
DRIVER_LIBRARY = "libcuda.so.1"
# What cuInit says, and what to do (cuda.h).
CODES = {
    3: ("CUDA is not initialized", "load the module: modprobe nvidia_uvm, then nvidia-smi"),
    100: ("CUDA finds no device", "let this process read /dev/nvidia*, and look at CUDA_VISIBLE_DEVICES"),
    101: ("a device of CUDA_VISIBLE_DEVICES is not there", "name devices that nvidia-smi -L lists"),
    222: ("the driver is older than the program's PTX", "install a newer driver"),
    802: ("the system is not ready: NVSwitch's fabric manager does not run", "systemctl start nvidia-fabricmanager"),
    803: ("the driver's libraries and its kernel module have different versions", "restart the machine"),
    804: (
        "CUDA's forward compatibility is not for this GPU",
        "remove the cuda-compat package, or LD_LIBRARY_PATH to it",
    ),
    999: ("CUDA does not start", "modprobe -r nvidia_uvm && modprobe nvidia_uvm, or restart the machine"),
}


class Loaded(NamedTuple):
    """`errors`: why a library does not load, by its name. `code`: what cuInit returned; None where it was not asked."""

    errors: dict[str, str]
    code: int | None


def _open(names: Sequence[str], folders: Sequence[str]) -> dict[str, str]:
    """Opens each library, from `folders/nvidia/*/lib` or where the system finds it, and returns why one does not load.

    The folders come first, as TensorFlow's wheels search them.
    """
    errors = {}
    for name in names:
        places = [str(path) for folder in folders for path in sorted(Path(folder).glob(f"nvidia/*/lib/{name}"))]
        for place in [*places, name]:
            try:
                ctypes.CDLL(place, mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                errors.setdefault(name, str(error))
            else:
                errors.pop(name, None)
                break
    return errors


def _tell() -> None:
    """Prints what was found, as JSON, for `load`. `sys.argv`: names and folders, as JSON."""
    names, folders = json.loads(sys.argv[1])
    errors, code = _open([DRIVER_LIBRARY, *names], folders), None
    print(json.dumps([errors, code]), flush=True)
    if DRIVER_LIBRARY not in errors:
        with contextlib.suppress(OSError, AttributeError):
            code = ctypes.CDLL(DRIVER_LIBRARY).cuInit(0)
        print(json.dumps([errors, code]), flush=True)


def load(cuda: str, folders: Sequence[str]) -> Loaded:
    """Tries the driver's library and those of a version of CUDA (`12.9`), in a process that may crash or hang.

    `folders`: where packages lie.
    """
    names = SONAMES.get(cuda.partition(".")[0], SONAMES["12"])
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from launch.health import libraries; libraries._tell()"
    answer = programs.ask([sys.executable, "-c", code, json.dumps([names, [str(folder) for folder in folders]])])
    lines = [line for line in answer.output.splitlines() if line.startswith("[")]
    if not lines:
        return Loaded({"libraries": answer.said or f"ended with code {answer.code}"}, None)
    errors, number = json.loads(lines[-1])
    if answer.code != 0 and DRIVER_LIBRARY not in errors:
        errors[DRIVER_LIBRARY] = f"cuInit does not return: {answer.said or answer.code}"
    return Loaded(errors, number)
