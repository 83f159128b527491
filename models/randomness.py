"""Noise as a pure function of (seed, step, position of the example in the global batch).

Keras draws the same mask on every replica and keeps generator state that a checkpoint may miss. Here the loop sets the
place of a batch in the run (`at`), and each layer draws numbers of its own (`uniform`). An example gets the same noise
at every number of replicas and after every resume, and nothing has to be saved.

Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): one counter gives four
32-bit words. Examples own disjoint, consecutive ranges of counters, so a replica can start in the middle at no cost.
"""

import contextlib
import contextvars
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

_PHILOX = 1
_WORDS_PER_COUNTER = 4
# Elements that `rounded` rounds at once.
_ROUNDED_AT_ONCE = 1 << 20


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


def is_placed() -> bool:
    """Whether this is within `at`."""
    return _PLACE.get() is not None


def here() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A function whose block is in the place where this is called, whenever it is entered: `with again():`."""
    place = _PLACE.get()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        token = _PLACE.set(place)
        try:
            yield
        finally:
            _PLACE.reset(token)

    return again


def known(value: Any) -> Any:
    """A tensor of whole numbers as one Python integer or a list of them, where the graph has it as a constant.

    Nothing folds the constants of a compiled loop's body: what is computed of them is computed at each step.
    """
    static = tf.get_static_value(value)
    return value if static is None else static.tolist()


def _bits(place: Place, shape: Any, stream: str, dtype: tf.DType) -> tf.Tensor:
    """Random bits for each element of the batched `shape`: `dtype` is uint32, or uint16 for half the work.

    They are the same eager, in a graph and under XLA. `shape`: a tensor, or integers where it is static.
    """
    shape, first = known(shape), known(place.first)
    if isinstance(shape, list):
        examples, per_example = shape[0], math.prod(shape[1:])
    else:
        examples, per_example = tf.cast(shape[0], tf.int64), tf.cast(tf.reduce_prod(shape[1:]), tf.int64)
    per_counter = _WORDS_PER_COUNTER * tf.uint32.size // dtype.size
    counters = (per_example + per_counter - 1) // per_counter
    key = (place.seed << 32 ^ zlib.crc32(stream.encode())) & 0xFFFFFFFFFFFFFFFF
    # The high word is the step, the low word counts within it: 2**64 counters belong to each step.
    counter = tf.bitcast(tf.stack([first * counters, place.step]), tf.uint64)
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[examples, counters * _WORDS_PER_COUNTER],
        key=tf.constant([key], tf.uint64),
        counter=counter,
        alg=_PHILOX,
        dtype=tf.uint32,
    )
    bits = tf.bitcast(bits, dtype)
    if not isinstance(shape, list) or per_example % per_counter:
        bits = tf.reshape(bits, [examples, counters * per_counter])[:, :per_example]
    return tf.reshape(bits, shape)


def uniform(shape: Any, stream: str) -> tf.Tensor:
    """Uniform numbers in [0, 1) for the current place: float32, of the batched `shape` `[batch, …]`.

    `stream` names the consumer, e.g. a layer's path: two streams are independent. Outside `at`, where a model is called
    by hand, the numbers are an ordinary random draw.
    """
    place = _PLACE.get()
    shape = tf.convert_to_tensor(shape, tf.int32)
    if place is None:
        return tf.random.uniform(shape)
    # 24 bits fill a float32's significand. TensorFlow's own conversion differs between XLA and the kernels.
    return tf.cast(tf.bitwise.right_shift(_bits(place, shape, stream, tf.uint32), 8), tf.float32) * 2.0**-24


def rounded(x: tf.Tensor, stream: str) -> tf.Tensor:
    """`x`, float32 of a static shape, as bfloat16: up or down by chance, so that the mean over all draws is `x`.

    The chance of the number farther from 0 is the share of the gap between the two that `x` has passed, in steps of
    2**-16: those of float32. What bfloat16 has is kept, and what is not finite. Below 2**-119 numbers are cut off. The
    noise is that of the current place; `stream` as in `uniform`. Source: Gupta et al., "Deep learning with limited
    numerical precision", ICML 2015; for 16 bits: Zamirai et al., "Revisiting bfloat16 training", 2020.
    """
    size, place = math.prod(x.shape), _PLACE.get()
    if place is None or size <= _ROUNDED_AT_ONCE:
        return _rounded(x, stream)
    # Ten tensors of this size are on the way from here to there: piece by piece there is room for them.
    pieces = -(-size // _ROUNDED_AT_ONCE)
    flat = tf.pad(tf.reshape(x, [-1]), [[0, pieces * _ROUNDED_AT_ONCE - size]])

    def of_piece(piece: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        with at(place.seed, place.step, piece[1]):
            return _rounded(tf.reshape(piece[0], [_ROUNDED_AT_ONCE]), stream)

    elements = tf.reshape(flat, [pieces, _ROUNDED_AT_ONCE]), tf.range(pieces, dtype=tf.int64)
    found = tf.map_fn(of_piece, elements, fn_output_signature=tf.bfloat16, parallel_iterations=1)
    return tf.reshape(tf.reshape(found, [-1])[:size], x.shape)


def _rounded(x: tf.Tensor, stream: str) -> tf.Tensor:
    """As `rounded`, at once."""
    words = tf.bitcast(x, tf.uint32)
    # Whole numbers of 32 bits are hardly computed with on GPUs; bits, and what follows in float32, are, and exactly.
    near = tf.bitcast(tf.bitwise.bitwise_and(words, tf.constant(0xFFFF0000, tf.uint32)), tf.float32)
    power = tf.bitcast(tf.bitwise.bitwise_and(words, tf.constant(0x7F800000, tf.uint32)), tf.float32)
    gap = power * 2.0**-7
    place, shape = _PLACE.get(), tf.constant([math.prod(x.shape)])
    if place is None:
        chance = tf.floor(tf.random.uniform(tf.shape(x)) * 2**16)
    else:
        bits = _bits(place, tf.concat([[1], shape], axis=0), stream, tf.uint16)
        chance = tf.reshape(tf.cast(bits, tf.float32), tf.shape(x))
    far = tf.abs(x - near) > chance * (gap * 2.0**-16)
    moved = near + tf.where(far, tf.sign(x) * gap, 0.0)
    return tf.cast(tf.where(tf.math.is_finite(x), moved, x), tf.bfloat16)


def dropout_mask(rate: float, shape: Any, stream: str, dtype: Any = tf.float32) -> tf.Tensor:
    """What dropout multiplies by: 0 with probability `rate`, `1 / (1 - rate)` otherwise. Of the batched `shape`.

    A `rate` in [0, 1) is rounded to a multiple of 2**-16 and is at most 1 - 2**-15, so that float16 can hold the scale.
    The scale is that of the rounded rate, so the mean is 1, up to the rounding of `dtype`. An element takes 16 random
    bits, half of what `uniform` takes: drawing them is most of the cost of dropout. Outside `at`, as `uniform`.
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


def uniform_of_step(stream: str) -> tf.Tensor:
    """A uniform number in [0, 1), float32 scalar, that all examples of the current step share."""
    place = _PLACE.get()
    if place is None:
        return tf.random.uniform([])
    with at(place.seed, place.step, tf.zeros([], tf.int64)):
        return uniform([1, 1], stream)[0, 0]
