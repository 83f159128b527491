"""`--accumulate=auto`: the smallest number of parts in which an update fits into memory, found before the first step.

On GPUs by trial: the compiled loop makes one update, of which nothing stays. On CPUs, where the kernel ends a process
that takes too much, by an estimate (`trainers.run.activations`). What was found is the run's value of the flag from
then on: run.json, flags.txt and checkpoints have the number, and whoever goes on with the run takes it from there.
"""

import bisect
import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from trainers.input.batches import batches
from trainers.record import reading, state
from trainers.run import activations, driver, workers
from trainers.run.faults import faults_named, missing_gradients_named
from trainers.run.inner_loop import InnerLoop
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import check_batch, parts_allowed
from trainers.world import machine, private_api
from trainers.world.watchdog import Watchdog

# The estimate does not know what operations need while they run, nor what else is on the machine.
SHARE_OF_MEMORY = 0.5


def settle(loop: InnerLoop, watchdog: Watchdog) -> None:
    """Sets `loop.config.accumulate` to the number of the run that `--run_dir` holds, or to the smallest that fits.

    The same on all workers: the largest that one of them needs.

    Raises:
      BadConfiguration: there is none, or the run's does not divide the batch.
    """
    known = reading.found_with(loop.config, "accumulate") or 0
    if number := int(workers.from_chief(loop.world, known)):
        loop.config = dataclasses.replace(loop.config, accumulate=number)
        check_batch(loop.config, loop.world.replicas)
        return
    choices = parts_allowed(loop.config, loop.world.replicas)
    fits = Trial(loop, watchdog) if tf.config.list_logical_devices("GPU") else Estimate(loop, watchdog)
    own = smallest(choices, fits) or 0
    each = [int(parts) for parts in workers.gather(loop.world, own)]
    if not all(each):
        count = loop.config.batch_size // loop.world.replicas // choices[-1]
        raise BadConfiguration(
            f"--accumulate=auto: an update does not fit into memory even in {choices[-1]} parts of {count} "
            f"example{'s' * (count > 1)} ({fits.reason}); pass --recompute or --precision=bfloat16, make the model "
            "smaller, or pass a number"
        )
    loop.config = dataclasses.replace(loop.config, accumulate=max(each))
    loop.found = {"accumulate": {"parts": max(each), "of_each_worker": each, **fits.facts}}


def smallest(choices: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first of rising numbers that fits, where all that follow one that fits do too; None if none does.

    Each trial doubles the number at least; then what was gone over is halved.
    """
    below, at = -1, 0
    while not fits(choices[at]):
        if at == len(choices) - 1:
            return None
        below, at = at, min(bisect.bisect_left(choices, 2 * choices[at]), len(choices) - 1)
    while at - below > 1:
        middle = (below + at) // 2
        below, at = (below, middle) if fits(choices[middle]) else (middle, at)
    return choices[at]


class Trial:
    """Whether an update fits into the memory of this process's devices: it is made, and everything put back."""

    def __init__(self, loop: InnerLoop, watchdog: Watchdog):
        self.loop, self.watchdog = loop, watchdog
        self.values = state.values_of(loop.variables)
        self.tried: dict[int, bool] = {}
        self.reason = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says: whether an update fitted, by the number of parts."""
        return {"by": "trial", "fitted": {str(parts): fitted for parts, fitted in self.tried.items()}}

    def __call__(self, parts: int) -> bool:
        loop, config = self.loop, self.loop.config
        self.watchdog.feed(f"trying an update in {parts} parts", config.startup_timeout + config.step_timeout)
        loop.config, traces, loop.traces = dataclasses.replace(config, accumulate=parts), loop.traces, 0
        try:
            self.tried[parts] = self._fits()
        finally:
            loop.config, loop.traces = config, traces
            gc.collect()  # graphs, which hold what lies on devices, are held in circles
            state.assign(loop.variables, self.values)
        return self.tried[parts]

    def _fits(self) -> bool:
        try:
            self._update()
        except tf.errors.OpError as error:
            if not is_out_of_memory(error):
                raise
            self.reason = " ".join(str(error.message).split())[:200]
            return False
        return True

    def _update(self) -> None:
        """The first update, on each replica by itself: a device that fails leaves no other waiting for it."""
        loop, config = self.loop, self.loop.config
        train = loop.dataset.train
        source = batches(loop.world.strategy, train, config.batch_size, config.seed, config.parts, config.views)
        source.start(0)
        first, last = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
        sums, news = (tf.zeros([size], tf.float64) for size in (loop.sums.width, driver.NUM_NEWS))
        call = driver.make_train_call(loop, source)
        with private_api.without_collectives(), missing_gradients_named(), faults_named(source, 0, 1, self.watchdog):
            for result in call(first, last, sums, news, first):
                result.numpy()


def is_out_of_memory(error: tf.errors.OpError) -> bool:
    """Whether an error says that a device has no memory left. Libraries of CUDA say so in words."""
    text = str(error.message).lower()
    return isinstance(error, tf.errors.ResourceExhaustedError) or "out of memory" in text or "alloc_failed" in text


class Estimate:
    """Whether what an update keeps is no more than half of the memory of the machine, or of its container.

    That are the variables, two gradients of each weight, and what a part keeps for its backward pass, of all replicas
    on this machine.
    """

    def __init__(self, loop: InnerLoop, watchdog: Watchdog):
        config = loop.config
        watchdog.feed("estimating the memory of an update", config.startup_timeout + config.step_timeout)
        local = loop.world.replicas // loop.world.workers
        weights = sum(activations.size_of(w.shape, w.dtype) for w in loop.weights)
        self.fixed = local * (activations.held_by(loop.variables) + 2 * weights)
        self.of_batch, self.memory = activations.of_update(loop), machine.memory()

    def needed(self, parts: int) -> int:
        """Bytes of an update in so many parts."""
        return self.fixed + self.of_batch // parts

    def __call__(self, parts: int) -> bool:
        self.least = self.needed(parts)
        return self.least <= SHARE_OF_MEMORY * self.memory

    @property
    def reason(self) -> str:
        """Why the number of parts that was asked about last does not fit."""
        return f"{self.least >> 20} MiB, above half of the {self.memory >> 20} MiB that there are"

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says, in bytes."""
        return {"by": "estimate", "fixed": self.fixed, "activations": self.of_batch, "memory": self.memory}
