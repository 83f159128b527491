"""Dynamic loss scaling for float16: gradients too small for the format are kept, steps that overflow are skipped.

Source: Micikevicius et al., "Mixed precision training", ICLR 2018, section 3.2.
"""

import tensorflow as tf

_INITIAL = 2.0**15
_GROWTH_INTERVAL = 2000


class LossScale:
    """The factor on the loss: halved when a gradient overflows, doubled after 2,000 good steps. Built in the scope."""

    def __init__(self):
        def variable(initial: float | int, name: str) -> tf.Variable:
            once = tf.VariableAggregation.ONLY_FIRST_REPLICA
            return tf.Variable(initial, trainable=False, name=name, aggregation=once)

        self.factor = variable(_INITIAL, "loss_scale")
        self.good_steps = variable(0, "good_steps")
        self.skipped = variable(0, "skipped_steps")

    @property
    def variables(self) -> list[tf.Variable]:
        """What a checkpoint must hold."""
        return [self.factor, self.good_steps, self.skipped]

    def adjust(self, finite: tf.Tensor) -> None:
        """Moves the factor after a step, outside of the replicas. `finite`: whether all gradients were."""
        grown = self.good_steps + 1 >= _GROWTH_INTERVAL
        up = tf.where(grown, self.factor * 2.0, self.factor)
        self.factor.assign(tf.where(finite, up, tf.maximum(self.factor / 2.0, 1.0)))
        self.good_steps.assign(tf.where(finite & ~grown, self.good_steps + 1, 0))
        self.skipped.assign_add(tf.where(finite, 0, 1))
