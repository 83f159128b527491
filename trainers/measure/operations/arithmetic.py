"""Operations on dense arrays of numbers: elementwise, reductions, products, convolutions, sorting, linear algebra."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.lib.stride_tricks import sliding_window_view

from trainers.measure.comparison import Operation
from trainers.measure.operations import inputs


def _in_float32(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """NumPy has no fast product in bfloat16; products of its numbers are exact in float32."""
    return x.astype(np.float32) @ y.astype(np.float32)


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(axis=1, keepdims=True)
    return np.log(np.exp(x - top).sum(axis=1)) + top[:, 0]


def _windows(images: np.ndarray, stride: int) -> np.ndarray:
    """3 × 3 windows of images padded to keep their size: `[batch, height, width, channels, 3, 3]`.

    At stride 2 TensorFlow pads an even side at its far edge only.
    """
    edge = (1, 1) if stride == 1 else (0, 1)
    padded = np.pad(images, ((0, 0), edge, edge, (0, 0)))
    return sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]


def _convolution(stride: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda images, kernel: np.tensordot(_windows(images, stride), kernel, axes=([4, 5, 3], [0, 1, 2]))


def _singular_values(x: np.ndarray) -> np.ndarray:
    return np.linalg.svd(x, compute_uv=False)


def _from_eigenvectors(values: Any, vectors: Any) -> Any:
    """The matrix itself: the sign of an eigenvector is arbitrary, so eigenvectors cannot be compared."""
    return (vectors * values) @ (tf.transpose(vectors) if tf.is_tensor(vectors) else vectors.T)


def _product_flops(x: np.ndarray, y: np.ndarray) -> float:
    return 2.0 * x.size * y.shape[-1]


def _convolution_flops(stride: int) -> Callable[[np.ndarray, np.ndarray], float]:
    """Windows at the edge are counted as if they were full, which is the usual convention."""
    return lambda images, kernel: 2.0 * images[..., 0].size / stride**2 * kernel.size


OPERATIONS = [
    Operation("add", "elementwise", inputs.two_matrices, tf.add, np.add, 0, traffic=lambda x, y: 3 * x.nbytes),
    Operation("exp", "elementwise", inputs.matrix, tf.exp, np.exp, 2e-6, traffic=lambda x: 2 * x.nbytes),
    Operation("tanh", "elementwise", inputs.matrix, tf.tanh, np.tanh, 2e-6, traffic=lambda x: 2 * x.nbytes),
    Operation(
        "where x > y",
        "elementwise",
        inputs.two_matrices,
        lambda x, y: tf.where(x > y, x, -y),
        lambda x, y: np.where(x > y, x, -y),
        0,
        traffic=lambda x, y: 3 * x.nbytes,
    ),
    Operation("sum", "reductions", inputs.positive, tf.reduce_sum, np.sum, 5e-5, traffic=lambda x: x.nbytes),
    Operation(
        "mean of columns",
        "reductions",
        inputs.positive,
        lambda x: tf.reduce_mean(x, 0),
        lambda x: x.mean(0),
        5e-5,
        traffic=lambda x: x.nbytes,
    ),
    Operation(
        "max of rows",
        "reductions",
        inputs.matrix,
        lambda x: tf.reduce_max(x, 1),
        lambda x: x.max(1),
        0,
        traffic=lambda x: x.nbytes,
    ),
    Operation(
        "argmax of rows",
        "reductions",
        inputs.matrix,
        lambda x: tf.argmax(x, 1),
        lambda x: x.argmax(1),
        0,
        traffic=lambda x: x.nbytes,
    ),
    Operation(
        "logsumexp of rows",
        "reductions",
        inputs.matrix,
        lambda x: tf.reduce_logsumexp(x, 1),
        _logsumexp,
        5e-5,
        traffic=lambda x: x.nbytes,
    ),
    Operation("float32", "matmul", inputs.two_matrices, tf.matmul, np.matmul, 1e-5, _product_flops),
    Operation("float64", "matmul", inputs.two_doubles, tf.matmul, np.matmul, 1e-13, _product_flops),
    Operation("bfloat16", "matmul", inputs.two_bfloat16, tf.matmul, _in_float32, 1e-2, _product_flops),
    Operation("batch of 64", "matmul", inputs.batch_of_matrices, tf.matmul, np.matmul, 1e-5, _product_flops),
    Operation(
        "3 × 3",
        "convolution",
        inputs.images,
        lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"),
        _convolution(stride=1),
        5e-5,
        _convolution_flops(stride=1),
    ),
    Operation(
        "3 × 3, stride 2",
        "convolution",
        inputs.images,
        lambda x, kernel: tf.nn.conv2d(x, kernel, 2, "SAME"),
        _convolution(stride=2),
        5e-5,
        _convolution_flops(stride=2),
    ),
    Operation(
        "3 × 3, by channel",
        "convolution",
        inputs.images_by_channel,
        lambda x, kernel: tf.nn.depthwise_conv2d(x, kernel, (1, 1, 1, 1), "SAME"),
        lambda x, kernel: np.einsum("nhwcij,ijc->nhwc", _windows(x, 1), kernel[..., 0], optimize=True),
        5e-5,
        _convolution_flops(stride=1),
    ),
    Operation(
        "bqhd,bkhd->bhqk",
        "einsum",
        inputs.heads,
        lambda x, y: tf.einsum("bqhd,bkhd->bhqk", x, y),
        lambda x, y: np.einsum("bqhd,bkhd->bhqk", x, y, optimize=True),
        1e-5,
        lambda x, y: 2.0 * x.size * y.shape[1],
    ),
    Operation(
        "ij,kj->ik",
        "einsum",
        inputs.two_matrices,
        lambda x, y: tf.einsum("ij,kj->ik", x, y),
        lambda x, y: np.einsum("ij,kj->ik", x, y, optimize=True),
        1e-5,
        _product_flops,
    ),
    Operation("sort rows", "sorting", inputs.matrix, lambda x: tf.sort(x, 1), lambda x: np.sort(x, 1), 0),
    Operation(
        "stable argsort",
        "sorting",
        inputs.repeated_integers,
        lambda x: tf.argsort(x, 1, stable=True),
        lambda x: np.argsort(x, 1, stable=True),
        0,
    ),
    Operation(
        "largest 8 of rows",
        "sorting",
        inputs.matrix,
        lambda x: tf.math.top_k(x, 8).values,
        lambda x: -np.sort(np.partition(-x, 7, 1)[:, :8], 1),
        0,
    ),
    Operation(
        "solve",
        "linear algebra",
        inputs.linear_system,
        tf.linalg.solve,
        np.linalg.solve,
        1e-4,
        lambda a, b: 2 / 3 * len(a) ** 3 + 2.0 * a.size * b.shape[1],
    ),
    Operation(
        "cholesky",
        "linear algebra",
        inputs.positive_definite,
        tf.linalg.cholesky,
        np.linalg.cholesky,
        1e-5,
        lambda a: len(a) ** 3 / 3,
    ),
    Operation(
        "singular values",
        "linear algebra",
        inputs.small_matrix,
        lambda x: tf.linalg.svd(x, compute_uv=False),
        _singular_values,
        5e-5,
    ),
    Operation(
        "eigh, put together",
        "linear algebra",
        inputs.small_symmetric,
        lambda x: _from_eigenvectors(*tf.linalg.eigh(x)),
        lambda x: _from_eigenvectors(*np.linalg.eigh(x)),
        1e-3,
    ),
]
