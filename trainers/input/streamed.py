"""A split read from its begin through tf.data: for data that cannot be read by index."""

from typing import Any

import tensorflow as tf

from trainers.input.dataset import Features
from trainers.input.piped import Piped
from trainers.input.pipelines import READY_STEPS

# Records among which a streamed split is shuffled. Resident data is shuffled as a whole.
STREAM_WINDOW = 10_000


class StreamedBatches(Piped):
    """A split read through tf.data: files in a fixed order, shuffled in a window keyed by seed and epoch.

    The order is as reproducible as that of resident data, and as independent of the replicas, but less random: an
    example moves by about `STREAM_WINDOW` records. `start` reads over what comes before within the epoch.
    """

    def pipeline(self, step: int, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Reads over what comes before the step within its epoch."""
        local = self.replicas // context.num_input_pipelines
        first, share = context.input_pipeline_id * local, self.batch_size // self.replicas

        def own(features: Features, weights: tf.Tensor) -> Any:
            def rows(value: tf.Tensor) -> tf.Tensor:
                mine = value[first * share : (first + local) * share]
                return tf.reshape(mine, [local, share, *value.shape[1:].as_list()])

            return tf.nest.map_structure(rows, (features, weights))

        global_batches = self._dataset(step * self.batch_size).map(own)
        return global_batches.unbatch().prefetch(READY_STEPS * local)

    def _dataset(self, position: int) -> tf.data.Dataset:
        if self.seed is None:
            # Repeated: each evaluation reads on where the one before has ended, at the first batch.
            return self.split.stream().batch(self.batch_size).map(self._padded).repeat()
        epoch, skipped = divmod(position // self.views, self.size)

        def shuffled(number: tf.Tensor) -> tf.data.Dataset:
            return _shuffled_records(self.split.stream(), min(STREAM_WINDOW, self.size), self.seed, number).skip(
                tf.where(number == epoch, tf.cast(skipped, tf.int64), 0)
            )

        epochs = tf.data.Dataset.range(epoch, tf.int64.max)
        examples = epochs.flat_map(shuffled).batch(self.batch_size // self.views, drop_remainder=True)
        if self.views > 1:
            examples = examples.map(self._repeated)
        return examples.map(self._padded)

    def _repeated(self, features: Features) -> Features:
        """Each example once for each of its views."""
        return {key: tf.repeat(value, self.views, axis=0) for key, value in features.items()}

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
