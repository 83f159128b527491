"""Layers of our own: what Keras lacks, gets wrong under several replicas, or hides.

Each computes in its policy's compute dtype and keeps its weights in float32, so mixed precision is safe; statistics and
attention scores are computed in float32.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from models import randomness

register = keras.saving.register_keras_serializable("lockstep")
_SYNCHRONIZED: contextvars.ContextVar[bool] = contextvars.ContextVar("synchronized", default=True)


@register
class Dropout(keras.layers.Layer):
    """Zeroes a share `rate` of the elements in training and scales the rest by `1 / (1 - rate)`.

    Unlike Keras's layer, which draws the same mask on every replica, the mask is a pure function of the seed, the step
    and the example's position in the global batch (`models.randomness`). `x: [batch, …]` → the same shape. An infinite
    element that is dropped becomes NaN, and is found as one.
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
        return x * randomness.dropout_mask(self.rate, tf.shape(x), self.path, x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return super().get_config() | {"rate": self.rate}


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
        """Nothing to build: the layer has no weights."""
        self.built = True

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Adds noise in training, passes `x` through otherwise."""
        if not training or not self.stddev:
            return x
        return x + tf.cast(self.stddev * randomness.normal(tf.shape(x), self.path), x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return super().get_config() | {"stddev": self.stddev}


@register
class Dense(keras.layers.Layer):
    """`activation(x · kernel + bias)`. `x: [..., features]` → `[..., units]`."""

    def __init__(self, units: int, activation: Any = None, initializer: Any = "glorot_uniform", **kwargs: Any):
        super().__init__(**kwargs)
        self.units = units
        self.activation = keras.activations.get(activation)
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape: Any) -> None:
        """Makes the kernel `[features, units]` and the bias `[units]`."""
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), initializer=self.initializer, name="kernel")
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The layer's output."""
        x = tf.tensordot(x, tf.convert_to_tensor(self.kernel), 1) if x.shape.rank > 2 else x @ self.kernel
        return self.activation(x + self.bias)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape with `units` in the last place."""
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return super().get_config() | {
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "initializer": keras.initializers.serialize(self.initializer),
        }


@register
class LayerNormalization(keras.layers.Layer):
    """Each position over its features: `(x - mean) / √(variance + epsilon) · scale + offset`, both trainable.

    `x: [..., features]` → the same shape. Source: Ba et al., "Layer normalization", 2016.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape: Any) -> None:
        """Makes scale and offset, `[features]` each."""
        shape = (input_shape[-1],)
        self.scale = self.add_weight(shape=shape, initializer="ones", name="scale", autocast=False)
        self.offset = self.add_weight(shape=shape, initializer="zeros", name="offset", autocast=False)
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The normalized input."""
        wide = tf.cast(x, tf.float32)
        mean, variance = tf.nn.moments(wide, axes=[-1], keepdims=True)
        normal = (wide - mean) * tf.math.rsqrt(variance + self.epsilon) * self.scale + self.offset
        return tf.cast(normal, x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return super().get_config() | {"epsilon": self.epsilon}


@register
class GatedMerge(keras.layers.Layer):
    """Two inputs, two outputs: a learned gate decides, feature by feature, how much of each goes on.

    `(a, b)`, `[batch, features]` each → `(gate · a + (1 - gate) · b, gate)`, `[batch, features]` each.
    Source: Srivastava et al., "Highway networks", 2015.
    """

    def build(self, input_shape: Any) -> None:
        """Makes the gate's kernel and bias. `input_shape`: those of a and b."""
        features = input_shape[0][-1]
        self.kernel = self.add_weight(shape=(2 * features, features), initializer="glorot_uniform", name="kernel")
        self.bias = self.add_weight(shape=(features,), initializer="zeros", name="bias")
        self.built = True

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """The merged features and the gate."""
        a, b = inputs
        gate = tf.sigmoid(tf.concat([a, b], axis=-1) @ self.kernel + self.bias)
        return gate * a + (1 - gate) * b, gate

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of a, twice."""
        return input_shape[0], input_shape[0]


@register
class AttentionBlock(keras.layers.Layer):
    """A transformer block: attention of several heads, then two dense layers, each on the normalized input and added.

    `x: [batch, time, features]` → the same shape. With `causal`, a position sees itself and those before it. Sources:
    Vaswani et al., "Attention is all you need", 2017; normalization first: Xiong et al., ICML 2020.
    """

    def __init__(self, heads: int, expansion: int = 4, dropout: float = 0.0, causal: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.heads, self.expansion, self.dropout, self.causal = heads, expansion, dropout, causal
        self.attention_norm = LayerNormalization(name="attention_norm", dtype=self.dtype_policy)
        self.dense_norm = LayerNormalization(name="dense_norm", dtype=self.dtype_policy)
        self.drop_attention = Dropout(dropout, name="drop_attention", dtype=self.dtype_policy)
        self.drop_dense = Dropout(dropout, name="drop_dense", dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        """Builds the parts for `features`, which `heads` must divide."""
        features = input_shape[-1]
        if features % self.heads:
            raise ValueError(f"{features} features do not divide over {self.heads} heads; choose a divisor")
        small = keras.initializers.RandomNormal(stddev=0.02)
        policy = self.dtype_policy
        self.queries_keys_values = Dense(3 * features, initializer=small, name="queries_keys_values", dtype=policy)
        self.projection = Dense(features, initializer=small, name="projection", dtype=policy)
        self.expand = Dense(self.expansion * features, "gelu", initializer=small, name="expand", dtype=policy)
        self.contract = Dense(features, initializer=small, name="contract", dtype=policy)
        for part in (self.attention_norm, self.dense_norm, self.drop_attention, self.drop_dense):
            part.build(input_shape)
        for part in (self.queries_keys_values, self.projection, self.expand):
            part.build(input_shape)
        self.contract.build((*input_shape[:-1], self.expansion * features))
        self.built = True

    def attention(self, x: tf.Tensor) -> tf.Tensor:
        """Attention of all heads, projected: `[batch, time, features]`."""
        batch, time, features = tf.shape(x)[0], tf.shape(x)[1], x.shape[-1]
        size = features // self.heads
        qkv = tf.reshape(self.queries_keys_values(x), [batch, time, 3, self.heads, size])
        query, key, value = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
        scores = tf.cast(tf.matmul(query, key, transpose_b=True), tf.float32) * size**-0.5
        if self.causal:
            scores += -1e9 * (1 - tf.linalg.band_part(tf.ones([time, time]), -1, 0))
        mixed = tf.matmul(tf.cast(tf.nn.softmax(scores), value.dtype), value)
        return self.projection(tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [batch, time, features]))

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The block's output."""
        x = x + self.drop_attention(self.attention(self.attention_norm(x)), training=training)
        return x + self.drop_dense(self.contract(self.expand(self.dense_norm(x))), training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        config = {"heads": self.heads, "expansion": self.expansion, "dropout": self.dropout, "causal": self.causal}
        return super().get_config() | config


@register
class ResidualDense(keras.layers.Layer):
    """Dense layers with a shortcut: `x + f(x)`. `x: [batch, features]` → the same shape."""

    def __init__(self, layers: int = 2, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_layers = layers

    def build(self, input_shape: Any) -> None:
        """Builds the dense layers, as wide as the input."""
        self.parts = []
        for i in range(1, self.num_layers + 1):
            # The last starts at zero, so the block starts as the identity, however often it is used.
            initializer = "zeros" if i == self.num_layers else "he_normal"
            self.parts.append(Dense(input_shape[-1], "elu", initializer, name=f"dense_{i}", dtype=self.dtype_policy))
            self.parts[-1].build(input_shape)
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The block's output."""
        y = x
        for part in self.parts:
            y = part(y)
        return x + y

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return super().get_config() | {"layers": self.num_layers}


def _sum_over_replicas(x: tf.Tensor) -> tf.Tensor:
    """The sum over all replicas, the same on each; `x` itself outside a replica. It has no gradient.

    The stop keeps TensorFlow from searching the other replicas' graphs for variables at each all-reduce, in a time that
    grows with the square of the depth: two minutes to trace a ResNet-50 on two replicas.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return x
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(x))


@contextlib.contextmanager
def batch_statistics(synchronized: bool) -> Iterator[None]:
    """Within the block, batch normalization is made so unless its maker says otherwise."""
    token = _SYNCHRONIZED.set(synchronized)
    try:
        yield
    finally:
        _SYNCHRONIZED.reset(token)


@register
class BatchNormalization(keras.layers.Layer):
    """Each channel over the batch: `(x - mean) / √(variance + epsilon) · gamma + beta`. `x: [batch, …, channels]`.

    `synchronized`: mean and variance are those of the *global* batch, at one all-reduce in the forward and one in the
    backward pass, so the result does not depend on the number of replicas; else those of the replica's share, and the
    moving statistics are the mean over replicas. None: what `batch_statistics` says, or True. The gradient is written
    out, for the first derivative alone: a second raises LookupError.

    Momentum 0.9, not Keras's 0.99: with a few hundred steps, statistics at 0.99 still remember their initial value.
    Source: Ioffe and Szegedy, "Batch normalization", ICML 2015.
    """

    def __init__(
        self,
        momentum: float = 0.9,
        epsilon: float = 1e-3,
        gamma_initializer: Any = "ones",
        synchronized: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon
        self.synchronized = _SYNCHRONIZED.get() if synchronized is None else synchronized
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """Makes gamma, beta and the moving mean and variance, `[channels]` each."""
        shape = (input_shape[-1],)
        self.gamma = self.add_weight(shape=shape, initializer=self.gamma_initializer, name="gamma", autocast=False)
        self.beta = self.add_weight(shape=shape, initializer="zeros", name="beta", autocast=False)
        # Synchronized, all replicas have the same value and each writes its own copy.
        moving = {"trainable": False, "autocast": False, "aggregation": "none" if self.synchronized else "mean"}
        self.moving_mean = self.add_weight(shape=shape, initializer="zeros", name="moving_mean", **moving)
        self.moving_variance = self.add_weight(shape=shape, initializer="ones", name="moving_variance", **moving)
        self.built = True

    def crosses_replicas(self, replicas: int) -> bool:
        """Whether the layer reduces over replicas within the forward pass, which XLA cannot compile."""
        return self.synchronized and replicas > 1

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The normalized input: by the batch in training, by the moving statistics otherwise. Computes in float32."""
        wide = tf.cast(x, tf.float32)
        gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        if not training or not self.trainable:
            mean, variance = tf.convert_to_tensor(self.moving_mean), tf.convert_to_tensor(self.moving_variance)
            y = tf.nn.batch_normalization(wide, mean, variance, beta, gamma, self.epsilon)
        else:
            context = tf.distribute.get_replica_context()
            alone = context is None or context.num_replicas_in_sync == 1 or not self.synchronized
            y, mean, variance = (self._fused if alone else self._over_replicas)(wide, gamma, beta)
            keep = self.momentum
            self.moving_mean.assign(keep * self.moving_mean + (1 - keep) * mean)
            self.moving_variance.assign(keep * self.moving_variance + (1 - keep) * variance)
        return tf.cast(y, self.compute_dtype)

    def _fused(self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """By this replica's share, in TensorFlow's one kernel."""
        rows = x if x.shape.rank == 4 else tf.reshape(x, [-1, 1, 1, x.shape[-1]])
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(rows, gamma, beta, epsilon=self.epsilon, is_training=True)
        # The kernel gives the unbiased variance; what normalizes is the biased one.
        count = tf.cast(tf.size(x) // x.shape[-1], tf.float32)
        return tf.reshape(y, tf.shape(x)), mean, variance * ((count - 1) / count)

    def _over_replicas(self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """By the global batch: all replicas have shares of one size."""
        axes = list(range(x.shape.rank - 1))
        replicas = tf.distribute.get_replica_context().num_replicas_in_sync
        count = tf.cast(tf.size(x) // x.shape[-1] * replicas, tf.float32)
        own = tf.stop_gradient(x)
        sums = _sum_over_replicas(tf.stack([tf.reduce_sum(own, axes), tf.reduce_sum(tf.square(own), axes)]))
        mean, square = tf.unstack(sums / count)
        variance = tf.maximum(square - tf.square(mean), 0.0)
        inverse = tf.math.rsqrt(variance + self.epsilon)

        @tf.custom_gradient
        def normalized(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, Any]:
            def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
                message = "batch normalization over several replicas has a first derivative only"
                upstream = tf.raw_ops.PreventGradient(input=upstream, message=message)
                to_beta = tf.reduce_sum(upstream, axes)
                to_gamma = (tf.reduce_sum(upstream * x, axes) - mean * to_beta) * inverse
                all_to_beta, all_to_gamma = tf.unstack(_sum_over_replicas(tf.stack([to_beta, to_gamma])) / count)
                scale = gamma * inverse
                slope = -scale * inverse * all_to_gamma
                return scale * upstream + (slope * x - (scale * all_to_beta + slope * mean)), to_gamma, to_beta

            scale = gamma * inverse
            return x * scale + (beta - mean * scale), gradient

        return normalized(x, gamma, beta), mean, variance

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return super().get_config() | {
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "synchronized": self.synchronized,
        }


class _ConvolutionBlock(keras.layers.Layer):
    """`relu(f(x) + shortcut(x))` with `f` a chain of convolutions, each followed by batch normalization.

    The shortcut is the identity where the shape stays, else a 1×1 convolution with the block's stride.
    """

    def __init__(self, filters: int, stride: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        self.filters, self.stride = filters, stride
        self.projection = None

    def convolutions(self) -> list[tuple[int, int, int]]:
        """Filters, size and stride of each convolution."""
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
        """Builds the parts; the 1×1 convolution only where the shape changes."""
        plan, shape = self.convolutions(), input_shape
        self.chain, self.norms = [], []
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
        """The block's output, after the last activation."""
        y = x
        for i, (convolution, norm) in enumerate(zip(self.chain, self.norms, strict=True)):
            y = norm(convolution(tf.nn.relu(y) if i else y), training=training)
        if self.projection is not None:
            x = self.projection_norm(self.projection(x), training=training)
        return tf.nn.relu(x + y)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return super().get_config() | {"filters": self.filters, "stride": self.stride}


@register
class ResidualBlock(_ConvolutionBlock):
    """Two 3×3 convolutions and a shortcut.

    `x: [batch, height, width, channels]` → `[batch, ⌈height / stride⌉, ⌈width / stride⌉, filters]`.
    Source: He et al., "Deep residual learning", CVPR 2016, figure 5 left.
    """

    def convolutions(self) -> list[tuple[int, int, int]]:
        """3×3 with the stride, 3×3."""
        return [(self.filters, 3, self.stride), (self.filters, 3, 1)]


@register
class BottleneckBlock(_ConvolutionBlock):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; the stride is that of the 3×3.

    `x: [batch, height, width, channels]` → `[batch, ⌈height / stride⌉, ⌈width / stride⌉, 4 · filters]`.
    Source: He et al., figure 5 right; the stride's place: "ResNet v1.5".
    """

    def convolutions(self) -> list[tuple[int, int, int]]:
        """1×1, 3×3 with the stride, 1×1 with four times the filters."""
        return [(self.filters, 1, 1), (self.filters, 3, self.stride), (4 * self.filters, 1, 1)]
