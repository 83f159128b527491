"""Losses of each example: `loss.call(targets, outputs) -> [batch]`. Only the training loop reduces over the batch.

Each is also an ordinary, serializable Keras loss and works in `model.compile`. Names for flags: `models.cards.LOSSES`.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

register = keras.saving.register_keras_serializable("lockstep")


def errors(targets: Any, outputs: Any) -> tf.Tensor:
    """`outputs - targets` in float32, with outputs `[batch, 1]` squeezed where targets are `[batch]`."""
    outputs, targets = tf.cast(outputs, tf.float32), tf.cast(targets, tf.float32)
    if outputs.shape.rank == targets.shape.rank + 1:
        outputs = tf.squeeze(outputs, -1)
    return outputs - targets


def per_example(values: tf.Tensor) -> tf.Tensor:
    """Mean over everything but the batch: `[batch, …]` → `[batch]`."""
    return tf.reduce_mean(values, axis=list(range(1, values.shape.rank))) if values.shape.rank > 1 else values


class Loss(keras.losses.Loss):
    """A Keras loss that lists its constructor's own arguments in `arguments`, for `get_config`."""

    arguments: tuple[str, ...] = ()

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {name: getattr(self, name) for name in self.arguments}


@register
class SquaredError(Loss):
    """`(output - target)²`, mean over the target's own dimensions. Targets `[batch, …]` → `[batch]`."""

    def call(self, targets: Any, outputs: Any) -> tf.Tensor:
        return per_example(tf.square(errors(targets, outputs)))


@register
class Huber(Loss):
    """Quadratic up to an error of `threshold`, linear beyond it. Targets `[batch, …]` → `[batch]`.

    Source: P. J. Huber, "Robust estimation of a location parameter", 1964.
    """

    arguments = ("threshold",)

    def __init__(self, threshold: float = 1.0, name: str = "huber", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        if not threshold > 0:
            raise ValueError(
                f"threshold {threshold} is not above 0; pass the error from which the loss is linear, e.g. 1"
            )
        self.threshold = float(threshold)

    def call(self, targets: Any, outputs: Any) -> tf.Tensor:
        error = tf.abs(errors(targets, outputs))
        # The quadratic term gets the clipped error, so it cannot overflow where the linear term applies.
        quadratic = tf.minimum(error, self.threshold)
        return per_example(0.5 * tf.square(quadratic) + self.threshold * (error - quadratic))


@register
class PseudoHuber(Loss):
    """`d² (√(1 + (error / d)²) - 1)`: like Huber's with threshold `d`, and smooth. Targets `[batch, …]` → `[batch]`.

    Source: Charbonnier et al., "Deterministic edge-preserving regularization", 1997.
    """

    arguments = ("threshold",)

    def __init__(self, threshold: float = 1.0, name: str = "pseudo_huber", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        if not threshold > 0:
            raise ValueError(f"threshold {threshold} is not above 0; pass the scale of the errors, e.g. 1")
        self.threshold = float(threshold)

    def call(self, targets: Any, outputs: Any) -> tf.Tensor:
        scaled = tf.abs(errors(targets, outputs)) / self.threshold
        # √(1 + x²) - 1 = x · x / (√(1 + x²) + 1) has no cancellation for small x. For large x, where x² would overflow,
        # x is taken out of the root.
        small, large = tf.minimum(scaled, 1.0), tf.maximum(scaled, 1.0)
        root = tf.where(scaled > 1.0, large * tf.sqrt(1.0 + tf.square(1.0 / large)), tf.sqrt(1.0 + tf.square(small)))
        return per_example(self.threshold**2 * scaled * (scaled / (root + 1.0)))


@register
class LogCosh(Loss):
    """`log(cosh(error))`: half the square of a small error, the size of a large one. `[batch, …]` → `[batch]`."""

    def call(self, targets: Any, outputs: Any) -> tf.Tensor:
        error = tf.abs(errors(targets, outputs))
        # log cosh x = x + log(1 + e^(-2x)) - log 2 for x ≥ 0: no exponential overflows.
        return per_example(error + tf.math.log1p(tf.exp(-2.0 * error)) - math.log(2.0))


class _ClassLoss(Loss):
    """A loss of one class out of many: labels `[batch]` integers, logits `[batch, num_classes]` → `[batch]`.

    `class_weights`: a factor for each class, by its label; None = 1 for all.
    """

    def __init__(self, class_weights: Sequence[float] | None = None, name: str | None = None, **kwargs: Any):
        super().__init__(name=name, **kwargs)
        self.class_weights = None if class_weights is None else [float(weight) for weight in class_weights]

    def _log_probability(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """Log of the probability of the label: `[batch]`, float32."""
        labels, logits = tf.cast(labels, tf.int32), tf.cast(logits, tf.float32)
        return -tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)

    def _weighted(self, labels: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        if self.class_weights is None:
            return values
        return values * tf.gather(tf.constant(self.class_weights), tf.cast(labels, tf.int32))


@register
class CrossEntropy(_ClassLoss):
    """Cross-entropy with label smoothing and class weights.

    With smoothing `s` the target is `1 - s` for the label plus `s / num_classes` for each class. Source: Szegedy et
    al., "Rethinking the Inception architecture", CVPR 2016, section 7.
    """

    arguments = ("label_smoothing", "class_weights")

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: tuple[float, ...] | None = None,
        name: str = "cross_entropy",
        **kwargs: Any,
    ):
        super().__init__(class_weights, name=name, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing {label_smoothing} is outside [0, 1); pass a fraction, e.g. 0.1")
        self.label_smoothing = float(label_smoothing)

    def call(self, targets: Any, outputs: Any) -> tf.Tensor:
        values = -self._log_probability(targets, outputs)
        if self.label_smoothing:
            uniform = -tf.reduce_mean(tf.nn.log_softmax(tf.cast(outputs, tf.float32)), axis=-1)
            values = (1 - self.label_smoothing) * values + self.label_smoothing * uniform
        return self._weighted(targets, values)


def smoothed_cross_entropy(
    label_smoothing: float = 0.1, class_weights: tuple[float, ...] | None = None
) -> CrossEntropy:
    """Cross-entropy with a label smoothing of 0.1, the value of the paper."""
    return CrossEntropy(label_smoothing, class_weights)


@register
class Focal(_ClassLoss):
    """`-(1 - p)^gamma log p` of the label's probability `p`: easy examples count less.

    Source: Lin et al., "Focal loss for dense object detection", ICCV 2017.
    """

    arguments = ("gamma", "class_weights")

    def __init__(
        self,
        gamma: float = 2.0,
        class_weights: tuple[float, ...] | None = None,
        name: str = "focal",
        **kwargs: Any,
    ):
        super().__init__(class_weights, name=name, **kwargs)
        if not gamma >= 0:
            raise ValueError(f"gamma {gamma} is below 0; pass 0 (cross-entropy) or more, e.g. 2")
        self.gamma = float(gamma)

    def call(self, targets: Any, outputs: Any) -> tf.Tensor:
        log_p = self._log_probability(targets, outputs)
        # 1 - p = -expm1(log p), kept above 0, where the gradient of the power is infinite for gamma below 1.
        return self._weighted(targets, -tf.pow(tf.maximum(-tf.math.expm1(log_p), 1e-12), self.gamma) * log_p)


@register
class PixelCrossEntropy(CrossEntropy):
    """`CrossEntropy`, mean over pixels: labels `[batch, height, width]`, logits `[batch, height, width, num_classes]`.

    Every pixel counts alike, or with the weight of its class.
    """

    def call(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The loss of each example, in nats a pixel: `[batch]`."""
        return per_example(super().call(targets, outputs))


@register
class TokenCrossEntropy(Loss):
    """Cross-entropy of the next token, mean over time: tokens `[batch, time]`, logits `[batch, time, vocabulary]`.

    A negative target has a loss of 0, and the sum is divided by all of `time` nevertheless: so each token that is
    predicted counts the same, in whichever example and on whichever replica it stands.
    """

    def call(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The loss of each example, in nats a token: `[batch]`."""
        targets, logits = tf.cast(targets, tf.int32), tf.cast(outputs, tf.float32)
        values = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(targets, 0), logits)
        return per_example(tf.where(targets >= 0, values, 0.0))
