"""Profiles of a running trainer: at the steps that --profile names, or when SIGUSR2 comes; told as a table as well."""

import dataclasses
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import tensorflow as tf

from trainers.show import graphs
from trainers.show.summaries import Summaries
from trainers.show.tables import readable, table
from trainers.world import private_api

# Updates that a profile on demand takes.
STEPS_ON_DEMAND = 10
TOP_OPERATIONS = 15
_SIGNAL = signal.SIGUSR2


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one operation took in a profile: its name in the graph, its kind, how often it ran and for how long."""

    name: str
    kind: str
    count: int
    seconds: float


class Profiles:
    """Begins and ends profiles between compiled calls. While one runs, a call is one update, so each step is marked.

    `steps`: the first and the last of the flag, or none. `single`: whether this process decides alone how long a call
    is; among workers a profile on demand takes one call as it is. `chief`: only it profiles the flag's steps and tells.
    """

    def __init__(
        self,
        steps: tuple[int, ...],
        directory: Path,
        summaries: Summaries,
        single: bool,
        chief: bool,
        say: Callable[[str], None],
    ):
        self._flag, self._demanded, self._directory, self._summaries = steps, (), directory, summaries
        self._single, self._chief, self._say = single, chief, say
        self._running: tuple[int, ...] | None = None
        self._asked = False
        self._steps = 0
        # Not handled but held back and looked for: a handler would count as one of the signals that end a process.
        signal.pthread_sigmask(signal.SIG_BLOCK, [_SIGNAL])

    def _look(self) -> None:
        """Takes a signal that has come."""
        if _SIGNAL in signal.sigpending():
            signal.sigwait([_SIGNAL])
            self._asked = self._running is None

    def _windows(self) -> list[tuple[int, ...]]:
        return [window for window in (self._flag, self._demanded) if window]

    def stop_of(self, step: int, stop: int) -> int:
        """Where a call from `step` must end that would go on to `stop`. The same on all workers."""
        self._look()
        if self._asked and self._single:
            self._asked, self._demanded = False, (step, step + STEPS_ON_DEMAND)
        for first, last in self._windows():
            if first <= step < last:
                return step + 1
        return min([stop, *(edge for window in self._windows() for edge in window if edge > step)])

    def begin(self, step: int) -> None:
        """Starts a profile if one is due at this step."""
        if self._running is not None:
            return
        due = [window for window in self._windows() if window[0] <= step < window[1] and self._chief]
        if self._asked and not due:
            due, self._asked = [(step, step)], False  # among workers: this call alone
        if due:
            self._running, self._steps = due[0], 0
            tf.profiler.experimental.start(str(self._directory))

    def mark(self, step: int) -> tf.profiler.experimental.Trace:
        """Marks what follows as a step, for the profile's tools."""
        return tf.profiler.experimental.Trace("train", step_num=step, _r=1)

    def end(self, step: int, updates: int, last: int) -> None:
        """Ends the profile if it is done, and tells of it."""
        if self._running is None:
            return
        self._steps += updates
        if step >= min(self._running[1], last):
            self._running = None
            tf.profiler.experimental.stop()
            found = operations(newest(self._directory))
            text = describe(found, self._steps)
            self._summaries.text("train", step, "profile/operations", text)
            self._say(f"profile of {self._steps} steps up to step {step}, in {self._directory}\n{text}")

    def close(self) -> None:
        """Ends what still runs. The signal does nothing from now on."""
        if self._running is not None:
            self._running = None
            tf.profiler.experimental.stop()


def newest(directory: Path) -> Path:
    """The newest profile's file under a log directory."""
    return max((directory / "plugins" / "profile").glob("*/*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)


def operations(path: Path) -> list[Operation]:
    """What ran in a profile, longest first: the kernels of GPUs where there are any, else TensorFlow's operations."""
    space = private_api.profile_from(path.read_bytes())
    devices = [plane for plane in space.planes if plane.name.startswith("/device:")]
    planes = devices or [plane for plane in space.planes if plane.name == "/host:CPU"]
    found: dict[tuple[str, str], list[float]] = {}
    for plane in planes:
        stats = {number: stat.name for number, stat in plane.stat_metadata.items()}
        events = {number: event.name for number, event in plane.event_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                named = {stats.get(stat.metadata_id): stat for stat in event.stats}
                key = _named(events[event.metadata_id], named, stats, bool(devices))
                if key:
                    entry = found.setdefault(key, [0, 0.0])
                    entry[0] += 1
                    entry[1] += event.duration_ps * 1e-12
    rows = [Operation(name, kind, int(count), seconds) for (name, kind), (count, seconds) in found.items()]
    return sorted(rows, key=lambda operation: -operation.seconds)


def _named(event: str, stats: Mapping[str, object], names: Mapping[int, str], device: bool) -> tuple[str, str] | None:
    """Name and kind of what an event ran, or None for what is no operation."""
    stat = stats.get("tf_op")
    full = (stat.str_value or names.get(stat.ref_value, "")) if stat is not None else event
    name, colon, kind = full.rpartition(":")
    if device:
        return graphs.short_name(name or event), kind or event
    # The executor's own events are named like C++.
    return (graphs.short_name(name), kind) if colon and kind.isidentifier() and ":" not in name else None


def describe(found: list[Operation], steps: int) -> str:
    """The longest operations as a table, in time of one update and share of all."""
    total = sum(operation.seconds for operation in found) or 1.0
    rows = [
        [one.kind, one.name[-80:], str(one.count), readable(one.seconds / max(steps, 1)), f"{one.seconds / total:.1%}"]
        for one in found[:TOP_OPERATIONS]
    ]
    return table(["kind", "operation", "calls", "time a step", "share"], rows)
