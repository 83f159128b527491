"""Which updates are left out: those whose gradients overflow in float16, and spikes of the gradient's norm.

Leaving a batch out after a spike: Chowdhery et al., "PaLM: scaling language modeling with pathways", JMLR 2023, section
5.1.
"""

from typing import Any

import tensorflow as tf

from trainers.run import workers
from trainers.run.loss_scale import LossScale
from trainers.settings.config import Config
from trainers.world.devices import World

# Norms that a norm is compared with. Before there are so many, nothing is a spike.
WINDOW = 128
# The column of metrics, and the key of run.json.
SKIPPED = "skipped_spikes"


class Spikes:
    """The norms of the last `WINDOW` updates, those that were left out among them. Built in the strategy's scope.

    A spike enters the window too: norms that have grown for good are none any more once they are half of it.
    `factor`: of the median, from which on a norm is a spike.
    """

    def __init__(self, factor: float):
        def variable(initial: Any, name: str) -> tf.Variable:
            once = tf.VariableAggregation.ONLY_FIRST_REPLICA
            return tf.Variable(initial, trainable=False, name=name, aggregation=once)

        self.factor = factor
        self.norms = variable(tf.zeros([WINDOW]), "last_norms")
        self.seen, self.skipped = variable(0, "norms_seen"), variable(0, SKIPPED)

    @property
    def variables(self) -> list[tf.Variable]:
        """What a checkpoint must hold."""
        return [self.norms, self.seen, self.skipped]

    def found(self, norm: tf.Tensor) -> tf.Tensor:
        """Whether a norm is a spike, which is counted. One that is not finite is none, and is not kept.

        Called once an update, outside of the replicas, with a norm that is the same on all workers.
        """
        finite, before = tf.math.is_finite(norm), tf.convert_to_tensor(self.norms)
        median = tf.reduce_mean(tf.sort(before)[(WINDOW - 1) // 2 : WINDOW // 2 + 1])
        known = (self.seen >= WINDOW) & (median > 0)
        spike = finite & known & (norm >= self.factor * median)
        self.norms.assign(tf.where(finite, tf.concat([before[1:], norm[None]], axis=0), before))
        self.seen.assign(tf.minimum(self.seen + tf.cast(finite, tf.int32), WINDOW))
        self.skipped.assign_add(tf.cast(spike, tf.int32))
        return spike


class LeftOut:
    """Decides about each update, alike on all replicas and workers. Built in the strategy's scope."""

    def __init__(self, config: Config, world: World):
        self.world = world
        self.loss_scale = LossScale() if config.precision == "float16" else None
        self.spikes = Spikes(config.skip_spikes) if config.skip_spikes else None

    @property
    def variables(self) -> dict[str, list[tf.Variable]]:
        """What a checkpoint must hold, by the first part of its names."""
        held = {"loss_scale": self.loss_scale, "spikes": self.spikes}
        return {name: one.variables for name, one in held.items() if one}

    @tf.autograph.experimental.do_not_convert
    def decide(self, norm: tf.Tensor, loss: tf.Tensor) -> tuple[Any, tf.Tensor]:
        """Whether the update is made, and whether the run can go on. Outside of the replicas.

        `norm`: of the gradient, before clipping. The first is True, no tensor, where every update is made.
        """
        made, finite = True, tf.math.is_finite(loss)
        if self.loss_scale:  # gradients that overflow are left out, and the scale made smaller
            made = tf.math.is_finite(norm)
            self.loss_scale.adjust(made)
        else:
            finite &= tf.math.is_finite(norm)
        if self.spikes:
            # The mean over the workers is one number on all of them, where each may round its own in another way.
            made &= ~self.spikes.found(workers.mean(self.world, norm))
        return made, finite

    @property
    def norm_names(self) -> tuple[str, ...]:
        """The columns that `counts` fills."""
        return (SKIPPED,) if self.spikes else ()

    @tf.autograph.experimental.do_not_convert
    def counts(self) -> tuple[tf.Tensor, ...]:
        """Spikes so far, for the metrics: float32."""
        return (tf.cast(self.spikes.skipped, tf.float32),) if self.spikes else ()

    def count(self) -> Any:
        """Updates that were left out so far; 0 where none ever is."""
        held = [one.skipped for one in (self.loss_scale, self.spikes) if one]
        return tf.add_n([tf.convert_to_tensor(one) for one in held]) if held else 0

    def facts(self) -> dict[str, int]:
        """What run.json says."""
        held = {"skipped_steps": self.loss_scale, SKIPPED: self.spikes}
        return {name: int(one.skipped.numpy()) for name, one in held.items() if one}
