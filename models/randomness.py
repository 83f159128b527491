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


def _bits(place: Place, shape: tf.Tensor, stream: str, dtype: tf.DType) -> tf.Tensor:
    """Random bits for each element of the batched `shape`: `dtype` is uint32, or uint16 for half the work.

    The same eager, in a graph and under XLA.
    """
    per_example = tf.cast(tf.reduce_prod(shape[1:]), tf.int64)
    per_counter = _WORDS_PER_COUNTER * tf.uint32.size // dtype.size
    counters = (per_example + per_counter - 1) // per_counter
    examples = tf.cast(shape[0], tf.int64)
    key = (place.seed << 32 ^ zlib.crc32(stream.encode())) & 0xFFFFFFFFFFFFFFFF
    # The high word is the step, the low word counts within it: 2**64 counters belong to each step.
    counter = tf.bitcast(tf.stack([place.first * counters, place.step]), tf.uint64)
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=tf.stack([examples, counters * _WORDS_PER_COUNTER]),
        key=tf.constant([key], tf.uint64),
        counter=counter,
        alg=_PHILOX,
        dtype=tf.uint32,
    )
    bits = tf.reshape(tf.bitcast(bits, dtype), tf.stack([examples, counters * per_counter]))
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
    return tf.cast(tf.bitwise.right_shift(_bits(place, shape, stream, tf.uint32), 8), tf.float32) * 2.0**-24


def dropout_mask(rate: float, shape: Any, stream: str, dtype: Any = tf.float32) -> tf.Tensor:
    """What dropout multiplies by: 0 with probability `rate`, `1 / (1 - rate)` otherwise. Of the batched `shape`.

    A `rate` in [0, 1) counts as the nearest multiple of 2**-16, 1 - 2**-15 at most, for which float16 has a scale. The
    scale is of that too, so the mean is 1, to the rounding of `dtype`. The 16 bits that an element takes are half of
    those of a number, and drawing them is most of what dropout costs. Outside `at`, as `uniform`.
    """
    place = _PLACE.get()
    shape = tf.convert_to_tensor(shape, tf.int32)
    dropped = min(round(rate * 2**16), 2**16 - 2)
    if place is None:
        kept = tf.random.uniform(shape) >= dropped / 2**16
    else:
        kept = _bits(place, shape, stream, tf.uint16) >= tf.constant(dropped, tf.uint16)
    return tf.cast(kept, dtype) * (2**16 / (2**16 - dropped))


def normal(shape: Any, stream: str) -> tf.Tensor:
    """Standard normal numbers for the current place, float32, by Box and Muller's transform of two uniform draws."""
    radius = tf.sqrt(-2.0 * tf.math.log1p(-uniform(shape, stream + "/radius")))
    return radius * tf.cos(2.0 * math.pi * uniform(shape, stream + "/angle"))
