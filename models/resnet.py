"""Residual networks, subclassed. Source: He et al., "Deep residual learning for image recognition", CVPR 2016."""

from typing import Any

import keras
import tensorflow as tf

from models import tasks
from models.batch_norm import BatchNormalization
from models.blocks import BottleneckBlock, ResidualBlock
from models.layers import check_sizes, rates_by_depth

# Images below this size are not reduced before the first block: the stem is a single 3×3 convolution (He et al., 4.2).
_LARGE_IMAGE = 64


@keras.saving.register_keras_serializable("lockstep")
class ResNet(keras.Model):
    """A stem, stages of residual blocks, global mean, logits.

    `x: [batch, height, width, channels]` → logits `[batch, num_classes]`, float32. The first stage keeps the
    resolution; each later one halves it. `blocks`: blocks of each stage; `widths`: filters of each stage; `bottleneck`:
    blocks of three convolutions with four times the filters; `large_images`: a 7×7 stem of stride 2 and a pool of
    stride 2; `stochastic_depth`: the rate of the last block, see `models.layers.rates_by_depth`.
    """

    def __init__(
        self,
        num_classes: int,
        widths: tuple[int, ...] = (32, 64, 128),
        blocks: tuple[int, ...] = (1, 1, 1),
        bottleneck: bool = False,
        large_images: bool = False,
        stochastic_depth: float = 0.0,
        name: str = "resnet",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.num_classes, self.widths, self.num_blocks = num_classes, tuple(widths), tuple(blocks)
        self.bottleneck, self.large_images, self.stochastic_depth = bottleneck, large_images, stochastic_depth
        size, stride = (7, 2) if large_images else (3, 1)
        self.stem = keras.layers.Conv2D(
            widths[0], size, stride, "same", use_bias=False, kernel_initializer="he_normal", name="stem"
        )
        self.stem_norm = BatchNormalization(name="stem_norm")
        self.stem_pool = keras.layers.MaxPooling2D(3, 2, "same", name="stem_pool") if large_images else None
        block_class = BottleneckBlock if bottleneck else ResidualBlock
        rates = iter(rates_by_depth(stochastic_depth, sum(blocks)))
        self.stages = [
            block_class(width, 2 if stage > 1 and block == 1 else 1, next(rates), name=f"stage_{stage}_block_{block}")
            for stage, (width, count) in enumerate(zip(self.widths, self.num_blocks, strict=True), 1)
            for block in range(1, count + 1)
        ]
        self.pool = keras.layers.GlobalAveragePooling2D(name="pool")
        self.head = keras.layers.Dense(num_classes, name="logits", dtype="float32")

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = tf.nn.relu(self.stem_norm(self.stem(x), training=training))
        if self.stem_pool is not None:
            x = self.stem_pool(x)
        for block in self.stages:
            x = block(x, training=training)
        return self.head(self.pool(x))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "num_classes": self.num_classes,
            "widths": self.widths,
            "blocks": self.num_blocks,
            "bottleneck": self.bottleneck,
            "large_images": self.large_images,
            "stochastic_depth": self.stochastic_depth,
        }


def _widths(width: int, stages: int) -> tuple[int, ...]:
    return tuple(width * 2**stage for stage in range(stages))


def build(
    spec: tasks.DataSpec, *, width: int = 32, blocks: tuple[int, ...] = (1, 1, 1), stochastic_depth: float = 0.0
) -> tuple[keras.Model, tasks.Task]:
    """The small network for small images. `width`: filters of the first stage; each later one has twice as many."""
    check_sizes(width=width, blocks=blocks)
    widths = _widths(width, len(blocks))
    return ResNet(spec.num_classes, widths, blocks, stochastic_depth=stochastic_depth), tasks.classification(spec)


def _imagenet(
    spec: tasks.DataSpec, name: str, width: int, blocks: tuple[int, ...], bottleneck: bool, stochastic_depth: float
) -> ResNet:
    check_sizes(width=width, blocks=blocks)
    large = min(spec.input_shape[:2]) >= _LARGE_IMAGE
    return ResNet(spec.num_classes, _widths(width, len(blocks)), blocks, bottleneck, large, stochastic_depth, name=name)


def build_18(
    spec: tasks.DataSpec, *, width: int = 64, blocks: tuple[int, ...] = (2, 2, 2, 2), stochastic_depth: float = 0.0
) -> tuple[keras.Model, tasks.Task]:
    """ResNet-18. `blocks`: of each stage."""
    return _imagenet(spec, "resnet18", width, blocks, False, stochastic_depth), tasks.classification(spec)


def build_50(
    spec: tasks.DataSpec, *, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3), stochastic_depth: float = 0.0
) -> tuple[keras.Model, tasks.Task]:
    """ResNet-50. `blocks`: of each stage; `width`: filters in the first, a quarter of its output."""
    return _imagenet(spec, "resnet50", width, blocks, True, stochastic_depth), tasks.classification(spec)
