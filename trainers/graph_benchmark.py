"""What does @tf.function buy? Times a loop of small operations, and the trainer's own step, eager and compiled.

python trainers/graph_benchmark.py --model=resnet --steps=10 --repeats=3
python trainers/graph_benchmark.py --n=1000 --show_autograph
tensorboard --logdir=runs/graph_benchmark
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements()

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from models.cards import MODELS
from trainers.settings import paths
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration, RunEnded
from trainers.settings.flags import fill, short_help_page
from trainers.settings.rules import resolve
from trainers.show.tables import paragraph, readable, table, times
from trainers.world import files, machine, process, quiet

if TYPE_CHECKING:
    from trainers.measure.steps import TrainStep
    from trainers.measure.sums import Sums
    from trainers.measure.traces import Timing

DEFAULT_STEPS_PER_CALL = 50
# Beyond it the sum of squares exceeds int64.
LARGEST_N = 3_000_000
# What this repeats: seconds at n = 10,000, eager, and as a graph with its tracing.
PUBLISHED = {"n": 10_000, "eager": 1.15, "graph": 0.31}


# ----------------------------------------------------------------------------------------------------------------------
# Flags.


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of the flags. `config`: the trainer's configuration of the step that is measured."""

    config: Config
    n: int
    repeats: int
    steps: int
    steps_per_call: int
    out_dir: Path
    show_autograph: bool

    def facts(self) -> dict[str, Any]:
        """For the JSON file."""
        own = {name: getattr(self, name) for name in ("n", "repeats", "steps", "steps_per_call")}
        return own | {name: getattr(self.config, name) for name in ("model", "dataset", "batch_size", "seed")}


def _define(values: flags.FlagValues) -> None:
    for name, default, low, high, text in (
        ("n", PUBLISHED["n"], 1, LARGEST_N, "sum_up_to adds the squares of 0 … n"),
        ("repeats", 5, 1, None, "measurements, of which the median counts"),
        ("batch_size", 32, 1, None, "examples in a training step"),
        ("steps", 50, 1, None, "training steps in one measurement"),
        ("steps_per_call", DEFAULT_STEPS_PER_CALL, 1, None, "training steps in one call, where there are several"),
        ("seed", 0, 0, 2**31 - 1, "initial weights, order of the data, noise"),
    ):
        flags.DEFINE_integer(name, default, text, lower_bound=low, upper_bound=high, flag_values=values)
    flags.DEFINE_string("model", "mlp", "the model that is trained, on the data set of its card", flag_values=values)
    flags.DEFINE_string("data_dir", Config.data_dir, "where prepared data lies", flag_values=values)
    flags.DEFINE_string("out_dir", "runs/graph_benchmark", "where tables, chart and graphs go", flag_values=values)
    flags.DEFINE_bool("show_autograph", False, "print AutoGraph's conversion of sum_up_to first", flag_values=values)
    flags.DEFINE_bool("help", False, "print this page", short_name="h", flag_values=values)


def settings_from(argv: Sequence[str]) -> Settings:
    """The settings of a command line (`argv[0]` is the program).

    Raises:
      BadConfiguration: a flag is unknown, malformed or breaks a rule.
      SystemExit: `--help` was given and its page has been printed; code 0.
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
    if values.model.partition(",")[0] in MODELS:  # `resolve` answers where it is not
        # At least the steps that are measured: past the end of its schedule a model no longer learns.
        config = dataclasses.replace(config, train_steps=max(config.card.recipe.train_steps, values.steps))
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
        paths.local("--out_dir", values.out_dir),
        values.show_autograph,
    )


# ----------------------------------------------------------------------------------------------------------------------
# What is printed.


def _cells(timing: "Timing", eager: "Timing", per_step: bool) -> list[str]:
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
    """What is measured, and where."""
    return paragraph(
        f"Measured on one device, {facts['device']}, with {facts['cores']} CPU cores (load average at the start "
        f"{facts['load_average']}), TensorFlow {facts['versions']['tensorflow']}: wall time by a monotonic clock, "
        "until the result is on the host. A first call is one measurement, with tracing and compilation; later calls "
        f"are the median of {settings.repeats}. Times vary with the machine's load: compare them within a run."
    )


def describe_sums(settings: Settings, sums: "Sums") -> str:
    """Experiment 1 in words and tables."""
    eager, graph = sums.timings[:2]
    head = ["variant", "first call", "later calls", "eager ÷ later", "traces", "nodes", "pays off after"]
    parts = [
        f"## 1. sum_up_to({settings.n:,}): {settings.n + 1:,} squares added one by one = {sums.value:,}",
        table(head, [_cells(timing, eager, False) for timing in sums.timings]),
        paragraph(
            f"A published example (n = {PUBLISHED['n']:,}) includes the tracing: {PUBLISHED['eager']} s eager, "
            f"{PUBLISHED['graph']} s as a graph, {times(PUBLISHED['eager'] / PUBLISHED['graph'])}. The same comparison "
            f"here: {readable(eager.first)} and {readable(graph.first)}, {times(eager.first / graph.first)}. It hides "
            f"that tracing is paid once: later calls take {readable(graph.later)}, {times(eager.later / graph.later)} "
            "less than eager. And it hides that the loop itself is the cost: three operations over all numbers take "
            f"{readable(sums.timings[2].later)}, eager."
        ),
        "### Which loop",
        table(
            ["loop over", "n", "nodes", "first call", "later calls"],
            [[loop, str(n), str(t.nodes), readable(t.first), readable(t.later)] for loop, n, t in sums.unrolled],
        ),
        _describe_loops(sums),
    ]
    return "\n\n".join(parts)


def _describe_loops(sums: "Sums") -> str:
    _, n, unrolled = sums.unrolled[-1]
    rolled = next(timing for _, m, timing in sums.unrolled if m == n)
    return paragraph(
        f"AutoGraph converts a loop over tf.range to one loop in the graph: {rolled.nodes} nodes at every n. A loop "
        f"over Python's range is unrolled by the trace: {unrolled.nodes} nodes at n = {n}, a first call that grows "
        "with n, and another trace for another n. AutoGraph keeps its conversion of a function, so the first call of "
        "another tf.function around the same code is shorter than the first in the process."
    )


def describe_train_step(settings: Settings, step: "TrainStep") -> str:
    """Experiment 2 in words and a table."""
    import tensorflow as tf

    from trainers.measure.steps import TOLERANCE

    config, eager = settings.config, step.timings[0]
    head = ["variant", "first call", "a later step", "eager ÷ later", "traces", "nodes", "pays off after", "difference"]
    parts = [
        f"## 2. The training step of {config.model} ({step.parameters:,} parameters, {config.dataset}, "
        f"batch {config.batch_size}), {settings.steps} steps",
        table(head, [_cells(timing, eager, True) for timing in step.timings]),
        paragraph(
            f"Difference: the largest relative difference of any weight from eager after {settings.steps} steps; "
            f"{TOLERANCE:g} is allowed. XLA compiles the forward and backward pass, as the trainer's --jit=on does."
            + (" TF32 is off, so that weights can be compared." if tf.config.list_physical_devices("GPU") else "")
        ),
    ]
    parts += [f"{timing.variant} cannot run: {timing.failure}" for timing in step.timings if timing.failure]
    return "\n\n".join(parts)


def describe_traces(settings: Settings, sums: "Sums", step: "TrainStep") -> str:
    """How often each function was traced, and why."""
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


def write(settings: Settings, facts: dict[str, Any], text: str, sums: "Sums", step: "TrainStep") -> dict[str, Any]:
    """Writes all files to `settings.out_dir`. `text`: what was printed. Returns the content of the JSON file.

    Raises:
      BadConfiguration: they cannot be written.
    """
    import tensorflow as tf

    from trainers.measure import charts

    out, config = settings.out_dir, settings.config
    record = {
        "machine": facts,
        "flags": settings.facts(),
        "published": PUBLISHED,
        "sum_up_to": sums.facts(),
        "train_step": step.facts(),
    }
    title = f"{facts['device']}, {facts['cores']} cores; n = {settings.n:,}; {config.model}, batch {config.batch_size}"
    try:
        files.write_text(out / "graph_benchmark.json", files.to_json(record, indent=2, ensure_ascii=False) + "\n")
        charts.write_timings(out / "graph_benchmark.png", sums.timings, step.timings, title)
        graphs = {"sum_up_to": sums.graph, "train_step": step.graph}
        charts.write_events(out / "tensorboard", text, graphs)
    except (OSError, tf.errors.OpError) as error:
        line = str(error).splitlines()[0]
        raise BadConfiguration(f"--out_dir {out} cannot be written: {line}; free space or name another") from error
    print(f"\nwritten to {out}: graph_benchmark.json, graph_benchmark.png, tensorboard/")
    return record


# ----------------------------------------------------------------------------------------------------------------------
# The script.


def check_agreement(settings: Settings, step: "TrainStep") -> None:
    """Checks that all variants that ran have trained the same weights.

    Raises:
      RunEnded: a variant has not; exit code 1.
    """
    from trainers.measure.steps import TOLERANCE

    for timing in step.timings:
        if not timing.failure and not timing.difference <= TOLERANCE:
            raise RunEnded(
                f"{timing.variant}: weights differ from eager by {timing.difference:.1e} after {settings.steps} steps, "
                f"{TOLERANCE:g} is allowed; pass fewer --steps if the difference is rounding that grows"
            )


def benchmark(settings: Settings) -> dict[str, Any]:
    """Runs both experiments, prints the tables and writes them to `settings.out_dir`. Returns the JSON file's content.

    Raises:
      BadConfiguration: out_dir cannot be written, or the data is not available.
      RunEnded: the variants do not agree; everything is written in that case, too.
    """
    import tensorflow as tf

    from trainers.measure.steps import measure_train_step
    from trainers.measure.sums import measure_sums, sum_up_to
    from trainers.measure.traces import retracing_expected
    from trainers.world import devices

    try:
        settings.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfiguration(
            f"--out_dir {settings.out_dir} cannot be made: {error.strerror}; name a directory"
        ) from None
    if settings.show_autograph:
        print(f"AutoGraph's conversion of sum_up_to:\n\n{tf.autograph.to_code(sum_up_to)}")
    # First of all: once an operation has run, the devices are what they are.
    world, facts = devices.set_up(settings.config), machine.facts()
    parts = [describe_machine(settings, facts)]
    print(parts[-1], flush=True)
    with retracing_expected():
        sums = measure_sums(settings.n, settings.repeats)
        parts.append(describe_sums(settings, sums))
        print(f"\n{parts[-1]}", flush=True)
        step = measure_train_step(settings.config, world, settings.steps, settings.steps_per_call, settings.repeats)
    parts += [describe_train_step(settings, step), describe_traces(settings, sums, step)]
    print("\n" + "\n\n".join(parts[-2:]), flush=True)
    record = write(settings, facts, "\n\n".join(parts), sums, step)
    check_agreement(settings, step)
    return record


def main(settings: Settings) -> None:
    """Runs the benchmark."""
    quiet.import_tensorflow()
    logging.set_verbosity(logging.WARNING)
    benchmark(settings)


if __name__ == "__main__":
    process.main(settings_from, main)
