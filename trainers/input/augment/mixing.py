"""Changes that need a whole batch, or are cheapest there: erasing, and blends of an example with its neighbour."""

import math

import tensorflow as tf

from models import randomness

_GAMMA_TRIES = 12


def erased(images: tf.Tensor, probability: float) -> tf.Tensor:
    """In some images a rectangle becomes noise: `[batch, height, width, channels]`, float32 in [0, 255].

    Area 0.02 to 1/3 of the image, aspect 0.3 to 3.3. Source: Zhong et al., "Random erasing data augmentation", 2020.
    """
    # In float64: exponentials of float32 differ in the last bit with the place of a number in its vector.
    draws = tf.cast(randomness.uniform(tf.stack([tf.shape(images)[0], 5]), "augment/erase"), tf.float64)
    area = 0.02 + (1 / 3 - 0.02) * draws[:, 1]
    aspect = tf.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * draws[:, 2])
    extent = tf.stack([tf.sqrt(area * aspect), tf.sqrt(area / aspect)], axis=1)
    inside = _rectangle(images, draws[:, 3:], tf.minimum(extent, 1.0), centred=False)
    inside &= (draws[:, 0] < probability)[:, None, None, None]
    noise = tf.floor(randomness.uniform(tf.shape(images), "augment/erase/noise") * 256)
    return tf.where(inside, noise, images)


def _rectangle(images: tf.Tensor, place: tf.Tensor, extent: tf.Tensor, centred: bool) -> tf.Tensor:
    """Where the pixels of a rectangle are: `[batch, height, width, 1]`. `place`, `extent`: `[batch, 2]`, shares of 1.

    `centred`: `place` is that of the centre, and what lies outside is cut off; else the rectangle lies in the image.
    """
    sides = []
    for axis in (0, 1):
        size = images.shape[1 + axis]
        length = tf.round(extent[:, axis] * size)
        begin = tf.floor(place[:, axis] * size) - tf.floor(length / 2) if centred else None
        begin = begin if centred else tf.floor(place[:, axis] * (size - length + 1))
        pixel = tf.range(size, dtype=length.dtype)[None]
        sides.append((pixel >= begin[:, None]) & (pixel < (begin + length)[:, None]))
    return (sides[0][:, :, None] & sides[1][:, None, :])[..., None]


def neighbours(values: tf.Tensor) -> tf.Tensor:
    """The other example of each pair: 0 and 1, 2 and 3, … of a batch of even size."""
    pairs = tf.reshape(values, [-1, 2, *values.shape[1:].as_list()])
    return tf.reshape(tf.reverse(pairs, axis=[1]), tf.shape(values))


def mixed_up(images: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """Each image blended with its neighbour; `share [batch]` is its own part.

    Source: Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018.
    """
    share = share[:, None, None, None]
    return share * images + (1 - share) * neighbours(images)


def cut_mixed(images: tf.Tensor, share: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Each image with a rectangle of its neighbour. Returns the part that is its own, too: `[batch]`.

    Source: Yun et al., "CutMix: regularization strategy to train strong classifiers", ICCV 2019.
    """
    side = tf.sqrt(1 - tf.cast(share, tf.float64))
    place = tf.cast(randomness.uniform(tf.stack([tf.shape(images)[0], 2]), "augment/cutmix/place"), tf.float64)
    inside = _rectangle(images, place, tf.stack([side, side], axis=1), centred=True)
    own = 1 - tf.reduce_mean(tf.cast(inside, tf.float32), axis=[1, 2, 3])
    return tf.where(inside, neighbours(images), images), own


def beta(count: tf.Tensor, alpha: float, stream: str) -> tf.Tensor:
    """Draws of Beta(alpha, alpha), `[count]`, by the ratio of two gamma draws.

    In float64 up to the last: logarithms of float32 differ in the last bit with the place of a number in its vector.
    """
    ours, theirs = (_log_gamma_draw(count, alpha, f"{stream}/{side}") for side in ("own", "other"))
    return tf.cast(tf.sigmoid(ours - theirs), tf.float32)


def _log_gamma_draw(count: tf.Tensor, alpha: float, stream: str) -> tf.Tensor:
    """Logarithms of draws of Gamma(alpha, 1): `[count]`, float64. They do not underflow where alpha is small.

    Source: Marsaglia and Tsang, "A simple method for generating gamma variables", 2000, for alpha + 1, and their
    section 6 for what is below. Of twelve tries the first that is accepted counts; each is in 19 of 20 cases.
    """
    d = alpha + 1 - 1 / 3
    c = 1 / math.sqrt(9 * d)
    draws = tf.cast(randomness.uniform(tf.stack([count, 3 * _GAMMA_TRIES + 1]), stream), tf.float64)
    radius, angle, uniform, boost = tf.split(draws, [_GAMMA_TRIES] * 3 + [1], axis=1)
    # Box and Muller's transform.
    normal = tf.sqrt(-2.0 * tf.math.log1p(-radius)) * tf.cos(2.0 * math.pi * angle)
    cubed = (1 + c * normal) ** 3
    log_cubed = tf.math.log(tf.maximum(cubed, 1e-30))
    accepted = (cubed > 0) & (tf.math.log(tf.maximum(uniform, 1e-30)) < 0.5 * normal**2 + d - d * cubed + d * log_cubed)
    first = tf.argmax(tf.cast(accepted, tf.int32), axis=1)
    log_draw = math.log(d) + tf.gather(log_cubed, first, batch_dims=1)
    return log_draw + tf.math.log(tf.maximum(boost[:, 0], 2.0**-25)) / alpha
