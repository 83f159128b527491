"""What the workers of a run do together: share a value, wait for each other, and find out that one is gone."""

import functools
from collections.abc import Callable

import tensorflow as tf

from trainers.record import checkpoints, state
from trainers.settings.exit_codes import PeerLost
from trainers.world.devices import World


@tf.autograph.experimental.do_not_convert
def mean(world: World, values: tf.Tensor) -> tf.Tensor:
    """The mean of what each worker has, on all of them. Where there is one worker, its own."""
    if world.cluster is None:
        return values
    total = world.strategy.reduce("SUM", world.strategy.run(lambda: values), axis=None)
    return total / world.replicas


@functools.cache
def _compiled_sum(world: World) -> Callable[[tf.Tensor], tf.Tensor]:
    """The sum over workers of a float64 vector, compiled once: each call of another tf.function would trace."""

    def total(values: tf.Tensor) -> tf.Tensor:
        own = world.strategy.run(lambda: values)
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


def peer_lost(error: BaseException) -> BaseException:
    """What TensorFlow raises when a worker goes away, as what it means; anything else as it is."""
    lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
    lost += (tf.errors.CancelledError, tf.errors.InternalError, tf.errors.UnknownError)
    if not isinstance(error, lost):
        return error
    line = next(iter(str(error.message).splitlines()), "")[:300]
    return PeerLost(f"a worker was lost: {line}; start all workers again, the run continues from its checkpoint")


def restore(world: World, store: checkpoints.Checkpoints) -> tuple[int, state.State] | None:
    """Step and values of the newest whole checkpoint; on every worker those of the one that the chief has chosen."""
    if world.cluster is None:
        return store.restore_newest()
    restored = store.restore_newest() if world.chief else None
    step = int(from_chief(world, restored[0] if restored else -1))
    if not world.chief and step >= 0:
        restored = step, store.restore(step)
    from_chief(world, 0)
    return restored
