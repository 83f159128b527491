"""The vector of running sums that a training loop or an evaluation keeps, and what it stands for.

One vector for the loss and all metrics: it is summed over replicas by one all-reduce and kept between compiled calls.
"""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from models.metrics import StreamingMetric
from models.tasks import Mixed


class Sums:
    """The layout of the vector: the loss, the number of examples, then each metric's statistics.

    `width`: the length of the vector. `names`: what `values` returns, the loss and then each metric.
    """

    def __init__(self, metrics: Mapping[str, StreamingMetric]):
        self.metrics = dict(metrics)
        self.width = 2 + sum(metric.width for metric in self.metrics.values())
        self.names = ("loss", *self.metrics)

    @classmethod
    def of_means(cls, *names: str) -> "Sums":
        """The layout for means whose sums over the examples a loop computes itself, one number for each name."""
        return cls({name: StreamingMetric(name) for name in names})

    def of_examples(self, targets: Any, outputs: Any, losses: tf.Tensor, weights: tf.Tensor | None = None) -> tf.Tensor:
        """The sums over a batch, each example times its weight: `[width]`, float32.

        `losses`, `weights`: `[batch]`, float32. A weight of 0 leaves an example out, also of the count; without weights
        each counts. For `Mixed` targets the statistics are those of both, each by its share.
        """
        losses = tf.expand_dims(losses, axis=1)
        columns = [losses, tf.ones_like(losses)]
        if isinstance(targets, Mixed):
            for metric in self.metrics.values():
                own, other = (metric.statistics(side, outputs) for side in (targets.own, targets.other))
                columns.append(targets.share[:, None] * own + (1 - targets.share[:, None]) * other)
        else:
            columns += [metric.statistics(targets, outputs) for metric in self.metrics.values()]
        values = tf.concat(columns, axis=1)
        return tf.reduce_sum(values if weights is None else values * weights[:, None], axis=0)

    def values(self, sums: tf.Tensor) -> tf.Tensor:
        """The mean loss and the metrics, as in `names`: sums `[width]` → `[1 + number of metrics]`, float64 both."""
        count = tf.maximum(sums[1], 1.0)
        values, at = [sums[0] / count], 2
        for metric in self.metrics.values():
            total = tf.cast(sums[at : at + metric.width], tf.float32)
            values.append(tf.cast(metric.result_of(total, tf.cast(count, tf.float32)), tf.float64))
            at += metric.width
        return tf.stack(values)
