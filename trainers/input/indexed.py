"""A split read by index: a worker reads its own examples alone, and begins at any step."""

import tensorflow as tf

from models import randomness
from trainers.input.dataset import Features, Split
from trainers.input.piped import Piped
from trainers.input.pipelines import READY_STEPS, calls_at_once
from trainers.input.records import num_bytes
from trainers.settings.exit_codes import BadConfiguration

# Steps beyond the end of a call in which an unreadable example is looked for: read ahead, and in other threads.
_AHEAD_STEPS = 4


class IndexedBatches(Piped):
    """Positions of the run → indices → what is stored → examples, decoded and augmented, in tf.data's threads.

    The order is that of resident data. No example waits in a shuffle buffer: what is held are a few batches.
    """

    def take(self, strategy: tf.distribute.Strategy, split: Split) -> None:
        """The records are read by index; what is read is counted."""
        super().take(strategy, split)
        self.records = split.records
        # Counted where it happens: examples, bytes.
        with tf.device("CPU:0"):
            self._read = [tf.Variable(0, dtype=tf.int64, trainable=False) for _ in range(2)]
        self._first_replica = self._local = 0

    def pipeline(self, step: int, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Begins at the step, at the same cost for each."""
        self._local = self.replicas // context.num_input_pipelines
        self._first_replica = context.input_pipeline_id * self._local
        share = self.batch_size // self.replicas
        elements = tf.data.Dataset.range(step * self._local * share, tf.int64.max)
        elements = elements.map(self._example, num_parallel_calls=calls_at_once(), deterministic=True)
        elements = elements.batch(share, drop_remainder=True)
        return elements.prefetch(READY_STEPS * self._local)

    def augmented(self, features: Features) -> Features:
        """What needs the whole batch; each example by itself was changed while it was decoded."""
        return self.augmentation.of_batch(features)

    def _place(self, number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Step and position in its global batch of this worker's example `number`: replica by replica, part by part."""
        count = self.batch_size // self.parts // self.replicas
        own = self._local * self.parts * count
        step, rest = number // own, number % own
        replica, rest = self._first_replica + rest // (self.parts * count), rest % (self.parts * count)
        part, at = rest // count, rest % count
        return step, part * (self.batch_size // self.parts) + replica * count + at

    def _index(self, step: tf.Tensor, first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The example at a place, and its weight: 0 beyond the end of a pass in order."""
        if self.seed is None:
            # Repeated: each evaluation reads on where the one before has ended, at the first batch.
            position = step % -(-self.size // self.batch_size) * self.batch_size + first
            return self.index(position), tf.cast(position < self.size, tf.float32)
        return self.index((step * self.batch_size + first)[None])[0], tf.constant(1.0)

    @tf.autograph.experimental.do_not_convert
    def _example(self, number: tf.Tensor) -> tuple[Features, tf.Tensor]:
        """This worker's example `number` since the begin of the run."""
        step, first = self._place(number)
        index, weight = self._index(step, first)
        stored = self.records.read(index)
        counted = [
            variable.assign_add(more)
            for variable, more in zip(self._read, (tf.constant(1, tf.int64), num_bytes(stored)), strict=True)
        ]
        with tf.control_dependencies(counted):
            stored = {key: tf.identity(value) for key, value in stored.items()}
        if not self.augmentation:
            return self.records.decode(stored), weight
        with randomness.at(self.seed, step, first):
            example = self.records.decode(stored, self.augmentation.crop)
            return self.augmentation.of_one(example), weight

    def examples_read(self) -> int:
        """Examples that this process has read so far."""
        return int(self._read[0].numpy())

    def bytes_read(self) -> int:
        """Bytes that this process has read so far, as they are stored."""
        return int(self._read[1].numpy())

    def fault(self, first: int, last: int) -> BadConfiguration | None:
        """After an error in steps `first … last`: the example of this worker that cannot be read, by its name."""
        own = self._local * (self.batch_size // self.replicas)
        seen = set()
        for number in range(first * own, (last + _AHEAD_STEPS) * own):
            index = int(self._index(*self._place(tf.constant(number, tf.int64)))[0])
            if index not in seen and (fault := self.records.fault(index)):
                return fault
            seen.add(index)
        return None
