"""Experiment 2 of `trainers/graph_benchmark.py`: the trainer's own step, eager and compiled."""

import contextlib
import copy
import dataclasses
import statistics
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.custom_loop import Supervised
from trainers.input import load
from trainers.input.batches import batches
from trainers.measure.traces import Timing, TraceLog, num_nodes
from trainers.record import state
from trainers.run import driver
from trainers.run.faults import missing_gradients_named
from trainers.run.inner_loop import Source
from trainers.run.windows import Columns
from trainers.settings.config import Config
from trainers.settings.exit_codes import Diverged, RunEnded
from trainers.show import graphs
from trainers.world.devices import World, full_float32

# Variants compute the same; they may differ by the rounding of fused operations.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run the trainer's step. `steps`: in one call. `jit`: as the trainer's flag."""

    name: str
    steps: int = 1
    eager: bool = False
    jit: str = "off"


@dataclasses.dataclass
class TrainStep:
    """The results. `timings`: eager first. `graph`: one update, with layers by their own names."""

    timings: list[Timing]
    graph: tf.compat.v1.GraphDef
    parameters: int

    def facts(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "parameters": self.parameters,
            "variants": [timing.facts(self.timings[0]) for timing in self.timings],
            "largest_relative_difference": max(timing.difference for timing in self.timings),
            "tolerance": TOLERANCE,
        }


def variants_of(steps_per_call: int) -> list[Variant]:
    """Eager, one compiled step in a call, `steps_per_call` of them, and the same with XLA."""
    label = f"{steps_per_call} step{'s' if steps_per_call > 1 else ''} a call"
    more = [Variant(f"graph, {label}", steps_per_call)] if steps_per_call > 1 else []
    return [
        Variant("eager", eager=True),
        Variant("graph, 1 step a call"),
        *more,
        Variant(f"XLA, {label}", steps_per_call, jit="on"),
    ]


def measure_train_step(config: Config, world: World, steps: int, steps_per_call: int, repeats: int) -> TrainStep:
    """Times the trainer's step, on one device, in all variants: each from the same weights, over the same batches.

    Args:
      config: the trainer's configuration, resolved.
      world: one device.
      steps: updates in one measurement.
      steps_per_call: updates in one call, for the variants that have several.
      repeats: measurements, of which the median counts.

    Raises:
      Diverged: a loss or a gradient is not finite.
    """
    loop = Supervised(config, world, load.load_for(config))
    source = batches(world.strategy, loop.dataset.train, config.batch_size, config.seed, config.parts, config.views)
    source.start(0)
    initial = state.values_of(loop.variables)
    timings, reference = [], None
    with full_float32():
        for variant in variants_of(steps_per_call):
            try:
                timing, weights = measure_variant(loop, source, initial, variant, steps, repeats)
            except RunEnded:
                raise
            except Exception as error:
                if variant.jit != "on":
                    raise
                # XLA refuses a model with errors of many classes; the row shows which.
                timings.append(Timing(variant.name, failure=_reason(error)))
                continue
            reference = reference or weights
            timing.difference = largest_relative_difference(reference, weights)
            timings.append(timing)
    return TrainStep(timings, update_graph(loop, source), loop.num_parameters)


def measure_variant(
    loop: Supervised, source: Source, initial: state.State, variant: Variant, steps: int, repeats: int
) -> tuple[Timing, state.State]:
    """Times a variant from the `initial` values on. Also returns the values after `steps` updates.

    A call is what the trainer's is: results are on the host when it ends.
    """
    loop = copy.copy(loop)
    loop.config, loop.traces = dataclasses.replace(loop.config, jit=variant.jit), 0
    caller = _Caller(loop, source, variant)
    with functions_run_eagerly(variant.eager):
        state.assign(loop.variables, initial)
        began = time.perf_counter()
        caller.call(0, variant.steps)
        first, seconds = time.perf_counter() - began, []
        for _ in range(repeats):
            state.assign(loop.variables, initial)
            began, step = time.perf_counter(), 0
            while step < steps:
                step = caller.call(step, min(step + variant.steps, steps))
            seconds.append((time.perf_counter() - began) / steps)
    timing = Timing(variant.name, first, statistics.median(seconds), variant.steps, caller.log.reasons)
    if not variant.eager:
        timing.nodes = num_nodes(caller.train_call.get_concrete_function().graph)
    return timing, state.values_of(loop.variables)


class _Caller:
    """Calls the trainer's compiled loop, and notes why it is traced."""

    def __init__(self, loop: Supervised, source: Source, variant: Variant):
        self.loop, self.variant, self.columns = loop, variant, Columns(loop)
        self.train_call = driver.make_train_call(loop, source)
        self.log = TraceLog(["first", "last", "sums", "news", "ahead"])

    def call(self, first: int, last: int) -> int:
        """Does the updates `first … last` and returns `last`.

        Raises:
          Diverged: a loss or a gradient is not finite.
        """
        if self.variant.eager:
            self.loop.traces = 0  # the Python body runs at every call, which is not a trace
        zeros = np.zeros(self.loop.sums.width), np.zeros(driver.NUM_NEWS)
        begin, end, ahead = (tf.constant(number, tf.int64) for number in (first, last, 0))
        arguments = begin, end, *map(tf.constant, zeros), ahead
        with missing_gradients_named():
            results = self.train_call(*arguments)
        windows, _, finite, *_ = (result.numpy() for result in results)
        if not self.variant.eager:
            self.log.note(self.loop.traces, arguments)
        step, norm = (self.columns.column(windows, name)[-1] for name in ("step", "gradient_norm"))
        if not finite or step != last:
            raise Diverged(
                f"{self.variant.name}: not finite at step {step:.0f} (gradient norm {norm}); pass fewer --steps"
            )
        return last


@contextlib.contextmanager
def functions_run_eagerly(eager: bool) -> Iterator[None]:
    """Within the block tf.function does nothing, if `eager`."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(eager)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def largest_relative_difference(a: state.State, b: state.State) -> float:
    """The largest max |a - b| / max |a| of the model's variables."""
    largest = 0.0
    for name in a:
        if name.startswith("model/"):
            scale = max(float(np.abs(a[name]).max()), 1e-8)
            largest = np.maximum(largest, float(np.abs(a[name] - b[name]).max()) / scale)
    return float(largest)


def update_graph(loop: Supervised, source: Source) -> tf.compat.v1.GraphDef:
    """The graph of one update, taken out of the compiled loop, where TensorBoard would hide it."""
    with missing_gradients_named():
        concrete = driver.make_train_call(loop, source).get_concrete_function()
    return graphs.of_first_replica(graphs.step(concrete.graph, loop.layer_names))


def _reason(error: Exception) -> str:
    """The most telling line of an error: the line in which XLA names what it does not support, or the first."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(next((line for line in lines if "nsupported" in line), lines[0]), 300, placeholder=" …")
