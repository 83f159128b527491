"""What contrastive learning adds to a model: a projection head, and the similarities of views.

Source: Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020.
"""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("lockstep")
class Contrastive(keras.Model):
    """An encoder and the projection head of the paper: a hidden layer and a linear one.

    What the encoder takes → `[batch, width]`, float32, rows of length 1: their products are the cosines that the loss
    compares. `encoder`: its output is `[batch, features]`, which is what is used afterwards. `hidden`: the width of the
    hidden layer.
    """

    def __init__(self, encoder: keras.Model, hidden: int, width: int, name: str = "contrastive", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        self.encoder, self.hidden_width, self.width = encoder, hidden, width
        self.hidden = keras.layers.Dense(hidden, "relu", kernel_initializer="he_normal", name="hidden")
        self.projection = keras.layers.Dense(width, name="projection", dtype="float32")

    def call(self, x: Any, training: bool = False) -> tf.Tensor:
        projected = self.projection(self.hidden(self.encoder(x, training=training)))
        return tf.math.l2_normalize(projected, axis=-1)

    def get_config(self) -> dict[str, Any]:
        own = {"encoder": keras.saving.serialize_keras_object(self.encoder)}
        return super().get_config() | own | {"hidden": self.hidden_width, "width": self.width}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Contrastive":
        return cls(**(config | {"encoder": keras.saving.deserialize_keras_object(config["encoder"])}))


def among_all(own: tf.Tensor, every: tf.Tensor, first: tf.Tensor, temperature: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Which of all views is the other one of its pair, for the views from position `first` on: a classification.

    `own: [rows, width]`, `every: [all rows, width]`, float32, of length 1; the views at positions 2i and 2i + 1 are a
    pair. Returns the positions of the others, `[rows]`, and logits `[rows, all rows]`: cosines over the temperature,
    and for the view itself the least number. Their cross-entropy is NT-Xent of each view, equation 1 of the paper.
    """
    at = tf.cast(first, tf.int32) + tf.range(tf.shape(own)[0])
    itself = tf.one_hot(at, tf.shape(every)[0], on_value=True, off_value=False, dtype=tf.bool)
    logits = tf.matmul(own, every, transpose_b=True) / temperature
    return at + 1 - 2 * (at % 2), tf.where(itself, logits.dtype.min, logits)
