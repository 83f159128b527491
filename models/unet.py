"""A U-Net for a label of each pixel, subclassed.

Source: Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015, with padded
convolutions and batch normalization.
"""

from typing import Any

import keras
import tensorflow as tf

from models import tasks
from models.batch_norm import BatchNormalization
from models.layers import check_sizes
from models.recompute import Block


@keras.saving.register_keras_serializable("lockstep")
class ConvolutionPair(Block):
    """Two 3×3 convolutions, each normalized and rectified: `[batch, height, width, …]` → `[…, filters]`."""

    def __init__(self, filters: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.filters = filters
        self.convolutions = [
            keras.layers.Conv2D(
                filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"conv_{i}"
            )
            for i in (1, 2)
        ]
        self.norms = [BatchNormalization(name=f"norm_{i}") for i in (1, 2)]

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = tf.nn.relu(norm(convolution(x), training=training))
        return x

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"filters": self.filters}


@keras.saving.register_keras_serializable("lockstep")
class UNet(keras.Model):
    """`x: [batch, height, width, channels]` → logits of each pixel `[batch, height, width, num_classes]`, float32.

    `depth` times the resolution is halved and the filters, `width` at first, are doubled; on the way back up each
    resolution sees what it was on the way down. Height and width divide by `2 ** depth`.
    """

    def __init__(self, num_classes: int, width: int = 16, depth: int = 2, name: str = "unet", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        self.num_classes, self.width, self.depth = num_classes, width, depth
        self.down = [ConvolutionPair(width * 2**i, name=f"down_{i}") for i in range(depth)]
        self.pools = [keras.layers.MaxPooling2D(2, name=f"pool_{i}") for i in range(depth)]
        self.bottom = ConvolutionPair(width * 2**depth, name="bottom")
        self.enlarge = [
            keras.layers.Conv2DTranspose(width * 2**i, 2, 2, kernel_initializer="he_normal", name=f"enlarge_{i}")
            for i in range(depth)
        ]
        self.up = [ConvolutionPair(width * 2**i, name=f"up_{i}") for i in range(depth)]
        self.head = keras.layers.Conv2D(num_classes, 1, name="logits", dtype="float32")

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        skips = []
        for block, pool in zip(self.down, self.pools, strict=True):
            skips.append(block(x, training=training))
            x = pool(skips[-1])
        x = self.bottom(x, training=training)
        for i in reversed(range(self.depth)):
            x = self.up[i](tf.concat([skips[i], self.enlarge[i](x)], axis=-1), training=training)
        return self.head(x)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"num_classes": self.num_classes, "width": self.width, "depth": self.depth}


def build(spec: tasks.DataSpec, *, width: int = 16, depth: int = 2) -> tuple[keras.Model, tasks.Task]:
    """`width`: filters at the full resolution; `depth`: how often it is halved and the filters are doubled."""
    check_sizes(width=width, depth=depth)
    if any(side % 2**depth for side in spec.input_shape[:2]):
        raise ValueError(
            f"images of {spec.input_shape[0]}×{spec.input_shape[1]} cannot be halved {depth} times; pass a smaller "
            "depth"
        )
    return UNet(spec.num_classes, width, depth), tasks.segmentation(spec)
