"""The arrays that operations are compared on, for a random generator and the side `n` of the matrices."""

import math

import numpy as np
import tensorflow as tf


def normal(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal numbers of a shape, float32."""
    return generator.standard_normal(shape, dtype=np.float32)


def matrix(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """`[n, n]`, float32."""
    return (normal(generator, n, n),)


def two_matrices(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Two of `[n, n]`, float32."""
    return normal(generator, n, n), normal(generator, n, n)


def positive(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Sums of positive numbers do not cancel, so their relative error means something."""
    return (generator.random((n, n), dtype=np.float32),)


def two_doubles(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Two of `[n, n]`, float64."""
    return generator.standard_normal((n, n)), generator.standard_normal((n, n))


def two_bfloat16(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Two of `[n, n]`, bfloat16."""
    return tuple(x.astype(tf.bfloat16.as_numpy_dtype) for x in two_matrices(generator, n))


def batch_of_matrices(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Two of `[64, side, side]`, where `side` is an eighth of `n`."""
    side = max(8, n // 8)
    return normal(generator, 64, side, side), normal(generator, 64, side, side)


def images(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Images `[8, side, side, 32]` and a kernel `[3, 3, 32, 32]`; im2col in NumPy takes nine times the images."""
    side = min(128, max(8, n // 8))
    return normal(generator, 8, side, side, 32), normal(generator, 3, 3, 32, 32)


def images_by_channel(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Images `[8, side, side, 32]` and a kernel `[3, 3, 32, 1]`, of which each channel has its own."""
    pixels, kernel = images(generator, n)
    return pixels, kernel[..., :1]


def heads(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Queries and keys of attention: `[batch, position, head, width]`."""
    return normal(generator, 4, max(8, n // 4), 4, 32), normal(generator, 4, max(8, n // 4), 4, 32)


def repeated_integers(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """`[n, n]`, int32: each value stands about four times in a row."""
    return (generator.integers(0, max(2, n // 4), (n, n), dtype=np.int32),)


def linear_system(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """A well-conditioned matrix and 8 right-hand sides."""
    matrix = normal(generator, n, n) + 4 * np.float32(math.sqrt(n)) * np.eye(n, dtype=np.float32)
    return matrix, normal(generator, n, 8)


def positive_definite(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """`[n, n]`, symmetric, eigenvalues above 1."""
    x = normal(generator, n, n)
    return (x @ x.T / np.float32(n) + np.eye(n, dtype=np.float32),)


def small_matrix(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """A matrix of a quarter of the side: the operation grows with the cube of it."""
    return matrix(generator, max(8, n // 4))


def small_symmetric(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """A symmetric matrix of a quarter of the side."""
    x = matrix(generator, max(8, n // 4))[0]
    return ((x + x.T) / 2,)


WORDS = np.array([b"all", b"replicas", b"sum", b"their", b"gradients", b"and", b"take", b"the", b"same", b"step"])


def words(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Two of `[16 n]`, bytes."""
    return generator.choice(WORDS, 16 * n), generator.choice(WORDS, 16 * n)


def sentences(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """`[16 n]`, bytes: one to seven words each."""
    return (np.array([b" ".join(generator.choice(WORDS, 1 + i % 7)) for i in range(16 * n)]),)


def letters(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Words in UTF-8, whose letters take one to four bytes."""
    repeated = np.array([letter * (1 + i % 5) for i, letter in enumerate("aäß中😀")])
    return (np.strings.encode(generator.choice(repeated, 16 * n), "utf-8"),)


def numerals(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """`[16 n]`, bytes: decimal numbers."""
    return (np.array([f"{x:.4f}" for x in generator.standard_normal(16 * n)], "S"),)


def uneven_rows(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Values `[sum of lengths]` and lengths `[rows]`, 1 to `n`."""
    lengths = generator.integers(1, n + 1, n, dtype=np.int64)
    return generator.random(lengths.sum(), dtype=np.float32), lengths


def sparse_matrix(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Positions `[entries, 2]` and values `[entries]` of about 2 % of a matrix, and a dense matrix `[n, n]`."""
    flat = np.unique(generator.integers(0, n * n, max(1, n * n // 50)))
    positions = np.stack(np.unravel_index(flat, (n, n)), axis=1).astype(np.int64)
    return positions, normal(generator, len(flat)), normal(generator, n, n)


def sets(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Two sets in each of `n` rows, `[n, 16]`, with repetitions."""
    return generator.integers(0, 32, (n, 16)), generator.integers(0, 32, (n, 16))
