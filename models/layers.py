"""Layers of our own: what Keras lacks or gets wrong under several replicas."""

from typing import Any

import keras
import tensorflow as tf

from models import randomness


@keras.saving.register_keras_serializable("lockstep")
class Dropout(keras.layers.Layer):
    """Zeroes a share `rate` of the elements in training and scales the rest by `1 / (1 - rate)`.

    Unlike Keras's layer, which draws the same mask on every replica, the mask is a pure function of the seed, the step
    and the example's position in the global batch (`models.randomness`). `x: [batch, …]` → the same shape.
    Source: Srivastava et al., "Dropout", JMLR 2014.
    """

    def __init__(self, rate: float, **kwargs: Any):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"rate {rate} is outside [0, 1); pass the share of elements to drop, e.g. 0.1")
        self.rate = rate
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """Nothing to build: the layer has no weights."""
        self.built = True

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Drops in training, passes `x` through otherwise."""
        if not training or not self.rate:
            return x
        keep = randomness.uniform(tf.shape(x), self.path) >= self.rate
        return tf.where(keep, x / (1.0 - self.rate), tf.zeros_like(x))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return super().get_config() | {"rate": self.rate}


def batch_normalization(name: str, **kwargs: Any) -> keras.layers.BatchNormalization:
    """Batch normalization over the *global* batch: replicas add up their sums before they normalize.

    Momentum 0.9, not Keras's 0.99: with a few hundred steps, statistics at 0.99 still remember their initial value.
    """
    return keras.layers.BatchNormalization(momentum=0.9, synchronized=True, name=name, **kwargs)


@keras.saving.register_keras_serializable("lockstep")
class ResidualBlock(keras.layers.Layer):
    """Two 3×3 convolutions and a shortcut: `relu(f(x) + shortcut(x))`.

    `x: [batch, height, width, channels]` → `[batch, ⌈height / stride⌉, ⌈width / stride⌉, filters]`. The shortcut is the
    identity where the shape stays, else a 1×1 convolution. Source: He et al., "Deep residual learning", CVPR 2016.
    """

    def __init__(self, filters: int, stride: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        self.filters, self.stride = filters, stride

        def convolution(size: int, step: int, name: str) -> keras.layers.Conv2D:
            return keras.layers.Conv2D(
                filters, size, step, "same", use_bias=False, kernel_initializer="he_normal", name=name
            )

        self.first = convolution(3, stride, "conv_1")
        self.first_norm = batch_normalization("norm_1")
        self.second = convolution(3, 1, "conv_2")
        # A block that starts as the identity trains sooner (Goyal et al., 2017, section 5.1).
        self.second_norm = batch_normalization("norm_2", gamma_initializer="zeros")
        self.shortcut = convolution(1, stride, "shortcut")
        self.shortcut_norm = batch_normalization("shortcut_norm")
        self.projects = False

    def build(self, input_shape: Any) -> None:
        """Builds the parts; the 1×1 convolution only where the shape changes."""
        self.projects = self.stride != 1 or input_shape[-1] != self.filters
        inner = self.first.compute_output_shape(input_shape)
        self.first.build(input_shape)
        self.first_norm.build(inner)
        self.second.build(inner)
        self.second_norm.build(inner)
        if self.projects:
            self.shortcut.build(input_shape)
            self.shortcut_norm.build(inner)
        self.built = True

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The block's output, after the last activation."""
        y = tf.nn.relu(self.first_norm(self.first(x), training=training))
        y = self.second_norm(self.second(y), training=training)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), training=training)
        return tf.nn.relu(x + y)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return super().get_config() | {"filters": self.filters, "stride": self.stride}
