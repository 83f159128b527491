"""How fast is the loop? Against its ceiling, Model.fit, one Python call a compiled step, and the eager loop.

python trainers/benchmark.py
python trainers/benchmark.py --rows=mlp:32:1,resnet:128:2 --seconds=1
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags, logging

from models.cards import MODELS
from trainers.record.run_record import write_atomically
from trainers.settings.config import Config, resolve
from trainers.settings.exit_codes import OK, BadConfiguration, RunEnded
from trainers.settings.flags import fill, or_exit, short_help_page
from trainers.world import quiet
from trainers.world.signals import end_at_once_on_signal

DEFAULT_ROWS = "mlp:32:1,mlp:32:2,resnet:128:1,resnet:128:2,vit:128:1,vit:128:2,transformer:64:1"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model at a global batch on a number of replicas."""

    model: str
    batch_size: int
    replicas: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {self.replicas} replica{'s'[: self.replicas > 1]}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say."""

    rows: tuple[Row, ...]
    repeats: int
    seconds: float
    data_dir: str
    out_dir: Path


def row_from(text: str) -> Row:
    """`model:batch:replicas`.

    Raises:
      BadConfiguration: it is not.
    """
    try:
        model, batch_size, replicas = text.split(":")
        return Row(model, int(batch_size), int(replicas))
    except ValueError:
        raise BadConfiguration(
            f"--rows {text!r} is not model:batch:replicas; pass e.g. mlp:32:1,resnet:128:2"
        ) from None


def settings_from(argv: Sequence[str]) -> Settings:
    """The settings of a command line (`argv[0]` is the program).

    Raises:
      BadConfiguration: a flag is unknown, malformed or breaks a rule.
      SystemExit: `--help` was asked for and has been printed; code 0.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("rows", DEFAULT_ROWS, "what is measured: model:batch:replicas, …", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "rounds, of which the median counts", lower_bound=1, flag_values=values)
    flags.DEFINE_float("seconds", 2.0, "of one measurement, about", lower_bound=0.05, flag_values=values)
    flags.DEFINE_string("data_dir", Config.data_dir, "where prepared data lies", flag_values=values)
    flags.DEFINE_string("out_dir", "runs/benchmark", "where table, figures and chart go", flag_values=values)
    flags.DEFINE_bool("help", False, "print this page", short_name="h", flag_values=values)
    fill(values, argv, lambda: short_help_page(__doc__, values))
    rows = tuple(row_from(text.strip()) for text in values.rows.split(",") if text.strip())
    if not rows:
        raise BadConfiguration("--rows is empty; pass e.g. mlp:32:1,resnet:128:2")
    settings = Settings(rows, values.repeats, values.seconds, values.data_dir, Path(values.out_dir).expanduser())
    for row in rows:
        config_of(row, settings)
        if row.batch_size % row.replicas:
            raise BadConfiguration(
                f"--rows {row.model}:{row.batch_size}:{row.replicas}: the batch does not divide by the replicas; "
                "pass a multiple"
            )
        if MODELS[row.model].recipe.optimizer == "sam":
            raise BadConfiguration(f"--rows {row.model}: it takes two gradients a step, and fit cannot; pass another")
    return settings


def config_of(row: Row, settings: Settings, **changes: Any) -> Config:
    """The trainer's configuration of a row: the model's recipe and the default cadences but for those in `changes`."""
    return resolve(
        Config(
            model=row.model,
            batch_size=row.batch_size,
            replicas=row.replicas,
            input="resident",
            data_dir=settings.data_dir,
            **({"eval_every": 0, "checkpoint_every": 0, "run_dir": "unused"} | changes),
        )
    )


if __name__ == "__main__":
    # Flags are checked before TensorFlow is imported, which takes seconds.
    SETTINGS = or_exit(settings_from, sys.argv)
    end_at_once_on_signal()

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with quiet.known_noise_removed():
    import keras
    import numpy as np
    import tensorflow as tf

    from models import optimizers
    from trainers import custom_loop
    from trainers.input import load as data
    from trainers.run.job import Job, build_job, example_inputs
    from trainers.show.tables import machine, paragraph, readable, table, write_png
    from trainers.world import devices


# ----------------------------------------------------------------------------------------------------------------------
# The contenders. Each has `steps(n)`: n updates of the global batch, and the seconds that they took.

Steps = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to train: `key` of its kind, `name` with the settings it runs at, `steps(n) -> seconds`."""

    key: str
    name: str
    steps: Steps


KINDS = {
    "ceiling": "the ceiling: forward, backward and update on one resident batch, in one call",
    "ours": "our loop as it is run: input, metrics, log lines, TensorBoard, progress",
    "fit": "Model.fit as it comes",
    "fit_best": "Model.fit at its best steps_per_execution and jit_compile",
    "call": "one Python call a compiled step, at its best jit_compile",
    "eager": "the eager loop",
    "ours_silent": "our loop without log lines",
    "ours_saving": "our loop with a checkpoint every 100 steps",
}
PEERS = ("fit", "fit_best", "call", "eager")


def rows_of(dataset: data.Dataset) -> tuple[Any, Any]:
    """All training examples as the models take them: inputs and targets, in host memory."""
    features = {key: tf.constant(array) for key, array in dataset.train.arrays.items()}
    return dataset.prepare(features)


def from_the_start(variables: Sequence[keras.Variable | tf.Variable], steps: Steps) -> Steps:
    """`steps` from the values that the variables have now, each time.

    Trained on and on, a model has learnt all there is to learn: gradients vanish, and a CPU computes with such numbers
    at half the speed.
    """
    start = [variable.numpy() for variable in variables]

    def again(count: int) -> float:
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        return steps(count)

    return again


def after_a_call(steps: Steps) -> Steps:
    """`steps` after a call that is not counted.

    Whoever seeds TensorFlow clears its cache of functions, and `train` does: what was compiled is prepared again at its
    next call, which takes up to a second. Ours is timed from its second call on, and `fit` in its second epoch.
    """

    def second(count: int) -> float:
        steps(1)
        return steps(count)

    return second


class Peer:
    """What the peers train: the model, optimizer and recipe of the row, made anew, without anything of our loop.

    On one replica there is no strategy: it costs them time, and they do not need it. Their input is as fast as tf.data
    gives it: batches cut once, kept in memory, repeated without a shuffle and prefetched.
    """

    def __init__(self, config: Config, strategy: tf.distribute.Strategy, dataset: data.Dataset):
        self.strategy = strategy if config.replicas > 1 else tf.distribute.get_strategy()
        self.config = config
        with self.strategy.scope():
            self.model, self.task = config.card.builder()(dataset.spec)
            self.model(example_inputs(dataset, self.task), training=False)
            schedule = optimizers.SCHEDULES[config.schedule](
                config.learning_rate, config.warmup_steps, config.train_steps
            )
            self.optimizer = optimizers.build(config.optimizer, schedule, config.weight_decay)
            weights = self.model.trainable_variables
            self.optimizer.exclude_from_weight_decay(var_list=[v for v in weights if len(v.shape) < 2])
            self.optimizer.global_clipnorm = config.clip_norm or None
            self.optimizer.build(weights)
            self.metrics = [keras.metrics.Mean("loss")]
            if dataset.spec.task != "regression":
                self.metrics.append(keras.metrics.SparseCategoricalAccuracy("accuracy"))
        inputs, targets = rows_of(dataset)
        batches = tf.data.Dataset.from_tensor_slices((self.task.inputs(inputs), targets))
        batches = batches.batch(config.batch_size, drop_remainder=True).cache().repeat().prefetch(tf.data.AUTOTUNE)
        self.batches = batches

    def from_the_start(self, steps: Steps) -> Steps:
        """`steps`, each time from the initial weights."""
        return from_the_start([*self.model.variables, *self.optimizer.variables], steps)

    def loss(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The mean over the examples of this replica."""
        return tf.reduce_mean(self.task.loss(targets, outputs))

    def update(self, inputs: Any, targets: Any) -> None:
        """One update, as guides to custom loops write it: in a replica, metrics counted in."""
        with tf.GradientTape() as tape:
            outputs = self.model(inputs, training=True)
            loss = self.loss(targets, outputs)
        weights = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        self.metrics[0].update_state(loss)
        for metric in self.metrics[1:]:
            metric.update_state(targets, outputs)


def loop_of_calls(peer: Peer, eager: bool, jit: bool = False) -> Steps:
    """One Python call a step; the metrics are read at the cadence of the log."""
    replica = tf.function(peer.update, jit_compile=True) if jit else peer.update
    if peer.config.replicas > 1:

        def step(batch: Any) -> None:
            peer.strategy.run(replica, args=batch)
    else:

        def step(batch: Any) -> None:
            replica(*batch)

    step = step if eager else tf.function(step)
    iterator = iter(peer.strategy.experimental_distribute_dataset(peer.batches))

    def steps(count: int) -> float:
        began = time.perf_counter()
        for i in range(1, count + 1):
            step(next(iterator))
            if i % peer.config.log_every == 0 or i == count:
                for metric in peer.metrics:
                    float(metric.result())
                    metric.reset_state()
        # Kernels of a GPU may still run: the last update is on the host when its weights are.
        peer.model.trainable_variables[-1].numpy()
        return time.perf_counter() - began

    return after_a_call(peer.from_the_start(steps))


class EpochTimes(keras.callbacks.Callback):
    """The seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Reads it, when the logs are on the host."""
        _ = {name: float(value) for name, value in (logs or {}).items()}
        self.seconds.append(time.perf_counter() - self._began)


def fit(peer: Peer, per_execution: int = 1, jit: bool | str = "auto", verbose: int = 0) -> Steps:
    """Model.fit. The first epoch pays for the start of the iterator, the second is timed."""
    with peer.strategy.scope():
        peer.model.compile(
            peer.optimizer,
            loss=peer.loss,
            metrics=["sparse_categorical_accuracy"] if len(peer.metrics) > 1 else [],
            steps_per_execution=per_execution,
            jit_compile=jit,
        )

    def steps(count: int) -> float:
        done = math.ceil(count / per_execution) * per_execution
        times = EpochTimes()
        with contextlib.redirect_stdout(io.StringIO()):
            peer.model.fit(
                peer.batches, steps_per_epoch=done, epochs=2, verbose=verbose, callbacks=[times], shuffle=False
            )
        # Whole executions, of which there may be more than was asked for.
        return times.seconds[1] * count / done

    return peer.from_the_start(steps)


def ceiling(job: Job, jit: bool) -> Steps:
    """Forward and backward pass, sum over replicas, clipping and update, many in one call, on a batch that is there."""
    share = job.config.batch_size // job.replicas
    features = {key: tf.constant(array[:share]) for key, array in job.dataset.train.arrays.items()}
    inputs, targets = (tf.nest.map_structure(tf.identity, part) for part in job.dataset.prepare(features))
    inputs, weights = job.task.inputs(inputs), job.model.trainable_variables

    def gradients_of() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            losses = job.task.loss(targets, job.model(inputs, training=True))
            loss = tf.reduce_sum(losses) / job.config.batch_size
        return [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, weights)]

    compiled = tf.function(gradients_of, jit_compile=True) if jit else gradients_of

    def update() -> None:
        gradients = compiled()
        if job.replicas > 1:
            context = tf.distribute.get_replica_context()
            gradients = context.all_reduce("sum", [tf.stop_gradient(gradient) for gradient in gradients])
        if job.config.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, job.config.clip_norm)
        job.optimizer.apply(gradients, weights)

    @tf.function
    def call(count: tf.Tensor) -> None:
        for _ in tf.range(count):
            job.strategy.run(tf.autograph.experimental.do_not_convert(update))

    def steps(count: int) -> float:
        began = time.perf_counter()
        call(tf.constant(count))
        job.model.trainable_variables[-1].numpy()
        return time.perf_counter() - began

    return after_a_call(from_the_start([*job.model.variables, *job.optimizer.variables], steps))


def ours(row: Row, settings: Settings, **changes: Any) -> Steps:
    """`train`, whole, in a run_dir of its own: timed from where its calls have their length to its last step."""

    def steps(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            config = config_of(row, settings, train_steps=max(count, 50), run_dir=f"{folder}/run", **changes)
            with contextlib.redirect_stderr(nowhere):
                summary = custom_loop.train(config)
            steady = json.loads((summary.run_dir / "run.json").read_text())["steady"]
        return steady["seconds"] / steady["steps"] * count

    return steps


def best_of(contenders: Iterator[Contender], seconds: float) -> Contender:
    """The fastest in a trial of `seconds` each. One that cannot run is left out."""
    found = []
    for contender in contenders:
        try:
            rate = 1 / calibrated(contender.steps, seconds)[1]
        except Exception as error:
            logging.info("%s cannot run: %s", contender.name, error)
            continue
        found.append((rate, contender))
    return max(found, key=lambda pair: pair[0])[1]


def calibrated(steps: Steps, seconds: float) -> tuple[int, float]:
    """How many steps last about `seconds`, and the seconds of one. The first call, which traces, is not counted."""
    steps(1)
    count = 1
    while True:
        took = steps(count)
        if took >= seconds / 4:
            return max(round(seconds / took * count), 1), took / count
        count = min(max(count * 2, int(count * seconds / 3 / max(took, 1e-6))), count * 20)


def contenders_of(row: Row, settings: Settings, job: Job) -> list[Contender]:
    """All of them, the peers at the best settings that a trial finds."""

    def peer() -> Peer:
        return Peer(job.config, job.strategy, job.dataset)

    trial = settings.seconds / 2
    plain = fit(peer())

    def fits() -> Iterator[Contender]:
        # An execution that lasts longer than a measurement gains nothing by it.
        step = calibrated(plain, trial)[1]
        for jit in (False, True):
            for per_execution in (n for n in (10, 50, 200) if n == 10 or n * step <= settings.seconds):
                name = f"steps_per_execution={per_execution}, jit_compile={jit}"
                yield Contender("fit_best", name, fit(peer(), per_execution, jit))

    def calls() -> Iterator[Contender]:
        for jit in (False, True):
            yield Contender("call", f"jit_compile={jit}", loop_of_calls(peer(), False, jit))

    def ceilings() -> Iterator[Contender]:
        for jit in (False, True):
            yield Contender("ceiling", f"jit_compile={jit}", ceiling(job, jit))

    return [
        best_of(ceilings(), trial),
        Contender("ours", "", ours(row, settings)),
        Contender("fit", "", plain),
        best_of(fits(), trial),
        best_of(calls(), trial),
        Contender("eager", "", loop_of_calls(peer(), True)),
        Contender("ours_silent", "", ours(row, settings, log_every=0)),
        Contender("ours_saving", "", ours(row, settings, checkpoint_every=100)),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The measurement.


@dataclasses.dataclass
class Result:
    """A row's seconds of one step: for each contender one a round. `names`: their settings."""

    row: Row
    parameters: int
    names: dict[str, str]
    seconds: dict[str, list[float]]

    def ratio(self, key: str, other: str) -> tuple[float, float, float]:
        """How many times as fast `key` is as `other`: median, lowest and highest over the rounds."""
        ratios = [b / a for a, b in zip(self.seconds[key], self.seconds[other], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def best_peer(self) -> str:
        """The fastest peer, by the median."""
        return min((key for key in PEERS if key in self.seconds), key=lambda key: statistics.median(self.seconds[key]))

    def facts(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            **dataclasses.asdict(self.row),
            "parameters": self.parameters,
            "best_peer": self.best_peer(),
            "contenders": {
                key: {
                    "what": KINDS[key],
                    "settings": self.names[key],
                    "seconds_per_step": self.seconds[key],
                    "median_seconds_per_step": statistics.median(self.seconds[key]),
                }
                for key in self.seconds
            },
        }


def measure(row: Row, settings: Settings) -> Result:
    """Measures one row: rounds in which each contender has its turn, the first another one in each round."""
    config = config_of(row, settings)
    strategy = devices.set_up(config)
    dataset = data.load(config.dataset, config.data_dir, "resident")
    job = build_job(config, strategy, dataset)
    found = []
    for contender in contenders_of(row, settings, job):
        found.append((contender, calibrated(contender.steps, settings.seconds)[0]))
    result = Result(row, job.model.count_params(), {c.key: c.name for c, _ in found}, {c.key: [] for c, _ in found})
    for turn in range(settings.repeats):
        for contender, count in found[turn % len(found) :] + found[: turn % len(found)]:
            gc.collect()
            result.seconds[contender.key].append(contender.steps(count) / count)
    return result


def cell(numbers: tuple[float, float, float]) -> str:
    """`1.23 (1.20–1.27)`."""
    median, low, high = numbers
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def describe(results: Sequence[Result]) -> str:
    """The table of the ratios, and of what each contender takes."""
    ratios = [
        [
            str(result.row),
            cell(result.ratio("ours", "ceiling")),
            cell(result.ratio("ours", result.best_peer())),
            result.best_peer(),
            cell(result.ratio("ours", "fit")),
            cell(result.ratio("ours_silent", "ours")),
            cell(result.ratio("ours_silent", "ours_saving")),
        ]
        for result in results
    ]
    head = ["row", "ours ÷ ceiling", "ours ÷ best peer", "best peer", "ours ÷ fit", "cost of logs", "cost of saving"]
    times = [
        [str(result.row), *(readable(statistics.median(values)) for values in result.seconds.values())]
        for result in results
    ]
    legend = "\n".join(f"- {key}: {text}" for key, text in KINDS.items())
    settings = "\n".join(
        f"- {result.row}: " + "; ".join(f"{key} at {name}" for key, name in result.names.items() if name)
        for result in results
    )
    return "\n\n".join(
        [
            "Throughput, as a ratio: median over the rounds (lowest–highest).",
            table(head, ratios),
            "Time of one update of the global batch, median:",
            table(["row", *results[0].seconds], times),
            legend,
            settings,
        ]
    )


def write_chart(path: Path, results: Sequence[Result], title: str) -> None:
    """Bars: the throughput of each contender as a share of the ceiling's."""
    # Here and not above: it takes a second. A Figure by itself draws with Agg, without a window.
    from matplotlib.figure import Figure

    keys = [key for key in ("ours", "fit_best", "call", "fit", "eager") if key in results[0].seconds]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(keys)
    for i, key in enumerate(keys):
        places = np.arange(len(results)) + (i - (len(keys) - 1) / 2) * width
        numbers = np.array([result.ratio(key, "ceiling") for result in results]).T
        bars = axes.bar(places, numbers[0], width, label=KINDS[key])
        axes.errorbar(
            places, numbers[0], [numbers[0] - numbers[1], numbers[2] - numbers[0]], fmt="none", color="k", lw=0.8
        )
        axes.bar_label(bars, [f"{value:.2f}" for value in numbers[0]], fontsize=7, padding=2)
    axes.axhline(1.0, color="k", lw=0.8)
    axes.set_xticks(np.arange(len(results)), [str(result.row).replace(", ", "\n") for result in results], fontsize=8)
    axes.set(ylabel="throughput ÷ that of the ceiling")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)  # beside the bars, whose spread it would cover
    figure.suptitle(title, fontsize=10)
    write_png(path, figure)


def write(out: Path, facts: dict[str, Any], settings: Settings, results: Sequence[Result]) -> dict[str, Any]:
    """Writes figures, table and chart of the rows so far. Returns what the JSON file holds."""
    found = {
        "machine": facts,
        "flags": {"repeats": settings.repeats, "seconds": settings.seconds},
        "rows": [result.facts() for result in results],
    }
    try:
        write_atomically(out / "benchmark.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        write_atomically(out / "benchmark.md", describe(results) + "\n")
        write_chart(out / "benchmark.png", results, f"{facts['device']}, {facts['cores']} cores")
    except OSError as error:
        raise BadConfiguration(f"--out_dir {out} cannot be written: {error}; free space or name another") from error
    return found


def benchmark(settings: Settings) -> dict[str, Any]:
    """Measures all rows, prints the table and writes it to `settings.out_dir`. Returns what the JSON file holds.

    Raises:
      BadConfiguration: out_dir cannot be written, the data cannot be had, or there are too few devices.
    """
    out = settings.out_dir
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfiguration(f"--out_dir {out} cannot be made: {error.strerror}; name a directory") from None
    # First of all, for the largest row: once an operation has run, the devices are what they are.
    devices.set_up(config_of(max(settings.rows, key=lambda row: row.replicas), settings))
    facts = machine()
    print(
        paragraph(
            f"{facts['device']}, {facts['cores']} CPU cores (load average at the start {facts['load_average']}), "
            f"TensorFlow {facts['versions']['tensorflow']}: {settings.repeats} rounds, in each of which each "
            f"contender has about {settings.seconds:g} s. Virtual CPU devices share the cores: two have no more "
            "to compute with than one. Compare within a row."
        ),
        flush=True,
    )
    results: list[Result] = []
    for row in settings.rows:
        results.append(measure(row, settings))
        spent = "  ".join(f"{key} {readable(statistics.median(v))}" for key, v in results[-1].seconds.items())
        print(f"{row}: {spent}", flush=True)
        # After each row: it has taken minutes, and the next one may be cut off.
        found = write(out, facts, settings, results)
        keras.backend.clear_session()
    print(f"\n{describe(results)}", flush=True)
    print(f"\nwritten to {out}: benchmark.json, benchmark.md, benchmark.png")
    return found


def main(settings: Settings) -> int:
    """Runs `benchmark` as a program: what the user can act on is one line and an exit code."""
    logging.set_verbosity(logging.WARNING)
    tf.get_logger().setLevel("ERROR")  # that replicas are slow eagerly is what one row measures
    try:
        benchmark(settings)
    except RunEnded as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return error.exit_code
    return OK


if __name__ == "__main__":
    custom_loop.leave(main(SETTINGS))
