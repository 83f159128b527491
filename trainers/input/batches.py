"""Which examples form the global batch of a step, and how each replica gets its share.

Example `p` of the run (`p = step * batch_size + position in the batch`) is a pure function of the seed and `p`, so the
order does not depend on the number of replicas, epochs follow each other without a gap, and a resumed run needs no
saved position. A source has three functions: `order` runs for many steps at once, inside of each replica; `feed` once a
step, outside of them; `part` once for each part of a step, inside.
"""

import abc
from typing import Any

import tensorflow as tf

from trainers.input.dataset import Features, Split
from trainers.world import private_api

# Records among which a streamed split is shuffled. Resident data is shuffled as a whole.
STREAM_WINDOW = 10_000
_SHUFFLE_ROUNDS = 4
# The examples of some steps: the first of the steps, and a row for each. It lies where the replica computes.
Order = tuple[tf.Tensor, tf.Tensor]
# Examples whose order is computed at once. Step by step a step of `mlp` takes 3 to 6 % longer.
_ORDERED = 1 << 16


def shuffled_index(position: tf.Tensor, size: int, seed: int) -> tf.Tensor:
    """The example at positions `[n]` (int64) of a run over `size` examples, each epoch in an order of its own: `[n]`.

    Source: the pseudo-random permutation of `tf.random.experimental.index_shuffle`, keyed by seed and epoch.
    """
    epoch = position // size
    key = tf.stack([tf.fill(tf.shape(epoch), tf.cast(seed, tf.int64)), epoch, epoch // 2**32], axis=1)
    return tf.raw_ops.RandomIndexShuffle(
        index=position % size,
        seed=tf.cast(key, tf.uint32),
        max_index=tf.fill(tf.shape(epoch), tf.cast(size - 1, tf.int64)),
        rounds=_SHUFFLE_ROUNDS,
    )


class Batches(abc.ABC):
    """A source of global batches of `batch_size`, from a split of `size` examples.

    A global batch is cut into `parts` first and each part over the replicas, so that what is computed over a part
    (batch statistics) does not depend on the number of replicas. `seed=None`: in the order of the split, once.
    `ordered`: the most steps that one call of `order` should cover.
    """

    ordered: int

    def __init__(
        self, strategy: tf.distribute.Strategy, split: Split, batch_size: int, seed: int | None, parts: int = 1
    ):
        self.size, self.batch_size, self.seed = split.size, batch_size, seed
        self.parts, self.replicas = parts, strategy.num_replicas_in_sync

    @abc.abstractmethod
    def start(self, step: int) -> None:
        """Goes to a step: the next `feed` is that of its global batch."""

    @abc.abstractmethod
    def order(self, first: tf.Tensor, last: tf.Tensor) -> Order:
        """In a replica: its examples of steps `first … last`, those of a step part by part."""

    @abc.abstractmethod
    def feed(self) -> tuple[Any, tf.Tensor]:
        """What the replicas take a step's examples from, and the seconds that the step waits for it, float64."""

    @abc.abstractmethod
    def share(
        self, feed: Any, order: Order, step: tf.Tensor, first: tf.Tensor, part: int, count: int
    ) -> tuple[Features, tf.Tensor]:
        """Part number `part` of this replica's examples, `count` of them; weights `[count]`: 1, or 0 for padding.

        `first`: the position of its first example in the global batch of the step.
        """

    def part(self, feed: Any, order: Order, step: tf.Tensor, number: int) -> tuple[Features, tf.Tensor, tf.Tensor]:
        """In a replica: part `number` of its share of the step's global batch, as `(features, weights, first)`.

        `features`: `[batch_size / parts / replicas, …]` each; `weights`: as in `share`. `first`: the position of the
        first of these examples in the global batch, int64; the others follow it without a gap.
        """
        whole_part = self.batch_size // self.parts
        count = whole_part // self.replicas
        start = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64) * count
        first = start + number * whole_part
        features, weights = self.share(feed, order, step, first, number, count)
        return features, weights, first


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


class StreamedBatches(Batches):
    """A split read through tf.data: files in a fixed order, shuffled in a window keyed by seed and epoch.

    The order is as reproducible as that of resident data, and as independent of the replicas, but less random: an
    example moves by about `STREAM_WINDOW` records. `start` reads over what comes before within the epoch.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, split: Split, batch_size: int, seed: int | None, parts: int = 1
    ):
        super().__init__(strategy, split, batch_size, seed, parts)
        self.ordered = _ORDERED
        self._strategy, self._split = strategy, split
        self._iterator = None

    def start(self, step: int) -> None:
        """Reads over what comes before the step within its epoch."""
        options = tf.data.Options()
        options.deterministic = True
        global_batches = self._dataset(step * self.batch_size).with_options(options)

        def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
            """One element for each replica of this worker and step, in order."""
            local = self.replicas // context.num_input_pipelines
            first, share = context.input_pipeline_id * local, self.batch_size // self.replicas

            def own(features: Features, weights: tf.Tensor) -> Any:
                def rows(value: tf.Tensor) -> tf.Tensor:
                    mine = value[first * share : (first + local) * share]
                    return tf.reshape(mine, [local, share, *value.shape[1:].as_list()])

                return tf.nest.map_structure(rows, (features, weights))

            return global_batches.map(own).unbatch().prefetch(tf.data.AUTOTUNE)

        self._iterator = iter(self._strategy.distribute_datasets_from_function(of_worker))

    def _dataset(self, position: int) -> tf.data.Dataset:
        if self.seed is None:
            # Repeated: each evaluation reads on where the one before has ended, at the first batch.
            return self._split.stream().batch(self.batch_size).map(self._padded).repeat()
        epoch, skipped = divmod(position, self.size)

        def shuffled(number: tf.Tensor) -> tf.data.Dataset:
            return _shuffled_records(self._split.stream(), min(STREAM_WINDOW, self.size), self.seed, number).skip(
                tf.where(number == epoch, tf.cast(skipped, tf.int64), 0)
            )

        epochs = tf.data.Dataset.range(epoch, tf.int64.max)
        return epochs.flat_map(shuffled).batch(self.batch_size, drop_remainder=True).map(self._padded)

    def _padded(self, features: Features) -> tuple[Features, tf.Tensor]:
        """Fills a last, smaller batch up with its first example at weight 0."""
        present = tf.shape(next(iter(features.values())))[0]
        index = tf.range(self.batch_size)
        weights = tf.cast(index < present, tf.float32)
        padded = {key: tf.gather(value, tf.where(index < present, index, 0)) for key, value in features.items()}
        return {key: self._by_replica(value) for key, value in padded.items()}, self._by_replica(weights)

    def _by_replica(self, value: tf.Tensor) -> tf.Tensor:
        """Part by part, replica by replica → replica by replica, part by part: a replica gets one contiguous piece."""
        rest = value.shape[1:].as_list()
        grid = tf.reshape(value, [self.parts, self.replicas, self.batch_size // self.parts // self.replicas, *rest])
        return tf.reshape(tf.transpose(grid, [1, 0, 2, *range(3, 3 + len(rest))]), [self.batch_size, *rest])

    def order(self, first: tf.Tensor, last: tf.Tensor) -> Order:
        """Nothing: the stream has its own."""
        return first, tf.zeros([0], tf.int64)

    def feed(self) -> tuple[Any, tf.Tensor]:
        """The next global batch, split over the replicas in order, and the seconds waited for it, float64.

        With deterministic kernels TensorFlow has no clock in the graph: the seconds are 0 then.
        """
        if private_api.is_deterministic():
            return next(self._iterator), tf.constant(0.0, tf.float64)
        asked = tf.timestamp()
        with tf.control_dependencies([asked]):
            feed = next(self._iterator)
        own = [tensor for value in tf.nest.flatten(feed) for tensor in self._strategy.experimental_local_results(value)]
        with tf.control_dependencies(own):
            return feed, tf.timestamp() - asked

    def share(
        self, feed: Any, order: Order, step: tf.Tensor, first: tf.Tensor, part: int, count: int
    ) -> tuple[Features, tf.Tensor]:
        """Part number `part` of this replica's examples, `count` of them, and their weights `[count]`."""
        features, weights = feed
        window = slice(part * count, (part + 1) * count)
        return {key: value[window] for key, value in features.items()}, weights[window]


def batches(
    strategy: tf.distribute.Strategy, split: Split, batch_size: int, seed: int | None, parts: int = 1
) -> Batches:
    """The source for a split: resident if it holds arrays, streamed otherwise.

    `seed=None`: in order, once. `parts`: pieces of the global batch that are computed one after another.
    """
    source = ResidentBatches if split.arrays is not None else StreamedBatches
    return source(strategy, split, batch_size, seed, parts)


def _shuffled_records(records: tf.data.Dataset, window: int, seed: int, epoch: tf.Tensor) -> tf.data.Dataset:
    """Records shuffled in a window by (seed, epoch) alone.

    `Dataset.shuffle` mixes in the global seed, and refuses a seed that is a tensor when the global one is 0.
    """
    shapes = tf.nest.flatten(tf.compat.v1.data.get_output_shapes(records))
    types = tf.nest.flatten(tf.compat.v1.data.get_output_types(records))
    variant = tf.raw_ops.ShuffleDataset(
        input_dataset=tf.data.experimental.to_variant(records),
        buffer_size=tf.constant(window, tf.int64),
        seed=tf.constant(seed + 1, tf.int64),
        seed2=epoch + 1,
        output_types=types,
        output_shapes=shapes,
        reshuffle_each_iteration=False,
    )
    return tf.data.experimental.from_variant(variant, records.element_spec)


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
