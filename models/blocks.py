"""Blocks of several layers, each with a shortcut: attention, dense and convolutional."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models.batch_norm import BatchNormalization
from models.layers import Dense, Dropout, LayerNormalization, StochasticDepth
from models.recompute import Block

register = keras.saving.register_keras_serializable("lockstep")
# Keys and values of the positions before, `[batch, heads, past, size]` each.
Past = tuple[tf.Tensor, tf.Tensor]


def rotated(x: tf.Tensor, first: Any = 0) -> tf.Tensor:
    """Vectors turned by an angle for each pair of features that grows with their position: `x` of the same shape.

    `x: [..., time, size]`, `size` even; `first`: the number of the first position. A pair is a feature and the one
    `size / 2` after it; it turns by 1 radian a position for the first pair, down to almost 1/10,000 for the last. The
    product of two vectors then depends on how far apart they stand. Source: Su et al., "RoFormer", 2021.
    """
    half = x.shape[-1] // 2
    rates = tf.constant(10_000.0 ** -(np.arange(half) / half), tf.float32)
    angles = tf.cast(first + tf.range(tf.shape(x)[-2]), tf.float32)[:, None] * rates
    sine, cosine = tf.sin(angles), tf.cos(angles)
    a, b = tf.split(tf.cast(x, tf.float32), 2, axis=-1)
    return tf.cast(tf.concat([a * cosine - b * sine, a * sine + b * cosine], axis=-1), x.dtype)


@register
class AttentionBlock(Block):
    """A transformer block: multi-head attention, then two dense layers, each on the normalized input and added to it.

    `x: [batch, time, features]` → the same shape. With `causal`, a position sees itself and those before it; with
    `documents: [batch, time]`, only those of the document that it belongs to. Attention scores are float32 under every
    dtype policy. `bias`: whether dense layers and normalizations have one; `residual_scale`: of the initial values of
    what is added to `x`; `rotary`: whether queries and keys are `rotated`. With the `past`, positions follow those that
    it holds, `documents` are `[batch, past + time]`, and what is returned has the past of the next call beside it.
    Sources: Vaswani et al., "Attention is all you need", 2017; normalization first: Xiong et al., ICML 2020.
    """

    def __init__(
        self,
        heads: int,
        expansion: int = 4,
        dropout: float = 0.0,
        causal: bool = False,
        stochastic_depth: float = 0.0,
        bias: bool = True,
        residual_scale: float = 1.0,
        rotary: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.bias, self.residual_scale, self.rotary = bias, residual_scale, rotary
        self.heads, self.expansion, self.dropout, self.causal = heads, expansion, dropout, causal
        self.stochastic_depth = stochastic_depth
        self.skip_attention, self.skip_dense = (
            StochasticDepth(stochastic_depth, name=name, dtype=self.dtype_policy)
            for name in ("skip_attention", "skip_dense")
        )
        self.attention_norm = LayerNormalization(center=bias, name="attention_norm", dtype=self.dtype_policy)
        self.dense_norm = LayerNormalization(center=bias, name="dense_norm", dtype=self.dtype_policy)
        self.drop_attention = Dropout(dropout, name="drop_attention", dtype=self.dtype_policy)
        self.drop_dense = Dropout(dropout, name="drop_dense", dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        features = input_shape[-1]
        if features % self.heads:
            raise ValueError(f"{features} features do not divide over {self.heads} heads; choose a divisor")
        if self.rotary and features // self.heads % 2:
            raise ValueError(
                f"{features} features over {self.heads} heads are {features // self.heads} each, and rotary positions "
                "need an even number; choose another"
            )
        small = keras.initializers.RandomNormal(stddev=0.02)
        added = keras.initializers.RandomNormal(stddev=0.02 * self.residual_scale)
        same = {"use_bias": self.bias, "dtype": self.dtype_policy}
        self.queries_keys_values = Dense(3 * features, None, small, name="queries_keys_values", **same)
        self.projection = Dense(features, None, added, name="projection", **same)
        self.expand = Dense(self.expansion * features, "gelu", small, name="expand", **same)
        self.contract = Dense(features, None, added, name="contract", **same)
        for part in (self.attention_norm, self.dense_norm, self.drop_attention, self.drop_dense):
            part.build(input_shape)
        for part in (self.skip_attention, self.skip_dense):
            part.build(input_shape)
        for part in (self.queries_keys_values, self.projection, self.expand):
            part.build(input_shape)
        self.contract.build((*input_shape[:-1], self.expansion * features))
        self.built = True

    def attention(self, x: tf.Tensor, documents: tf.Tensor | None, past: Past | None) -> tuple[tf.Tensor, Past]:
        """Attention of all heads, projected: `[batch, time, features]`; and keys and values, those before with them."""
        batch, time, features = tf.shape(x)[0], tf.shape(x)[1], x.shape[-1]
        size = features // self.heads
        first = 0 if past is None else tf.shape(past[0])[2]
        qkv = tf.reshape(self.queries_keys_values(x), [batch, time, 3, self.heads, size])
        query, key, value = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
        if self.rotary:
            query, key = rotated(query, first), rotated(key, first)
        if past is not None:
            key, value = (tf.concat(pair, axis=2) for pair in zip(past, (key, value), strict=True))
        scores = tf.cast(tf.matmul(query, key, transpose_b=True), tf.float32) * size**-0.5
        if self.causal:
            scores += -1e9 * (1 - tf.linalg.band_part(tf.ones([time, first + time]), -1, first))
        if documents is not None:
            other = tf.not_equal(documents[:, None, first:, None], documents[:, None, None, :])
            scores += -1e9 * tf.cast(other, tf.float32)
        mixed = tf.matmul(tf.cast(tf.nn.softmax(scores), value.dtype), value)
        mixed = tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [batch, time, features])
        return self.projection(mixed), (key, value)

    def call(
        self, x: tf.Tensor, documents: tf.Tensor | None = None, past: Past | None = None, training: bool = False
    ) -> tf.Tensor | tuple[tf.Tensor, Past]:
        y, now = self.attention(self.attention_norm(x), documents, past)
        x = x + self.skip_attention(self.drop_attention(y, training=training), training=training)
        y = self.drop_dense(self.contract(self.expand(self.dense_norm(x))), training=training)
        x = x + self.skip_dense(y, training=training)
        return x if past is None else (x, now)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = {"heads": self.heads, "expansion": self.expansion, "dropout": self.dropout, "causal": self.causal}
        config |= {"bias": self.bias, "residual_scale": self.residual_scale, "rotary": self.rotary}
        return super().get_config() | config | {"stochastic_depth": self.stochastic_depth}


@register
class ResidualDense(keras.layers.Layer):
    """Dense layers with a shortcut: `x + f(x)`. `x: [batch, features]` → the same shape."""

    def __init__(self, layers: int = 2, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_layers = layers

    def build(self, input_shape: Any) -> None:
        self.parts = []
        for i in range(1, self.num_layers + 1):
            # The last starts at zero, so the block starts as the identity, however often it is used.
            initializer = "zeros" if i == self.num_layers else "he_normal"
            self.parts.append(Dense(input_shape[-1], "elu", initializer, name=f"dense_{i}", dtype=self.dtype_policy))
            self.parts[-1].build(input_shape)
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        y = x
        for part in self.parts:
            y = part(y)
        return x + y

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"layers": self.num_layers}


class _ConvolutionBlock(Block):
    """`relu(f(x) + shortcut(x))` with `f` a chain of convolutions, each followed by batch normalization.

    The shortcut is the identity where the shape stays, else a 1×1 convolution with the block's stride.
    """

    def __init__(self, filters: int, stride: int = 1, stochastic_depth: float = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.filters, self.stride, self.stochastic_depth = filters, stride, stochastic_depth
        self.projection = None
        self.skip = StochasticDepth(stochastic_depth, name="skip", dtype=self.dtype_policy)

    def convolutions(self) -> list[tuple[int, int, int]]:
        """Filters, kernel size and stride of each convolution."""
        raise NotImplementedError

    def _convolution(self, filters: int, size: int, stride: int, name: str) -> keras.layers.Conv2D:
        return keras.layers.Conv2D(
            filters,
            size,
            stride,
            "same",
            use_bias=False,
            kernel_initializer="he_normal",
            name=name,
            dtype=self.dtype_policy,
        )

    def build(self, input_shape: Any) -> None:
        plan, shape = self.convolutions(), input_shape
        self.chain, self.norms = [], []
        self.skip.build(input_shape)
        for i, (filters, size, stride) in enumerate(plan, 1):
            # A block that starts as the identity trains sooner (Goyal et al., 2017, section 5.1).
            gamma = "zeros" if i == len(plan) else "ones"
            self.chain.append(self._convolution(filters, size, stride, f"conv_{i}"))
            self.norms.append(BatchNormalization(name=f"norm_{i}", gamma_initializer=gamma, dtype=self.dtype_policy))
            self.chain[-1].build(shape)
            shape = self.chain[-1].compute_output_shape(shape)
            self.norms[-1].build(shape)
        if self.stride != 1 or input_shape[-1] != shape[-1]:
            self.projection = self._convolution(shape[-1], 1, self.stride, "shortcut")
            self.projection_norm = BatchNormalization(name="shortcut_norm", dtype=self.dtype_policy)
            self.projection.build(input_shape)
            self.projection_norm.build(shape)
        self.built = True

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        y = x
        for i, (convolution, norm) in enumerate(zip(self.chain, self.norms, strict=True)):
            y = norm(convolution(tf.nn.relu(y) if i else y), training=training)
        if self.projection is not None:
            x = self.projection_norm(self.projection(x), training=training)
        return tf.nn.relu(x + self.skip(y, training=training))

    def get_config(self) -> dict[str, Any]:
        config = {"filters": self.filters, "stride": self.stride, "stochastic_depth": self.stochastic_depth}
        return super().get_config() | config


@register
class ResidualBlock(_ConvolutionBlock):
    """Two 3×3 convolutions and a shortcut; the stride is that of the first.

    `x: [batch, height, width, channels]` → `[batch, ⌈height / stride⌉, ⌈width / stride⌉, filters]`.
    Source: He et al., "Deep residual learning", CVPR 2016, figure 5 left.
    """

    def convolutions(self) -> list[tuple[int, int, int]]:
        return [(self.filters, 3, self.stride), (self.filters, 3, 1)]


@register
class BottleneckBlock(_ConvolutionBlock):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; the stride is that of the 3×3.

    `x: [batch, height, width, channels]` → `[batch, ⌈height / stride⌉, ⌈width / stride⌉, 4 · filters]`.
    Source: He et al., figure 5 right; the stride's place: "ResNet v1.5".
    """

    def convolutions(self) -> list[tuple[int, int, int]]:
        return [(self.filters, 1, 1), (self.filters, 3, self.stride), (4 * self.filters, 1, 1)]
