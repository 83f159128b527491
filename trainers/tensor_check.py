"""Uses TensorFlow like NumPy, as a check of the machine: values against NumPy, and speeds beside NumPy's.

python trainers/tensor_check.py
python trainers/tensor_check.py --size=2048 --repeats=20 --json=check.json

Every operation runs on every visible GPU or, with no GPU, on the CPU; then the replicas sum vectors.
Measure on an idle machine: NumPy's matrix products wait for their threads by spinning, and where another process takes
a core they lose far more than TensorFlow's. Values do not depend on it.
Exit code: 0 if every value agrees with NumPy, 1 if one does not, 2 for a flag that breaks a rule.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import json
import math
import os
import platform
import re
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from numpy.lib.stride_tricks import sliding_window_view

from trainers.record.run_record import versions, write_atomically
from trainers.settings.config import Config
from trainers.settings.exit_codes import OK, BadConfiguration, RunEnded
from trainers.settings.flags import fill, or_exit
from trainers.world import quiet
from trainers.world.signals import end_at_once_on_signal

DISAGREES = RunEnded.exit_code
# The slowest check, a singular value decomposition, grows with the cube of the side.
MOST_SIDE = 8192
MOST_REPLICAS = 64
# A replica's vector in the all-reduce: 32 bytes for each element of a matrix, and at most this many (256 MiB).
LONGEST_VECTOR = 2**26


# ----------------------------------------------------------------------------------------------------------------------
# Flags. They are checked before TensorFlow is imported, which takes seconds.


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say. `json` is the path of the file to write; empty: none."""

    size: int = 512
    repeats: int = 5
    replicas: int = 0
    json: str = ""


_HELP = {
    "size": f"side of the matrices, 8 to {MOST_SIDE}",
    "repeats": "timed calls of each operation, after one that is not timed; the median is printed",
    "replicas": "replicas that all-reduce; 0 = every visible GPU or, with no GPU, 2 virtual CPU devices",
    "json": "a file for the results",
}


def help_page() -> str:
    """The page behind `--help`."""
    lines = [__doc__.strip(), "", "Flags:"]
    for field in dataclasses.fields(Options):
        text = textwrap.fill(f"{_HELP[field.name]} (default: {'none' if field.default == '' else field.default})", 88)
        lines += [f"  --{field.name}", textwrap.indent(text, "        ")]
    return "\n".join(lines)


def options_from(argv: Sequence[str]) -> Options:
    """The options of a command line (`argv[0]` is the program).

    Raises:
      BadConfiguration: a flag is unknown, malformed or breaks a rule.
      SystemExit: `--help` was asked for and has been printed; code 0.
    """
    values = flags.FlagValues()
    for field in dataclasses.fields(Options):
        define = flags.DEFINE_integer if field.type is int else flags.DEFINE_string
        define(field.name, field.default, _HELP[field.name], flag_values=values)
    flags.DEFINE_bool("help", False, "print this page", short_name="h", flag_values=values)
    fill(values, argv, help_page)
    options = Options(**{field.name: values[field.name].value for field in dataclasses.fields(Options)})
    _check_options(options)
    return options


def _check_options(options: Options) -> None:
    for name, low, high in (("size", 8, MOST_SIDE), ("repeats", 1, None), ("replicas", 0, MOST_REPLICAS)):
        value = getattr(options, name)
        if value < low:
            raise BadConfiguration(f"--{name} {value} is below {low}; use {low} or more")
        if high is not None and value > high:
            raise BadConfiguration(f"--{name} {value} is above {high}; use {high} or less")
    if options.json:
        path = Path(options.json)
        if path.is_dir():
            raise BadConfiguration(f"--json {path} is a directory; name a file")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise BadConfiguration(f"--json {path} cannot be written: no such folder, or not ours; name one that can")


if __name__ == "__main__":
    OPTIONS = or_exit(options_from, sys.argv)
    end_at_once_on_signal()

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with quiet.known_noise_removed():
    import tensorflow as tf

    tf.config.list_physical_devices()

    from trainers.world import devices


# ----------------------------------------------------------------------------------------------------------------------
# The operations, and NumPy's way to the same values.


@dataclasses.dataclass(frozen=True)
class Check:
    """An operation that TensorFlow and NumPy both do.

    Attributes:
      name: of the operation, as it is printed.
      group: what it belongs to; a heading of the table.
      inputs: makes the arrays for a generator and the side of the matrices.
      tensorflow: of those arrays as tensors, gives a dense tensor.
      numpy: of those arrays, gives the array that `tensorflow` must give.
      tolerance: largest allowed difference (`largest_difference`); 0 = every element must be equal.
      flops: additions and multiplications of one call, from the arrays; None = no customary count.
      traffic: bytes that one call must read and write, from the arrays; used where `flops` is None.
    """

    name: str
    group: str
    inputs: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
    tensorflow: Callable[..., tf.Tensor]
    numpy: Callable[..., np.ndarray]
    tolerance: float
    flops: Callable[..., float] | None = None
    traffic: Callable[..., float] | None = None


def _normal(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape, dtype=np.float32)


def _matrix(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return (_normal(generator, n, n),)


def _two_matrices(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return _normal(generator, n, n), _normal(generator, n, n)


def _positive(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Sums of positive numbers do not cancel, so their relative error means something."""
    return (generator.random((n, n), dtype=np.float32),)


def _two_doubles(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return generator.standard_normal((n, n)), generator.standard_normal((n, n))


def _two_bfloat16(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return tuple(x.astype(tf.bfloat16.as_numpy_dtype) for x in _two_matrices(generator, n))


def _batch_of_matrices(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    side = max(8, n // 8)
    return _normal(generator, 64, side, side), _normal(generator, 64, side, side)


def _images(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Images `[8, side, side, 32]` and a kernel `[3, 3, 32, 32]`; im2col in NumPy takes nine times the images."""
    side = min(128, max(8, n // 8))
    return _normal(generator, 8, side, side, 32), _normal(generator, 3, 3, 32, 32)


def _images_by_channel(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    images, kernel = _images(generator, n)
    return images, kernel[..., :1]


def _heads(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Queries and keys of attention: `[batch, position, head, width]`."""
    return _normal(generator, 4, max(8, n // 4), 4, 32), _normal(generator, 4, max(8, n // 4), 4, 32)


def _repeated_integers(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return (generator.integers(0, max(2, n // 4), (n, n), dtype=np.int32),)


def _linear_system(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """A well-conditioned matrix and 8 right sides."""
    return _normal(generator, n, n) + 4 * np.float32(math.sqrt(n)) * np.eye(n, dtype=np.float32), _normal(
        generator, n, 8
    )


def _positive_definite(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    x = _normal(generator, n, n)
    return (x @ x.T / np.float32(n) + np.eye(n, dtype=np.float32),)


def _small_matrix(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return _matrix(generator, max(8, n // 4))


def _small_symmetric(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    x = _matrix(generator, max(8, n // 4))[0]
    return ((x + x.T) / 2,)


_WORDS = np.array([b"all", b"replicas", b"sum", b"their", b"gradients", b"and", b"take", b"the", b"same", b"step"])


def _words(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return generator.choice(_WORDS, 16 * n), generator.choice(_WORDS, 16 * n)


def _sentences(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return (np.array([b" ".join(generator.choice(_WORDS, 1 + i % 7)) for i in range(16 * n)]),)


def _letters(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Words in UTF-8, whose letters take one to four bytes."""
    words = np.array([letter * (1 + i % 5) for i, letter in enumerate("aäß中😀")])
    return (np.strings.encode(generator.choice(words, 16 * n), "utf-8"),)


def _numerals(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return (np.array([f"{x:.4f}" for x in generator.standard_normal(16 * n)], "S"),)


def _uneven_rows(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Values `[sum of lengths]` and lengths `[rows]`, 1 to `n`."""
    lengths = generator.integers(1, n + 1, n, dtype=np.int64)
    return generator.random(lengths.sum(), dtype=np.float32), lengths


def _sparse_matrix(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Places `[entries, 2]` and values `[entries]` of about 2 % of a matrix, and a dense one `[n, n]`."""
    flat = np.unique(generator.integers(0, n * n, max(1, n * n // 50)))
    places = np.stack(np.unravel_index(flat, (n, n)), axis=1).astype(np.int64)
    return places, _normal(generator, len(flat)), _normal(generator, n, n)


def _sets(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Two sets in each of `n` rows, `[n, 16]`, with repetitions."""
    return generator.integers(0, 32, (n, 16)), generator.integers(0, 32, (n, 16))


def _in_float32(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """NumPy has no fast product in bfloat16; products of its numbers are exact in float32."""
    return x.astype(np.float32) @ y.astype(np.float32)


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(axis=1, keepdims=True)
    return np.log(np.exp(x - top).sum(axis=1)) + top[:, 0]


def _windows(images: np.ndarray, stride: int) -> np.ndarray:
    """3 × 3 windows of images padded to keep their size: `[batch, height, width, channels, 3, 3]`.

    TensorFlow pads an even side at stride 2 on its far edge alone.
    """
    edge = (1, 1) if stride == 1 else (0, 1)
    padded = np.pad(images, ((0, 0), edge, edge, (0, 0)))
    return sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]


def _convolution(stride: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda images, kernel: np.tensordot(_windows(images, stride), kernel, axes=([4, 5, 3], [0, 1, 2]))


def _sparse(places: tf.Tensor, values: tf.Tensor, dense: tf.Tensor) -> tf.SparseTensor:
    return tf.SparseTensor(places, values, tf.shape(dense, tf.int64))


def _filled(places: np.ndarray, values: np.ndarray, dense: np.ndarray) -> np.ndarray:
    matrix = np.zeros_like(dense)
    matrix[places[:, 0], places[:, 1]] = values
    return matrix


def _padded(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(lengths), lengths.max()), values.dtype)
    rows[np.arange(lengths.max()) < lengths[:, None]] = values
    return rows


def _by_row(operation: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """A set operation on each pair of rows; rows are filled up with -1."""

    def apply(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        found = [operation(a, b) for a, b in zip(x, y, strict=True)]
        return _padded(np.concatenate(found) + 1, np.array([len(row) for row in found])) - 1

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
    """The rows of x `[rows, width]` from last to first, through an array that grows as it is written."""
    rows = tf.TensorArray(tf.float32, 0, dynamic_size=True)
    for i in tf.range(tf.shape(x)[0]):
        rows = rows.write(i, x[tf.shape(x)[0] - 1 - i])
    return rows.stack()


def _singular_values(x: np.ndarray) -> np.ndarray:
    return np.linalg.svd(x, compute_uv=False)


def _from_eigenvectors(values: Any, vectors: Any) -> Any:
    """The matrix again, for its eigenvectors have no sign of their own."""
    return (vectors * values) @ (tf.transpose(vectors) if tf.is_tensor(vectors) else vectors.T)


def _product_flops(x: np.ndarray, y: np.ndarray) -> float:
    return 2.0 * x.size * y.shape[-1]


def _convolution_flops(stride: int) -> Callable[[np.ndarray, np.ndarray], float]:
    """Windows at the edge are counted as if they were full, as is the custom."""
    return lambda images, kernel: 2.0 * images[..., 0].size / stride**2 * kernel.size


# Tolerances: float32 rounds by 6e-8 of a number, bfloat16 by 4e-3, float64 by 1e-16. Sums of n terms in another order
# differ by some √n times that; Winograd's convolutions and iterations for eigenvalues by more. There is room for the
# largest --size. Elements that are moved, compared, counted or added once must be equal.
CHECKS = [
    Check("add", "elementwise", _two_matrices, tf.add, np.add, 0, traffic=lambda x, y: 3 * x.nbytes),
    Check("exp", "elementwise", _matrix, tf.exp, np.exp, 2e-6, traffic=lambda x: 2 * x.nbytes),
    Check("tanh", "elementwise", _matrix, tf.tanh, np.tanh, 2e-6, traffic=lambda x: 2 * x.nbytes),
    Check(
        "where x > y",
        "elementwise",
        _two_matrices,
        lambda x, y: tf.where(x > y, x, -y),
        lambda x, y: np.where(x > y, x, -y),
        0,
        traffic=lambda x, y: 3 * x.nbytes,
    ),
    Check("sum", "reductions", _positive, tf.reduce_sum, np.sum, 5e-5, traffic=lambda x: x.nbytes),
    Check(
        "mean of columns",
        "reductions",
        _positive,
        lambda x: tf.reduce_mean(x, 0),
        lambda x: x.mean(0),
        5e-5,
        traffic=lambda x: x.nbytes,
    ),
    Check(
        "max of rows",
        "reductions",
        _matrix,
        lambda x: tf.reduce_max(x, 1),
        lambda x: x.max(1),
        0,
        traffic=lambda x: x.nbytes,
    ),
    Check(
        "argmax of rows",
        "reductions",
        _matrix,
        lambda x: tf.argmax(x, 1),
        lambda x: x.argmax(1),
        0,
        traffic=lambda x: x.nbytes,
    ),
    Check(
        "logsumexp of rows",
        "reductions",
        _matrix,
        lambda x: tf.reduce_logsumexp(x, 1),
        _logsumexp,
        5e-5,
        traffic=lambda x: x.nbytes,
    ),
    Check("float32", "matmul", _two_matrices, tf.matmul, np.matmul, 1e-5, _product_flops),
    Check("float64", "matmul", _two_doubles, tf.matmul, np.matmul, 1e-13, _product_flops),
    Check("bfloat16", "matmul", _two_bfloat16, tf.matmul, _in_float32, 1e-2, _product_flops),
    Check("batch of 64", "matmul", _batch_of_matrices, tf.matmul, np.matmul, 1e-5, _product_flops),
    Check(
        "3 × 3",
        "convolution",
        _images,
        lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"),
        _convolution(stride=1),
        5e-5,
        _convolution_flops(stride=1),
    ),
    Check(
        "3 × 3, stride 2",
        "convolution",
        _images,
        lambda x, kernel: tf.nn.conv2d(x, kernel, 2, "SAME"),
        _convolution(stride=2),
        5e-5,
        _convolution_flops(stride=2),
    ),
    Check(
        "3 × 3, by channel",
        "convolution",
        _images_by_channel,
        lambda x, kernel: tf.nn.depthwise_conv2d(x, kernel, (1, 1, 1, 1), "SAME"),
        lambda x, kernel: np.einsum("nhwcij,ijc->nhwc", _windows(x, 1), kernel[..., 0], optimize=True),
        5e-5,
        _convolution_flops(stride=1),
    ),
    Check(
        "bqhd,bkhd->bhqk",
        "einsum",
        _heads,
        lambda x, y: tf.einsum("bqhd,bkhd->bhqk", x, y),
        lambda x, y: np.einsum("bqhd,bkhd->bhqk", x, y, optimize=True),
        1e-5,
        lambda x, y: 2.0 * x.size * y.shape[1],
    ),
    Check(
        "ij,kj->ik",
        "einsum",
        _two_matrices,
        lambda x, y: tf.einsum("ij,kj->ik", x, y),
        lambda x, y: np.einsum("ij,kj->ik", x, y, optimize=True),
        1e-5,
        _product_flops,
    ),
    Check("sort rows", "sorting", _matrix, lambda x: tf.sort(x, 1), lambda x: np.sort(x, 1), 0),
    Check(
        "stable argsort",
        "sorting",
        _repeated_integers,
        lambda x: tf.argsort(x, 1, stable=True),
        lambda x: np.argsort(x, 1, stable=True),
        0,
    ),
    Check(
        "largest 8 of rows",
        "sorting",
        _matrix,
        lambda x: tf.math.top_k(x, 8).values,
        lambda x: -np.sort(np.partition(-x, 7, 1)[:, :8], 1),
        0,
    ),
    Check(
        "solve",
        "linear algebra",
        _linear_system,
        tf.linalg.solve,
        np.linalg.solve,
        1e-4,
        lambda a, b: 2 / 3 * len(a) ** 3 + 2.0 * a.size * b.shape[1],
    ),
    Check(
        "cholesky",
        "linear algebra",
        _positive_definite,
        tf.linalg.cholesky,
        np.linalg.cholesky,
        1e-5,
        lambda a: len(a) ** 3 / 3,
    ),
    Check(
        "singular values",
        "linear algebra",
        _small_matrix,
        lambda x: tf.linalg.svd(x, compute_uv=False),
        _singular_values,
        5e-5,
    ),
    Check(
        "eigh, put together",
        "linear algebra",
        _small_symmetric,
        lambda x: _from_eigenvectors(*tf.linalg.eigh(x)),
        lambda x: _from_eigenvectors(*np.linalg.eigh(x)),
        1e-3,
    ),
    Check(
        "join",
        "strings",
        _words,
        lambda x, y: tf.strings.join([x, y], "-"),
        lambda x, y: np.strings.add(np.strings.add(x, b"-"), y),
        0,
    ),
    Check("upper", "strings", _words, lambda x, _: tf.strings.upper(x), lambda x, _: np.strings.upper(x), 0),
    Check(
        "regular expression",
        "strings",
        _words,
        lambda x, _: tf.strings.regex_replace(x, "[aeiou]+", "_"),
        lambda x, _: np.array([re.sub(b"[aeiou]+", b"_", word) for word in x.tolist()]),
        0,
    ),
    Check(
        "words in sentences",
        "strings",
        _sentences,
        lambda x: tf.strings.split(x).row_lengths(),
        lambda x: np.strings.count(x, b" ") + 1,
        0,
    ),
    Check(
        "letters in UTF-8",
        "strings",
        _letters,
        lambda x: tf.strings.length(x, "UTF8_CHAR"),
        lambda x: np.strings.str_len(np.strings.decode(x, "utf-8")),
        0,
    ),
    Check("to numbers", "strings", _numerals, tf.strings.to_number, lambda x: x.astype(np.float32), 1e-7),
    Check(
        "sums of rows",
        "ragged",
        _uneven_rows,
        lambda values, lengths: tf.reduce_sum(tf.RaggedTensor.from_row_lengths(values, lengths), 1),
        lambda values, lengths: np.add.reduceat(values, np.cumsum(lengths) - lengths),
        5e-5,
        traffic=lambda values, lengths: values.nbytes,
    ),
    Check(
        "to padded rows",
        "ragged",
        _uneven_rows,
        lambda values, lengths: tf.RaggedTensor.from_row_lengths(values, lengths).to_tensor(),
        _padded,
        0,
    ),
    Check(
        "sparse × dense",
        "sparse",
        _sparse_matrix,
        lambda places, values, dense: tf.sparse.sparse_dense_matmul(_sparse(places, values, dense), dense),
        lambda places, values, dense: _filled(places, values, dense) @ dense,
        1e-5,
        lambda places, values, dense: 2.0 * values.size * dense.shape[1],
    ),
    Check(
        "to dense",
        "sparse",
        _sparse_matrix,
        lambda *matrix: tf.sparse.to_dense(_sparse(*matrix)),
        _filled,
        0,
    ),
    Check(
        "sums of rows",
        "sparse",
        _sparse_matrix,
        lambda *matrix: tf.sparse.reduce_sum(_sparse(*matrix), 1),
        lambda *matrix: _filled(*matrix).sum(1),
        1e-5,
    ),
    Check("recurrence", "TensorArray", _matrix, _recurrence, _recurrence_in_numpy, 1e-6),
    Check("rows backwards", "TensorArray", _matrix, _backwards, lambda x: x[::-1].copy(), 0),
    Check(
        "intersection",
        "sets",
        _sets,
        lambda x, y: tf.sparse.to_dense(tf.sets.intersection(x, y), -1),
        _by_row(np.intersect1d),
        0,
    ),
    Check("union", "sets", _sets, lambda x, y: tf.sparse.to_dense(tf.sets.union(x, y), -1), _by_row(np.union1d), 0),
    Check(
        "difference",
        "sets",
        _sets,
        lambda x, y: tf.sparse.to_dense(tf.sets.difference(x, y), -1),
        _by_row(np.setdiff1d),
        0,
    ),
]


# ----------------------------------------------------------------------------------------------------------------------
# Checking.


@dataclasses.dataclass(frozen=True)
class Result:
    """One operation on one device: medians in seconds, rates in `unit`, and how far the values lie from NumPy's.

    `device` is where the values were made: a GPU hands strings and sets to the CPU. `error` says what went wrong
    where there is no number for it, and `tensorflow_seconds` is None if nothing came back.
    """

    group: str
    operation: str
    device: str
    inputs: str
    tensorflow_seconds: float | None
    numpy_seconds: float
    tensorflow_rate: float | None
    numpy_rate: float | None
    unit: str | None
    difference: float | None
    tolerance: float
    error: str | None

    @property
    def agrees(self) -> bool:
        """Whether the values lie within the tolerance of NumPy's."""
        return self.error is None and self.difference <= self.tolerance

    @property
    def complaint(self) -> str:
        """The line for a result that does not agree."""
        what = self.error or f"differs from NumPy by {self.difference:.1e}, above its tolerance {self.tolerance:.1e}"
        return f"{self.group}: {self.operation} on {self.device}, {self.inputs}: {what}"


def _misfit(actual: np.ndarray, expected: np.ndarray) -> str | None:
    """Why two arrays cannot be compared, if so. In NumPy bfloat16 is of kind V, and TensorFlow's strings of kind O."""
    if actual.shape != expected.shape:
        return f"shape {actual.shape} instead of {expected.shape}"
    if {"V": "f", "O": "S"}.get(actual.dtype.kind, actual.dtype.kind) != expected.dtype.kind:
        return f"type {actual.dtype} instead of {expected.dtype}"
    return None


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """How far an array lies from the expected one, of the same shape.

    Floating point: the largest |actual - expected| over the largest |expected|. Anything else, and where one
    of the two is not finite: the number of elements that are not equal.
    """
    if expected.dtype.kind == "f":
        actual, expected = actual.astype(np.float64), expected.astype(np.float64)
        if np.isfinite(actual).all() and np.isfinite(expected).all():
            scale = np.abs(expected).max(initial=0.0)
            return float(np.abs(actual - expected).max(initial=0.0) / (scale or 1.0))
        return float(np.sum((actual != expected) & ~(np.isnan(actual) & np.isnan(expected))))
    if expected.dtype.kind == "S":  # TensorFlow's strings come as objects
        actual, expected = actual.astype(object), expected.astype(object)
    return float(np.sum(actual != expected))


def _device_name(device: str) -> str:
    """`/job:localhost/replica:0/task:0/device:GPU:0` → `GPU:0`."""
    return ":".join(device.split(":")[-2:])


def _median_seconds(operation: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What the first call gives, which is not timed, and the median time of those after it."""
    result = operation()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - began)
    return result, statistics.median(seconds)


def _work(check: Check, arrays: Sequence[np.ndarray]) -> tuple[float | None, str | None]:
    """What one call does, in units of 10⁹, and the unit of its rate."""
    if check.flops is not None:
        return check.flops(*arrays) / 1e9, "GFLOP/s"
    if check.traffic is not None:
        return check.traffic(*arrays) / 1e9, "GB/s"
    return None, None


def _describe(array: np.ndarray) -> str:
    kind = "bytes" if array.dtype.kind == "S" else array.dtype.name
    return f"{'×'.join(map(str, array.shape))} {kind}"


def _compare(
    one: Check,
    arrays: Sequence[np.ndarray],
    tensors: Sequence[Any],
    device: str,
    expected: np.ndarray,
    numpy_seconds: float,
    repeats: int,
) -> Result:
    """Times TensorFlow's side on `tensors`; each tensor that it gives (a tuple: one of each replica) is compared."""

    def call() -> Any:
        given = one.tensorflow(*tensors)
        if "GPU" in device:  # a GPU is told what to do and goes on by itself
            tf.test.experimental.sync_devices()
        return given

    work, unit = _work(one, arrays)
    seconds = difference = error = None
    try:
        given, seconds = _median_seconds(call, repeats)
        if isinstance(given, tuple):
            actual = [np.asarray(tensor.numpy()) for tensor in given]
        else:
            actual, device = [np.asarray(given.numpy())], _device_name(given.device)
        error = next(filter(None, (_misfit(array, expected) for array in actual)), None)
        if error is None:
            difference = max(largest_difference(array, expected) for array in actual)
    except Exception as failure:  # whatever this machine cannot do is a finding, not the end
        message = textwrap.shorten(" ".join(str(failure).split()), 300, placeholder=" …")
        error = f"{type(failure).__name__}: {message}"
    return Result(
        group=one.group,
        operation=one.name,
        device=device,
        inputs=_describe(arrays[0]),
        tensorflow_seconds=seconds,
        numpy_seconds=numpy_seconds,
        tensorflow_rate=work / seconds if work and seconds else None,
        numpy_rate=work / numpy_seconds if work else None,
        unit=unit,
        difference=difference,
        tolerance=one.tolerance,
        error=error,
    )


def check(
    checks: Sequence[Check] = CHECKS,
    size: int = Options.size,
    repeats: int = Options.repeats,
    report: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Does every operation on every visible GPU or, with no GPU, on the CPU.

    Products of float32 are done in float32: TensorFloat-32, which carries three digits, is off meanwhile.

    Args:
      checks: the operations.
      size: side of the matrices.
      repeats: timed calls, after one that is not.
      report: is called with each result as it comes.
    """
    names = [device.name for device in tf.config.list_logical_devices("GPU")]
    names = names or [tf.config.list_logical_devices("CPU")[0].name]
    tensor_float_32 = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    results = []
    try:
        for one in checks:
            arrays = one.inputs(np.random.default_rng(0), size)
            expected, seconds = _median_seconds(lambda one=one, arrays=arrays: one.numpy(*arrays), repeats)
            for name in names:
                with tf.device(name):
                    tensors = [tf.identity(array) for array in arrays]
                    results.append(
                        _compare(one, arrays, tensors, _device_name(name), np.asarray(expected), seconds, repeats)
                    )
                report(results[-1])
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(tensor_float_32)
    return results


def check_all_reduce(strategy: tf.distribute.Strategy, size: int, repeats: int) -> Result:
    """Sums a vector over the replicas, as a trainer does with gradients; every replica must hold NumPy's sum.

    The rate is the bytes of one replica's vector over the time of the sum.

    Args:
      strategy: whose replicas sum.
      size: the vectors hold `8 * size ** 2` float32, at most `LONGEST_VECTOR`.
      repeats: timed calls, after one that is not.
    """
    replicas = strategy.num_replicas_in_sync

    def in_replica(share: tf.Tensor) -> tf.Tensor:
        # The identity gives an argument a device; without one a single replica is refused.
        return tf.distribute.get_replica_context().all_reduce("sum", tf.identity(share))

    @tf.function
    def total(values: Any) -> Any:
        return strategy.run(in_replica, (values,))

    one = Check(
        f"sum over {replicas} replica{'s' if replicas > 1 else ''}",
        "all-reduce",
        lambda generator, n: (_normal(generator, replicas, min(8 * n**2, LONGEST_VECTOR)),),
        lambda values: strategy.experimental_local_results(total(values)),
        lambda shares: shares.sum(axis=0),
        1e-6,
        traffic=(lambda shares: shares[0].nbytes) if replicas > 1 else None,
    )
    (shares,) = one.inputs(np.random.default_rng(0), size)
    expected, seconds = _median_seconds(lambda: one.numpy(shares), repeats)
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.identity(shares[context.replica_id_in_sync_group])
    )
    places = [_device_name(device) for device in strategy.extended.worker_devices]
    place = places[0] if replicas == 1 else f"{places[0]}–{places[-1].split(':')[1]}"
    return _compare(one, [shares], [values], place, expected, seconds, repeats)


# ----------------------------------------------------------------------------------------------------------------------
# The script.


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _microseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:,.0f}"


def _line(*cells: str) -> str:
    name, device, inputs, microseconds, numpy_microseconds, rate, numpy_rate, unit, difference, tolerance, note = cells
    return (
        f"  {name:<21}{device:<8}{inputs:<22}{microseconds:>10}{numpy_microseconds:>10}{rate:>11}{numpy_rate:>8} "
        f"{unit:<8}{difference:>7}{tolerance:>7} {note}"
    ).rstrip()


HEADING = "\n".join(
    (
        _line("", "", "", "TensorFlow", "NumPy", "TensorFlow", "NumPy", "", "differ-", "toler-", ""),
        _line("operation", "device", "first input", "µs", "µs", "rate", "rate", "unit", "ence", "ance", ""),
    )
)


def row(result: Result) -> str:
    """A line of the table."""
    return _line(
        result.operation,
        result.device,
        result.inputs,
        _microseconds(result.tensorflow_seconds),
        _microseconds(result.numpy_seconds),
        _rate(result.tensorflow_rate),
        _rate(result.numpy_rate),
        result.unit or "–",
        "–" if result.difference is None else f"{result.difference:.0e}" if result.difference else "0",
        f"{result.tolerance:.0e}" if result.tolerance else "0",
        "" if result.agrees else "WRONG",
    )


def _printer() -> Callable[[Result], None]:
    """Prints each result as it comes, under the heading of its group."""
    group = None

    def report(result: Result) -> None:
        nonlocal group
        if result.group != group:
            print(result.group)
            group = result.group
        print(row(result), flush=True)

    return report


def _as_json(options: Options, results: Sequence[Result]) -> str:
    record = {
        "host": platform.node(),
        "versions": versions(),
        "flags": dataclasses.asdict(options),
        "results": [dataclasses.asdict(result) | {"agrees": result.agrees} for result in results],
    }
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def run(options: Options, checks: Sequence[Check] = CHECKS) -> int:
    """Prints the table, names what is wrong on standard error, and returns the exit code.

    Raises:
      BadConfiguration: more replicas are asked for than there are GPUs, or the results cannot be written.
    """
    strategy = devices.set_up(Config(strategy="mirrored", replicas=options.replicas))
    print(f"TensorFlow {tf.__version__}, NumPy {np.__version__}; medians of {options.repeats}")
    print("difference: relative to NumPy's largest magnitude; where the tolerance is 0, unequal elements")
    print(HEADING)
    report = _printer()
    results = check(checks, options.size, options.repeats, report)
    results.append(check_all_reduce(strategy, options.size, options.repeats))
    report(results[-1])
    wrong = [result for result in results if not result.agrees]
    print(f"{len(results) - len(wrong)} of {len(results)} agree with NumPy", flush=True)
    for result in wrong:
        print(f"{sys.argv[0]}: {result.complaint}", file=sys.stderr)
    if options.json:
        try:
            write_atomically(Path(options.json), _as_json(options, results))
        except OSError as error:
            raise BadConfiguration(
                f"--json {options.json} cannot be written: {error.strerror}; name one that can"
            ) from None
    return DISAGREES if wrong else OK


def main(options: Options) -> int:
    """Runs the checks as a program: what the user can act on is one line and an exit code."""
    logging.set_verbosity(logging.WARNING)
    try:
        return run(options)
    except RunEnded as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
