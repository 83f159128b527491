"""What the wall time of a run went into, over all its attempts: updates that counted, and everything else.

An attempt keeps its seconds by part, and how they stood at each checkpoint. The chief writes them down while it goes
on (`trainers.record.beats`), so that `kill -9` loses a second. The next attempt knows where it continues: what was
done after that checkpoint is done again, and counts as lost.
"""

import collections
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.record import reading
from trainers.record.clock import Clock
from trainers.settings.exit_codes import OK, PEER_LOST, PREEMPTED
from trainers.world import process

# In run.json, and in what the chief writes while it goes on.
FACT = "goodput"
# The parts of the wall time, and the words for people.
PARTS = {
    "updates": "updates",
    "start_up": "start-up",
    "input": "input",
    "evaluation": "evaluation",
    "saving": "saving",
    "peers": "waiting for peers",
    "other": "other",
    "lost": "lost to restarts",
    "between": "between attempts",
}
# Those that come again where an attempt continues before the point that it is told of.
_REPEATED = ("updates", "input", "evaluation", "saving", "peers", "other")
# Of the clock's phases, once the loop has begun. All others are `other`.
_PHASES = {
    "train": "updates",
    "input_wait": "input",
    "evaluate": "evaluation",
    "checkpoint": "saving",
    "peers": "peers",
}
# Of a step, by the clock's phases.
_OF_A_STEP = {"compute": "train", "input": "input_wait", "peers": "peers"}
_NOTE_SECONDS = 0.25
# Attempts that run.json lists one by one; older ones are one entry.
MOST_LISTED = 100

Attempt = dict[str, Any]


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {part: round(value, 3) for part, value in seconds.items()}


class Goodput:
    """The seconds of this attempt, and what earlier ones have left.

    `earlier`: their entries, oldest first, as `attempts_of` gives them. An entry: `began` and `until` (times), `first`
    and `step` (where it began and how far it came), `seconds` by part, `marks` (those of them that would be lost after
    each checkpoint, by its step as text), `code` and `reason` of its end, null where nobody has told of it.
    """

    def __init__(self, clock: Clock, earlier: Sequence[Attempt] = ()):
        self._clock, self.earlier, self._lock = clock, list(earlier), threading.RLock()
        age = process.age()
        self._zero, self._began = time.monotonic() - age, time.time() - age
        self._opened: tuple[float, Mapping[str, float]] | None = None
        self._written_off = dict.fromkeys(_REPEATED, 0.0)
        self._first = self._step = 0
        self._marks: dict[str, Mapping[str, float]] = {}
        # At the end of calls, from the first on: the step, and seconds of the clock.
        self._noted = 0.0
        self._calls: collections.deque[tuple[int, Mapping[str, float]]] = collections.deque(maxlen=4096)

    def _seconds(self) -> dict[str, float]:
        """By part; the sum is the time since this attempt began."""
        age, now = time.monotonic() - self._zero, self._clock.snapshot()
        opened, before = self._opened or (age, now)
        seconds = dict.fromkeys(PARTS, 0.0)
        for phase, part in _PHASES.items():
            seconds[part] = now.get(phase, 0.0) - before.get(phase, 0.0)
        early = before.get("peers", 0.0)
        seconds["other"] = age - opened - sum(seconds.values())
        seconds["start_up"] = opened - early
        seconds["peers"] += early
        for part, lost in self._written_off.items():
            seconds[part] -= lost
        seconds["lost"] = sum(self._written_off.values())
        return seconds

    def _repeated(self) -> dict[str, float]:
        """Of these, what comes again where an attempt continues from here."""
        return {part: value for part, value in self._seconds().items() if part in _REPEATED}

    def begin(self, step: int) -> None:
        """This attempt continues from a step: what earlier ones did after it is lost."""
        with self._lock:
            for entry in reversed(self.earlier):
                write_off(entry, step)
                if entry["first"] <= step:
                    break
            self._first = self._step = step
            self.mark(step)

    def open(self) -> None:
        """The start is over: updates begin."""
        with self._lock:
            self._opened = time.monotonic() - self._zero, self._clock.snapshot()
            self.mark(self._first)

    def reach(self, step: int) -> None:
        """A call has ended with a step."""
        self._step, now = step, time.monotonic()
        if now - self._noted >= _NOTE_SECONDS:
            self._noted = now
            self._calls.append((step, self._clock.snapshot()))

    def pace(self, steps: int, seconds: float) -> dict[str, float]:
        """Seconds a step of `compute`, `input` and `peers` over the last `steps` of them or more, and as many seconds.

        `steps`: how many it were. Empty as long as there are not as many.
        """
        calls = list(self._calls)
        for step, before in reversed(calls):
            last, now = calls[-1]
            parts = {part: now.get(phase, 0.0) - before.get(phase, 0.0) for part, phase in _OF_A_STEP.items()}
            if last - step >= steps and sum(parts.values()) >= seconds:
                return {"steps": last - step} | {part: value / (last - step) for part, value in parts.items()}
        return {}

    def mark(self, step: int, others: Sequence[int] = ()) -> None:
        """What is done up to now is in the checkpoint of a step. `others`: those that are there already."""
        with self._lock:
            known = {str(one): self._marks.get(str(one)) for one in (self._first, *others)}
            self._marks = {one: at for one, at in known.items() if at} | {str(step): self._repeated()}

    def go_back(self, step: int) -> None:
        """This attempt goes back to the checkpoint of a step: what came after it is lost."""
        with self._lock:
            entry = self.entry()
            before = dict(entry["seconds"])
            write_off(entry, step)
            for part in _REPEATED:
                self._written_off[part] += before[part] - entry["seconds"][part]
            if step < self._first:  # its own first checkpoint is damaged
                for other in reversed(self.earlier):
                    write_off(other, step)
                    if other["first"] <= step:
                        break
            self._step, self._marks = step, dict(entry["marks"])
            self._calls.clear()
            self.mark(step)

    def entry(self) -> Attempt:
        """This attempt as it stands."""
        with self._lock:
            seconds = self._seconds()
            return {
                "began": round(self._began, 3),
                "until": round(self._began + sum(seconds.values()), 3),
                "first": self._first,
                "step": self._step,
                "seconds": _rounded(seconds),
                "marks": {step: _rounded(at) for step, at in self._marks.items()},
                "code": None,
                "reason": None,
            }

    def facts(self, code: int | None = None, reason: str | None = None) -> dict[str, Any]:
        """What run.json holds, all attempts taken together and one by one. `code`, `reason`: how this one ends."""
        with self._lock:
            entry = self.entry() | {"code": code, "reason": reason and reason[:300]}
            self.earlier = shortened(self.earlier)
            return facts_of([*self.earlier, entry])


def write_off(entry: Attempt, step: int) -> None:
    """Moves to `lost` what an attempt did after the checkpoint of a step, from which another continues."""
    if entry["step"] <= step and entry["code"] in (OK, PREEMPTED):
        return  # what came after the checkpoint was writing it, and leaving
    seconds, at = entry["seconds"], entry["marks"].get(str(step))
    if at is None:  # not told: as much as the steps say
        done = entry["step"] - entry["first"]
        share = min(max((step - entry["first"]) / done, 0.0), 1.0) if done > 0 else 0.0
        at = {part: seconds[part] * share for part in _REPEATED}
    for part in _REPEATED:
        lost = max(seconds[part] - at[part], 0.0)
        seconds[part] = round(seconds[part] - lost, 3)
        seconds["lost"] = round(seconds["lost"] + lost, 3)
    entry["step"] = max(min(entry["step"], step), entry["first"])
    entry["marks"] = {known: value for known, value in entry["marks"].items() if int(known) <= step}


def totals(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Seconds by part over attempts that follow each other, with the time between them."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for entry in attempts:
        for part, value in entry["seconds"].items():
            seconds[part] += value
    for entry, following in itertools.pairwise(attempts):
        if entry["code"] != OK:  # a complete run that is made longer one day has not waited for it
            seconds["between"] += max(following["began"] - entry["until"], 0.0)
    return seconds


def wall(attempts: Sequence[Attempt]) -> float:
    """Seconds since the first of some attempts began, without those after an end of the run."""
    rests = [max(b["began"] - a["until"], 0.0) for a, b in itertools.pairwise(attempts) if a["code"] == OK]
    merged = sum(entry.get("rests", 0.0) for entry in attempts)
    return attempts[-1]["until"] - attempts[0]["began"] - sum(rests) - merged


def shortened(attempts: Sequence[Attempt]) -> list[Attempt]:
    """At most `MOST_LISTED` entries: the oldest become one."""
    older, rest = attempts[: len(attempts) - MOST_LISTED + 1], attempts[len(attempts) - MOST_LISTED + 1 :]
    if len(attempts) <= MOST_LISTED:
        return list(attempts)
    one = dict(older[-1]) | {"began": older[0]["began"], "first": older[0]["first"], "marks": {}}
    rests = older[-1]["until"] - older[0]["began"] - wall(older)
    count = sum(entry.get("merged", 1) for entry in older)
    return [one | {"seconds": totals(older), "merged": count, "rests": rests}, *rest]


def facts_of(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """What is told of attempts: the wall time since the first began, seconds and shares of it by part."""
    seconds = totals(attempts)
    whole = max(sum(seconds.values()), 1e-9)
    return {
        "since": attempts[0]["began"],
        "until": attempts[-1]["until"],
        "wall_seconds": round(wall(attempts), 3),
        "seconds": _rounded(seconds),
        "shares": {part: round(value / whole, 5) for part, value in seconds.items()},
        "attempts": list(attempts),
    }


def attempts_of(facts: Mapping[str, Any], told: Mapping[str, Any], hang: Mapping[str, Any]) -> list[Attempt]:
    """The attempts that a run's files know of, oldest first; the last as it stood when it was heard of last.

    `facts`: run.json. `told`: what its chief writes while it goes on; of another attempt, it does not count.
    `hang`: what its workers have found when nothing moved, after which they end without another word.
    """
    attempts = [dict(entry) for entry in facts.get(FACT, {}).get("attempts", ())]
    if attempts and facts.get("ended") is None and told.get("attempt") == facts.get("attempts") and told.get(FACT):
        attempts[-1] = dict(told[FACT])
    if attempts and attempts[-1]["code"] is None and is_of_attempt(hang, facts.get("attempts"), attempts[-1]["began"]):
        attempts[-1] |= {"code": PEER_LOST, "reason": hang.get("line") or hang.get("reason")}
    return attempts


def is_of_attempt(hang: Mapping[str, Any], attempt: int | None, began: float) -> bool:
    """Whether workers have found in an attempt that nothing moves. `began`: for a version that told no number."""
    if hang.get("attempt") is not None:
        return hang["attempt"] == attempt
    return hang.get("time", 0.0) > began


def of_run(run_dir: Path) -> dict[str, Any]:
    """What a run's files tell, of a run that goes on or was killed too; empty where they tell nothing.

    Raises:
      BadConfiguration: run.json cannot be read.
    """
    attempts = attempts_of(reading.read_run(run_dir), reading.told_by(run_dir, 0), reading.read_hang(run_dir))
    return facts_of(attempts) if attempts else {}


def line(facts: Mapping[str, Any]) -> str:
    """For people: `goodput 71 % of 93 s: updates 71 %, start-up 20 %, …; 2 attempts`, the largest part first."""
    shares = sorted(((share, part) for part, share in facts["shares"].items() if share >= 0.005), reverse=True)
    words = ", ".join(f"{PARTS[part]} {100 * share:.0f} %" for share, part in shares)
    count = sum(entry.get("merged", 1) for entry in facts["attempts"])
    updates = 100 * facts["shares"]["updates"]
    attempts = "1 attempt" if count == 1 else f"{count} attempts"
    return f"goodput {updates:.0f} % of {span(facts['wall_seconds'])}: {words}; {attempts}"


def span(seconds: float) -> str:
    """A time for people: `42 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for length, unit in ((86400 * 2, "days"), (3600 * 2, "h"), (120, "min")):
        if seconds >= length:
            value = seconds / {"days": 86400, "h": 3600, "min": 60}[unit]
            return f"{value:.0f} {unit}" if unit == "min" else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s"
