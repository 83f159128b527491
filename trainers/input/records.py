"""Examples that are read one at a time, by index, in tf.data's own threads: no Python for each example."""

import abc
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from trainers.input.errors import reason_of
from trainers.input.pipelines import calls_at_once, steady
from trainers.settings.exit_codes import BadConfiguration

Example = dict[str, Any]
# Of images: height and width `[2]` int32 → top, left, height, width of a crop `[4]` int32.
Crop = Callable[[tf.Tensor], tf.Tensor]


def everything(shape: tf.Tensor) -> tf.Tensor:
    """The crop that takes the whole image."""
    return tf.concat([tf.zeros([2], tf.int32), shape], axis=0)


class Records(abc.ABC):
    """`size` examples of a split. Which one has an index never changes.

    `read` and `decode` are traced into a `tf.data` pipeline; an error there does not say which example it was, so that
    `fault` looks for it afterwards.
    """

    size: int

    @abc.abstractmethod
    def read(self, index: tf.Tensor) -> Example:
        """The example as it is stored. `index`: int64 scalar. Its strings and vectors are what was read."""

    @abc.abstractmethod
    def decode(self, stored: Example, crop: Crop | None = None) -> Example:
        """Features of a fixed shape. `crop`: which part of an image is taken; None = as evaluation has it."""

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """What holds the example, for messages: a file, or a file and the number of a record in it."""

    def changed(self, index: int) -> str:
        """How what holds the example differs from what was indexed; empty where it does not."""
        return ""

    def in_order(self) -> tf.data.Dataset:
        """All examples as stored, in order. Where reading a file from its begin is faster, that is done."""
        return tf.data.Dataset.range(self.size).map(
            tf.autograph.experimental.do_not_convert(self.read), num_parallel_calls=calls_at_once(), deterministic=True
        )

    def examples(self) -> tf.data.Dataset:
        """All examples in order, as evaluation has them."""
        return steady(
            self.in_order().map(
                tf.autograph.experimental.do_not_convert(self.decode),
                num_parallel_calls=calls_at_once(),
                deterministic=True,
            )
        )

    def fault(self, index: int) -> BadConfiguration | None:
        """What is wrong with an example, as an error that names it; None if it can be read."""
        if reason := self.changed(index):
            return BadConfiguration(f"{self.where(index)} has changed ({reason}); restore it, or begin another run")
        try:
            self.decode(self.read(tf.constant(index, tf.int64)), everything)
        except (tf.errors.OpError, ValueError) as error:
            return BadConfiguration(
                f"{self.where(index)} cannot be read ({reason_of(error)}); replace it, and begin another run"
            )
        return None


class Sample(Records):
    """`size` of the examples of others, spaced evenly."""

    def __init__(self, records: Records, size: int):
        self.records, self.size = records, size

    def _index(self, index: Any) -> Any:
        return index * self.records.size // self.size

    def read(self, index: tf.Tensor) -> Example:
        return self.records.read(self._index(index))

    def decode(self, stored: Example, crop: Crop | None = None) -> Example:
        return self.records.decode(stored, crop)

    def where(self, index: int) -> str:
        return self.records.where(self._index(index))

    def changed(self, index: int) -> str:
        return self.records.changed(self._index(index))


def num_bytes(stored: Example) -> tf.Tensor:
    """The bytes of an example's strings and vectors: int64. Single numbers, labels say, are not counted."""
    counts = [tf.cast(tf.strings.length(value), tf.int64) for value in stored.values() if value.dtype == tf.string]
    vectors = [value for value in stored.values() if value.dtype != tf.string and value.shape.rank]
    counts += [tf.size(value, tf.int64) * value.dtype.size for value in vectors]
    return tf.add_n(counts) if counts else tf.constant(0, tf.int64)
