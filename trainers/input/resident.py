"""A split that lies on each device: a replica gathers its share inside the compiled loop."""

from typing import Any

import tensorflow as tf

from trainers.input.dataset import Features, Split
from trainers.input.source import Batches, Order, shuffled_index

# Examples whose order is computed at once. Step by step a step of `mlp` takes 3 to 6 % longer.
_ORDERED = 1 << 16


class ResidentBatches(Batches):
    """A split held on each device; a replica gathers its share inside the compiled loop.

    With `seed=None` the order is that of the split, once; examples beyond its end get weight 0.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, split: Split, batch_size: int, seed: int | None, parts: int = 1
    ):
        super().__init__(strategy, split, batch_size, seed, parts)
        self.ordered = max(_ORDERED // batch_size, 1)
        self._held = _on_each_device(strategy, split.arrays)

    def start(self, step: int) -> None:
        """Nothing to do: the order is a function of the step."""

    def order(self, first: tf.Tensor, last: tf.Tensor) -> Order:
        """In a replica: its examples of steps `first … last`, those of a step part by part."""
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64)
        part = self.batch_size // self.parts
        share = part // self.replicas
        step, number = tf.range(first, last)[:, None, None], tf.range(self.parts, dtype=tf.int64)[:, None]
        position = step * self.batch_size + number * part + replica * share + tf.range(share, dtype=tf.int64)
        position = tf.reshape(position, [-1])
        if self.seed is None:
            index = tf.minimum(position, self.size - 1)
        else:
            index = shuffled_index(position, self.size, self.seed)
        return tf.identity(first), tf.reshape(index, [-1, self.parts * share])

    def feed(self) -> tuple[Any, tf.Tensor]:
        """The arrays of each replica, and the seconds that a step waits for them: none, float64."""
        return self._held, tf.constant(0.0, tf.float64)

    def share(
        self, feed: Features, order: Order, step: tf.Tensor, first: tf.Tensor, part: int, count: int
    ) -> tuple[Features, tf.Tensor]:
        """Part number `part` of this replica's examples, `count` of them; weights `[count]`: 1, or 0 for padding.

        `first`: the position of its first example in the global batch of the step.
        """
        begin, index = order
        index = tf.gather(index, step - begin)
        if self.parts > 1:
            index = index[part * count : (part + 1) * count]
        weights = tf.ones([count])
        if self.seed is None:
            position = step * self.batch_size + first + tf.range(count, dtype=tf.int64)
            weights = tf.cast(position < self.size, tf.float32)
        return {key: tf.gather(array, index) for key, array in feed.items()}, weights


def _on_each_device(strategy: tf.distribute.Strategy, arrays: Features) -> Any:
    """The arrays as tensors on each replica's device; CPU devices share one copy."""
    copies: dict[str, Features] = {}
    devices = strategy.extended.worker_devices
    for device in devices:
        kind = device if "GPU" in device else "CPU"
        if kind not in copies:
            with tf.device(device):
                copies[kind] = {key: tf.constant(array) for key, array in arrays.items()}
    values = [copies[device if "GPU" in device else "CPU"] for device in devices]

    def value(context: tf.distribute.experimental.ValueContext) -> Features:
        return values[context.replica_id_in_sync_group % len(values)]

    return strategy.experimental_distribute_values_from_function(value)
