"""A source whose examples come through tf.data, from beside the compiled loop."""

import abc
from typing import Any

import tensorflow as tf

from trainers.input.dataset import Features, Split
from trainers.input.pipelines import steady
from trainers.input.source import Batches, Order
from trainers.world import private_api

# There is no order to compute: as many steps at once as anybody wants.
_ORDERED = 1 << 16


class Piped(Batches):
    """Its pipeline gives each replica of this worker one element a step: all its parts, one after another."""

    def take(self, strategy: tf.distribute.Strategy, split: Split) -> None:
        """The split is read through a pipeline that `start` makes."""
        self.ordered = _ORDERED
        self.strategy, self.split = strategy, split
        self._iterator = None
        self._on_gpus = any("GPU" in device for device in strategy.extended.worker_devices)

    @abc.abstractmethod
    def pipeline(self, step: int, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Elements `(features, weights)`, `[batch_size / replicas, …]`, from a step on, for a worker's replicas."""

    def start(self, step: int) -> None:
        """Begins a pipeline at the step."""
        if self._on_gpus:
            self._iterator = iter(
                self.strategy.distribute_datasets_from_function(lambda context: steady(self.pipeline(step, context)))
            )
            return
        # What copies to devices ahead of time has threads of its own, see `steady`. In one memory nothing is copied.
        self._iterator = iter(steady(self.pipeline(step, self._context)))

    @property
    def _context(self) -> tf.distribute.InputContext:
        """Which worker this is, among how many."""
        resolver = self.strategy.cluster_resolver
        workers = len(resolver.cluster_spec().job_tasks("worker")) if resolver else 1
        return tf.distribute.InputContext(workers, resolver.task_id if resolver else 0, self.replicas)

    def order(self, first: tf.Tensor, last: tf.Tensor) -> Order:
        """Nothing: the pipeline has its own."""
        return first, tf.zeros([0], tf.int64)

    @tf.autograph.experimental.do_not_convert
    def feed(self) -> tuple[Any, tf.Tensor | None]:
        """The next global batch, split over the replicas in order, and the seconds waited for it, float64.

        With deterministic kernels TensorFlow has no clock in the graph: there are no seconds then.
        """
        if private_api.is_deterministic():
            return self._next(), None
        asked = tf.timestamp()
        with tf.control_dependencies([asked]):
            feed = self._next()
        own = [tensor for value in tf.nest.flatten(feed) for tensor in self.strategy.experimental_local_results(value)]
        with tf.control_dependencies(own):
            return feed, tf.timestamp() - asked

    def _next(self) -> Any:
        """On GPUs a value for each replica; else a list with what each replica takes, which all of them see."""
        if self._on_gpus:
            return next(self._iterator)
        return [next(self._iterator) for _ in range(self.replicas // self._context.num_input_pipelines)]

    def share(
        self, feed: Any, order: Order, step: tf.Tensor, first: tf.Tensor, part: int, count: int
    ) -> tuple[Features, tf.Tensor]:
        """Part number `part` of this replica's examples, `count` of them, and their weights `[count]`."""
        if not self._on_gpus:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            feed = feed[int(tf.get_static_value(replica)) % len(feed)]
        features, weights = feed
        window = slice(part * count, (part + 1) * count)
        return {key: value[window] for key, value in features.items()}, weights[window]
