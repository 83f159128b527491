"""Optimizers of whole matrices and of averaged weights, where Keras has none, or none that runs on replicas."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

register = keras.saving.register_keras_serializable("lockstep")


@register
class LARS(keras.optimizers.Optimizer):
    """Layer-wise rates: `m ← beta · m + rate · r · (g + decay · w)`, then `w ← w - m`.

    `r = trust · ‖w‖ / (‖g‖ + decay · ‖w‖)` of each weight, 1 where a norm is 0. What has no weight decay (biases,
    normalizations) has no `r` either: it is trained by plain momentum. Source: You, Gitman and Ginsburg, "Large batch
    training of convolutional networks", 2017, algorithm 1; what is left out: MLPerf's reference.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.9,
        trust: float = 0.001,
        name: str = "lars",
        **kwargs: Any,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} is outside [0, 1); pass a decay, e.g. 0.9")
        if not trust > 0:
            raise ValueError(f"trust {trust} is not above 0; pass the coefficient of the ratio of norms, e.g. 0.001")
        self.momentum, self.trust = momentum, trust

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self.velocities = self.add_optimizer_variables(variables, "velocity")

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Nothing before the step: the decay is part of it."""

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: Any) -> None:
        velocity = self.velocities[self._get_variable_index(variable)]
        step = tf.cast(gradient, variable.dtype)
        if self._use_weight_decay(variable):
            decay, weight = self.weight_decay or 0.0, tf.convert_to_tensor(variable)
            size, slope = tf.norm(weight), tf.norm(step)
            ratio = tf.math.divide_no_nan(self.trust * size, slope + decay * size)
            step = tf.where((size > 0) & (slope > 0), ratio, 1.0) * (step + decay * weight)
        moved = self.momentum * velocity + tf.cast(learning_rate, variable.dtype) * step
        self.assign(velocity, moved)
        self.assign_sub(variable, moved)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"momentum": self.momentum, "trust": self.trust}


@register
class Lamb(keras.optimizers.Lamb):
    """Keras's LAMB, which Keras cannot make from its configuration. Weight decay is decoupled, before the step.

    Source: You et al., "Large batch optimization for deep learning", ICLR 2020, algorithm 2, which decays in the ratio.
    """


@register
class Muon(keras.optimizers.Muon):
    """Keras's Muon: matrices move by the orthogonal factor of their momentum, all else, and `adam_for`, by Adam.

    `adam_for`: a regular expression of paths, of embeddings and of the last layer. Keras assigns decayed weights in
    one replica, which TensorFlow refuses where there are several; here `weight_decay` is that of every optimizer.
    Sources: Jordan, "Muon", 2024; the size of the step: Liu et al., "Muon is scalable for LLM training", 2025.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: float | None = None,
        adam_for: str = "embedding|positions|class_token|logits",
        name: str = "muon",
        **kwargs: Any,
    ):
        super().__init__(
            learning_rate,
            weight_decay=weight_decay,
            adam_weight_decay=weight_decay,
            exclude_layers=[adam_for] if adam_for else None,
            exclude_embeddings=False,
            name=name,
            **kwargs,
        )
        self.adam_for = adam_for

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        super(keras.optimizers.Muon, self)._apply_weight_decay(variables)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config() | {"adam_for": self.adam_for}
        return {
            k: v for k, v in config.items() if k not in ("adam_weight_decay", "exclude_layers", "exclude_embeddings")
        }


def muon(
    learning_rate: Any,
    weight_decay: float | None,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    rms_rate: float | None = 0.2,
    adam_for: str = "embedding|positions|class_token|logits",
    adam_beta_1: float = 0.9,
    adam_beta_2: float = 0.999,
    adam_lr_ratio: float = 1.0,
    epsilon: float = 1e-7,
) -> Muon:
    """`Muon` with its options; `ns_steps`: of the iteration; `rms_rate`: the size of a step, as Adam's."""
    return Muon(
        learning_rate,
        weight_decay,
        adam_for,
        momentum=momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        rms_rate=rms_rate,
        adam_beta_1=adam_beta_1,
        adam_beta_2=adam_beta_2,
        adam_lr_ratio=adam_lr_ratio,
        epsilon=epsilon,
    )


@register
class ScheduleFreeAdamW(keras.optimizers.Optimizer):
    """AdamW whose steps are averaged, in place of a falling rate: for `--schedule=constant` with a warm-up.

    The model's weights are `y`, where gradients are taken; `z` is what AdamW moves, and `x`, of which `average` tells,
    is the mean of all `z`, each with the square of its rate: `y = (1 - beta_1) z + beta_1 x`. The loop evaluates `x`.
    Source: Defazio et al., "The road less scheduled", NeurIPS 2024, algorithm 1, in the form of the authors' code.
    Keras's class of this name reads `z` after its update, gives each step the same share, and decays `y` alone.
    """

    def __init__(
        self,
        learning_rate: Any = 0.0025,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        name: str = "schedule_free",
        **kwargs: Any,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not 0 < beta_1 <= 1:
            raise ValueError(f"beta_1 {beta_1} is outside (0, 1]; pass the share of the average, e.g. 0.9")
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self.bases, self.velocities = self.add_optimizer_variables(variables, ["base", "velocity"])
            # Of each replica alike, as the counter of steps: the sum of the squares of all rates.
            self.shares = self.add_variable((), "zeros", "float32", aggregation="only_first_replica", name="shares")

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Nothing before the step: the decay is part of it."""

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        if not self.built:
            self.build(trainable_variables)
        self.shares.assign_add(tf.square(tf.cast(self.learning_rate, tf.float32)))
        super().apply(grads, trainable_variables)

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: Any) -> None:
        place = self._get_variable_index(variable)
        base, velocity = self.bases[place], self.velocities[place]
        rate, gradient = tf.cast(learning_rate, variable.dtype), tf.cast(gradient, variable.dtype)
        weight, step = tf.convert_to_tensor(variable), tf.cast(self.iterations + 1, variable.dtype)
        # Weights may be set after the optimizer is built: all begins from what the first update sees.
        base_before = tf.where(tf.equal(self.iterations, 0), weight, tf.convert_to_tensor(base))
        second = self.beta_2 * velocity + (1 - self.beta_2) * tf.square(gradient)
        move = gradient / (tf.sqrt(second / (1 - tf.pow(self.beta_2, step))) + self.epsilon)
        if self.weight_decay and self._use_weight_decay(variable):
            move += self.weight_decay * weight
        share = tf.math.divide_no_nan(tf.square(rate), tf.cast(self.shares, variable.dtype))
        moved = (1 - share) * weight + share * base_before + rate * (self.beta_1 * (1 - share) - 1) * move
        self.assign(velocity, second)
        self.assign(base, base_before - rate * move)
        self.assign(variable, moved)

    def base_of(self, variable: keras.Variable) -> keras.Variable:
        """`z` of a weight."""
        return self.bases[self._get_variable_index(variable)]

    def average(self, weight: Any, base: Any) -> tf.Tensor:
        """`x` from `y` and `z`, once there was an update."""
        return (weight - (1 - self.beta_1) * base) / self.beta_1

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}
