"""Many small variables as a few vectors, so that what treats them all alike is a few operations and not some for each.

A large variable stays as it is: copying it into a vector would cost more than its operations do.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

# Elements of a vector, at most; a variable of more stands alone. On a CPU a vector stays in its caches from one
# operation to the next. On a GPU each operation costs its launch, so few are best.
MOST_ON_CPU, MOST_ON_GPU = 1 << 20, 1 << 22


class Vectors:
    """How variables are cut into vectors. `bundles`: the places of the variables in each; of one alone, it as it is.

    `shapes`: those of all variables.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], bundles: Sequence[Sequence[int]]):
        self.shapes, self.bundles = [tuple(shape) for shape in shapes], [list(bundle) for bundle in bundles]
        self.sizes = [tf.TensorShape(shape).num_elements() for shape in self.shapes]

    def begins(self, bundle: Sequence[int]) -> list[tuple[int, int]]:
        """The variables of one bundle by their places, each with its first element in the vector."""
        ends = itertools.accumulate((self.sizes[place] for place in bundle), initial=0)
        return list(zip(bundle, ends, strict=False))

    def pack(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The vectors of values of the variables: `[elements]`, or the value itself of a variable alone."""
        return [joined([values[place] for place in bundle]) for bundle in self.bundles]

    def unpack(self, vectors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The values of all variables, of vectors as `pack` makes them."""
        values: list[Any] = [None] * len(self.shapes)
        for bundle, vector in zip(self.bundles, vectors, strict=True):
            for place, value in zip(bundle, self.parts(bundle, vector), strict=True):
                values[place] = value
        return values

    def parts(self, bundle: Sequence[int], vector: tf.Tensor) -> list[tf.Tensor]:
        """The values of the variables of one bundle."""
        if len(bundle) == 1:
            return [vector]
        pieces = tf.split(vector, [self.sizes[place] for place in bundle])
        return [tf.reshape(piece, self.shapes[place]) for piece, place in zip(pieces, bundle, strict=True)]


def joined(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Tensors one after another, `[elements]`; one alone as it is."""
    if len(values) == 1:
        return tf.convert_to_tensor(values[0])
    flat = tf.constant([-1])
    return tf.concat([tf.reshape(value, flat) for value in values], axis=0)


def vectors_of(variables: Sequence[Any]) -> Vectors:
    """Vectors of variables of one type each, in their order."""
    most = MOST_ON_GPU if tf.config.list_logical_devices("GPU") else MOST_ON_CPU
    shapes = [tuple(variable.shape) for variable in variables]
    bundles: list[list[int]] = []
    # For each type the bundle that is not full, and the elements in it.
    open_bundles: dict[tf.DType, tuple[list[int], int]] = {}
    for place, (variable, shape) in enumerate(zip(variables, shapes, strict=True)):
        dtype = tf.as_dtype(variable.dtype)
        size = tf.TensorShape(shape).num_elements()
        bundle, filled = open_bundles.get(dtype, ([], most))
        if not bundle or size > most or filled + size > most:
            bundle, filled = [], 0
            bundles.append(bundle)
        bundle.append(place)
        if size <= most:
            open_bundles[dtype] = bundle, filled + size
    return Vectors(shapes, bundles)
