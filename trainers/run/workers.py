"""What the workers of a run do together: share a value, wait for each other, and find out that one is gone."""

import functools
from collections.abc import Callable

import tensorflow as tf

from trainers.record import checkpoints, state
from trainers.settings.exit_codes import PeerLost
from trainers.world.devices import World


def mean(world: World, values: tf.Tensor) -> tf.Tensor:
    """The mean of what each worker has, on all of them. Where there is one worker, its own."""
    if world.cluster is None:
        return values
    total = world.strategy.reduce("SUM", world.strategy.run(lambda: values), axis=None)
    return total / world.replicas


@functools.cache
def _compiled_mean(world: World) -> Callable[[tf.Tensor], tf.Tensor]:
    """`mean` of a float64 scalar, compiled once: each call of another tf.function would trace, and TensorFlow warn."""
    return tf.function(lambda value: mean(world, value), input_signature=[tf.TensorSpec([], tf.float64)])


def from_chief(world: World, value: float) -> float:
    """The chief's value on all workers. Nobody passes before all have come: also a barrier."""
    own = tf.constant(float(value) if world.chief else 0.0, tf.float64)
    return float(_compiled_mean(world)(own).numpy() * world.workers)


def leave_together(world: World, ended: Callable[[], bool]) -> None:
    """Nobody passes before all have come, or are gone when `ended()`: what all waited for is done.

    The first to leave may take with it what the last still waits for.
    """
    try:
        from_chief(world, 0)
    except tf.errors.OpError as error:
        if peer_lost(error) is error or not ended():
            raise


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
