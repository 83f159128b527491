"""What a worker knows of its own part in the workers' sums: how many it has come to and left, and how long it waited.

The compiled step counts beside its collectives, in a variable on the host that any thread may read; no collective
waits for the count.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from trainers.world import private_api

_METER = "meter_of_this_project"


class Met(NamedTuple):
    """Sums over workers that this one has come to and has left, and the seconds that it was in them."""

    arrived: int
    left: int
    seconds: float


class Meter:
    """Counts the sums over replicas that a strategy does inside of compiled functions.

    `seconds` are 0 with deterministic kernels, where TensorFlow has no clock in the graph. What is summed on a GPU is
    there when a number of it has come to the host.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        with tf.device("CPU:0"):
            self.counts = tf.Variable(tf.zeros([3], tf.float64), trainable=False, name="collectives")
        self.strategy, self._asked = strategy, 0.0
        # `ReplicaContext.all_reduce` comes here. Its object is made for each replica anew.
        self._inner = strategy.extended.batch_reduce_to
        strategy.extended.batch_reduce_to = self._counted
        setattr(strategy.extended, _METER, self)

    def read(self) -> Met:
        """The counts up to now."""
        arrived, left, seconds = self.counts.numpy().tolist()
        return Met(int(arrived), int(left), seconds)

    def more_seconds(self) -> float:
        """Those since this was asked last."""
        before, self._asked = self._asked, self.read().seconds
        return self._asked - before

    @tf.autograph.experimental.do_not_convert
    def _counted(self, operation: Any, pairs: Sequence[tuple[Any, Any]], *rest: Any) -> list[Any]:
        """The sums of values, with their destinations, and a count on each side of them."""
        if tf.executing_eagerly():
            return self._inner(operation, pairs, *rest)
        began = self._count([value for value, _ in pairs], lambda now: [1.0, 0.0, 0.0])
        results = self._inner(operation, pairs, *rest)
        self._count(results, lambda now: [0.0, 1.0, now - began])
        return results

    def _count(self, values: Sequence[Any], change: Callable[[tf.Tensor], list[Any]]) -> tf.Tensor:
        """Adds to the counts when some values are there, on all replicas of this process. Returns the time."""
        with tf.name_scope("meter"), contextlib.ExitStack() as stack:
            there = [own for value in values for own in self.strategy.experimental_local_results(value)]
            there = [value for value in there if isinstance(value, tf.Tensor)]
            if any("GPU" in value.device for value in there):
                numbers = [tf.reshape(value, [-1])[:1] for value in there]
                with tf.device("CPU:0"):
                    there = [tf.identity(number) for number in numbers]
            stack.enter_context(tf.device("CPU:0"))
            stack.enter_context(tf.control_dependencies(there))
            zero = tf.constant(0.0, tf.float64)
            now = zero if private_api.is_deterministic() else tf.timestamp()
            with tf.control_dependencies([now]):
                self.counts.assign_add(tf.stack([tf.cast(number, tf.float64) for number in change(now)]))
            return now


def meter_of(strategy: tf.distribute.Strategy) -> Meter | None:
    """The meter of a strategy, if it has one."""
    return getattr(strategy.extended, _METER, None)
