"""Optimizers and learning-rate schedules that Keras lacks, and how those that a flag names are built."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from models import options

register = keras.saving.register_keras_serializable("lockstep")
# Types in which some optimizers keep what they know of each weight. Of the second, what is computed is float32, and
# rounded by chance when it is kept.
SLOTS = ("float32", "bfloat16")


@register
class Momentum(keras.optimizers.Optimizer):
    """Gradient descent with momentum: `m ← beta · m - rate · g`, then `w ← w + m`, or `w + beta · m - rate · g`.

    The latter is Nesterov's form. `coupled`: weight decay is added to the gradient, as L2, and passes through `m`.
    Source: Sutskever et al., "On the importance of initialization and momentum", 2013.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.9,
        nesterov: bool = True,
        coupled: bool = False,
        name: str = "momentum",
        **kwargs: Any,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} is outside [0, 1); pass a decay, e.g. 0.9")
        self.momentum, self.nesterov, self.coupled = momentum, nesterov, coupled

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: Any) -> None:
        velocity = self.velocities[self._get_variable_index(variable)]
        gradient = tf.cast(gradient, variable.dtype)
        if self.coupled and self.weight_decay and self._use_weight_decay(variable):
            gradient += self.weight_decay * tf.convert_to_tensor(variable)
        step = tf.cast(learning_rate, variable.dtype) * gradient
        moved = self.momentum * velocity - step
        self.assign(velocity, moved)
        self.assign_add(variable, self.momentum * moved - step if self.nesterov else moved)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        if not self.coupled:
            super()._apply_weight_decay(variables)

    def get_config(self) -> dict[str, Any]:
        own = {"momentum": self.momentum, "nesterov": self.nesterov, "coupled": self.coupled}
        return super().get_config() | own


@register
class SAM(Momentum):
    """Sharpness-aware minimization: the gradient is taken where, within `rho`, the loss is largest.

    A loop takes two gradients a step from an optimizer that has the method `perturbation`: one at the weights `w`, one
    at `w + perturbation`, with which it updates `w`. Both are those of the *global* batch.
    Source: Foret et al., "Sharpness-aware minimization", ICLR 2021.
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
        return super().get_config() | {"rho": self.rho}


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate as a function of the step, with a warm-up to `peak`.

    A subclass implements `__call__(step)`: the rate of the update that takes `step` to `step + 1`, a float32 scalar. It
    lists further arguments of its constructor in `arguments`, for `get_config`.
    """

    arguments: tuple[str, ...] = ()

    def __init__(self, peak: float, warmup_steps: int, total_steps: int):
        self.peak, self.warmup_steps, self.total_steps = peak, warmup_steps, total_steps

    def get_config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("peak", "warmup_steps", "total_steps", *self.arguments)}


@register
class Scaled(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule times a factor, at every step."""

    def __init__(self, schedule: Any, factor: float):
        self.schedule, self.factor = schedule, factor

    def __call__(self, step: Any) -> tf.Tensor:
        return self.schedule(step) * self.factor

    def get_config(self) -> dict[str, Any]:
        return {"schedule": keras.saving.serialize_keras_object(self.schedule), "factor": self.factor}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Scaled":
        return cls(keras.saving.deserialize_keras_object(config["schedule"]), config["factor"])


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is outside [0, 1]; pass a share, e.g. 0.1")
    return value


def _half_cosine(progress: tf.Tensor) -> tf.Tensor:
    """Falls from 1 to 0 while `progress` rises from 0 to 1."""
    return 0.5 * (1.0 + tf.cos(math.pi * progress))


class WarmupDecay(Schedule):
    """Linear warm-up from `peak / warmup_steps` to `peak`, then `peak · decay(progress)`."""

    def decay(self, progress: tf.Tensor) -> tf.Tensor:
        """The factor of the peak. `progress`: 0 until the warm-up ends, 1 after `total_steps`; both float32 scalars."""
        raise NotImplementedError

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        length = max(self.total_steps - self.warmup_steps, 1)
        progress = tf.clip_by_value((step - self.warmup_steps) / length, 0.0, 1.0)
        return self.peak * tf.minimum((step + 1.0) / max(self.warmup_steps, 1), 1.0) * self.decay(progress)


@register
class Constant(WarmupDecay):
    """Warm-up, then the peak."""

    def decay(self, progress: tf.Tensor) -> tf.Tensor:
        return tf.ones_like(progress)


@register
class Linear(WarmupDecay):
    """Warm-up, then a linear decay that reaches 0 after `total_steps`."""

    def decay(self, progress: tf.Tensor) -> tf.Tensor:
        return 1.0 - progress


@register
class Cosine(WarmupDecay):
    """Warm-up, then a cosine decay that reaches `floor` (a share of the peak) after `total_steps`.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017.
    """

    arguments = ("floor",)

    def __init__(self, peak: float, warmup_steps: int, total_steps: int, floor: float = 0.0):
        super().__init__(peak, warmup_steps, total_steps)
        self.floor = _share("floor", floor)

    def decay(self, progress: tf.Tensor) -> tf.Tensor:
        return self.floor + (1.0 - self.floor) * _half_cosine(progress)


@register
class Stepwise(WarmupDecay):
    """Warm-up, then the peak times `factor` for each of the points `at` that is passed; they count in parts of `of`.

    So `at=30x60x80,of=90` are the epochs 30, 60 and 80 of 90, whatever the number of steps. The rate after a point
    holds from the update whose number is the point's, rounded. Source: He et al., "Deep residual learning", CVPR 2016;
    with a warm-up: Goyal et al., "Accurate, large minibatch SGD", 2017.
    """

    arguments = ("at", "of", "factor")

    def __init__(
        self,
        peak: float,
        warmup_steps: int,
        total_steps: int,
        at: tuple[float, ...] = (30, 60, 80),
        of: float = 90,
        factor: float = 0.1,
    ):
        super().__init__(peak, warmup_steps, total_steps)
        if not all(0 < a < b for a, b in zip(at, (*at[1:], of), strict=True)):
            raise ValueError(f"at {at} does not rise from above 0 to below {of}; write e.g. at=30x60x80,of=90")
        if not 0 < factor <= 1:
            raise ValueError(f"factor {factor} is outside (0, 1]; pass what the rate is multiplied by, e.g. 0.1")
        self.at, self.of, self.factor = tuple(at), of, factor

    def __call__(self, step: Any) -> tf.Tensor:
        points = tf.constant([round(point / self.of * self.total_steps) for point in self.at], tf.float32)
        passed = tf.reduce_sum(tf.cast(tf.cast(step, tf.float32) >= points, tf.float32))
        return super().__call__(step) * tf.pow(self.factor, passed)

    def decay(self, progress: tf.Tensor) -> tf.Tensor:
        return tf.ones_like(progress)


@register
class WarmupStableDecay(WarmupDecay):
    """Warm-up, the peak, and over the last `cooldown` of all steps a fall to `floor` (a share of the peak).

    The fall is `1 - p^power` for `p` from 0 to 1: a line with 1, `1 - √p` with 0.5. Sources: Hu et al., "MiniCPM",
    2024, section 4; the forms of the fall: Hägele et al., "Scaling laws and compute-optimal training", NeurIPS 2024.
    """

    arguments = ("cooldown", "floor", "power")

    def __init__(
        self,
        peak: float,
        warmup_steps: int,
        total_steps: int,
        cooldown: float = 0.2,
        floor: float = 0.0,
        power: float = 1.0,
    ):
        super().__init__(peak, warmup_steps, total_steps)
        if not power > 0:
            raise ValueError(f"power {power} is not above 0; pass 1 for a line, 0.5 for a root")
        self.cooldown, self.floor, self.power = _share("cooldown", cooldown), _share("floor", floor), power

    def decay(self, progress: tf.Tensor) -> tf.Tensor:
        length = max(self.total_steps - self.warmup_steps, 1)
        falling = min(max(round(self.cooldown * self.total_steps), 1), length)
        fall = tf.maximum((progress * length - (length - falling)) / falling, 0.0)
        return 1.0 - (1.0 - self.floor) * tf.pow(fall, self.power)


@register
class Cyclic(Schedule):
    """Lines from `start` up to the peak over the warm-up, and down to `floor`, `cycles` times; both are shares of it.

    Without a warm-up the peak is in the middle of a cycle. Sources: Smith, "Cyclical learning rates", 2017; one cycle,
    from 10⁻⁴ of the peak to 0: ffcv-imagenet, 2022.
    """

    arguments = ("cycles", "start", "floor")

    def __init__(
        self,
        peak: float,
        warmup_steps: int,
        total_steps: int,
        cycles: int = 1,
        start: float = 1e-4,
        floor: float = 0.0,
    ):
        super().__init__(peak, warmup_steps, total_steps)
        if cycles < 1 or warmup_steps * cycles > total_steps:
            raise ValueError(f"cycles {cycles} of a warm-up of {warmup_steps} do not fit into {total_steps} steps")
        self.cycles, self.start, self.floor = cycles, _share("start", start), _share("floor", floor)

    def __call__(self, step: Any) -> tf.Tensor:
        length = self.total_steps / self.cycles
        top = self.warmup_steps or length / 2
        place = tf.math.floormod(tf.cast(step, tf.float32), length)
        rising = self.start + (1 - self.start) * place / top
        falling = (length - place + self.floor * (place - top)) / max(length - top, 1)
        return self.peak * tf.where(place < top, rising, falling)


@register
class OneCycle(Schedule):
    """From `peak / 25` up to `peak` by a cosine over the warm-up (30 % of the steps if 0), then down to `peak / 10⁴`.

    Source: Smith and Topin, "Super-convergence", 2018; the proportions are those that libraries use by default.
    """

    start_division, end_division = 25.0, 1e4

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.float32)
        top = float(self.warmup_steps or max(round(0.3 * self.total_steps), 1))
        up = _half_cosine(tf.clip_by_value(step / top, 0.0, 1.0))
        down = _half_cosine(tf.clip_by_value((step - top) / max(self.total_steps - 1 - top, 1.0), 0.0, 1.0))
        rising = self.peak + (self.peak / self.start_division - self.peak) * up
        falling = self.peak / self.end_division + (self.peak - self.peak / self.end_division) * down
        return tf.where(step < top, rising, falling)


@register
class InverseSquareRoot(Schedule):
    """Linear warm-up to `peak`, then `peak · √(warmup / step)`, whatever `total_steps` is.

    Source: Vaswani et al., "Attention is all you need", 2017, section 5.3.
    """

    def __call__(self, step: Any) -> tf.Tensor:
        done, warmup = tf.cast(step, tf.float32) + 1.0, float(max(self.warmup_steps, 1))
        return self.peak * tf.minimum(done / warmup, tf.sqrt(warmup / done))


def adam(
    learning_rate: Any,
    weight_decay: float | None,
    *,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
    slots: str = "float32",
) -> keras.optimizers.Adam:
    """Keras's Adam. `slots`: the type in which its moments are kept."""
    made = keras.optimizers.Adam(learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay)
    return _with_slots(made, slots)


def adamw(
    learning_rate: Any,
    weight_decay: float | None,
    *,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    amsgrad: bool = False,
    slots: str = "float32",
) -> keras.optimizers.AdamW:
    """Keras's AdamW, which takes 0 instead of None for no weight decay. `slots`: the type of its moments."""
    made = keras.optimizers.AdamW(learning_rate, weight_decay or 0.0, beta_1, beta_2, epsilon, amsgrad)
    return _with_slots(made, slots)


def lion(
    learning_rate: Any,
    weight_decay: float | None,
    *,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    slots: str = "float32",
) -> keras.optimizers.Lion:
    """Keras's Lion. `slots`: the type in which its momentum is kept."""
    return _with_slots(keras.optimizers.Lion(learning_rate, beta_1, beta_2, weight_decay), slots)


def _with_slots(optimizer: keras.optimizers.Optimizer, slots: str) -> keras.optimizers.Optimizer:
    """With the attribute `slots`, which whoever builds the optimizer looks at."""
    if slots not in SLOTS:
        raise ValueError(f"slots={slots} is neither {' nor '.join(SLOTS)}; pass one of them")
    if slots != SLOTS[0] and getattr(optimizer, "amsgrad", False):
        raise ValueError(f"slots={slots} would round the maxima of amsgrad up and up; leave one of them out")
    optimizer.slots = slots
    return optimizer


def build(text: str, learning_rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    """The optimizer `NAME,key=value,…` of `cards.OPTIMIZERS`, or of `module:object`, with decoupled weight decay.

    `learning_rate`: a number or a schedule; `weight_decay`: 0 = none. The optimizer does not clip: the loop must, after
    the all-reduce.

    Raises:
      models.options.OptionError: an unknown name or option, or a value of the wrong type.
    """
    return options.choose("optimizer", text).make(learning_rate, weight_decay=weight_decay or None)


def schedule(text: str, rate: float, warmup_steps: int, train_steps: int) -> Schedule:
    """The schedule `NAME,key=value,…` of `cards.SCHEDULES`, or of `module:object`, with the peak `rate`.

    Raises:
      models.options.OptionError: an unknown name or option, or a value of the wrong type.
    """
    return options.choose("schedule", text).make(rate, warmup_steps, train_steps)
