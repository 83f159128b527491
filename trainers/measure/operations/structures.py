"""Operations on what is not a dense array of numbers: strings, ragged and sparse tensors, TensorArrays, sets."""

import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainers.measure.comparison import Operation
from trainers.measure.operations import inputs


def _sparse(positions: tf.Tensor, values: tf.Tensor, dense: tf.Tensor) -> tf.SparseTensor:
    return tf.SparseTensor(positions, values, tf.shape(dense, tf.int64))


def _filled(positions: np.ndarray, values: np.ndarray, dense: np.ndarray) -> np.ndarray:
    matrix = np.zeros_like(dense)
    matrix[positions[:, 0], positions[:, 1]] = values
    return matrix


def _padded(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(lengths), lengths.max()), values.dtype)
    rows[np.arange(lengths.max()) < lengths[:, None]] = values
    return rows


def _by_row(operation: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """A set operation on each pair of rows; rows are padded with -1."""

    def apply(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        rows = [operation(a, b) for a, b in zip(x, y, strict=True)]
        return _padded(np.concatenate(rows) + 1, np.array([len(row) for row in rows])) - 1

    return apply


@tf.function
def _recurrence(x: tf.Tensor) -> tf.Tensor:
    """h[t] = h[t - 1] / 2 + x[t] over the rows of x `[steps, width]`, in a loop of the graph."""
    states = tf.TensorArray(tf.float32, tf.shape(x)[0])
    h = tf.zeros_like(x[0])
    for t in tf.range(tf.shape(x)[0]):
        h = h / 2 + x[t]
        states = states.write(t, h)
    return states.stack()


def _recurrence_in_numpy(x: np.ndarray) -> np.ndarray:
    states, h = np.empty_like(x), np.zeros_like(x[0])
    for t in range(len(x)):
        h = h / 2 + x[t]
        states[t] = h
    return states


@tf.function
def _backwards(x: tf.Tensor) -> tf.Tensor:
    """The rows of x `[rows, width]` from last to first, through a TensorArray that grows as it is written."""
    rows = tf.TensorArray(tf.float32, 0, dynamic_size=True)
    for i in tf.range(tf.shape(x)[0]):
        rows = rows.write(i, x[tf.shape(x)[0] - 1 - i])
    return rows.stack()


OPERATIONS = [
    Operation(
        "join",
        "strings",
        inputs.words,
        lambda x, y: tf.strings.join([x, y], "-"),
        lambda x, y: np.strings.add(np.strings.add(x, b"-"), y),
        0,
    ),
    Operation("upper", "strings", inputs.words, lambda x, _: tf.strings.upper(x), lambda x, _: np.strings.upper(x), 0),
    Operation(
        "regular expression",
        "strings",
        inputs.words,
        lambda x, _: tf.strings.regex_replace(x, "[aeiou]+", "_"),
        lambda x, _: np.array([re.sub(b"[aeiou]+", b"_", word) for word in x.tolist()]),
        0,
    ),
    Operation(
        "words in sentences",
        "strings",
        inputs.sentences,
        lambda x: tf.strings.split(x).row_lengths(),
        lambda x: np.strings.count(x, b" ") + 1,
        0,
    ),
    Operation(
        "letters in UTF-8",
        "strings",
        inputs.letters,
        lambda x: tf.strings.length(x, "UTF8_CHAR"),
        lambda x: np.strings.str_len(np.strings.decode(x, "utf-8")),
        0,
    ),
    Operation("to numbers", "strings", inputs.numerals, tf.strings.to_number, lambda x: x.astype(np.float32), 1e-7),
    Operation(
        "sums of rows",
        "ragged",
        inputs.uneven_rows,
        lambda values, lengths: tf.reduce_sum(tf.RaggedTensor.from_row_lengths(values, lengths), 1),
        lambda values, lengths: np.add.reduceat(values, np.cumsum(lengths) - lengths),
        5e-5,
        traffic=lambda values, lengths: values.nbytes,
    ),
    Operation(
        "to padded rows",
        "ragged",
        inputs.uneven_rows,
        lambda values, lengths: tf.RaggedTensor.from_row_lengths(values, lengths).to_tensor(),
        _padded,
        0,
    ),
    Operation(
        "sparse × dense",
        "sparse",
        inputs.sparse_matrix,
        lambda positions, values, dense: tf.sparse.sparse_dense_matmul(_sparse(positions, values, dense), dense),
        lambda positions, values, dense: _filled(positions, values, dense) @ dense,
        1e-5,
        lambda positions, values, dense: 2.0 * values.size * dense.shape[1],
    ),
    Operation(
        "to dense",
        "sparse",
        inputs.sparse_matrix,
        lambda *matrix: tf.sparse.to_dense(_sparse(*matrix)),
        _filled,
        0,
    ),
    Operation(
        "sums of rows",
        "sparse",
        inputs.sparse_matrix,
        lambda *matrix: tf.sparse.reduce_sum(_sparse(*matrix), 1),
        lambda *matrix: _filled(*matrix).sum(1),
        1e-5,
    ),
    Operation("recurrence", "TensorArray", inputs.matrix, _recurrence, _recurrence_in_numpy, 1e-6),
    Operation("rows backwards", "TensorArray", inputs.matrix, _backwards, lambda x: x[::-1].copy(), 0),
    Operation(
        "intersection",
        "sets",
        inputs.sets,
        lambda x, y: tf.sparse.to_dense(tf.sets.intersection(x, y), -1),
        _by_row(np.intersect1d),
        0,
    ),
    Operation(
        "union", "sets", inputs.sets, lambda x, y: tf.sparse.to_dense(tf.sets.union(x, y), -1), _by_row(np.union1d), 0
    ),
    Operation(
        "difference",
        "sets",
        inputs.sets,
        lambda x, y: tf.sparse.to_dense(tf.sets.difference(x, y), -1),
        _by_row(np.setdiff1d),
        0,
    ),
]
