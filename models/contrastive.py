"""What contrastive learning adds to a model: the projection head and the loss over pairs of views.

Source: Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020.
"""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("lockstep")
class Projection(keras.Model):
    """The head g of the paper, a hidden layer and a linear one: features `[batch, features]` → `[batch, width]`.

    Rows of the output have length 1, float32: their products are the similarities that the loss compares.
    """

    def __init__(self, width: int, hidden: int, name: str = "projection", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        self.width, self.hidden_width = width, hidden
        self.hidden = keras.layers.Dense(hidden, "relu", kernel_initializer="he_normal", name="hidden")
        self.out = keras.layers.Dense(width, name="out", dtype="float32")

    def call(self, features: tf.Tensor, training: bool = False) -> tf.Tensor:
        return tf.math.l2_normalize(self.out(self.hidden(features)), axis=-1)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"width": self.width, "hidden": self.hidden_width}


def nt_xent(own: tf.Tensor, every: tf.Tensor, first: tf.Tensor, temperature: float) -> tuple[tf.Tensor, tf.Tensor]:
    """NT-Xent of the views from position `first` on, against all views: losses `[rows]`, and 1 where a pair is nearest.

    `own: [rows, width]`, `every: [all rows, width]`, of length 1, float32. The views at positions 2i and 2i + 1 are a
    pair; all others but the view itself are negatives. A mean of these losses over all rows is the loss of the batch.
    """
    at = tf.cast(first, tf.int32) + tf.range(tf.shape(own)[0])
    other = at + 1 - 2 * (at % 2)
    similarities = tf.matmul(own, every, transpose_b=True) / temperature
    itself = tf.one_hot(at, tf.shape(every)[0], on_value=True, off_value=False, dtype=tf.bool)
    similarities = tf.where(itself, similarities.dtype.min, similarities)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(other, similarities)
    return losses, tf.cast(tf.argmax(similarities, axis=1, output_type=tf.int32) == other, tf.float32)
