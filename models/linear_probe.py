"""A linear probe: how well a linear function of features tells classes apart. It is exact, and needs no training.

Ridge regression of one-hot labels in closed form, from sums over examples: they add up in any grouping, so that the
result does not depend on how examples are split over replicas and workers. All in float64. Examples have weights
`[batch]`; a weight of 0 leaves one out.
"""

import tensorflow as tf


def products(features: tf.Tensor, labels: tf.Tensor, classes: int, weights: tf.Tensor) -> tf.Tensor:
    """The sums over a batch: features `[batch, width]`, labels `[batch]` → `[width + 1, width + 1 + classes]`.

    They are products of features and a 1 with features, a 1 and one-hot labels.
    """
    rows = _with_one(features)
    columns = tf.concat([rows, tf.one_hot(labels, classes, dtype=tf.float64)], axis=1)
    return tf.matmul(rows * tf.cast(weights, tf.float64)[:, None], columns, transpose_a=True)


def solution(sums: tf.Tensor, ridge: float) -> tf.Tensor:
    """The probe from the summed `products`: `[width + 1, classes]`, of which the last row is the offset.

    `ridge`: the penalty of squared weights, in mean variances of a feature and for each example; not of the offset.
    """
    width = sums.shape[0] - 1
    means = sums[width] / sums[width, width]
    covariance = sums[:width] / sums[width, width] - means[:width, None] * means[None]
    own, with_labels = covariance[:, :width], covariance[:, width + 1 :]
    # Of features that hardly vary the covariance is rounding, of the size of their squares times 1e-16.
    squares = tf.linalg.trace(sums[:width, :width]) / sums[width, width]
    penalty = tf.maximum(ridge * tf.linalg.trace(own), 1e-12 * squares + 1e-30) / width
    root = tf.linalg.cholesky(own + penalty * tf.eye(width, dtype=tf.float64))
    weights = tf.linalg.cholesky_solve(root, with_labels)
    offset = means[width + 1 :] - tf.linalg.matvec(weights, means[:width], transpose_a=True)
    return tf.concat([weights, offset[None]], axis=0)


def errors(features: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, probe: tf.Tensor) -> tf.Tensor:
    """Sums over a batch `[3]`: examples whose class the probe says, its squared error, and examples.

    The squared error is that to the one-hot label, a sum over classes.
    """
    said, labels = _with_one(features) @ probe, tf.cast(labels, tf.int64)
    squared = tf.reduce_sum(tf.square(said - tf.one_hot(labels, probe.shape[1], dtype=tf.float64)), axis=1)
    right = tf.cast(tf.argmax(said, axis=1) == labels, tf.float64)
    rows = tf.stack([right, squared, tf.ones_like(right)])
    return tf.linalg.matvec(rows, tf.cast(weights, tf.float64))


def _with_one(features: tf.Tensor) -> tf.Tensor:
    features = tf.cast(features, tf.float64)
    return tf.concat([features, tf.ones_like(features[:, :1])], axis=1)
