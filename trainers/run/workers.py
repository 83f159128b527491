"""What the workers of a run do together: share a value, wait for each other, and find out that one is gone."""

import functools
import itertools
import json
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from trainers.record import checkpoints, state
from trainers.settings.exit_codes import PeerLost
from trainers.world.devices import World

T = TypeVar("T")
# How often a worker that is busy tells the others.
_TELL_SECONDS = 1.0
# What is broadcast at once: 32 MiB.
_WORDS_AT_ONCE = 1 << 22


def _on_replicas(world: World, values: tf.Tensor) -> Any:
    """A worker's tensor as that of each of its replicas. The same object of several is no value that can be reduced."""
    return world.strategy.run(tf.identity, args=(values,))


@tf.autograph.experimental.do_not_convert
def mean(world: World, values: tf.Tensor) -> tf.Tensor:
    """The mean of what each worker has, on all of them. Where there is one worker, its own."""
    if world.cluster is None:
        return values
    total = world.strategy.reduce("SUM", _on_replicas(world, values), axis=None)
    return total / world.replicas


@functools.cache
def _compiled_sum(world: World) -> Callable[[tf.Tensor], tf.Tensor]:
    """The sum over workers of a float64 vector, compiled once: each call of another tf.function would trace."""

    def total(values: tf.Tensor) -> tf.Tensor:
        own = _on_replicas(world, values)
        return world.strategy.reduce("SUM", own, axis=None) / (world.replicas // world.workers)

    return tf.function(total, input_signature=[tf.TensorSpec([world.workers], tf.float64)])


def gather(world: World, value: float) -> list[float]:
    """The value of each worker, in their order, on all of them. Nobody passes before all have come: also a barrier."""
    if world.cluster is None:
        return [float(value)]
    own = tf.one_hot(world.cluster.index, world.workers, dtype=tf.float64) * float(value)
    return _compiled_sum(world)(own).numpy().tolist()


def from_chief(world: World, value: float) -> float:
    """The chief's value on all workers; also a barrier."""
    return gather(world, value)[0]


def leave_together(world: World, ended: Callable[[], bool], value: float = 0.0) -> list[float] | None:
    """Nobody passes before all have come, or are gone when `ended()`: what all waited for is done.

    The first to leave may take with it what the last still waits for. Returns the value of each worker, or None if
    they have gone.
    """
    try:
        return gather(world, value)
    except tf.errors.OpError as error:
        if peer_lost(error) is error or not ended():
            raise
        return None


def together(
    world: World,
    work: Callable[[Callable[[str], None]], T],
    feed: Callable[[str], None],
    ended: Callable[[], bool] = lambda: False,
) -> T:
    """What `work(feed)` returns, which may take long on some workers: nobody passes, or gives up, before all are done.

    `work` calls the `feed` that it is given all the time while it waits for something that moves, and ends itself if
    nothing does. `feed`: of this worker's watchdog. `ended`: as of `leave_together`.
    """
    if world.cluster is None:
        return work(feed)
    asked, all_here = time.monotonic(), True

    def tell(what: str) -> None:
        """The others learn that this one is still busy."""
        nonlocal asked, all_here
        feed(what)
        if all_here and time.monotonic() - asked > _TELL_SECONDS:
            try:
                gather(world, 1.0)
            except tf.errors.OpError:
                all_here = False  # who has gone is missed at the end
            asked = time.monotonic()

    result = work(tell)
    while any(leave_together(world, ended) or ()):
        feed("waiting for what comes to another worker from an object store")
    return result


def peer_lost(error: BaseException) -> BaseException:
    """What TensorFlow raises when a worker goes away, as what it means; anything else as it is."""
    lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
    lost += (tf.errors.CancelledError, tf.errors.InternalError, tf.errors.UnknownError)
    if not isinstance(error, lost):
        return error
    line = next(iter(str(error.message).splitlines()), "")[:300]
    return PeerLost(f"a worker was lost: {line}; start all workers again, the run continues from its checkpoint")


@functools.cache
def _compiled_broadcast(world: World) -> Callable[[tf.Tensor], tf.Tensor]:
    """What the chief's first replica has of an int64 vector, on all workers: a sum with zeros, which is exact."""

    def of_first(values: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        return values * tf.cast(tf.equal(context.replica_id_in_sync_group, 0), tf.int64)

    def total(values: tf.Tensor) -> tf.Tensor:
        return world.strategy.reduce("SUM", world.strategy.run(of_first, args=(values,)), axis=None)

    return tf.function(total)


def _broadcast_words(world: World, words: np.ndarray) -> None:
    """Puts the chief's int64 vector into those of the others, which are as long. Traced for two lengths at most."""
    for first in range(0, len(words), _WORDS_AT_ONCE):
        part = words[first : first + _WORDS_AT_ONCE]
        piece = np.zeros(min(len(words), _WORDS_AT_ONCE), np.int64)
        piece[: len(part)] = part
        part[:] = _compiled_broadcast(world)(tf.constant(piece)).numpy()[: len(part)]


def broadcast(world: World, values: state.State | None) -> state.State:
    """The chief's arrays by name, bit for bit, on all workers; the others come with None. Also a barrier.

    They go through the collective in pieces: each worker sends and receives what it would for gradients of this size.
    """
    if world.cluster is None:
        return values or {}
    arrays = {name: np.asarray(value) for name, value in (values or {}).items()}
    known = [(name, tf.as_dtype(array.dtype).name, array.shape) for name, array in arrays.items()]
    header = json.dumps(known).encode() if world.chief else b""
    size = int(from_chief(world, len(header)))
    text = np.zeros(-(-size // 8), np.int64)
    text.view(np.uint8)[: len(header)] = np.frombuffer(header, np.uint8)
    _broadcast_words(world, text)
    specs = [
        (name, tf.as_dtype(dtype).as_numpy_dtype, shape) for name, dtype, shape in json.loads(text.tobytes()[:size])
    ]
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for _, dtype, shape in specs]
    firsts = [0, *itertools.accumulate(-(-size // 8) for size in sizes)]
    words, found = np.zeros(firsts[-1], np.int64), {}
    for (name, dtype, shape), size, first in zip(specs, sizes, firsts[:-1], strict=True):
        found[name] = words.view(np.uint8)[8 * first :][:size].view(dtype).reshape(shape)
        if world.chief:
            found[name][...] = arrays[name]
    _broadcast_words(world, words)
    return found


def restore(
    world: World, store: checkpoints.Checkpoints, feed: Callable[[str], None]
) -> tuple[int, state.State] | None:
    """Step and values of the newest whole checkpoint, on every worker: the chief reads it, the others receive it."""
    restored = together(world, lambda tell: store.restore_newest(tell) if world.chief else None, feed)
    step = int(from_chief(world, restored[0] if restored else -1))
    return (step, broadcast(world, restored[1] if restored else None)) if step >= 0 else None


def resumed(world: World, step: int, seconds: float) -> str:
    """What is said of a checkpoint that was restored."""
    others = world.workers - 1
    sent = f" and sent to {others} worker{'s' * (others > 1)}" if others else ""
    return f"resumed from the checkpoint of step {step}, read{sent} in {seconds:.1f} s"
