"""What a loop does on every replica: call a function there, and update what lies there."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from trainers.record.state import Part, put, values_of
from trainers.run.vectors import joined, vectors_of
from trainers.world.devices import native


def boxed(function: Callable) -> Callable:
    """A replica's function in a name scope `replica_N`, for graphs and profiles: TensorFlow boxes all but the first.

    N counts the replicas of this process: workers that gave a collective two names would wait for each other.
    """

    def in_box(*arguments: Any) -> Any:
        innermost = tf.compat.v1.get_default_graph().get_name_scope().rpartition("/")[2]
        with contextlib.nullcontext() if innermost.startswith("replica_") else tf.name_scope("replica_0"):
            return function(*arguments)

    return tf.autograph.experimental.do_not_convert(in_box)


def on_replicas(strategy: tf.distribute.Strategy, function: Callable) -> Callable:
    """A function that calls `function` on each replica and returns what they return, as values for each replica."""
    in_box = boxed(function)
    return lambda *arguments: strategy.run(in_box, args=arguments)


def summed(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """In a replica: the sums over all replicas, the same on each.

    They have no gradient: nobody differentiates a sum of gradients, and without the stop TensorFlow searches every
    replica's graph for variables that somebody might.
    """
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, [tf.stop_gradient(value) for value in values])


@tf.autograph.experimental.do_not_convert
def first_local(strategy: tf.distribute.Strategy, value: Any) -> tf.Tensor:
    """A value of the first replica of this process."""
    return strategy.experimental_local_results(value)[0]


def _sum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """In a replica: the sum over all replicas, without a gradient.

    Both stops keep TensorFlow from searching the other replicas' graphs for variables, see `models.batch_norm`.
    """
    return tf.stop_gradient(summed([value])[0])


def _with_gradient(value: tf.Tensor, argument: tf.Tensor, gradient: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """A value that is linear in the argument, with the gradient that it has."""
    return tf.custom_gradient(
        lambda _: (tf.identity(value), lambda upstream: gradient(tf.ensure_shape(upstream, value.shape)))
    )(argument)


def gathered(rows: tf.Tensor) -> tf.Tensor:
    """In a replica: the rows of all replicas in the order of the global batch, `[rows, …]` → `[all rows, …]`.

    The number of rows is static, and the same on each replica. The values are exact, bit for bit. What each replica
    computes from all rows depends on the rows of each, so the gradient of a replica's rows is the *sum* over replicas
    of their gradients there, at one more all-reduce. XLA cannot compile it for more than one replica.
    """
    first, rest = _place_of(rows.shape[0])
    if rest == 0:
        return rows
    # One summand of each number is not zero, so that the sum is exact.
    padding = [[first, rest - first], *[[0, 0]] * (rows.shape.rank - 1)]
    every = tf.ensure_shape(_sum_over_replicas(tf.pad(rows, padding)), [rows.shape[0] + rest, *rows.shape[1:]])
    return _with_gradient(every, rows, _own_sums)


def _own_sums(every: tf.Tensor) -> tf.Tensor:
    """In a replica: its rows of the sum over replicas, `[all rows, …]` → `[rows, …]`; the transpose of `gathered`."""
    count = every.shape[0] // tf.distribute.get_replica_context().num_replicas_in_sync
    first, _ = _place_of(count)
    return _with_gradient(_sum_over_replicas(every)[first : first + count], every, gathered)


def _place_of(count: int) -> tuple[tf.Tensor, int]:
    """In a replica of `count` rows: where they begin among all, and how many are on others."""
    context = tf.distribute.get_replica_context()
    return tf.cast(context.replica_id_in_sync_group, tf.int32) * count, (context.num_replicas_in_sync - 1) * count


def assign(variables: Sequence[Any], values: Sequence[tf.Tensor]) -> None:
    """In a replica: sets the Keras variables on its device to values that are the same on all replicas."""

    def assign_all(strategy: tf.distribute.Strategy, values: list[tf.Tensor]) -> None:
        for variable, value in zip(variables, values, strict=True):
            strategy.extended.update(variable.value, lambda w, v: w.assign(v), args=(value,), group=False)

    tf.distribute.get_replica_context().merge_call(assign_all, args=(list(values),))


class MovingAverage:
    """A moving average of weights, `average += (1 - decay) (weight - average)`. Built in the strategy's scope.

    `counter`: a Keras variable of the updates done. With it the decay of update `t`, from 1 on, is at most
    `(1 + t) / (10 + t)`, so that the first weights are soon forgotten, as `tf.train.ExponentialMovingAverage` has it.
    """

    def __init__(self, weights: Sequence[Any], decay: float, counter: Any = None):
        self.weights, self.decay, self.counter = list(weights), decay, counter
        self.vectors = vectors_of(weights)
        # Of each weight, as checkpoints hold it: an average of its own, or a part of a vector of several weights'.
        self.variables: list[Any] = [None] * len(self.weights)
        self.averages = [self._begun(bundle) for bundle in self.vectors.bundles]

    def _begun(self, bundle: Sequence[int]) -> tf.Variable:
        """A variable that holds the weights of a bundle as they are."""
        names = [f"{weight.path}/average" for weight in self.weights]
        value = joined([native(self.weights[place]) for place in bundle])
        average = tf.Variable(value, trainable=False, name=names[bundle[0]] if len(bundle) == 1 else "averages")
        for place, first in self.vectors.begins(bundle):
            part = Part(average, first, self.vectors.shapes[place], f"{names[place]}:0")
            self.variables[place] = average if len(bundle) == 1 else part
        return average

    def begin_anew(self) -> None:
        """Outside of replicas: the average is the weights as they are."""
        put(zip(self.variables, [weight.numpy() for weight in self.weights], strict=True))

    def update(self) -> None:
        """In a replica: moves the average on its device."""
        if self.averages:
            tf.distribute.get_replica_context().merge_call(self._update_all)

    def _update_all(self, strategy: tf.distribute.Strategy) -> None:
        def move(
            _: tf.Variable, averages: list[tf.Variable], weights: list[list[tf.Variable]], *count: tf.Variable
        ) -> None:
            moved = 1 - self.decay
            if count:
                moved = tf.maximum(moved, 9 / (10 + tf.cast(count[0], tf.float32)))
            for average, own in zip(averages, weights, strict=True):
                average.assign_sub(tf.cast(moved, average.dtype) * (average - joined(own)))

        weights = [[native(self.weights[place]) for place in bundle] for bundle in self.vectors.bundles]
        count = () if self.counter is None else (native(self.counter),)
        strategy.extended.update(self.averages[0], move, args=(self.averages, weights, *count), group=False)

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within the block the weights are the average, and the average the weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        averages, weights = (values_of(dict(enumerate(held))).values() for held in (self.variables, self.weights))
        put(zip(self.variables, weights, strict=True))
        put(zip(self.weights, averages, strict=True))


class OptimizersAverage(MovingAverage):
    """The average of weights that their optimizer keeps, see `models.further_optimizers.ScheduleFreeAdamW`.

    `optimizers`: that of a weight by its place; a weight without one is its own average.
    """

    def __init__(self, weights: Sequence[Any], optimizers: Mapping[int, Any]):
        self.weights, self.optimizers = list(weights), dict(optimizers)
        self.variables = [tf.Variable(native(w), trainable=False, name=f"{w.path}/average") for w in self.weights]
        self.averages = self.variables

    def _update_all(self, strategy: tf.distribute.Strategy) -> None:
        for place, (average, weight) in enumerate(zip(self.variables, self.weights, strict=True)):
            optimizer = self.optimizers.get(place)
            values = (weight.value, optimizer.base_of(weight).value) if optimizer else (weight.value,)
            take = optimizer.average if optimizer else tf.identity
            strategy.extended.update(average, lambda a, *v, take=take: a.assign(take(*v)), args=values, group=False)
