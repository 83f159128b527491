"""Single layers that Keras lacks, or in which it draws the same noise on every replica.

Each computes in its policy's compute dtype and keeps its weights in float32, so mixed precision is safe; statistics are
computed in float32.
"""

from typing import Any

import keras
import tensorflow as tf

from models import randomness

register = keras.saving.register_keras_serializable("lockstep")


def check_sizes(least: int = 1, **sizes: int | tuple[int, ...]) -> None:
    """Raises ValueError where a size of a model, or one of several, is below `least`."""
    for name, value in sizes.items():
        several = value if isinstance(value, tuple) else (value,)
        if not several or min(several) < least:
            raise ValueError(f"{name} {value} is below {least}; pass {least} or more")


@register
class Dropout(keras.layers.Layer):
    """Sets a fraction `rate` of the elements to zero in training and scales the rest by `1 / (1 - rate)`.

    Keras's layer draws the same mask on every replica. Here the mask is a pure function of the seed, the step and the
    example's position in the global batch (`models.randomness`). `x: [batch, …]` → the same shape. An infinite element
    that is dropped becomes NaN, so the loop's check for finite numbers still sees it.
    Source: Srivastava et al., "Dropout", JMLR 2014.
    """

    def __init__(self, rate: float, **kwargs: Any):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"rate {rate} is outside [0, 1); pass the fraction of elements to drop, e.g. 0.1")
        self.rate = rate
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        self.built = True

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not self.rate:
            return x
        return x * randomness.dropout_mask(self.rate, tf.shape(x), self.path, x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"rate": self.rate}


@register
class StochasticDepth(Dropout):
    """Sets a fraction `rate` of the examples to zero in training, and scales the rest: for what a block adds to them.

    `x: [batch, …]` → the same shape. The mask is that of `Dropout`, one number for each example.
    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016.
    """

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not self.rate:
            return x
        shape = [tf.shape(x)[0], *[1] * (x.shape.rank - 1)]
        return x * randomness.dropout_mask(self.rate, shape, self.path, x.dtype)


def rates_by_depth(rate: float, blocks: int) -> list[float]:
    """Rates of `StochasticDepth` for each block, from `rate / blocks` up to `rate`. Source: as there, equation 4.

    Raises:
      ValueError: the rate is no fraction below 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"stochastic_depth {rate} is outside [0, 1); pass the last block's fraction, e.g. 0.1")
    return [rate * (block + 1) / blocks for block in range(blocks)]


@register
class Noise(keras.layers.Layer):
    """Adds normal noise of standard deviation `stddev` in training: a pure function of (seed, step, example).

    `x: [batch, …]` → the same shape.
    """

    def __init__(self, stddev: float, **kwargs: Any):
        super().__init__(**kwargs)
        if not stddev >= 0:
            raise ValueError(f"stddev {stddev} is below 0; pass the noise's standard deviation, e.g. 0.1")
        self.stddev = stddev
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        self.built = True

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not self.stddev:
            return x
        return x + tf.cast(self.stddev * randomness.normal(tf.shape(x), self.path), x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"stddev": self.stddev}


@register
class Dense(keras.layers.Layer):
    """`activation(x · kernel + bias)`. `x: [..., features]` → `[..., units]`."""

    def __init__(
        self,
        units: int,
        activation: Any = None,
        initializer: Any = "glorot_uniform",
        use_bias: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.units, self.use_bias = units, use_bias
        self.activation = keras.activations.get(activation)
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), initializer=self.initializer, name="kernel")
        if self.use_bias:
            self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        x = tf.tensordot(x, tf.convert_to_tensor(self.kernel), 1) if x.shape.rank > 2 else x @ self.kernel
        return self.activation(x + self.bias if self.use_bias else x)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "units": self.units,
            "use_bias": self.use_bias,
            "activation": keras.activations.serialize(self.activation),
            "initializer": keras.initializers.serialize(self.initializer),
        }


@register
class LayerNormalization(keras.layers.Layer):
    """Each position over its features: `(x - mean) / √(variance + epsilon) · scale + offset`, both trainable.

    `x: [..., features]` → the same shape. `center`: whether there is an offset. Source: Ba et al., "Layer
    normalization", 2016.
    """

    def __init__(self, epsilon: float = 1e-6, center: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.epsilon, self.center = epsilon, center

    def build(self, input_shape: Any) -> None:
        shape = (input_shape[-1],)
        self.scale = self.add_weight(shape=shape, initializer="ones", name="scale", autocast=False)
        if self.center:
            self.offset = self.add_weight(shape=shape, initializer="zeros", name="offset", autocast=False)
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        wide = tf.cast(x, tf.float32)
        mean, variance = tf.nn.moments(wide, axes=[-1], keepdims=True)
        normal = (wide - mean) * tf.math.rsqrt(variance + self.epsilon) * self.scale
        return tf.cast(normal + self.offset if self.center else normal, x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"epsilon": self.epsilon, "center": self.center}


@register
class GatedMerge(keras.layers.Layer):
    """Mixes two inputs by a learned gate, which decides for each feature how much of each passes; returns the gate too.

    `(a, b)`, `[batch, features]` each → `(gate · a + (1 - gate) · b, gate)`, `[batch, features]` each.
    Source: Srivastava et al., "Highway networks", 2015.
    """

    def build(self, input_shape: Any) -> None:
        features = input_shape[0][-1]
        self.kernel = self.add_weight(shape=(2 * features, features), initializer="glorot_uniform", name="kernel")
        self.bias = self.add_weight(shape=(features,), initializer="zeros", name="bias")
        self.built = True

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        a, b = inputs
        gate = tf.sigmoid(tf.concat([a, b], axis=-1) @ self.kernel + self.bias)
        return gate * a + (1 - gate) * b, gate

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape[0], input_shape[0]
