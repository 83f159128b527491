"""RandAugment: two operations out of fourteen for each image, all of one strength.

Source: Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space", 2020. Strengths
are those of its published code, but posterize and solarize grow stronger with the magnitude, as in later libraries.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import tensorflow as tf

from models import randomness
from trainers.world import private_api

LAYERS = 2
MOST = 10.0
# What geometry leaves empty.
_GREY = 128.0
_ROTATION, _SHEAR, _TRANSLATION = math.radians(30), 0.3, 100 / 224
_LUMA = (0.299, 0.587, 0.114)

Operation = Callable[[tf.Tensor, tf.Tensor, float], tf.Tensor]


def _blended(degenerate: tf.Tensor, images: tf.Tensor, magnitude: float) -> tf.Tensor:
    """Towards `degenerate` below a factor of 1, away from it above."""
    factor = magnitude / MOST * 1.8 + 0.1
    return tf.clip_by_value(degenerate + factor * (images - degenerate), 0.0, 255.0)


def _grey(images: tf.Tensor) -> tf.Tensor:
    if images.shape[-1] != 3:
        return images
    return tf.reduce_sum(images * tf.constant(_LUMA), axis=-1, keepdims=True) * tf.ones([3])


def _identity(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    return images


def _autocontrast(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    low = tf.reduce_min(images, axis=[1, 2], keepdims=True)
    high = tf.reduce_max(images, axis=[1, 2], keepdims=True)
    stretched = (images - low) * (255.0 / tf.maximum(high - low, 1.0))
    return tf.where(high > low, stretched, images)


def _equalized(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    """Each channel so that its grey levels are equally frequent, by the rule of Pillow."""
    _, height, width, channels = images.shape
    # As float32 as long as it can be: TensorFlow moves whole numbers of 32 bits between a GPU and the host.
    levels = tf.reshape(tf.transpose(images, [0, 3, 1, 2]), [-1, height * width])
    rows, highest = tf.cast(levels, tf.int32), tf.cast(tf.reduce_max(levels, axis=1), tf.int32)
    # The kernel for GPUs refuses to be deterministic.
    with tf.device("CPU:0") if private_api.is_deterministic() else contextlib.nullcontext():
        counts = tf.math.bincount(rows, axis=-1, minlength=256, maxlength=256, dtype=tf.int32)
    step = (height * width - tf.gather(counts, highest, batch_dims=1)) // 255
    before = tf.cumsum(counts, axis=1, exclusive=True)
    table = tf.clip_by_value((before + step[:, None] // 2) // tf.maximum(step, 1)[:, None], 0, 255)
    table = tf.where(step[:, None] > 0, table, tf.range(256)[None])
    values = tf.reshape(tf.gather(table, rows, batch_dims=1), [-1, channels, height, width])
    return tf.cast(tf.transpose(values, [0, 2, 3, 1]), tf.float32)


def _posterized(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    level = 2.0 ** round(4 * magnitude / MOST)
    return tf.floor(images / level) * level


def _solarized(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    return tf.where(images < 256 * (1 - magnitude / MOST), images, 255 - images)


def _color(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    return _blended(_grey(images), images, magnitude)


def _contrast(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    return _blended(tf.round(tf.reduce_mean(_grey(images), axis=[1, 2, 3], keepdims=True)), images, magnitude)


def _brightness(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    return _blended(tf.zeros_like(images), images, magnitude)


def _sharpness(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    """The degenerate image is smoothed, but for its border."""
    _, height, width, _ = images.shape
    if height < 3 or width < 3:
        return images
    smooth = tf.add_n(
        [
            images[:, 1 + y : height - 1 + y, 1 + x : width - 1 + x] * (5.0 if x == y == 0 else 1.0)
            for y in (-1, 0, 1)
            for x in (-1, 0, 1)
        ]
    )
    smooth = tf.pad(smooth / 13.0, [[0, 0], [1, 1], [1, 1], [0, 0]])
    inside = tf.pad(tf.ones([1, height - 2, width - 2, 1]), [[0, 0], [1, 1], [1, 1], [0, 0]])
    return _blended(tf.where(inside > 0, smooth, images), images, magnitude)


def _moved(images: tf.Tensor, matrix: list) -> tf.Tensor:
    """Each image through its own affine map of places, nearest pixel: `matrix` six values, scalar or `[batch]`."""
    height, width = images.shape[1:3]
    ones = tf.ones([tf.shape(images)[0]])
    a, b, x, c, d, y = (value * ones for value in matrix)
    # About the centre of the image, and not about its corner.
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x += centre_x - a * centre_x - b * centre_y
    y += centre_y - c * centre_x - d * centre_y
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([a, b, x, c, d, y, 0 * ones, 0 * ones], axis=1),
        output_shape=tf.constant([height, width]),
        fill_value=_GREY,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )


def _rotated(images: tf.Tensor, sign: tf.Tensor, magnitude: float) -> tf.Tensor:
    angle = _ROTATION * magnitude / MOST
    sine = sign * math.sin(angle)
    return _moved(images, [math.cos(angle), -sine, 0.0, sine, math.cos(angle), 0.0])


def _sheared(images: tf.Tensor, sign: tf.Tensor, magnitude: float, axis: int) -> tf.Tensor:
    amount = sign * (_SHEAR * magnitude / MOST)
    return _moved(images, [1.0, *((amount, 0.0, 0.0) if axis else (0.0, 0.0, amount)), 1.0, 0.0])


def _translated(images: tf.Tensor, sign: tf.Tensor, magnitude: float, axis: int) -> tf.Tensor:
    amount = sign * round(_TRANSLATION * magnitude / MOST * images.shape[1 + axis])
    return _moved(images, [1.0, 0.0, *((amount, 0.0, 1.0, 0.0) if axis else (0.0, 0.0, 1.0, amount))])


# Of images `[batch, height, width, channels]`, float32 in whole numbers from 0 to 255; `sign [batch]`, 1 or -1.
OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalized,
    "rotate": _rotated,
    "solarize": _solarized,
    "color": _color,
    "posterize": _posterized,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": functools.partial(_sheared, axis=1),
    "shear_y": functools.partial(_sheared, axis=0),
    "translate_x": functools.partial(_translated, axis=1),
    "translate_y": functools.partial(_translated, axis=0),
}


def randaugmented(images: tf.Tensor, magnitude: float, alone: bool) -> tf.Tensor:
    """Images `[batch, height, width, channels]`, uint8, each after two operations.

    `alone`: the batch is one image, so that only its own operations are computed.
    """
    values = tf.cast(images, tf.float32)
    for layer in range(LAYERS):
        draws = randomness.uniform(tf.stack([tf.shape(images)[0], 2]), f"augment/randaugment/{layer}")
        chosen = tf.cast(tf.floor(draws[:, 0] * len(OPERATIONS)), tf.int32)
        sign = tf.where(draws[:, 1] < 0.5, -1.0, 1.0)
        branches = [functools.partial(operation, values, sign, magnitude) for operation in OPERATIONS.values()]
        if alone:
            changed = tf.switch_case(chosen[0], branches)
        else:
            changed = values
            for number, branch in enumerate(branches):
                changed = tf.where((chosen == number)[:, None, None, None], branch(), changed)
        values = tf.ensure_shape(tf.round(changed), images.shape)
    return tf.cast(values, tf.uint8)
