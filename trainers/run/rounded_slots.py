"""Slots of an optimizer that are kept in bfloat16, half the memory of float32, while its update is computed in float32.

Rounded to the nearest, a moment that moves by less than half of a gap, 1 / 256 of itself, would not move at all: the
second moment of Adam never moves by more than 1 / 1000. Rounded by chance, it moves as it should in the mean.
"""

from typing import Any

import tensorflow as tf

from models import randomness
from trainers.world.devices import native


class ForOneUpdate:
    """What an update rule takes for a variable: a tensor, which stands for what has become of it so far."""

    value: tf.Tensor | None = None

    def assign(self, value: tf.Tensor) -> None:
        """As of a variable."""
        self.value = value

    def assign_add(self, value: tf.Tensor) -> None:
        """As of a variable."""
        self.value = self.value + value

    def assign_sub(self, value: tf.Tensor) -> None:
        """As of a variable."""
        self.value = self.value - value


class RoundedSlot(ForOneUpdate):
    """What an update rule takes for a slot: a variable of float32 that lasts from `read` to `keep`.

    `variable`: the slot, bfloat16. `stream`: names its noise, see `models.randomness`.
    """

    dtype = "float32"

    def __init__(self, variable: Any, stream: str):
        self.variable, self.stream, self.shape = variable, stream, tuple(variable.shape)

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> tf.Tensor:
        return self.value

    def read(self) -> None:
        """On a device: begins with what is kept there."""
        self.value = tf.cast(native(self.variable), tf.float32)

    def keep(self) -> Any:
        """On a device, within `models.randomness.at`: rounds what has become of it. In a graph the operation."""
        value, self.value = self.value, None
        return native(self.variable).assign(randomness.rounded(value, self.stream), read_value=False)
