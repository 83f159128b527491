"""Streaming metrics: each is a function of a sum, over examples, of additive statistics.

That form is exact at every number of replicas: statistics of all examples add up in any grouping, and one all-reduce
merges replicas. The loop uses the pure half (`statistics`, `result_of`) and keeps the sums itself, in the compiled
graph; as an ordinary Keras metric (`update_state`, `result`, `reset_state`) the same class works anywhere else.
"""

from typing import Any

import keras
import tensorflow as tf


class StreamingMetric(keras.metrics.Metric):
    """A metric that is `result_of(sum over examples of statistics)`.

    A subclass sets `width`, the number of statistics of one example, and implements the two pure functions.
    """

    width = 1

    def __init__(self, name: str | None = None, dtype: str | None = None):
        super().__init__(name=name, dtype=dtype)
        self._total = None

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """Additive statistics of each example: `[batch, width]`, float32."""
        raise NotImplementedError

    def result_of(self, total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """The metric from the summed statistics `[width]` of `count` examples: a scalar. Default: the mean."""
        return tf.math.divide_no_nan(total[0], count)

    def _state(self) -> keras.Variable:
        if self._total is None:
            self._total = self.add_variable((self.width + 1,), initializer="zeros", name="total", aggregation="sum")
        return self._total

    def update_state(self, targets: Any, outputs: Any, sample_weight: Any = None) -> None:
        """Adds a batch. `sample_weight: [batch]` scales each example's statistics and its count."""
        values = tf.cast(self.statistics(targets, outputs), tf.float32)
        values = tf.concat([values, tf.ones_like(values[:, :1])], axis=1)
        if sample_weight is not None:
            values *= tf.cast(sample_weight, tf.float32)[:, None]
        self._state().assign_add(tf.reduce_sum(values, axis=0))

    def result(self) -> tf.Tensor:
        """The metric over everything added since the last reset: a scalar."""
        total = tf.convert_to_tensor(self._state())
        return self.result_of(total[:-1], total[-1])

    def reset_state(self) -> None:
        """Forgets all examples."""
        self._state().assign(tf.zeros([self.width + 1]))


class Accuracy(StreamingMetric):
    """Share of examples whose largest logit is the label. `labels: [batch]`, `logits: [batch, num_classes]`."""

    def __init__(self, name: str = "accuracy", dtype: str | None = None):
        super().__init__(name=name, dtype=dtype)

    def statistics(self, targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        """1 where the largest logit is the label: `[batch, 1]`."""
        correct = tf.equal(tf.argmax(outputs, axis=-1, output_type=tf.int64), tf.cast(targets, tf.int64))
        return tf.cast(correct, tf.float32)[:, None]
