"""The Fréchet distance between two sets of images, from sums over examples: exact at every number of replicas."""

import math

import tensorflow as tf

# Features of an image: its own values where there are no more, else so many random projections of them.
MOST_FEATURES = 64
_PROJECTION_SEED = (2017, 6)


class FrechetDistance:
    """`|m - n|² + tr(S + T - 2 √(S T))` for means `m`, `n` and covariances `S`, `T` of the features of two sets.

    That is the squared Wasserstein distance between two normal distributions, which are fitted to the sets. 0 at best;
    its size depends on the number of examples. The features are an image's values or, where these are many, 64 fixed
    random projections of them, which keep squared distances in the mean. So its numbers can be compared on one data
    set, and not with the distances that others compute from features of a trained network.
    Source: Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS
    2017, section 3.

    `image_shape`: one example's shape. `width`: the length of the vector of sums.
    """

    def __init__(self, image_shape: tuple[int, ...]):
        self.values = math.prod(image_shape)
        self.features = min(self.values, MOST_FEATURES)
        # Of each set the number of examples, their sum and the sum of their outer products.
        self.width = 2 * (1 + self.features + self.features**2)

    def features_of(self, images: tf.Tensor) -> tf.Tensor:
        """`[batch, …]` → `[batch, features]`, float64: in float32 the differences of large sums would lose digits."""
        flat = tf.cast(tf.reshape(images, [-1, self.values]), tf.float32)
        if self.values > MOST_FEATURES:
            shape = [self.values, MOST_FEATURES]
            flat = flat @ (tf.random.stateless_normal(shape, _PROJECTION_SEED, alg="philox") / math.sqrt(MOST_FEATURES))
        return tf.cast(flat, tf.float64)

    def sums(self, one: tf.Tensor, other: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """Sums over a batch of both sets, `[batch, …]` each: `[width]`, float64. A weight of 0 leaves a row out."""
        parts = []
        for images in (one, other):
            rows = self.features_of(images)
            weighted = rows * tf.cast(weights, tf.float64)[:, None]
            outer = tf.matmul(rows, weighted, transpose_a=True)
            count = tf.reduce_sum(tf.cast(weights, tf.float64), keepdims=True)
            parts += [count, tf.reduce_sum(weighted, axis=0), tf.reshape(outer, [-1])]
        return tf.concat(parts, axis=0)

    def result_of(self, total: tf.Tensor) -> tf.Tensor:
        """The distance from sums over all examples, `[width]`: a float64 scalar."""
        (m, s), (n, t) = (self._moments(half) for half in tf.split(total, 2))
        # tr √(S T) = tr √(√S T √S), whose argument is symmetric: no root of a matrix that is not.
        values, vectors = tf.linalg.eigh(s)
        root = tf.matmul(vectors * tf.sqrt(tf.maximum(values, 0.0)), vectors, transpose_b=True)
        product = root @ t @ root
        shared = tf.linalg.eigvalsh((product + tf.transpose(product)) / 2)
        trace = tf.linalg.trace(s) + tf.linalg.trace(t) - 2 * tf.reduce_sum(tf.sqrt(tf.maximum(shared, 0.0)))
        return tf.maximum(tf.reduce_sum(tf.square(m - n)) + trace, 0.0)

    def _moments(self, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean `[features]` and covariance `[features, features]` of a set."""
        count, mean, outer = tf.split(sums, [1, self.features, self.features**2])
        mean = tf.math.divide_no_nan(mean, count)
        square = tf.reshape(tf.math.divide_no_nan(outer, count), [self.features, self.features])
        return mean, square - mean[:, None] * mean[None, :]
