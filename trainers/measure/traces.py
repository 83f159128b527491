"""The cost of a compiled function: how often and why it was traced, how large its graph is, when tracing pays off."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf


@dataclasses.dataclass
class Timing:
    """The cost of a variant.

    `first`: seconds of the first call, with tracing and compilation. `later`: the median seconds of a step in the calls
    that follow, where a call does `steps` of them. `reasons`: why each trace happened. `nodes`: of the graph, with the
    bodies of its loops. `difference`: of the weights from those of the first variant. `failure`: why it cannot run;
    nothing else is known then.
    """

    variant: str
    first: float = math.nan
    later: float = math.nan
    steps: int = 1
    reasons: list[str] = dataclasses.field(default_factory=list)
    nodes: int = 0
    difference: float = 0.0
    failure: str = ""

    def break_even(self, eager: "Timing") -> int | None:
        """Calls after which this variant, with its tracing, has taken no longer than `eager`.

        None if it never will, or if there is no tracing to pay off.
        """
        if not self.reasons or not self.later < eager.later:
            return None
        tracing = self.first - self.steps * self.later
        return max(1, math.ceil(tracing / (self.steps * (eager.later - self.later))))

    def facts(self, eager: "Timing") -> dict[str, Any]:
        """For the JSON file."""
        if self.failure:
            return {"variant": self.variant, "failure": self.failure}
        return {
            "variant": self.variant,
            "first_call_seconds": self.first,
            "later_seconds": self.later,
            "steps_in_a_call": self.steps,
            "times_as_fast_as_eager": eager.later / self.later,
            "break_even_calls": self.break_even(eager),
            "traces": len(self.reasons),
            "reasons": self.reasons,
            "nodes": self.nodes,
            "largest_relative_difference": self.difference,
        }


class TraceLog:
    """Why a function was traced: which of its arguments differ from those of the trace before.

    `names`: of the function's arguments, in order.
    """

    def __init__(self, names: Sequence[str]):
        self.names, self.reasons = tuple(names), []
        self._before: tuple[dict[str, str], ...] | None = None

    def note(self, traces: int, arguments: Sequence[Any]) -> None:
        """After a call: `traces` is how often the Python body has run so far, `arguments` are those of the call."""
        if traces <= len(self.reasons):
            return
        now = tuple(_description(argument) for argument in arguments)
        self.reasons.append("first call" if self._before is None else self._change(now))
        self.reasons += ["again within the same call"] * (traces - len(self.reasons))
        self._before = now

    def _change(self, now: tuple[dict[str, str], ...]) -> str:
        changes = []
        for name, old, new in zip(self.names, self._before, now, strict=True):
            if old.keys() != new.keys():
                changes.append(f"{name}: {old['kind']} became {new['kind']}")
                continue
            changes += [f"{name}: {key} changed {old[key]} → {new[key]}" for key in old if old[key] != new[key]]
        return "; ".join(changes) or "nothing changed in the arguments: another tf.function, or a captured value"


def _description(argument: Any) -> dict[str, str]:
    """What tf.function tells arguments apart by: the type and shape of a tensor, the value of anything else."""
    if isinstance(argument, tf.Tensor):
        return {"kind": "a tensor", "dtype": argument.dtype.name, "shape": str(argument.shape)}
    return {"kind": f"a Python {type(argument).__name__}", "Python value": repr(argument)}


class Compiled:
    """A function of one number under tf.function, whose Python body counts how often it runs: once for each trace."""

    def __init__(self, function: Callable[[Any], tf.Tensor]):
        self.traces, self.log = 0, TraceLog(["n"])

        def counted(n: Any) -> tf.Tensor:
            self.traces += 1
            return function(n)

        self.function = tf.function(counted)

    def __call__(self, n: Any) -> tf.Tensor:
        """The function's value at `n`, an int64 scalar."""
        value = self.function(n)
        self.log.note(self.traces, [n])
        return value


@contextlib.contextmanager
def retracing_expected() -> Iterator[None]:
    """Within the block TensorFlow does not warn of functions that are traced often: here it is on purpose."""

    def is_other(record: Any) -> bool:
        return "triggered tf.function retracing" not in record.getMessage()

    tf.get_logger().addFilter(is_other)
    try:
        yield
    finally:
        tf.get_logger().removeFilter(is_other)


def num_nodes(graph: tf.Graph) -> int:
    """Nodes of a graph and of the functions in its library, such as the body of a loop."""
    definition = graph.as_graph_def()
    return len(definition.node) + sum(len(function.node_def) for function in definition.library.function)
