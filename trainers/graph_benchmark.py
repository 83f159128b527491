"""What does @tf.function buy? Times a loop of small operations, and the trainer's own step, eager and compiled.

python trainers/graph_benchmark.py
python trainers/graph_benchmark.py --model=resnet --steps=10 --repeats=3
python trainers/graph_benchmark.py --n=1000 --show_autograph
tensorboard --logdir=runs/graph_benchmark
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import shutil
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags, logging

from models.cards import MODELS
from trainers.record.run_record import write_atomically
from trainers.settings.config import Config, resolve
from trainers.settings.exit_codes import OK, BadConfiguration, Diverged, RunEnded
from trainers.settings.flags import fill, or_exit, short_help_page
from trainers.world import quiet
from trainers.world.signals import end_at_once_on_signal

DEFAULT_STEPS_PER_CALL = 50
# Beyond it the sum of squares leaves int64.
LARGEST_N = 3_000_000
# A Python loop under tf.function makes nodes for each turn: longer ones are not traced here.
LARGEST_UNROLLED = 200
# Variants compute the same; they may differ by the rounding of fused operations.
TOLERANCE = 1e-4
# The example that this repeats: seconds at n = 10,000, eager, and as a graph with its tracing.
PUBLISHED = {"n": 10_000, "eager": 1.15, "graph": 0.31}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say. `config` is the trainer's configuration of the step that is measured."""

    config: Config
    n: int
    repeats: int
    steps: int
    steps_per_call: int
    out_dir: Path
    show_autograph: bool


def _define(values: flags.FlagValues) -> None:
    for name, default, low, high, text in (
        ("n", PUBLISHED["n"], 1, LARGEST_N, "sum_up_to adds the squares of 0 … n"),
        ("repeats", 5, 1, None, "measurements, of which the median counts"),
        ("batch_size", 32, 1, None, "examples in a training step"),
        ("steps", 50, 1, None, "training steps in one measurement"),
        ("steps_per_call", DEFAULT_STEPS_PER_CALL, 1, None, "training steps inside one call, where there are several"),
        ("seed", 0, 0, 2**31 - 1, "initial weights, order of the data, noise"),
    ):
        flags.DEFINE_integer(name, default, text, lower_bound=low, upper_bound=high, flag_values=values)
    flags.DEFINE_string("model", "mlp", "the model that is trained, on the data set of its card", flag_values=values)
    flags.DEFINE_string("data_dir", Config.data_dir, "where prepared data lies", flag_values=values)
    flags.DEFINE_string("out_dir", "runs/graph_benchmark", "where tables, chart and graphs go", flag_values=values)
    flags.DEFINE_bool("show_autograph", False, "print what AutoGraph makes of sum_up_to, first", flag_values=values)
    flags.DEFINE_bool("help", False, "print this page", short_name="h", flag_values=values)


def settings_from(argv: Sequence[str]) -> Settings:
    """The settings of a command line (`argv[0]` is the program).

    Raises:
      BadConfiguration: a flag is unknown, malformed or breaks a rule.
      SystemExit: `--help` was asked for and has been printed; code 0.
    """
    values = flags.FlagValues()
    _define(values)
    fill(values, argv, lambda: short_help_page(__doc__, values))
    config = Config(
        strategy="one_device",
        jit="off",
        input="resident",
        model=values.model,
        batch_size=values.batch_size,
        seed=values.seed,
        data_dir=values.data_dir,
    )
    if values.model in MODELS:  # `resolve` answers where it is not
        # At least the steps that are measured: past the end of its schedule a model no longer learns.
        config = dataclasses.replace(config, train_steps=max(MODELS[values.model].recipe.train_steps, values.steps))
    steps_per_call = values.steps_per_call
    if steps_per_call > values.steps:
        if values["steps_per_call"].present:
            raise BadConfiguration(
                f"--steps_per_call {steps_per_call} is above --steps {values.steps}; pass at most that"
            )
        steps_per_call = values.steps
    return Settings(
        resolve(config),
        values.n,
        values.repeats,
        values.steps,
        steps_per_call,
        Path(values.out_dir).expanduser(),
        values.show_autograph,
    )


if __name__ == "__main__":
    # Flags are checked before TensorFlow is imported, which takes seconds.
    SETTINGS = or_exit(settings_from, sys.argv)
    end_at_once_on_signal()

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with quiet.known_noise_removed():
    import numpy as np
    import tensorflow as tf

    from trainers import custom_loop
    from trainers.input import batches
    from trainers.input import load as data
    from trainers.record import checkpoints
    from trainers.show import graphs
    from trainers.show.tables import machine, paragraph, readable, table, times, write_png
    from trainers.world import devices


# ----------------------------------------------------------------------------------------------------------------------
# What a variant costs, and why it was traced.


@dataclasses.dataclass
class Timing:
    """What one variant costs.

    `first`: seconds of the first call, tracing and compilation counted in. `later`: the median seconds of one step of
    the calls that follow, where a call does `steps` of them. `reasons`: why each trace happened. `nodes`: of the graph,
    the bodies of its loops counted in. `difference`: of the weights from those of the first variant. `failure`: why it
    cannot run, and then nothing else is known.
    """

    variant: str
    first: float = math.nan
    later: float = math.nan
    steps: int = 1
    reasons: list[str] = dataclasses.field(default_factory=list)
    nodes: int = 0
    difference: float = 0.0
    failure: str = ""

    def break_even(self, eager: "Timing") -> int | None:
        """Calls after which this variant, tracing and all, has taken no longer than `eager`.

        None if it never will, or if there is no tracing to pay off.
        """
        if not self.reasons or not self.later < eager.later:
            return None
        tracing = self.first - self.steps * self.later
        return max(1, math.ceil(tracing / (self.steps * (eager.later - self.later))))

    def facts(self, eager: "Timing") -> dict[str, Any]:
        """For the JSON file."""
        if self.failure:
            return {"variant": self.variant, "failure": self.failure}
        return {
            "variant": self.variant,
            "first_call_seconds": self.first,
            "later_seconds": self.later,
            "steps_in_a_call": self.steps,
            "times_as_fast_as_eager": eager.later / self.later,
            "break_even_calls": self.break_even(eager),
            "traces": len(self.reasons),
            "reasons": self.reasons,
            "nodes": self.nodes,
            "largest_relative_difference": self.difference,
        }


class TraceLog:
    """Why a function was traced: what of its arguments differs from the trace before.

    `names`: of the function's arguments, in order.
    """

    def __init__(self, names: Sequence[str]):
        self.names, self.reasons = tuple(names), []
        self._before: tuple[dict[str, str], ...] | None = None

    def note(self, traces: int, arguments: Sequence[Any]) -> None:
        """After a call: `traces` is how often the Python body has run in all, `arguments` those of the call."""
        if traces <= len(self.reasons):
            return
        now = tuple(_described(argument) for argument in arguments)
        self.reasons.append("first call" if self._before is None else self._change(now))
        self.reasons += ["again within the same call"] * (traces - len(self.reasons))
        self._before = now

    def _change(self, now: tuple[dict[str, str], ...]) -> str:
        changes = []
        for name, old, new in zip(self.names, self._before, now, strict=True):
            if old.keys() != new.keys():
                changes.append(f"{name}: {old['kind']} became {new['kind']}")
                continue
            changes += [f"{name}: {key} changed {old[key]} → {new[key]}" for key in old if old[key] != new[key]]
        return "; ".join(changes) or "nothing changed in the arguments: another tf.function, or a captured value"


def _described(argument: Any) -> dict[str, str]:
    """What tf.function tells arguments apart by: of a tensor its type and shape, of anything else its value."""
    if isinstance(argument, tf.Tensor):
        return {"kind": "a tensor", "dtype": argument.dtype.name, "shape": str(argument.shape)}
    return {"kind": f"a Python {type(argument).__name__}", "Python value": repr(argument)}


class Compiled:
    """A function of one number under tf.function, whose Python body counts how often it runs: once a trace."""

    def __init__(self, function: Callable[[Any], tf.Tensor]):
        self.traces, self.log = 0, TraceLog(["n"])

        def counted(n: Any) -> tf.Tensor:
            self.traces += 1
            return function(n)

        self.function = tf.function(counted)

    def __call__(self, n: Any) -> tf.Tensor:
        """The function's value at `n`, an int64 scalar."""
        value = self.function(n)
        self.log.note(self.traces, [n])
        return value


@contextlib.contextmanager
def retracing_expected() -> Iterator[None]:
    """Within the block TensorFlow does not warn of functions that are traced often: that is what is measured."""

    def wanted(record: Any) -> bool:
        return "triggered tf.function retracing" not in record.getMessage()

    tf.get_logger().addFilter(wanted)
    try:
        yield
    finally:
        tf.get_logger().removeFilter(wanted)


def seconds_of(function: Callable[..., tf.Tensor], *arguments: Any) -> tuple[float, int]:
    """Seconds until the value is on the host, and the value."""
    began = time.perf_counter()
    value = int(function(*arguments).numpy())
    return time.perf_counter() - began, value


def num_nodes(graph: tf.Graph) -> int:
    """Nodes of a graph and of the functions in its library: a loop's body, for one."""
    definition = graph.as_graph_def()
    return len(definition.node) + sum(len(function.node_def) for function in definition.library.function)


# ----------------------------------------------------------------------------------------------------------------------
# Experiment 1: a loop of small operations.


def sum_up_to(n: tf.Tensor | int) -> tf.Tensor:
    """The sum of the squares of 0 … n, an int64 scalar: eager a Python loop, under tf.function a loop in the graph."""
    total = tf.constant(0, tf.int64)
    for i in tf.range(n + 1, dtype=tf.int64):
        total += i * i
    return total


def sum_unrolled(n: int) -> tf.Tensor:
    """The same over Python's range, which AutoGraph leaves alone: a trace goes through it turn by turn."""
    total = tf.constant(0, tf.int64)
    for i in range(n + 1):
        number = tf.constant(i, tf.int64)
        total += number * number
    return total


def sum_at_once(n: tf.Tensor) -> tf.Tensor:
    """The same without a loop, in three operations over all numbers."""
    return tf.reduce_sum(tf.square(tf.range(n + 1, dtype=tf.int64)))


@dataclasses.dataclass
class Sums:
    """Experiment 1. `timings`: eager first. `unrolled`: (loop, n, timing). `traces`: (calls, log). `graph`: the loop's.

    `value` is what all variants gave at n.
    """

    value: int
    timings: list[Timing]
    unrolled: list[tuple[str, int, Timing]]
    traces: list[tuple[str, TraceLog]]
    graph: tf.Graph


def _timing(variant: str, function: Callable[..., tf.Tensor], argument: Any, n: int, repeats: int) -> Timing:
    first, *later = [seconds_of(function, argument) for _ in range(1 + repeats)]
    expected = n * (n + 1) * (2 * n + 1) // 6
    for _, value in (first, *later):
        if value != expected:
            raise RunEnded(f"{variant} gives {value} at n = {n}, and n (n + 1) (2 n + 1) / 6 is {expected}; report it")
    timing = Timing(variant, first[0], statistics.median(seconds for seconds, _ in later))
    if isinstance(function, Compiled):
        timing.reasons = list(function.log.reasons)
        timing.nodes = num_nodes(function.function.get_concrete_function(argument).graph)
    return timing


def measure_sums(settings: Settings) -> Sums:
    """Times sum_up_to eager and compiled, unrolls it, and has it traced for every reason there is."""
    n, repeats = settings.n, settings.repeats
    number = tf.constant(n, tf.int64)
    tf.add(number, 1).numpy()  # the first operation of a process starts the runtime: nobody's cost here
    in_graph = Compiled(sum_up_to)
    timings = [
        _timing("eager", sum_up_to, number, n, repeats),
        _timing("@tf.function", in_graph, number, n, repeats),
        _timing("no loop, eager", sum_at_once, number, n, repeats),
    ]

    unrolled = []
    small = min(n, LARGEST_UNROLLED)
    for loop, function, kind in (
        ("tf.range", sum_up_to, lambda m: tf.constant(m, tf.int64)),
        ("Python's range", sum_unrolled, int),
    ):
        for m in sorted({max(small // 2, 1), small}):
            unrolled.append((loop, m, _timing(f"loop over {loop}", Compiled(function), kind(m), m, repeats)))

    traces = []
    for calls, arguments in (
        ("sum_up_to(10), sum_up_to(11)", (10, 11)),
        ("sum_up_to of tensors 10, 11", (tf.constant(10, tf.int64), tf.constant(11, tf.int64))),
        ("sum_up_to of tensors int64, int32", (tf.constant(10, tf.int64), tf.constant(10, tf.int32))),
        ("sum_up_to(10), of a tensor 10", (10, tf.constant(10, tf.int64))),
    ):
        compiled = Compiled(sum_up_to)
        for argument in arguments:
            compiled(argument)
        traces.append((calls, compiled.log))
    expected = n * (n + 1) * (2 * n + 1) // 6
    return Sums(expected, timings, unrolled, traces, in_graph.function.get_concrete_function(number).graph)


# ----------------------------------------------------------------------------------------------------------------------
# Experiment 2: the trainer's step.


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run the trainer's step. `jit`: as the trainer's flag."""

    name: str
    steps: int = 1
    eager: bool = False
    jit: str = "off"


@dataclasses.dataclass
class TrainStep:
    """Experiment 2. `timings`: eager first. `graph`: one update, with layers by their own names."""

    timings: list[Timing]
    graph: tf.compat.v1.GraphDef
    parameters: int


def variants_of(settings: Settings) -> list[Variant]:
    """Eager, a compiled step a call, several steps a call, and those with XLA."""
    several = settings.steps_per_call
    label = f"{several} step{'s' if several > 1 else ''} a call"
    more = [Variant(f"graph, {label}", several)] if several > 1 else []
    return [
        Variant("eager", eager=True),
        Variant("graph, 1 step a call"),
        *more,
        Variant(f"XLA, {label}", several, jit="on"),
    ]


@contextlib.contextmanager
def functions_run_eagerly(eager: bool) -> Iterator[None]:
    """Within the block tf.function does nothing, if `eager`."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(eager)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within the block a GPU multiplies float32 as float32: with TF32 variants would differ by 1e-3 from rounding."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def largest_relative_difference(a: checkpoints.State, b: checkpoints.State) -> float:
    """The largest over the model's variables of max |a - b| / max |a|."""
    worst = 0.0
    for name in a:
        if name.startswith("model/"):
            scale = max(float(np.abs(a[name]).max()), 1e-8)
            worst = np.maximum(worst, float(np.abs(a[name] - b[name]).max()) / scale)
    return float(worst)


def measure_variant(
    job: custom_loop.Job, source: Any, initial: checkpoints.State, variant: Variant, settings: Settings
) -> tuple[Timing, checkpoints.State]:
    """Times a variant from the `initial` values on. Also what `settings.steps` steps make of them.

    A call is what the trainer's is: results are on the host when it ends.
    """
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, jit=variant.jit), traces=0)
    train_call = custom_loop.make_train_call(job, source)
    log = TraceLog(list(inspect.signature(train_call.python_function).parameters))
    # After the steps, first and last, come running sums and the like, which begin at zero.
    begin = [np.zeros(spec.shape, spec.dtype.as_numpy_dtype) for spec in train_call.input_signature[2:]]

    def call(first: int, last: int) -> int:
        arguments = tf.constant(first, tf.int64), tf.constant(last, tf.int64), *map(tf.constant, begin)
        if variant.eager:
            job.traces = 0  # the Python body runs at every call: no trace
        windows, _, finite, *_ = (result.numpy() for result in train_call(*arguments))
        reached, norm = windows[-1, 0], windows[-1, 1 + custom_loop.FACTS.index("gradient_norm")]
        if not variant.eager:
            log.note(job.traces, arguments)
        if not finite or reached != last:
            raise Diverged(
                f"{variant.name}: not finite at step {reached:.0f} (gradient norm {norm}); pass fewer --steps"
            )
        return last

    with functions_run_eagerly(variant.eager):
        checkpoints.assign(job.variables, initial)
        began = time.perf_counter()
        call(0, variant.steps)
        first, runs = time.perf_counter() - began, []
        for _ in range(settings.repeats):
            checkpoints.assign(job.variables, initial)
            began, step = time.perf_counter(), 0
            while step < settings.steps:
                step = call(step, min(step + variant.steps, settings.steps))
            runs.append((time.perf_counter() - began) / settings.steps)
    timing = Timing(variant.name, first, statistics.median(runs), variant.steps, log.reasons)
    if not variant.eager:
        timing.nodes = num_nodes(train_call.get_concrete_function().graph)
    return timing, checkpoints.values_of(job.variables)


def update_graph(job: custom_loop.Job, source: Any) -> tf.compat.v1.GraphDef:
    """The graph of one update. The trainer's loop has it as the body of a `while`, which TensorBoard hides."""
    compute = functools.partial(custom_loop.gradients_of_part, job)

    def update(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        def replica(feed: Any) -> tuple[Any, ...]:
            return custom_loop.replica_gradients(job, compute, source, feed, source.order(step, step + 1), step)

        gradients, sums, norm = job.strategy.run(replica, args=(source.feed()[0],))
        job.strategy.run(lambda gradients: custom_loop.replica_update(job, gradients), args=(gradients,))
        return sums, norm

    traced = tf.function(update, autograph=False).get_concrete_function(tf.TensorSpec([], tf.int64, name="step"))
    return graphs.clean(traced.graph.as_graph_def(add_shapes=True), graphs.layer_names(job.model))


def measure_train_step(settings: Settings, strategy: tf.distribute.Strategy) -> TrainStep:
    """Times the trainer's step, on one device, in all variants: each from the same weights, over the same batches.

    Raises:
      Diverged: a loss or a gradient is not finite.
    """
    config = settings.config
    dataset = data.load(config.dataset, config.data_dir, config.input)
    job = custom_loop.build_job(config, strategy, dataset)
    source = batches.batches(strategy, dataset.train, config.batch_size, config.seed, config.accumulate)
    source.start(0)
    initial = checkpoints.values_of(job.variables)
    timings, reference = [], None
    with full_float32():
        for variant in variants_of(settings):
            try:
                timing, weights = measure_variant(job, source, initial, variant, settings)
            except RunEnded:
                raise
            except Exception as error:
                if variant.jit != "on":
                    raise
                # XLA refuses with errors of many kinds; which one is what the row tells.
                timings.append(Timing(variant.name, failure=_reason(error)))
                continue
            reference = reference or weights
            timing.difference = largest_relative_difference(reference, weights)
            timings.append(timing)
    return TrainStep(timings, update_graph(job, source), job.model.count_params())


def _reason(error: Exception) -> str:
    """The line of an error that says most: what XLA names as unsupported, or the first."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(next((line for line in lines if "nsupported" in line), lines[0]), 300, placeholder=" …")


# ----------------------------------------------------------------------------------------------------------------------
# What is told.


def _cells(timing: Timing, eager: Timing, per_step: bool) -> list[str]:
    if timing.failure:
        return [timing.variant, "cannot run", *["–"] * (6 if per_step else 5)]
    calls = timing.break_even(eager)
    after = "never" if calls is None else f"{calls:,} call{'s' if calls > 1 else ''}"
    if calls is not None and timing.steps > 1:
        after += f" = {calls * timing.steps:,} steps"
    cells = [timing.variant, readable(timing.first), readable(timing.later), times(eager.later / timing.later)]
    cells += [str(len(timing.reasons)), str(timing.nodes or "–"), after if timing.reasons else "–"]
    return cells + ([f"{timing.difference:.1e}"] if per_step else [])


def describe_machine(settings: Settings, facts: dict[str, Any]) -> str:
    """What was measured, and where."""
    return paragraph(
        f"Measured on one device, {facts['device']}, with {facts['cores']} CPU cores (load average at the start "
        f"{facts['load_average']}), TensorFlow {facts['versions']['tensorflow']}: wall time by a monotonic clock, "
        "until the result is on the host. A first call is one measurement, tracing and compilation counted in; later "
        f"calls are the median of {settings.repeats}. Times vary with the machine's load: compare them within a run."
    )


def describe_sums(settings: Settings, sums: Sums) -> str:
    """Experiment 1 in words and tables."""
    eager, graph = sums.timings[:2]
    small = sums.unrolled[-1]
    rolled = next(timing for loop, n, timing in sums.unrolled if n == small[1])
    head = ["variant", "first call", "later calls", "eager ÷ later", "traces", "nodes", "pays off after"]
    parts = [
        f"## 1. sum_up_to({settings.n:,}): {settings.n + 1:,} squares added one by one = {sums.value:,}",
        table(head, [_cells(timing, eager, False) for timing in sums.timings]),
        paragraph(
            f"A published example (n = {PUBLISHED['n']:,}) counts the tracing in: {PUBLISHED['eager']} s eager, "
            f"{PUBLISHED['graph']} s as a graph, {times(PUBLISHED['eager'] / PUBLISHED['graph'])}. The same comparison "
            f"here: {readable(eager.first)} and {readable(graph.first)}, {times(eager.first / graph.first)}. It hides "
            f"that tracing is paid once: later calls take {readable(graph.later)}, {times(eager.later / graph.later)} "
            "less than eager. And it hides that the loop itself is the cost: three operations over all numbers take "
            f"{readable(sums.timings[2].later)}, eager."
        ),
        "### Which loop",
        table(
            ["loop over", "n", "nodes", "first call", "later calls"],
            [
                [loop, str(n), str(timing.nodes), readable(timing.first), readable(timing.later)]
                for loop, n, timing in sums.unrolled
            ],
        ),
        paragraph(
            f"Of a loop over tf.range AutoGraph makes one loop in the graph: {rolled.nodes} nodes at every n. A loop "
            f"over Python's range is unrolled by the trace: {small[2].nodes} nodes at n = {small[1]}, a first call "
            "that grows with n, and another trace for another n. AutoGraph keeps what it has made of some code, so "
            "the first call of another tf.function around that code is shorter than the first in the process."
        ),
    ]
    return "\n\n".join(parts)


def describe_train_step(settings: Settings, step: TrainStep) -> str:
    """Experiment 2 in words and a table."""
    config, eager = settings.config, step.timings[0]
    head = ["variant", "first call", "a later step", "eager ÷ later", "traces", "nodes", "pays off after", "difference"]
    parts = [
        f"## 2. The training step of {config.model} ({step.parameters:,} parameters, {config.dataset}, "
        f"batch {config.batch_size}), {settings.steps} steps",
        table(head, [_cells(timing, eager, True) for timing in step.timings]),
        paragraph(
            f"Difference: the largest relative one of any weight after {settings.steps} steps, from eager; "
            f"{TOLERANCE:g} is allowed. XLA compiles the forward and backward pass, as the trainer's --jit=on does."
            + (" TF32 is off, so that weights can be compared." if tf.config.list_physical_devices("GPU") else "")
        ),
    ]
    parts += [f"{timing.variant} cannot run: {timing.failure}" for timing in step.timings if timing.failure]
    return "\n\n".join(parts)


def describe_traces(settings: Settings, sums: Sums, step: TrainStep) -> str:
    """How often what was traced, and why."""
    config = settings.config
    rows = [[calls, log.reasons] for calls, log in sums.traces]
    calls = 1 + settings.repeats
    rows += [[f"sum_up_to({settings.n:,}), {t.variant}, {calls} calls", t.reasons] for t in sums.timings if t.reasons]
    for timing in step.timings:
        calls = 1 + settings.repeats * math.ceil(settings.steps / timing.steps)
        if timing.reasons:
            rows.append([f"step of {config.model}, {timing.variant}, {calls:,} call{'s'[: calls > 1]}", timing.reasons])
    cells = [
        [name, str(len(why)), ", ".join(f"{i}. {reason}" for i, reason in enumerate(why, 1))] for name, why in rows
    ]
    return "\n\n".join(["## 3. Why functions were traced", table(["calls", "traces", "why"], cells)])


# ----------------------------------------------------------------------------------------------------------------------
# What is written.


def write_chart(path: Path, sums: Sums, step: TrainStep, title: str) -> None:
    """A bar chart of both experiments, PNG, logarithmic: of each variant the first call and what later ones take."""
    # Here and not above: it takes a second. A Figure by itself draws with Agg, without a window.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, timings, name, later in zip(
        figure.subplots(1, 2),
        (sums.timings, [timing for timing in step.timings if not timing.failure]),
        ("sum_up_to", "training step"),
        ("later calls", "a step of later calls"),
        strict=True,
    ):
        places = np.arange(len(timings))
        for offset, label, values in (
            (-0.2, "first call (with tracing)", [timing.first for timing in timings]),
            (0.2, later, [timing.later for timing in timings]),
        ):
            bars = axes.bar(places + offset, values, 0.38, label=label)
            axes.bar_label(bars, [readable(value) for value in values], fontsize=7)
        axes.set_xticks(places, [timing.variant.replace(", ", ",\n") for timing in timings], fontsize=8)
        axes.set(yscale="log", ylabel="seconds", title=name)
        axes.margins(y=0.15)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    write_png(path, figure)


def write_events(directory: Path, text: str, sums: Sums, step: TrainStep) -> None:
    """TensorBoard's files, one folder for each: `tables` has the text, `sum_up_to` and `train_step` their graphs."""
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        for name, write in (
            ("tables", lambda: tf.summary.text("graph_benchmark", text, step=0)),
            ("sum_up_to", lambda: tf.summary.graph(sums.graph)),
            ("train_step", lambda: tf.summary.graph(step.graph)),
        ):
            writer = tf.summary.create_file_writer(str(aside / name))
            with writer.as_default():
                write()
            writer.close()
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_agreement(settings: Settings, step: TrainStep) -> None:
    """Checks that all variants that ran have made the same of the weights.

    Raises:
      RunEnded: one has not; exit code 1.
    """
    for timing in step.timings:
        if not timing.failure and not timing.difference <= TOLERANCE:
            raise RunEnded(
                f"{timing.variant}: weights differ from eager by {timing.difference:.1e} after {settings.steps} steps, "
                f"{TOLERANCE:g} is allowed; with fewer --steps a difference that grows by rounding is smaller"
            )


def benchmark(settings: Settings) -> dict[str, Any]:
    """Runs both experiments, prints the tables and writes them to `settings.out_dir`. Returns what the JSON file holds.

    Raises:
      BadConfiguration: out_dir cannot be written, or the data cannot be had.
      RunEnded: the variants do not agree; everything is written then, too.
    """
    out = settings.out_dir
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfiguration(f"--out_dir {out} cannot be made: {error.strerror}; name a directory") from None
    if settings.show_autograph:
        print(f"What AutoGraph makes of sum_up_to:\n\n{tf.autograph.to_code(sum_up_to)}")
    # First of all: once an operation has run, the devices are what they are.
    strategy, facts = devices.set_up(settings.config), machine()
    parts = [describe_machine(settings, facts)]
    print(parts[-1], flush=True)
    with retracing_expected():
        sums = measure_sums(settings)
    parts.append(describe_sums(settings, sums))
    print(f"\n{parts[-1]}", flush=True)
    with retracing_expected():
        step = measure_train_step(settings, strategy)
    parts += [describe_train_step(settings, step), describe_traces(settings, sums, step)]
    print("\n" + "\n\n".join(parts[-2:]), flush=True)

    config = settings.config
    results = {
        "machine": facts,
        "flags": {
            "n": settings.n,
            "repeats": settings.repeats,
            "steps": settings.steps,
            "steps_per_call": settings.steps_per_call,
            "model": config.model,
            "dataset": config.dataset,
            "batch_size": config.batch_size,
            "seed": config.seed,
        },
        "published": PUBLISHED,
        "sum_up_to": {
            "value": sums.value,
            "variants": [timing.facts(sums.timings[0]) for timing in sums.timings],
            "loops": [
                {"loop": loop, "n": n, "nodes": t.nodes, "first_call_seconds": t.first, "later_seconds": t.later}
                for loop, n, t in sums.unrolled
            ],
            "traces": [{"calls": calls, "reasons": log.reasons} for calls, log in sums.traces],
        },
        "train_step": {
            "parameters": step.parameters,
            "variants": [timing.facts(step.timings[0]) for timing in step.timings],
            "largest_relative_difference": max(timing.difference for timing in step.timings),
            "tolerance": TOLERANCE,
        },
    }
    title = f"{facts['device']}, {facts['cores']} cores; n = {settings.n:,}; {config.model}, batch {config.batch_size}"
    try:
        write_atomically(out / "graph_benchmark.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_chart(out / "graph_benchmark.png", sums, step, title)
        write_events(out / "tensorboard", "\n\n".join(parts), sums, step)
    except (OSError, tf.errors.OpError) as error:
        line = str(error).splitlines()[0]
        raise BadConfiguration(f"--out_dir {out} cannot be written: {line}; free space or name another") from error
    print(f"\nwritten to {out}: graph_benchmark.json, graph_benchmark.png, tensorboard/")
    check_agreement(settings, step)
    return results


def main(settings: Settings) -> int:
    """Runs `benchmark` as a program: what the user can act on is one line and an exit code."""
    logging.set_verbosity(logging.WARNING)
    try:
        benchmark(settings)
    except RunEnded as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return error.exit_code
    return OK


if __name__ == "__main__":
    sys.exit(main(SETTINGS))
