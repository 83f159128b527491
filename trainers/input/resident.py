"""A split that lies on each device: a replica gathers its share inside the compiled loop."""

import math
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.input.dataset import Features, Split
from trainers.input.source import Batches, Order

# Examples whose order is computed at once. Step by step a step of `mlp` takes 3 to 6 % longer.
_ORDERED = 1 << 16


class ResidentBatches(Batches):
    """A split held on each device; a replica gathers its share inside the compiled loop.

    With `seed=None` the order is that of the split, once; examples beyond its end get weight 0.
    """

    def take(self, strategy: tf.distribute.Strategy, split: Split) -> None:
        """The arrays lie on each device."""
        self.ordered = max(_ORDERED // self.batch_size, 1)
        # GPUs gather no whole numbers of less than 32 bits, and TensorFlow keeps those of 32 in the host's memory: the
        # whole split would be copied at each step.
        narrow = [key for key, array in split.arrays.items() if array.dtype.itemsize < 8 and array.dtype.kind in "iu"]
        self._packed = {key: split.arrays[key] for key in narrow} if _gathers_on_gpus(strategy) else {}
        self._held = _on_each_device(strategy, split.arrays | {key: words_of(a) for key, a in self._packed.items()})

    def start(self, step: int) -> None:
        """Nothing to do: the order is a function of the step."""

    def order(self, first: tf.Tensor, last: tf.Tensor) -> Order:
        """In a replica: its examples of steps `first … last`, those of a step part by part."""
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64)
        part = self.batch_size // self.parts
        share = part // self.replicas
        step, number = tf.range(first, last)[:, None, None], tf.range(self.parts, dtype=tf.int64)[:, None]
        position = step * self.batch_size + number * part + replica * share + tf.range(share, dtype=tf.int64)
        index = self.index(tf.reshape(position, [-1]))
        return tf.identity(first), tf.reshape(index, [-1, self.parts * share])

    @tf.autograph.experimental.do_not_convert
    def feed(self) -> tuple[Any, None]:
        """The arrays of each replica, for which no step waits."""
        return self._held, None

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
        rows = {key: tf.gather(array, index) for key, array in feed.items()}
        return rows | {key: rows_of(rows[key], array) for key, array in self._packed.items()}, weights


def words_of(array: np.ndarray) -> np.ndarray:
    """An array `[size, …]` of 8 to 32 bits as words of 64 bits: int64 `[size, words]`, the last filled up with 0."""
    rows = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
    return np.pad(rows, [(0, 0), (0, -rows.shape[1] % 8)]).view(np.int64)


def rows_of(words: tf.Tensor, array: np.ndarray) -> tf.Tensor:
    """The way back from `words_of(array)`, of some rows: `[rows, words]` → `[rows, …]`, in the type of the array."""
    shape = array.shape[1:]
    values = tf.reshape(tf.bitcast(words, array.dtype), [-1, words.shape[1] * 8 // array.dtype.itemsize])
    return tf.reshape(values[:, : math.prod(shape)], [-1, *shape])


def _gathers_on_gpus(strategy: tf.distribute.Strategy) -> bool:
    return any("GPU" in device for device in strategy.extended.worker_devices)


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
