"""Optimizers and learning-rate schedules, ours and Keras's, by name."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

register = keras.saving.register_keras_serializable("lockstep")


@register
class Momentum(keras.optimizers.Optimizer):
    """Gradient descent with momentum: `m ← beta · m - rate · g`, then `w ← w + m`, or `w + beta · m - rate · g`.

    The latter is Nesterov's form. Source: Sutskever et al., "On the importance of initialization and momentum", 2013.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.9,
        nesterov: bool = True,
        name: str = "momentum",
        **kwargs: Any,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} is outside [0, 1); pass a decay, e.g. 0.9")
        self.momentum, self.nesterov = momentum, nesterov

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Makes a slot for each variable."""
        if not self.built:
            super().build(variables)
            self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: Any) -> None:
        """Moves one variable, of the gradient's shape."""
        velocity = self.velocities[self._get_variable_index(variable)]
        step = tf.cast(learning_rate, variable.dtype) * tf.cast(gradient, variable.dtype)
        moved = self.momentum * velocity - step
        self.assign(velocity, moved)
        self.assign_add(variable, self.momentum * moved - step if self.nesterov else moved)

    def get_config(self) -> dict[str, Any]:
        """The optimizer's arguments."""
        return super().get_config() | {"momentum": self.momentum, "nesterov": self.nesterov}


@register
class SAM(Momentum):
    """Sharpness-aware minimization: the gradient is taken where, within `rho`, the loss is largest.

    A loop that finds `perturbation` takes two gradients a step: one at the weights `w`, one at `w + perturbation`, with
    which it updates `w`. Both are those of the *global* batch. Source: Foret et al., ICLR 2021.
    """

    def __init__(self, learning_rate: Any = 0.01, rho: float = 0.05, name: str = "sam", **kwargs: Any):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not rho > 0:
            raise ValueError(f"rho {rho} is not above 0; pass the radius of the neighbourhood, e.g. 0.05")
        self.rho = rho

    def perturbation(self, gradients: Sequence[tf.Tensor], norm: tf.Tensor) -> list[tf.Tensor]:
        """`rho · g / ‖g‖` for gradients with the global `norm`."""
        return [gradient * (self.rho / (norm + 1e-12)) for gradient in gradients]

    def get_config(self) -> dict[str, Any]:
        """The optimizer's arguments."""
        return super().get_config() | {"rho": self.rho}


def _constant(share: tf.Tensor) -> tf.Tensor:
    return tf.ones_like(share)


def _linear(share: tf.Tensor) -> tf.Tensor:
    return 1.0 - share


def _cosine(share: tf.Tensor) -> tf.Tensor:
    return 0.5 * (1.0 + tf.cos(math.pi * share))


_DECAYS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


@register
class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from `peak / warmup_steps` to `peak`, then a decay that ends at 0 after `total_steps`.

    `decay`: `constant`, `linear` or `cosine` (Loshchilov and Hutter, "SGDR", ICLR 2017).
    """

    def __init__(self, peak: float, warmup_steps: int, total_steps: int, decay: str):
        self.peak, self.warmup_steps, self.total_steps, self.decay = peak, warmup_steps, total_steps, decay

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate of the update that takes `step` to `step + 1`: a float32 scalar."""
        step = tf.cast(step, tf.float32)
        length = max(self.total_steps - self.warmup_steps, 1)
        share = tf.clip_by_value((step - self.warmup_steps) / length, 0.0, 1.0)
        return self.peak * tf.minimum((step + 1.0) / max(self.warmup_steps, 1), 1.0) * _DECAYS[self.decay](share)

    def get_config(self) -> dict[str, Any]:
        """The schedule's arguments."""
        return {name: getattr(self, name) for name in ("peak", "warmup_steps", "total_steps", "decay")}


@register
class OneCycle(keras.optimizers.schedules.LearningRateSchedule):
    """From `peak / 25` up to `peak` by a cosine over the warm-up (30 % of the steps if 0), then down to `peak / 10⁴`.

    Source: Smith and Topin, "Super-convergence", 2018, with the proportions that became customary.
    """

    start_division, end_division = 25.0, 1e4

    def __init__(self, peak: float, warmup_steps: int, total_steps: int):
        self.peak, self.warmup_steps, self.total_steps = peak, warmup_steps, total_steps

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate of the update that takes `step` to `step + 1`: a float32 scalar."""
        step = tf.cast(step, tf.float32)
        top = float(self.warmup_steps or max(round(0.3 * self.total_steps), 1))
        up = _cosine(tf.clip_by_value(step / top, 0.0, 1.0))
        down = _cosine(tf.clip_by_value((step - top) / max(self.total_steps - 1 - top, 1.0), 0.0, 1.0))
        rising = self.peak + (self.peak / self.start_division - self.peak) * up
        falling = self.peak / self.end_division + (self.peak - self.peak / self.end_division) * down
        return tf.where(step < top, rising, falling)

    def get_config(self) -> dict[str, Any]:
        """The schedule's arguments."""
        return {name: getattr(self, name) for name in ("peak", "warmup_steps", "total_steps")}


@register
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to `peak`, then `peak · √(warmup / step)`. Source: Vaswani et al., 2017, section 5.3."""

    def __init__(self, peak: float, warmup_steps: int):
        self.peak, self.warmup_steps = peak, warmup_steps

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate of the update that takes `step` to `step + 1`: a float32 scalar."""
        done, warmup = tf.cast(step, tf.float32) + 1.0, float(max(self.warmup_steps, 1))
        return self.peak * tf.minimum(done / warmup, tf.sqrt(warmup / done))

    def get_config(self) -> dict[str, Any]:
        """The schedule's arguments."""
        return {"peak": self.peak, "warmup_steps": self.warmup_steps}


# What `--schedule` may name: (peak, warmup_steps, total_steps) → a schedule. `models.cards.SCHEDULES` names them too.
SCHEDULES: dict[str, Callable[[float, int, int], keras.optimizers.schedules.LearningRateSchedule]] = {
    **{name: lambda peak, warmup, total, name=name: WarmupDecay(peak, warmup, total, name) for name in _DECAYS},
    "one_cycle": OneCycle,
    "inverse_sqrt": lambda peak, warmup, total: InverseSquareRoot(peak, warmup),
}

# What `--optimizer` may name: (learning rate, weight decay or None) → an optimizer. `models.cards.OPTIMIZERS` repeats
# the names. None clips: that is the loop's, because it must follow the all-reduce.
OPTIMIZERS: dict[str, Callable[[Any, float | None], keras.optimizers.Optimizer]] = {
    "sgd": lambda rate, decay: keras.optimizers.SGD(rate, weight_decay=decay),
    "momentum": lambda rate, decay: Momentum(rate, weight_decay=decay),
    "adam": lambda rate, decay: keras.optimizers.Adam(rate, weight_decay=decay),
    "adamw": lambda rate, decay: keras.optimizers.AdamW(rate, weight_decay=decay or 0.0),
    "sam": lambda rate, decay: SAM(rate, weight_decay=decay),
}


def build(name: str, learning_rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    """The optimizer `name`, with decoupled weight decay (0 = none)."""
    return OPTIMIZERS[name](learning_rate, weight_decay or None)
