"""Profiles of a running trainer: at the steps that --profile names, or when SIGUSR2 comes; told as a table as well."""

import dataclasses
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import tensorflow as tf

from trainers import graphs
from trainers.figures import readable, table
from trainers.summaries import Summaries

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
    is; among workers a profile on demand takes one call as it is.
    """

    def __init__(
        self,
        steps: tuple[int, ...],
        directory: Path,
        summaries: Summaries,
        single: bool,
        say: Callable[[str], None],
    ):
        self._window, self._directory, self._summaries = steps, directory, summaries
        self._single, self._say = single, say
        self._running = self._asked = False
        self._steps = 0
        self._previous: object = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(_SIGNAL, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def stop_of(self, step: int, stop: int) -> int:
        """Where a call from `step` must end that would go on to `stop`."""
        if self._asked and not self._running and self._single:
            self._asked, self._window = False, (step, step + STEPS_ON_DEMAND)
        if self._window and self._window[0] <= step < self._window[1]:
            return step + 1 if self._single or not self._asked else stop
        return min([stop, *(edge for edge in self._window if edge > step)])

    def begin(self, step: int) -> None:
        """Starts a profile if one is due at this step."""
        due = bool(self._window) and self._window[0] <= step < self._window[1]
        if not self._running and (due or self._asked):
            tf.profiler.experimental.start(str(self._directory))
            self._running, self._steps = True, 0

    def mark(self, step: int) -> tf.profiler.experimental.Trace:
        """Marks what follows as a step, for the profile's tools."""
        return tf.profiler.experimental.Trace("train", step_num=step, _r=1)

    def end(self, step: int, updates: int, last: int) -> None:
        """Ends the profile if it is done, and tells of it."""
        if not self._running:
            return
        self._steps += updates
        if self._asked or not self._window or step >= min(self._window[1], last):
            self._running = self._asked = False
            tf.profiler.experimental.stop()
            found = operations(newest(self._directory))
            text = describe(found, self._steps)
            self._summaries.text("train", step, "profile/operations", text)
            self._say(f"profile of {self._steps} steps up to step {step}, in {self._directory}\n{text}")

    def close(self) -> None:
        """Ends what still runs, and gives the signal back."""
        if self._running:
            self._running = False
            tf.profiler.experimental.stop()
        if self._previous is not None:
            signal.signal(_SIGNAL, self._previous)


def newest(directory: Path) -> Path:
    """The newest profile's file under a log directory."""
    return max((directory / "plugins" / "profile").glob("*/*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)


def operations(path: Path) -> list[Operation]:
    """What ran in a profile, longest first: the kernels of GPUs where there are any, else TensorFlow's operations."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace.FromString(path.read_bytes())
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
