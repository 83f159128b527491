"""A multi-layer perceptron for classification, subclassed."""

from typing import Any

import keras
import tensorflow as tf

from models import layers, tasks


@keras.saving.register_keras_serializable("lockstep")
class MLP(keras.Model):
    """Flatten, hidden layers with ReLU and dropout, logits.

    `x: [batch, …]` → logits `[batch, num_classes]`, float32.
    """

    def __init__(self, num_classes: int, units: tuple[int, ...] = (256, 128), dropout: float = 0.2, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_classes, self.units, self.dropout = num_classes, tuple(units), dropout
        self.flatten = keras.layers.Flatten(name="flatten")
        self.hidden = [
            keras.layers.Dense(n, "relu", kernel_initializer="he_normal", name=f"hidden_{i}")
            for i, n in enumerate(self.units, 1)
        ]
        self.drops = [layers.Dropout(dropout, name=f"dropout_{i}") for i in range(1, len(self.units) + 1)]
        self.head = keras.layers.Dense(num_classes, name="logits", dtype="float32")

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = self.flatten(x)
        for hidden, drop in zip(self.hidden, self.drops, strict=True):
            x = drop(hidden(x), training=training)
        return self.head(x)

    def get_config(self) -> dict[str, Any]:
        config = {"num_classes": self.num_classes, "units": self.units, "dropout": self.dropout}
        return super().get_config() | config


def build(
    spec: tasks.DataSpec, *, width: tuple[int, ...] = (256, 128), dropout: float = 0.2
) -> tuple[keras.Model, tasks.Task]:
    """The model and its task for a classification data set. `width`: units of each hidden layer."""
    layers.check_sizes(width=width)
    return MLP(spec.num_classes, width, dropout, name="mlp"), tasks.classification(spec)
