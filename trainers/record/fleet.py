"""What the workers of a run tell of themselves, taken together: who is slower than the others, and who did not come."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.record import reading
from trainers.world import host

# A worker is told of that is so much slower than the median of the others, over so many steps and seconds.
SLOWER, STEPS, SECONDS = 1.2, 100, 5.0
# And that costs at least such a share of the whole step: in a step that is short, noise is large.
WORTH_A_LINE = 0.05
# A worker that was not heard of for so many of its beats, and as many seconds more, is silent.
_BEATS, _MORE_SECONDS = 3, 2.0

Told = Mapping[str, Any]
# In what a worker has told, of who reads it: seconds since it told something else. By one clock: those of two machines
# may differ by more than a worker may be silent.
UNHEARD = "unheard"


class Ear:
    """For who reads what workers tell: when each of them told something new, by the own clock. It has to be used often.

    `clock`: seconds, which never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._heard = clock, {}

    def hear(self, run_dir: Path, told: Told) -> float:
        """Seconds since a worker told something new; since it was heard of first, where it has not."""
        now, key = self._clock(), (run_dir, told["worker"])
        before, since, news = self._heard.get(key, (None, now, -1))
        if told != before:
            since, news = now, news + 1
        self._heard[key] = told, since, news
        return now - since

    def has_news(self, run_dir: Path, worker: int) -> bool:
        """Whether a worker has told something new since it was heard of first."""
        return self._heard.get((run_dir, worker), (None, 0.0, 0))[2] > 0


def told_by_all(run_dir: Path, ear: Ear) -> list[dict[str, Any]]:
    """What each worker has told last, in their order, with `UNHEARD`; without those that have told nothing."""
    places = sorted((run_dir / reading.WORKERS).glob("worker-*.json"))
    told = [reading.told_by(run_dir, int(p.stem.partition("-")[2])) for p in places if p.stem[7:].isdecimal()]
    heard = [one | {UNHEARD: ear.hear(run_dir, one)} for one in told if one]
    return sorted(heard, key=lambda one: one["worker"])


def own_seconds(told: Told) -> float:
    """Seconds a step that a worker needs for itself: in its own compute and input, not in sums over workers."""
    return told["pace"]["compute"] + told["pace"]["input"]


def slowest(told: Sequence[Told]) -> tuple[Told, float] | None:
    """The slowest of the workers that tell their pace, and its seconds a step by the median of the others."""
    known = [one for one in told if one.get("pace")]
    if len(known) < 2:
        return None
    worst = max(known, key=own_seconds)
    median = statistics.median(own_seconds(one) for one in known if one is not worst)
    return worst, own_seconds(worst) / max(median, 1e-9)


def straggler(told: Sequence[Told]) -> tuple[int, str] | None:
    """The number of a worker that holds the others up, and a line on it; None where nobody does."""
    found = slowest(told)
    if found is None or found[1] < SLOWER:
        return None
    worst, ratio = found
    own = own_seconds(worst)
    excess = own * (1 - 1 / ratio)
    if excess < WORTH_A_LINE * (own + worst["pace"]["peers"]):
        return None
    others = [one["pace"] for one in told if one is not worst and one.get("pace")]
    more = {part: worst["pace"][part] - statistics.median(p[part] for p in others) for part in ("input", "compute")}
    reasons = [f"GPU {gpu['gpu']} is throttled ({', '.join(gpu['throttled'])})" for gpu in _throttled(worst)]
    what = max(more, key=more.get)
    why = f"{what}: {', '.join(reasons)}" if reasons and what == "compute" else what
    line = (
        f"worker {worst['worker']} ({worst['host']}) is {ratio - 1:.0%} slower than the median of the others over "
        f"{worst['pace']['steps']} steps: {1e3 * own:.3g} ms a step of its own, they {1e3 * own / ratio:.3g} ms; "
        f"it waits for {why}"
    )
    return worst["worker"], line


def _throttled(told: Told) -> list[Told]:
    return [gpu for gpu in told.get("gpus", ()) if gpu["throttled"]]


def state_of(told: Told) -> str:
    """Of a worker, as `told_by_all` has it: `gone`, `stopped` or `silent`; empty where nothing speaks against it."""
    if is_of_here(told) and (state := host.state_of_process(told["pid"])) in ("gone", "stopped"):
        return state
    return "silent" if told[UNHEARD] > silence(told) else ""


def is_of_here(told: Told) -> bool:
    """Whether a worker's process is one of this machine's, so that the kernel tells what it does."""
    return bool(told["processes"]) and told["processes"] == host.processes()


def silence(told: Told) -> float:
    """After how many seconds without a word a worker is silent."""
    return _BEATS * told["every"] + _MORE_SECONDS


def position(told: Told) -> tuple[int, bool, int, bool]:
    """How far a worker has come among the things that all do together: one with a lower one is waited for."""
    arrived, left = told.get("sums", (0, 0))
    return told["met"], told["meeting"], arrived, arrived > left


def place(told: Told) -> str:
    """Where a worker is, in words."""
    arrived, left = told.get("sums", (0, 0))
    inside = f", waiting in sum {arrived} over workers" if arrived > left else ""
    inside = inside or (f", in no sum over workers, {left} done" if arrived else "")
    return f"{told['doing']} (for {told['for_seconds']:.0f} s){inside}"


def who_did_not_come(run_dir: Path, workers: int, ear: Ear) -> str:
    """A line that names the worker for which the others wait; empty where nothing tells which it is."""
    told = {one["worker"]: one for one in told_by_all(run_dir, ear)}
    words = {
        "gone": "its process is gone",
        "stopped": "its process is stopped (SIGSTOP), and cannot write its stacks",
        "silent": "it was not heard of, so it is frozen, cut off or gone, and cannot write its stacks",
    }
    for number in range(workers):
        if number not in told:
            return f"worker {number} did not come: it has told nothing in this run"
    for number, one in told.items():
        if number < workers and (state := state_of(one)):
            ago = f"last heard of {one[UNHEARD]:.0f} s ago in: {place(one)}"
            return f"worker {number} ({one['host']}, process {one['pid']}) did not come: {words[state]}; {ago}"
    behind = min((one for number, one in told.items() if number < workers), key=position)
    if position(behind) == max(position(one) for number, one in told.items() if number < workers):
        return ""
    return (
        f"worker {behind['worker']} ({behind['host']}, process {behind['pid']}) did not come: it is in: "
        f"{place(behind)}; its stacks are in {reading.stacks_file(run_dir, behind['worker'])}"
    )
