"""What a model is trained for: its loss for each example and its metrics, apart from any loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from models import metrics as metrics_lib


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a model must know of the data to be built.

    `input_shape`: one example's shape without the batch, e.g. `(8, 8, 1)`, after the data set's own preparation.
    `input_dtype`: its element type. `num_classes`: classes of the label; 0 where the target is not a class.
    """

    task: str
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"
    num_classes: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """The loss and the metrics of a model.

    `loss(targets, outputs) -> [batch]` gives one value for each example; only the loop reduces.
    `metrics`: each a sum over examples of additive statistics, see `models.metrics.StreamingMetric`.
    `best_metric`, `best_mode`: the eval metric, `max` or `min`, by which the best checkpoint is kept.
    """

    loss: Callable[[Any, Any], tf.Tensor]
    metrics: Mapping[str, metrics_lib.StreamingMetric]
    best_metric: str = "loss"
    best_mode: str = "min"


def classification() -> Task:
    """One label in `[0, num_classes)` for each example; the model returns logits `[batch, num_classes]`."""

    def loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, tf.cast(logits, tf.float32))

    return Task(loss, {"accuracy": metrics_lib.Accuracy()}, best_metric="accuracy", best_mode="max")
