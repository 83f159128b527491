"""Batch normalization whose result does not depend on the number of replicas.

Weights and statistics are float32 under every dtype policy.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

_SYNCHRONIZED: contextvars.ContextVar[bool] = contextvars.ContextVar("synchronized", default=True)


@contextlib.contextmanager
def batch_statistics(synchronized: bool) -> Iterator[None]:
    """Sets the default of `BatchNormalization(synchronized=None)` for layers that are made within the block."""
    token = _SYNCHRONIZED.set(synchronized)
    try:
        yield
    finally:
        _SYNCHRONIZED.reset(token)


def _sum_over_replicas(x: tf.Tensor) -> tf.Tensor:
    """The sum over all replicas, the same on each; `x` itself outside a replica. It has no gradient.

    The stop keeps TensorFlow from searching the other replicas' graphs for variables at each all-reduce, in a time that
    grows with the square of the depth: two minutes to trace a ResNet-50 on two replicas.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return x
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(x))


@keras.saving.register_keras_serializable("lockstep")
class BatchNormalization(keras.layers.Layer):
    """Each channel over the batch: `(x - mean) / √(variance + epsilon) · gamma + beta`. `x: [batch, …, channels]`.

    `synchronized`: mean and variance are those of the *global* batch, at one all-reduce in the forward and one in the
    backward pass, so the result does not depend on the number of replicas; else those of the replica's own examples,
    and the moving statistics are the mean over replicas. None: as `batch_statistics` sets it, by default True.

    The gradient over several replicas is written by hand and is a first derivative only: a second raises LookupError,
    as TensorFlow does for what has no gradient.

    Momentum 0.9, not Keras's 0.99: after a few hundred steps, statistics at 0.99 still depend on their initial value.
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
        shape = (input_shape[-1],)
        self.gamma = self.add_weight(shape=shape, initializer=self.gamma_initializer, name="gamma", autocast=False)
        self.beta = self.add_weight(shape=shape, initializer="zeros", name="beta", autocast=False)
        # Synchronized, all replicas have the same value and each writes its own copy.
        moving = {"trainable": False, "autocast": False, "aggregation": "none" if self.synchronized else "mean"}
        self.moving_mean = self.add_weight(shape=shape, initializer="zeros", name="moving_mean", **moving)
        self.moving_variance = self.add_weight(shape=shape, initializer="ones", name="moving_variance", **moving)
        self.built = True

    def crosses_replicas(self, replicas: int) -> bool:
        """Whether the layer reduces over replicas within the forward pass, which XLA cannot compile. Frozen: no."""
        return self.synchronized and self.trainable and replicas > 1

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Normalizes by the batch in training, by the moving statistics otherwise, in float32."""
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
        """By this replica's own examples, in TensorFlow's fused kernel: `(y, mean, variance)`."""
        rows = x if x.shape.rank == 4 else tf.reshape(x, [-1, 1, 1, x.shape[-1]])
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(rows, gamma, beta, epsilon=self.epsilon, is_training=True)
        # The kernel returns the unbiased variance, but normalizes by the biased one.
        count = tf.cast(tf.size(x) // x.shape[-1], tf.float32)
        return tf.reshape(y, tf.shape(x)), mean, variance * ((count - 1) / count)

    def _over_replicas(self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """By the global batch: `(y, mean, variance)`. All replicas must have the same number of examples."""
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
                upstream = tf.raw_ops.PreventGradient(input=upstream, message=self._no_second_derivative())
                to_beta = tf.reduce_sum(upstream, axes)
                to_gamma = (tf.reduce_sum(upstream * x, axes) - mean * to_beta) * inverse
                all_to_beta, all_to_gamma = tf.unstack(_sum_over_replicas(tf.stack([to_beta, to_gamma])) / count)
                scale = gamma * inverse
                slope = -scale * inverse * all_to_gamma
                return scale * upstream + (slope * x - (scale * all_to_beta + slope * mean)), to_gamma, to_beta

            scale = gamma * inverse
            return x * scale + (beta - mean * scale), gradient

        return normalized(x, gamma, beta), mean, variance

    def _no_second_derivative(self) -> str:
        return (
            f"layer {self.path}: batch normalization over several replicas has a first derivative only; use "
            "models.layers.LayerNormalization there, or statistics of each replica (--batch_norm=per_replica)"
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "synchronized": self.synchronized,
        }
