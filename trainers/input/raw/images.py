"""Images as people have them: pixels of any size and mode, or files."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from trainers.input.pictures import Pictures
from trainers.input.raw.form import Features, Raw

# Mean and deviation of channels that are scaled to [-1, 1].
HALF = (0.5, 0.5, 0.5)


def normalization(mean: Sequence[float], deviation: Sequence[float], channels: int) -> tuple[Any, Any]:
    """Factor and offset by which pixels become inputs: `pixel * factor - offset`, by channel."""
    if (tuple(mean), tuple(deviation)) == (HALF, HALF) or channels != len(mean):
        return 2 / 255, 1  # [-1, 1]
    factor = np.array([1 / (255 * each) for each in deviation], np.float32)
    return factor, np.array(mean, np.float32) / np.array(deviation, np.float32)


@dataclasses.dataclass(frozen=True)
class RawImages(Raw):
    """Images, uint8 `[batch, height, width, channels]`, of grey or colours, with or without transparency.

    `pictures`: how evaluation resizes them. `mean`, `deviation`: as `ImageOptions` has them.
    """

    kind: ClassVar[str] = "images"
    pictures: Pictures
    classes: tuple[str, ...]
    mean: tuple[float, ...] = HALF
    deviation: tuple[float, ...] = HALF

    def signature(self) -> tuple[tf.TensorSpec]:
        """All images of a batch have one size."""
        return (tf.TensorSpec([None, None, None, None], tf.uint8, name="images"),)

    def features(self, images: tf.Tensor) -> Features:
        """`image`: in the size that the model sees. `size`: height and width as given, for what is drawn on them."""
        pixels = self.pictures.cut_all(self._in_channels(images), self.pictures.evaluation_crop)
        return {"image": tf.ensure_shape(pixels, [None, *self.pictures.shape]), "size": tf.shape(images)[1:3]}

    def decoded(self, encoded: tf.Tensor, orientation: tf.Tensor | None = None) -> tf.Tensor:
        """The pixels of a file that the model sees, uint8 `[height, width, channels]`; the crop is that of evaluation.

        `orientation`: as EXIF has it; None = 1.
        """
        return self.pictures.decode(encoded, orientation, None)

    def inputs(self, features: Features) -> tf.Tensor:
        """float32, normalized by channel."""
        factor, offset = normalization(self.mean, self.deviation, self.pictures.channels)
        return tf.cast(features["image"], tf.float32) * factor - offset

    def errors(self, images: tf.Tensor) -> tf.Tensor:
        """None: every picture is one."""
        return tf.fill([tf.shape(images)[0]], "")

    def of_stored(self, features: Mapping[str, Any]) -> tuple[Any] | None:
        """The pixels, where evaluation takes all of an image; of a cut one the rest is not stored."""
        return (features["image"],) if self.pictures.whole else None

    def target_of(self, cells: Mapping[str, str]) -> int | None:
        """The number of the class that the cell `label` names."""
        return self.class_number(cells["label"]) if "label" in cells else None

    def facts(self) -> dict[str, Any]:
        """Size, channels and normalization; the crop as it is done."""
        pictures = self.pictures
        return {
            "kind": self.kind,
            "size": list(pictures.size),
            "channels": pictures.channels,
            "crop": "the whole image" if pictures.whole else "the largest centred part of this aspect, 7/8 of it",
            "whole": pictures.whole,
            "mean": list(self.mean),
            "deviation": list(self.deviation),
            "classes": list(self.classes),
        }

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "RawImages":
        """The way back."""
        pictures = Pictures(tuple(facts["size"]), facts["channels"], facts["whole"])
        return cls(pictures, tuple(facts["classes"]), tuple(facts["mean"]), tuple(facts["deviation"]))

    def _in_channels(self, images: tf.Tensor) -> tf.Tensor:
        """Without transparency; grey as colours, or colours as grey."""
        given, wanted = tf.shape(images)[-1], self.pictures.channels
        if wanted not in (1, 3):
            return tf.ensure_shape(images, [None, None, None, wanted])
        colours = tf.where(given % 2 == 0, given - 1, given)
        images = images[..., :colours]
        if wanted == 3:
            return tf.ensure_shape(tf.repeat(images, 3 // colours, axis=-1), [None, None, None, 3])
        grey = tf.cond(
            tf.equal(colours, 3),
            lambda: tf.image.rgb_to_grayscale(tf.ensure_shape(images, [None, None, None, 3])),
            lambda: tf.identity(images),
        )
        return tf.ensure_shape(grey, [None, None, None, 1])
