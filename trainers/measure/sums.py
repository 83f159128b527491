"""Experiment 1 of `trainers/graph_benchmark.py`: a loop of small operations, eager and compiled."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from trainers.measure.traces import Compiled, Timing, TraceLog, num_nodes
from trainers.settings.exit_codes import RunEnded

# A Python loop under tf.function makes nodes for each iteration: longer loops are not traced here.
LARGEST_UNROLLED = 200


def sum_up_to(n: tf.Tensor | int) -> tf.Tensor:
    """The sum of the squares of 0 … n, int64: a Python loop when eager, a loop in the graph under tf.function."""
    total = tf.constant(0, tf.int64)
    for i in tf.range(n + 1, dtype=tf.int64):
        total += i * i
    return total


def sum_unrolled(n: int) -> tf.Tensor:
    """The same over Python's range, which AutoGraph does not convert: a trace runs every iteration."""
    total = tf.constant(0, tf.int64)
    for i in range(n + 1):
        number = tf.constant(i, tf.int64)
        total += number * number
    return total


def sum_at_once(n: tf.Tensor) -> tf.Tensor:
    """The same without a loop, in three operations over all numbers."""
    return tf.reduce_sum(tf.square(tf.range(n + 1, dtype=tf.int64)))


def formula(n: int) -> int:
    """The value that all of them must return."""
    return n * (n + 1) * (2 * n + 1) // 6


@dataclasses.dataclass
class Sums:
    """The results.

    `value`: what all variants returned at n. `timings`: eager first. `unrolled`: (loop, n, timing). `traces`: (calls,
    log). `graph`: of the compiled loop.
    """

    value: int
    timings: list[Timing]
    unrolled: list[tuple[str, int, Timing]]
    traces: list[tuple[str, TraceLog]]
    graph: tf.Graph

    def facts(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "value": self.value,
            "variants": [timing.facts(self.timings[0]) for timing in self.timings],
            "loops": [
                {"loop": loop, "n": n, "nodes": t.nodes, "first_call_seconds": t.first, "later_seconds": t.later}
                for loop, n, t in self.unrolled
            ],
            "traces": [{"calls": calls, "reasons": log.reasons} for calls, log in self.traces],
        }


def measure_sums(n: int, repeats: int) -> Sums:
    """Times sum_up_to eagerly and compiled, unrolls it, and has it traced for every possible reason.

    Raises:
      RunEnded: a variant returned a wrong value.
    """
    number = tf.constant(n, tf.int64)
    tf.add(number, 1).numpy()  # the first operation of a process starts the runtime: it is not part of any variant
    in_graph = Compiled(sum_up_to)
    timings = [
        _timing("eager", sum_up_to, number, n, repeats),
        _timing("@tf.function", in_graph, number, n, repeats),
        _timing("no loop, eager", sum_at_once, number, n, repeats),
    ]
    graph = in_graph.function.get_concrete_function(number).graph
    return Sums(formula(n), timings, _unrolled(n, repeats), _traces(), graph)


def _unrolled(n: int, repeats: int) -> list[tuple[str, int, Timing]]:
    """Both loops, compiled, at two sizes."""
    results, small = [], min(n, LARGEST_UNROLLED)
    for loop, function, argument in (
        ("tf.range", sum_up_to, lambda m: tf.constant(m, tf.int64)),
        ("Python's range", sum_unrolled, int),
    ):
        for m in sorted({max(small // 2, 1), small}):
            timing = _timing(f"loop over {loop}", Compiled(function), argument(m), m, repeats)
            results.append((loop, m, timing))
    return results


def _traces() -> list[tuple[str, TraceLog]]:
    """Pairs of calls, and why each of them was traced."""
    results = []
    for calls, arguments in (
        ("sum_up_to(10), sum_up_to(11)", (10, 11)),
        ("sum_up_to of tensors 10, 11", (tf.constant(10, tf.int64), tf.constant(11, tf.int64))),
        ("sum_up_to of tensors int64, int32", (tf.constant(10, tf.int64), tf.constant(10, tf.int32))),
        ("sum_up_to(10), of a tensor 10", (10, tf.constant(10, tf.int64))),
    ):
        compiled = Compiled(sum_up_to)
        for argument in arguments:
            compiled(argument)
        results.append((calls, compiled.log))
    return results


def _timing(variant: str, function: Callable[..., tf.Tensor], argument: Any, n: int, repeats: int) -> Timing:
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        value = int(function(argument).numpy())
        seconds.append(time.perf_counter() - began)
        if value != formula(n):
            raise RunEnded(
                f"{variant} returns {value} at n = {n}, but n (n + 1) (2 n + 1) / 6 is {formula(n)}; "
                "check the TensorFlow installation, e.g. with trainers/tensor_check.py"
            )
    timing = Timing(variant, seconds[0], statistics.median(seconds[1:]))
    if isinstance(function, Compiled):
        timing.reasons = list(function.log.reasons)
        timing.nodes = num_nodes(function.function.get_concrete_function(argument).graph)
    return timing
