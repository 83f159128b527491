"""Residual networks, subclassed. Source: He et al., "Deep residual learning for image recognition", CVPR 2016."""

from typing import Any

import keras
import tensorflow as tf

from models import layers, tasks


@keras.saving.register_keras_serializable("lockstep")
class ResNet(keras.Model):
    """A residual network for small images: a 3×3 stem, stages of residual blocks, global mean, logits.

    `x: [batch, height, width, channels]` → logits `[batch, num_classes]`, float32. The first stage keeps the
    resolution; each later one halves it.
    """

    def __init__(
        self,
        num_classes: int,
        widths: tuple[int, ...] = (32, 64, 128),
        blocks: int = 1,
        name: str = "resnet",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.num_classes, self.widths, self.num_blocks = num_classes, tuple(widths), blocks
        self.stem = keras.layers.Conv2D(
            widths[0], 3, 1, "same", use_bias=False, kernel_initializer="he_normal", name="stem"
        )
        self.stem_norm = layers.batch_normalization("stem_norm")
        self.stages = [
            layers.ResidualBlock(
                width, stride=2 if stage > 1 and block == 1 else 1, name=f"stage_{stage}_block_{block}"
            )
            for stage, width in enumerate(self.widths, 1)
            for block in range(1, blocks + 1)
        ]
        self.pool = keras.layers.GlobalAveragePooling2D(name="pool")
        self.head = keras.layers.Dense(num_classes, name="logits", dtype="float32")

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Logits of a batch."""
        x = tf.nn.relu(self.stem_norm(self.stem(x), training=training))
        for block in self.stages:
            x = block(x, training=training)
        return self.head(self.pool(x))

    def get_config(self) -> dict[str, Any]:
        """The model's arguments."""
        config = {"num_classes": self.num_classes, "widths": self.widths, "blocks": self.num_blocks}
        return super().get_config() | config


def build(spec: tasks.DataSpec) -> tuple[keras.Model, tasks.Task]:
    """The model and its task for an image-classification data set."""
    return ResNet(spec.num_classes), tasks.classification()
