"""Noise as a pure function of (seed, step, position of the example in the global batch).

Keras draws one mask and repeats it on every replica, and keeps generator state that a checkpoint may miss. Here the
loop announces where in the run a batch stands (`at`), and a layer asks for numbers of its own (`uniform`). The same
example gets the same noise at every number of replicas and after every resume, and nothing has to be saved.

Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): one counter gives four
32-bit words, and examples own disjoint, consecutive ranges of counters, so a replica starts in the middle for free.
"""

import contextlib
import contextvars
import dataclasses
import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

_PHILOX = 1
_WORDS_PER_COUNTER = 4


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a batch stands in a run: `seed` a Python integer; `step`, `first` int64 scalars.

    `first` is the position, within the global batch of `step`, of the batch's first example; the rest follow.
    """

    seed: int
    step: tf.Tensor
    first: tf.Tensor


_PLACE: contextvars.ContextVar[Place | None] = contextvars.ContextVar("place", default=None)


@contextlib.contextmanager
def at(seed: int, step: tf.Tensor, first: tf.Tensor) -> Iterator[None]:
    """Within the block (and this thread), layers draw the noise of this place in the run."""
    token = _PLACE.set(Place(seed, tf.cast(step, tf.int64), tf.cast(first, tf.int64)))
    try:
        yield
    finally:
        _PLACE.reset(token)


def _bits(place: Place, shape: tf.Tensor, stream: str) -> tf.Tensor:
    """32 random bits for each element of the batched `shape`, uint32: the same eager, in a graph and under XLA."""
    per_example = tf.cast(tf.reduce_prod(shape[1:]), tf.int64)
    counters = (per_example + _WORDS_PER_COUNTER - 1) // _WORDS_PER_COUNTER
    padded = tf.stack([tf.cast(shape[0], tf.int64), counters * _WORDS_PER_COUNTER])
    key = (place.seed << 32 ^ zlib.crc32(stream.encode())) & 0xFFFFFFFFFFFFFFFF
    # The high word is the step, the low word counts within it: 2**64 counters belong to each step.
    counter = tf.cast(tf.stack([place.first * counters, place.step]), tf.uint64)
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=padded, key=tf.constant([key], tf.uint64), counter=counter, alg=_PHILOX, dtype=tf.uint32
    )
    return tf.reshape(bits[:, :per_example], shape)


def uniform(shape: Any, stream: str) -> tf.Tensor:
    """Uniform numbers in [0, 1) for the current place: float32, of the batched `shape` `[batch, …]`.

    `stream` names the consumer, say a layer's path: two streams are independent. Outside `at` (a model called by hand)
    it falls back on an ordinary random draw.
    """
    place = _PLACE.get()
    shape = tf.convert_to_tensor(shape, tf.int32)
    if place is None:
        return tf.random.uniform(shape)
    # 24 bits fill a float32's significand. TensorFlow's own conversion differs between XLA and the kernels.
    return tf.cast(tf.bitwise.right_shift(_bits(place, shape, stream), 8), tf.float32) * 2.0**-24


def exceeds(rate: float, shape: Any, stream: str) -> tf.Tensor:
    """`uniform(shape, stream) >= rate`, the very same booleans, for a `rate` in [0, 1), float32.

    The bits are compared as they are: making numbers of them first took 6 % of a step of `mlp`.
    """
    place = _PLACE.get()
    if place is None or np.float32(rate) >= 1:  # rounded up to 1, which no 32 bits reach
        return uniform(shape, stream) >= rate
    threshold = math.ceil(float(np.float32(rate)) * 2**24) << 8
    return _bits(place, tf.convert_to_tensor(shape, tf.int32), stream) >= tf.constant(threshold, tf.uint32)


def normal(shape: Any, stream: str) -> tf.Tensor:
    """Standard normal numbers for the current place, float32, by Box and Muller's transform of two uniform draws."""
    radius = tf.sqrt(-2.0 * tf.math.log1p(-uniform(shape, stream + "/radius")))
    return radius * tf.cos(2.0 * math.pi * uniform(shape, stream + "/angle"))
