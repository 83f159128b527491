"""Optimizers and learning-rate schedules by name."""

from typing import Any

import keras


class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from `peak / warmup_steps` to `peak`, then a decay that ends at 0 after `total_steps`.

    `shape`: `constant`, `linear` or `cosine` (Loshchilov and Hutter, "SGDR", ICLR 2017).
    """

    def __init__(self, peak: float, warmup_steps: int, total_steps: int, shape: str):
        self.peak, self.warmup_steps, self.total_steps, self.shape = peak, warmup_steps, total_steps, shape

    def __call__(self, step: Any) -> Any:
        """The rate of the update that takes `step` to `step + 1`: a float32 scalar."""
        ops = keras.ops
        step = ops.cast(step, "float32")
        share = ops.clip((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 0.0, 1.0)
        decay = {
            "constant": lambda: ops.ones_like(share),
            "linear": lambda: 1.0 - share,
            "cosine": lambda: 0.5 * (1.0 + ops.cos(3.141592653589793 * share)),
        }[self.shape]()
        warm = ops.minimum((step + 1.0) / max(self.warmup_steps, 1), 1.0)
        return self.peak * warm * decay

    def get_config(self) -> dict[str, Any]:
        """The schedule's arguments."""
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "shape": self.shape,
        }


def build(name: str, learning_rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    """The optimizer `name`, with decoupled weight decay. Clipping is the loop's: it must follow the all-reduce."""
    decay = {"weight_decay": weight_decay or None}
    return {
        "sgd": lambda: keras.optimizers.SGD(learning_rate, **decay),
        "momentum": lambda: keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True, **decay),
        "adam": lambda: keras.optimizers.Adam(learning_rate, **decay),
        # AdamW without decay is Adam: Keras's AdamW refuses None.
        "adamw": lambda: keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay),
    }[name]()
