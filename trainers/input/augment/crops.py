"""Crops, shifts and reflections of images, each image by numbers of its own: `[batch, height, width, channels]`."""

import math

import tensorflow as tf

from models import randomness

# Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.
ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10


def inception(shape: tf.Tensor, least_area: float) -> tf.Tensor:
    """Crops of images: `shape` `[batch, 2]` int32, height and width → `[batch, 4]` int32, top, left, height, width.

    Of ten draws of area and aspect the first that lies within the image; if none does, the central square.
    """
    batch = tf.shape(shape)[0]
    # In float64: exponentials of float32 differ in the last bit with the place of a number in its vector.
    draws = tf.cast(randomness.uniform(tf.stack([batch, 4 * _TRIES]), "augment/inception"), tf.float64)
    draws = tf.reshape(draws, [-1, _TRIES, 4])
    size = tf.cast(shape, tf.float64)[:, None, :]
    area = (least_area + (1 - least_area) * draws[..., 0]) * size[..., 0] * size[..., 1]
    low, high = (math.log(aspect) for aspect in ASPECTS)
    aspect = tf.exp(low + (high - low) * draws[..., 1])
    extent = tf.round(tf.stack([tf.sqrt(area / aspect), tf.sqrt(area * aspect)], axis=-1))
    fits = tf.reduce_all((extent >= 1) & (extent <= size), axis=-1)
    # The central square stands last, and always fits.
    square = tf.reduce_min(size, axis=-1, keepdims=True) * tf.ones([1, 1, 2], tf.float64)
    extent = tf.concat([extent, square], axis=1)
    place = tf.concat([draws[..., 2:], tf.fill(tf.stack([batch, 1, 2]), tf.constant(0.5, tf.float64))], axis=1)
    fits = tf.concat([fits, tf.ones(tf.stack([batch, 1]), tf.bool)], axis=1)
    first = tf.argmax(tf.cast(fits, tf.int32), axis=1)
    extent, place = (tf.gather(value, first, batch_dims=1) for value in (extent, place))
    # `place` is below 1: the offset is one of `size - extent + 1` places.
    offset = tf.minimum(tf.floor(place * (size[:, 0] - extent + 1)), size[:, 0] - extent)
    return tf.cast(tf.concat([offset, extent], axis=1), tf.int32)


def resized(images: tf.Tensor, crops: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """A crop of each image, bilinear, as `tf.image.resize` of the crop has it: uint8 `[batch, *size, channels]`."""
    values = tf.cast(images, tf.float32)
    for axis in (0, 1):
        begin, extent = (tf.cast(crops[:, column], tf.float32)[:, None] for column in (axis, axis + 2))
        centre = (tf.range(size[axis], dtype=tf.float32)[None] + 0.5) * (extent / size[axis]) - 0.5
        below = tf.floor(centre)
        share = centre - below
        low, high = (tf.cast(begin + tf.clip_by_value(edge, 0.0, extent - 1), tf.int32) for edge in (below, below + 1))
        share = share[:, :, None, None] if axis == 0 else share[:, None, :, None]
        lower, upper = (tf.gather(values, index, axis=axis + 1, batch_dims=1) for index in (low, high))
        values = lower + (upper - lower) * share
    return tf.cast(tf.round(values), tf.uint8)


def shifted(images: tf.Tensor, most: float, alone: bool) -> tf.Tensor:
    """Each image shifted by up to `most` of its size in both directions, over black. `alone`: the batch is one image.

    Source: He et al., "Deep residual learning", CVPR 2016, section 4.2 (4 of 32 pixels); one pixel at the least.
    """
    _, height, width, _ = images.shape
    draws = randomness.uniform(tf.stack([tf.shape(images)[0], 2]), "augment/crop")
    # Many are shifted where the replica computes, and GPUs gather no numbers of 8 bits.
    values = images if alone else tf.cast(images, tf.float32)
    for axis, size in ((1, height), (2, width)):
        reach = max(round(most * size), 1)
        shift = tf.cast(tf.floor(draws[:, axis - 1] * (2 * reach + 1)), tf.int32) - reach
        index = tf.range(size)[None] + shift[:, None]
        inside = tf.cast((index >= 0) & (index < size), values.dtype)
        inside = inside[:, :, None, None] if axis == 1 else inside[:, None, :, None]
        values = tf.gather(values, tf.clip_by_value(index, 0, size - 1), axis=axis, batch_dims=1) * inside
    return tf.cast(values, images.dtype)


def flipped(images: tf.Tensor, alone: bool) -> tf.Tensor:
    """Every second image, by chance, with left and right exchanged. `alone`: the batch is one image."""
    chosen = randomness.uniform(tf.stack([tf.shape(images)[0], 1]), "augment/flip") < 0.5
    if alone:
        return tf.cond(chosen[0, 0], lambda: tf.reverse(images, axis=[2]), lambda: images)
    return tf.where(chosen[:, :, None, None], tf.reverse(images, axis=[2]), images)
