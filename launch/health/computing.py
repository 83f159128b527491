"""How fast TensorFlow computes and sums here, against the data sheets of the GPUs that are known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from launch.health.packages import NOT_INSTALLED, Environment
from launch.health.rows import BAD, NOT_HERE, OK, WARNING, Row
from trainers.world import data_sheets, programs

PROBE = Path(__file__).with_name("probe.py")
# Seconds that TensorFlow has to start and to compute; it starts in 5 to 30.
SECONDS = 100.0
# Shares of the data sheet's number below which something holds a GPU or a link back. Large products reach 0.65 to 0.8.
# A sum is timed with the call that starts it, which may take longer than it: only a detour over PCIe is told apart.
LEAST_COMPUTING, LEAST_LINK = 0.5, 0.1


class Seen(NamedTuple):
    """What launch/health/probe.py has printed.

    `gpus`: None if it did not come so far. `missing`: why there is nothing at all. `failure`: what ended it too soon.
    `log`: its standard error.
    """

    build: dict[str, Any]
    capabilities: list[str]
    gpus: list[dict[str, str]] | None
    matmul: list[dict[str, Any]]
    all_reduce: dict[str, Any]
    missing: str = ""
    failure: str = ""
    log: str = ""


def look(env: Environment | None, seconds: float = SECONDS) -> Seen:
    """Has TensorFlow look at the machine, in a process of its own with a bound on its time."""
    if env is None:
        return Seen({}, [], None, [], {}, missing=NOT_INSTALLED)
    # A cluster of the environment is not met here: the probe is one process.
    own = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    answer = programs.ask([str(env.python), str(PROBE)], seconds, {**own, "PYTHONDONTWRITEBYTECODE": "1"})
    found: dict[str, list[Any]] = {}
    for line in answer.output.splitlines():
        if line.startswith("{"):
            for name, value in json.loads(line).items():
                found.setdefault(name, []).append(value)
    failure = ""
    if answer.code != 0:
        last = [line for line in answer.error.splitlines() if line.strip()][-1:] or [f"ended with code {answer.code}"]
        failure = programs.one_line(last[0])
    return Seen(
        found.get("build", [{}])[0],
        found.get("capabilities", [[]])[0],
        found.get("gpus", [None])[0],
        found.get("matmul", []),
        found.get("all_reduce", [{}])[0],
        failure=failure,
        log=answer.error,
    )


def _matmul(found: dict[str, Any]) -> Row:
    title = f"matmul: {found['device']} {found['precision']}"
    rate, peak = found["teraflops"], data_sheets.peak_teraflops(found["name"], found["precision"])
    if found["precision"] == "float32" and os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return Row(title, OK, f"{rate:.3g} TFLOP/s without TF32, as NVIDIA_TF32_OVERRIDE=0 asks")
    if peak is None:
        sheet = "" if found["name"] == "CPU" else f"; the data sheet of {found['name']} is not known here"
        return Row(title, OK, f"{rate:.3g} TFLOP/s{sheet}")
    text = f"{rate:.3g} TFLOP/s, {rate / peak:.2f} of the data sheet's {peak:g}"
    if rate < LEAST_COMPUTING * peak:
        remedy = "look for other work on it, heat and limits of power: nvidia-smi -q -d PERFORMANCE,CLOCK,POWER"
        return Row(title, WARNING, text, remedy)
    return Row(title, OK, text)


def _all_reduce(found: dict[str, Any], nvlink: bool) -> Row:
    """The sum over the replicas. `nvlink`: whether NVLink joins all GPUs."""
    replicas, rate = found["replicas"], found["gigabytes"]
    title = f"all-reduce: {replicas} replicas"
    if found["wrong"]:
        return Row(
            title, BAD, found["wrong"], "NCCL_P2P_DISABLE=1 tells whether a link is at fault; do not train on it"
        )
    if replicas < 2 or rate is None:
        return Row("all-reduce", NOT_HERE, "one device; nothing is summed")
    # What each link carries: every byte is sent 2(n - 1)/n times.
    carried = rate * 2 * (replicas - 1) / replicas
    peak = data_sheets.nvlink_gigabytes(found["name"]) if nvlink else None
    if peak is None:
        return Row(title, OK, f"{rate:.3g} GB/s of the vector; the sum is right")
    share = f"{carried / peak:.2f} of the data sheet's {peak:g} for NVLink"
    text = f"{carried:.3g} GB/s on each link, {share}; the sum is right"
    if carried < LEAST_LINK * peak:
        return Row(title, WARNING, text, "NCCL_DEBUG=INFO shows which way it takes; nvidia-smi nvlink --status")
    return Row(title, OK, text)


def speed_rows(seen: Seen, nvlink: bool = False) -> list[Row]:
    """Matrix products and the all-reduce."""
    if seen.missing:
        return [Row("matmul", NOT_HERE, seen.missing), Row("all-reduce", NOT_HERE, seen.missing)]
    found = [_matmul(each) for each in seen.matmul]
    if seen.all_reduce:
        found.append(_all_reduce(seen.all_reduce, nvlink))
    if seen.failure:
        remedy = f"run it and read what it prints: {PROBE.parent.parent.name}/health/probe.py"
        found.append(Row("TensorFlow", BAD, seen.failure, remedy))
    return found
