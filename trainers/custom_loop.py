"""Trains a subclassed Keras 3 model in a loop of our own, compiled with tf.function under tf.distribute.

python trainers/custom_loop.py --strategy=mirrored
python trainers/custom_loop.py --strategy=mirrored --model=mlp --train_steps=500 --run_dir=runs/first
python trainers/custom_loop.py --flagfile=runs/first/flags.txt --run_dir=runs/again
python trainers/custom_loop.py --mode=evaluate --run_dir=runs/first
"""

import sys
import time
from pathlib import Path

STARTED = time.monotonic()
if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from trainers.settings.flags import parse
    from trainers.world.signals import end_at_once_on_signal

    end_at_once_on_signal()
    # Flags are checked before TensorFlow is imported, which takes seconds.
    CONFIG = parse(sys.argv, __doc__)

import contextlib
import dataclasses
import errno
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from trainers.world import quiet

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Threads of their own that only feed a GPU (TensorFlow's guide "Optimize GPU performance with the Profiler").
os.environ.setdefault("TF_GPU_THREAD_MODE", "gpu_private")
with quiet.known_noise_removed(), quiet.not_installed("sklearn", "matplotlib"):
    import numpy as np
    import tensorflow as tf

    tf.config.list_physical_devices()
from absl import logging

from models import randomness
from models.metrics import StreamingMetric
from trainers.input import batches
from trainers.input import load as data
from trainers.record import checkpoints
from trainers.record.background import Background
from trainers.record.run_record import Clock, Observer, RunRecord, Shares, completed
from trainers.run import evaluator
from trainers.run.cadence import due, next_due
from trainers.run.job import Job, averaged_weights, build_job, export_model, flops_of_step, input_spec, plan, uses_xla
from trainers.settings.config import FIXED, Config, check_batch, check_task
from trainers.settings.exit_codes import CRASHED, OK, BadConfiguration, Diverged, PeerLost, Preempted, RunEnded
from trainers.show import drawings as pictures
from trainers.show import graphs
from trainers.show.profiles import Profiles
from trainers.show.progress import Progress
from trainers.show.summaries import Summaries, table_of
from trainers.world import devices
from trainers.world.cluster import resolve
from trainers.world.signals import Preemption
from trainers.world.watchdog import Watchdog

IMPORT_SECONDS = time.monotonic() - STARTED
# A compiled call lasts about this long: short enough to answer a signal, long enough that Python costs nothing.
CALL_SECONDS = 1.0
NUM_NEWS = 2
# Flags that tell where and how a run is made, not what is compared of it.
NOT_COMPARED = (
    "mode",
    "run_dir",
    "data_dir",
    "resume",
    "dry_run",
    "export",
    "profile",
    "startup_timeout",
    "step_timeout",
)
# What a line of training tells of its last update, beside loss and metrics.
FACTS = ("learning_rate", "gradient_norm", "parameter_norm", "update_norm")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `train` returns: the last step, the last metrics of each split, and where everything lies."""

    step: int
    train: dict[str, float]
    eval: dict[str, float]
    run_dir: Path
    traces: int


# ----------------------------------------------------------------------------------------------------------------------
# One update of the global batch. This is the part to change for research.


Metrics = Mapping[str, StreamingMetric]


def num_sums(metrics: Metrics) -> int:
    """Length of the vector of running sums: the loss, the number of examples, then each metric's statistics."""
    return 2 + sum(metric.width for metric in metrics.values())


def per_example_sums(metrics: Metrics, targets: Any, outputs: Any, losses: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Sums over examples of the loss `[batch]`, of 1, and of the metrics' statistics: `[num_sums]`, float32."""
    columns = [losses[:, None], tf.ones_like(losses)[:, None]]
    columns += [metric.statistics(targets, outputs) for metric in metrics.values()]
    return tf.reduce_sum(tf.concat(columns, axis=1) * weights[:, None], axis=0)


def metric_values(metrics: Metrics, sums: tf.Tensor) -> tf.Tensor:
    """The loss and the metrics of the examples that were summed: `[1 + number of metrics]`, float64."""
    count = tf.maximum(sums[1], 1.0)
    values, at = [sums[0] / count], 2
    for metric in metrics.values():
        total = tf.cast(sums[at : at + metric.width], tf.float32)
        values.append(tf.cast(metric.result_of(total, tf.cast(count, tf.float32)), tf.float64))
        at += metric.width
    return tf.stack(values)


def gradients_of_part(job: Job, features: Any, step: tf.Tensor, first: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Forward and backward pass over a part of the global batch, from its example `first` on.

    The loss is divided by the *global* batch, so the gradients of all parts and replicas add up to that of the batch.
    A penalty (`model.losses`) is one for each part, so it is divided by their number.
    """
    config, model = job.config, job.model
    parts = job.replicas * config.accumulate
    with tf.name_scope("input"):
        inputs, targets = job.dataset.prepare(features)
        inputs = job.task.inputs(inputs)
    with tf.GradientTape() as tape, randomness.at(config.seed, step, first):
        outputs = model(inputs, training=True)
        with tf.name_scope("loss"):
            losses = job.task.loss(targets, outputs)
            penalty = tf.add_n(model.losses) / parts if model.losses else tf.constant(0.0)
            loss = tf.reduce_sum(losses) / config.batch_size + tf.cast(penalty, tf.float32)
            scaled = loss * job.loss_scale.factor if job.loss_scale else loss
    weights = model.trainable_variables
    with tf.name_scope("gradients"):
        gradients = tape.gradient(scaled, weights)
        # A weight that the loss does not use has none; the tape's own zeros do not know Keras's variables.
        gradients = [tf.zeros(w.shape, w.dtype) if g is None else g for g, w in zip(gradients, weights, strict=True)]
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        if job.loss_scale:
            gradients = [gradient / job.loss_scale.factor for gradient in gradients]
    with tf.name_scope("metrics"):
        sums = per_example_sums(job.task.metrics, targets, outputs, losses, tf.ones_like(losses))
        return gradients, sums + tf.one_hot(0, num_sums(job.task.metrics)) * penalty * config.batch_size


def replica_order(source: Any, first: tf.Tensor, last: tf.Tensor) -> batches.Order:
    """In a replica: which examples it gets in steps `first … last`."""
    with tf.name_scope("input"):
        return source.order(first, last)


def replica_gradients(
    job: Job, compiled: Callable, source: Any, feed: Any, order: batches.Order, step: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
    """In a replica: its share's gradients, summed over all replicas, then clipped. Also the sums and the norm.

    Clipping follows the sum: clipped before it, the result would depend on the number of replicas.
    """
    context = tf.distribute.get_replica_context()
    config = job.config
    # The global batch is cut into parts first and each part over the replicas, so that what is computed over a part
    # (batch statistics) does not depend on the number of replicas.
    whole_part = config.batch_size // config.accumulate
    count = whole_part // job.replicas
    start = tf.cast(context.replica_id_in_sync_group, tf.int64) * count
    gradients, sums = None, None
    for part in range(config.accumulate):
        # One part after the other: together they would need the memory that accumulation saves.
        with tf.control_dependencies([] if part == 0 else [*gradients, sums]):
            first = start + part * whole_part
            with tf.name_scope("input"):
                features, _ = source.share(feed, order, step, first, part, count)
            more, more_sums = compiled(features, step, first)
        gradients = more if part == 0 else [a + b for a, b in zip(gradients, more, strict=True)]
        sums = more_sums if part == 0 else sums + more_sums
    # The stop: nobody differentiates a sum of gradients, and without it TensorFlow searches every replica's graph for
    # variables that somebody might.
    with tf.name_scope("all_reduce"):
        values = [tf.stop_gradient(value) for value in (*gradients, sums)]
        *gradients, sums = context.all_reduce(tf.distribute.ReduceOp.SUM, values)
    with tf.name_scope("clip"):
        norm = tf.linalg.global_norm(gradients)
        if config.clip_norm:
            factor = tf.minimum(1.0, config.clip_norm / tf.maximum(norm, 1e-30))
            gradients = [gradient * factor for gradient in gradients]
    return gradients, sums, norm


def replica_displace(job: Job, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
    """In a replica: moves the weights to where a second gradient is taken. Returns the weights that they were."""
    weights = [tf.identity(v) for v in job.model.trainable_variables]
    perturbation = job.optimizer.perturbation(gradients, tf.linalg.global_norm(gradients))
    replica_assign(job, [w + e for w, e in zip(weights, perturbation, strict=True)])
    return weights


def replica_assign(job: Job, values: list[tf.Tensor]) -> None:
    """In a replica: sets the weights on its device to values that are the same on all replicas."""

    def assign(strategy: tf.distribute.Strategy, values: list[tf.Tensor]) -> None:
        for weight, value in zip(job.model.trainable_variables, values, strict=True):
            strategy.extended.update(weight.value, lambda w, v: w.assign(v), args=(value,), group=False)

    tf.distribute.get_replica_context().merge_call(assign, args=(values,))


def replica_update(job: Job, gradients: list[tf.Tensor]) -> None:
    """In a replica: applies gradients that are the same on all replicas."""
    with tf.name_scope("optimizer"):
        job.optimizer.apply(gradients, job.model.trainable_variables)
    if job.ema:
        with tf.name_scope("ema"):
            tf.distribute.get_replica_context().merge_call(update_ema, args=(job,))


def update_ema(strategy: tf.distribute.Strategy, job: Job) -> None:
    """Moves the average of the weights on each device."""

    def move(average: tf.Variable, weight: tf.Tensor) -> None:
        average.assign_sub((1 - job.config.ema) * (average - weight))

    for average, weight in zip(job.ema, job.model.trainable_variables, strict=True):
        strategy.extended.update(average, move, args=(weight.value,), group=False)


def boxed(function: Callable) -> Callable:
    """A replica's function in a name scope `replica_N`, for graphs and profiles: TensorFlow boxes all but the first.

    N counts the replicas of this process: workers that gave one collective two names would wait for each other.
    """

    def in_box(*arguments: Any) -> Any:
        innermost = tf.compat.v1.get_default_graph().get_name_scope().rpartition("/")[2]
        with contextlib.nullcontext() if innermost.startswith("replica_") else tf.name_scope("replica_0"):
            return function(*arguments)

    return tf.autograph.experimental.do_not_convert(in_box)


def own_weights(job: Job) -> list[tf.Tensor]:
    """The weights as they are now, outside of the replicas: those on this process's first device."""
    return [tf.identity(checkpoints.first_component(weight)) for weight in job.model.trainable_variables]


def mean_over_workers(job: Job, values: tf.Tensor) -> tf.Tensor:
    """The mean of what each worker has, on all of them. Where there is one worker, its own."""
    if job.cluster is None:
        return values
    total = job.strategy.reduce("SUM", job.strategy.run(lambda: values), axis=None)
    return total / job.replicas


def from_chief(job: Job, value: float) -> float:
    """The chief's value on all workers. Nobody passes before all have come: also a barrier."""
    own = tf.constant([float(value) if job.chief else 0.0], tf.float64)
    return float(tf.function(lambda: mean_over_workers(job, own))().numpy()[0] * job.workers)


def leave_together(job: Job, ended: Callable[[], bool]) -> None:
    """Nobody passes before all have come, or are gone when `ended()`: what all waited for is done.

    The first to leave may take with it what the last still waits for.
    """
    try:
        from_chief(job, 0)
    except tf.errors.OpError as error:
        if peer_lost(error) is error or not ended():
            raise


def make_train_call(job: Job, source: Any, summaries: Summaries | None = None) -> Callable:
    """The compiled loop: updates `first … last` of the run, in one call, stopping at the first that is not finite.

    Returns a function `(first, last, sums [num_sums], news) -> (windows, sums, finite, news, waited)`, numbers in
    float64. `windows [n, 1 + len(FACTS) + 1 + number of metrics]`: at each log step of the call, and at its end, the
    step, `FACTS` of its last update, and loss and metrics since the window before; `sums` are those with which the
    first begins, and those of the last. `news` is what a worker has to tell, `[stop requested, seconds a step]`; it
    comes back as the mean over all workers, so that all decide alike. `waited`: seconds that steps waited for input.
    With `summaries`, histograms are written at their cadence.
    """
    compiled = tf.function(lambda *args: gradients_of_part(job, *args), jit_compile=True, autograph=False)
    if not uses_xla(job):
        compiled = lambda *args: gradients_of_part(job, *args)  # noqa: E731

    run, scalar = job.strategy.run, tf.TensorSpec([], tf.int64)
    order_of = boxed(lambda first, last: replica_order(source, first, last))
    gradients_of_batch = boxed(lambda feed, order, step: replica_gradients(job, compiled, source, feed, order, step))
    displace = boxed(lambda gradients: replica_displace(job, gradients))
    assign = boxed(lambda values: replica_assign(job, values))
    update = boxed(lambda gradients: replica_update(job, gradients))

    every = tf.constant(job.config.log_every or job.config.train_steps, tf.int64)
    # The graphs of all workers must be one: where only the chief writes, it does so between calls.
    histogram_every = job.config.histogram_every if summaries is not None and job.cluster is None else 0
    local = job.strategy.experimental_local_results
    sums_spec, news_spec = (tf.TensorSpec([size], tf.float64) for size in (num_sums(job.task.metrics), NUM_NEWS))

    @tf.function(input_signature=[scalar, scalar, sums_spec, news_spec])
    def train_call(first: tf.Tensor, last: tf.Tensor, sums: tf.Tensor, news: tf.Tensor) -> tuple[tf.Tensor, ...]:
        count_trace(job)
        step, norm, finite, waited = first, tf.constant(0.0), tf.constant(True), tf.constant(0.0, tf.float64)
        width = 1 + len(FACTS) + 1 + len(job.task.metrics)
        windows = tf.TensorArray(tf.float64, size=0, dynamic_size=True, element_shape=[width])
        own, before = sums, own_weights(job)
        while (step < last) & finite:
            edge = tf.minimum(last, (step // every + 1) * every)
            # Loops in loops, not one with conditions: what happens at every step is only what must. The last update
            # of a window stands alone, so that the weights before it tell how far it went.
            while (step < edge) & finite:
                before = own_weights(job)
                until = tf.minimum(tf.maximum(edge - 1, step + 1), step + source.ordered)
                order = run(order_of, args=(step, until))
                while (step < until) & finite:
                    feed, seconds = source.feed()
                    waited += seconds
                    gradients, new_sums, norms = run(gradients_of_batch, args=(feed, order, step))
                    if hasattr(job.optimizer, "perturbation"):
                        weights = run(displace, args=(gradients,))
                        gradients, _, _ = run(gradients_of_batch, args=(feed, order, step))
                        run(assign, args=(weights,))
                    norm, new_sums = local(norms)[0], local(new_sums)[0]
                    finite = tf.math.is_finite(new_sums[0])
                    if job.loss_scale:
                        whole = tf.math.is_finite(norm)
                        if whole:
                            run(update, args=(gradients,))
                        job.loss_scale.adjust(whole)
                    else:
                        finite &= tf.math.is_finite(norm)
                        run(update, args=(gradients,))
                    sums += tf.cast(new_sums, tf.float64)
                    step += 1
                    if histogram_every and step % histogram_every == 0:
                        own_gradients = [local(gradient)[0] for gradient in gradients]
                        summaries.histograms(step, job.model.trainable_variables, own_gradients)
            after = own_weights(job)
            moved = tf.linalg.global_norm([a - b for a, b in zip(after, before, strict=True)])
            facts = (step, job.schedule(step - 1), norm, tf.linalg.global_norm(after), moved)
            facts = [tf.cast(value, tf.float64) for value in facts]
            row = tf.concat([facts, metric_values(job.task.metrics, sums)], axis=0)
            windows = windows.write(windows.size(), row)
            own, sums = sums, tf.zeros_like(sums)
        return windows.stack(), own, finite, mean_over_workers(job, news), waited

    return train_call


def make_evaluate(job: Job, source: Any) -> Callable:
    """The compiled evaluation: one pass over the eval split. Returns a function `() -> sums [num_sums] float64`.

    The loss is the task's alone, without penalties. Examples that fill up the last batch have weight 0.
    """
    share = source.batch_size // job.replicas
    num_batches = -(-source.size // source.batch_size)
    metrics = eval_metrics(job)

    def replica_sums(feed: Any, step: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        first = tf.cast(context.replica_id_in_sync_group, tf.int64) * share
        features, weights = source.share(feed, source.order(step, step + 1), step, first, 0, share)
        inputs, targets = job.dataset.prepare(features)
        outputs = job.model(job.task.inputs(inputs), training=False)
        losses = job.task.loss(targets, outputs)
        return per_example_sums(metrics, targets, outputs, losses, weights)

    @tf.function(input_signature=[])
    def evaluate() -> tf.Tensor:
        sums = tf.zeros([num_sums(metrics)], tf.float64)
        for step in tf.range(num_batches, dtype=tf.int64):
            feed, _ = source.feed()
            new = job.strategy.run(replica_sums, args=(feed, step))
            sums += tf.cast(job.strategy.reduce("SUM", new, axis=None), tf.float64)
        return metric_values(metrics, sums)

    return evaluate


def eval_metrics(job: Job) -> Metrics:
    """What an evaluation measures: the metrics of training and those that are for evaluation alone."""
    return dict(job.task.metrics) | dict(job.task.eval_metrics)


@tf.autograph.experimental.do_not_convert
def count_trace(job: Job) -> None:
    """Runs once for each trace of the train call. A second one is a defect that costs minutes: it is logged."""
    job.traces += 1
    if job.traces > 1:
        frames = [frame for frame in traceback.extract_stack()[:-1] if "site-packages" not in frame.filename]
        cause = "".join(traceback.format_list(frames[-6:]))
        logging.warning("the train step is traced again (trace %d); called from:\n%s", job.traces, cause)


# ----------------------------------------------------------------------------------------------------------------------
# The run, from top to bottom.


def train(config: Config) -> Summary:
    """Runs or resumes the run that `config` (resolved) describes.

    Raises:
      BadConfiguration, Diverged, Preempted: see `trainers.settings.exit_codes`.
    """
    clock = Clock()
    clock.add("import", IMPORT_SECONDS)
    cluster = resolve(os.environ) if config.strategy == "multi_worker" else None
    if config.dry_run and cluster:
        print(cluster.tf_config())
        return Summary(0, {}, {}, Path(config.run_dir), 0)
    if cluster and config.mode == "train" and (facts := completed(config)):
        # The others may have gone long ago, and will not come to be met.
        final, directory = facts["final"], Path(config.run_dir)
        if checkpoints.is_there(directory / "checkpoints", facts["step"]):
            say(f"complete already: {Progress.words(final['eval'])}  in {directory}")
            return Summary(facts["step"], final["train"], final["eval"], directory, 0)
    with Watchdog(config.step_timeout) as watchdog:
        with clock.phase("build"):
            watchdog.feed("meeting the other workers", config.startup_timeout + config.step_timeout)
            strategy = devices.set_up(config, cluster, say)
            if config.mode == "train":
                check_batch(config, strategy.num_replicas_in_sync)
            watchdog.feed("loading the data and building the model", config.startup_timeout + config.step_timeout)
            dataset = data.load(config.dataset, config.data_dir, config.input, config.label)
            check_task(config, dataset.spec.task)
            job = dataclasses.replace(build_job(config, strategy, dataset), cluster=cluster)
        if config.dry_run:
            print(plan(job))
            return Summary(0, {}, {}, Path(config.run_dir), 0)
        if config.mode == "evaluate":
            line = evaluator.follow(job, make_evaluate, clock, watchdog, ("loss", *eval_metrics(job)))
            return Summary(line.get("step", 0), {}, line, Path(config.run_dir) / evaluator.FOLDER, 0)
        record = RunRecord(config) if job.chief else Observer(config)
        with contextlib.closing(record), Preemption() as preemption:
            try:
                return run(job, record, clock, preemption, watchdog)
            except BaseException as error:
                ended = peer_lost(error) if cluster else error
                code = ended.exit_code if isinstance(ended, RunEnded) else CRASHED
                with contextlib.suppress(OSError):
                    record.end(code, f"{type(ended).__name__}: {ended}", seconds=clock.seconds)
                raise ended from (None if ended is error else error)


def say(line: str) -> None:
    """Prints a line for the user."""
    print(line, file=sys.stderr, flush=True)


def peer_lost(error: BaseException) -> BaseException:
    """What TensorFlow raises when a worker goes away, as what it means; anything else as it is."""
    lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
    lost += (tf.errors.CancelledError, tf.errors.InternalError, tf.errors.UnknownError)
    if not isinstance(error, lost):
        return error
    line = next(iter(str(error.message).splitlines()), "")[:300]
    return PeerLost(f"a worker was lost: {line}; start all workers again, the run continues from its checkpoint")


def run(job: Job, record: RunRecord, clock: Clock, preemption: Preemption, watchdog: Watchdog) -> Summary:
    """Restores, trains, evaluates, saves, and ends."""
    config, model = job.config, job.model
    store = checkpoints.Checkpoints(
        record.directory / "checkpoints",
        config.keep_checkpoints,
        {name: getattr(config, name) for name in FIXED} | {"data": job.dataset.fingerprint},
        job.task.best_metric,
        job.task.best_mode,
    )
    step, sums = 0, np.zeros([num_sums(job.task.metrics)], np.float64)
    with clock.phase("checkpoint"):
        if config.resume == "never" and store.steps():
            raise BadConfiguration(
                f"--resume=never and --run_dir {record.directory} holds a checkpoint; name another, or --resume=auto"
            )
        watchdog.feed("restoring a checkpoint")
        restored = restore(job, store)
        if restored:
            step, state = restored
            sums = state.pop("loop/sums")
            checkpoints.assign(job.variables, state)
        record.rewind_metrics(step)
    record.facts.update(
        replicas=job.replicas,
        devices=list(job.strategy.extended.worker_devices),
        parameters=model.count_params(),
        data_fingerprint=job.dataset.fingerprint,
        resumed_from=step if restored else None,
    )
    record.begin()
    if step >= config.train_steps:
        return finish(job, record, clock, step, "complete already")

    with clock.phase("build"):
        source = batches.batches(job.strategy, job.dataset.train, config.batch_size, config.seed, config.accumulate)
        source.start(step)
        eval_source = batches.batches(job.strategy, job.dataset.eval, config.batch_size, None)
        eval_source.start(0)
        summaries = Summaries(record.directory, step, silent=not job.chief)
        train_call, evaluate = make_train_call(job, source, summaries), make_evaluate(job, eval_source)
        values = checkpoints.reader(job.variables)
    with clock.phase("trace"):
        watchdog.feed("tracing the train step", config.startup_timeout + config.step_timeout)
        # Both now: AutoGraph reads this file, which may be edited while the run goes on.
        concrete, evaluate = train_call.get_concrete_function(), evaluate.get_concrete_function()
        checkpoints.check_complete(job.strategy, job.variables, concrete, evaluate)
        part = config.batch_size // config.accumulate // job.replicas
        forward = graphs.forward(model, input_spec(job.dataset, part), job.task.inputs)
        record.facts["flops_per_step"] = flops = flops_of_step(job, forward)
        peak = devices.peak_flops(config.precision)

    progress = Progress(step, config.train_steps, silent=not job.chief)
    if restored:
        progress.line(f"resumed from the checkpoint of step {step}")
    progress.line(plan(job))

    def tell(split: str, steps: Sequence[int], lines: Sequence[Mapping[str, float]]) -> None:
        """Everywhere that metrics are read: lines of metrics.jsonl, TensorBoard, the terminal."""
        record.append_metrics([{"step": step, "split": split, **line} for step, line in zip(steps, lines, strict=True)])
        for step, line in zip(steps, lines, strict=True):
            summaries.scalars(split, step, line)
            progress.metrics(split, step, line)

    def tell_windows(windows: np.ndarray, rates: Sequence[float], spent: Mapping[str, float]) -> None:
        steps = [int(step) for step in windows[:, 0]]
        lines = []
        for (_, *values), rate in zip(windows.tolist(), rates, strict=True):
            found = dict(zip((*FACTS, "loss", *job.task.metrics), values, strict=True))
            line = {name: found[name] for name in ("loss", *job.task.metrics, *FACTS)}
            line |= {"steps_per_second": rate, "examples_per_second": rate * config.batch_size}
            line |= {"model_flops_per_second": rate * flops}
            lines.append(line | ({"utilization": rate * flops / peak / job.replicas} if peak else {}) | spent)
        tell("train", steps, lines)

    def introduce() -> None:
        """What TensorBoard shows of a run before its first update: what it is, and its graphs."""
        if not job.chief:
            return
        with only_warned("TensorBoard shows no graphs"):
            show_run()

    def show_run() -> None:
        flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_COMPARED}
        summaries.hparams(step, flags, (*job.task.metrics, *job.task.eval_metrics, "loss"), time.time())
        summaries.text("train", step, "run", table_of(record.card()))
        layers = graphs.layer_names(model)
        summaries.graph(graphs.clean(forward.as_graph_def(add_shapes=True), layers))
        whole = graphs.step(concrete.graph, layers)
        if whole is not None:
            summaries.tagged_graph("step of one replica", graphs.of_first_replica(whole))
            summaries.tagged_graph("step of all replicas", whole)

    def save(step: int, state: checkpoints.State, evaluation: Mapping[str, float] | None) -> None:
        record.sync_metrics()
        summaries.flush()
        store.save(step, state, evaluation)

    call, seconds_per_step, own_seconds = 0, 0.0, 0.0
    window_steps, window_seconds = 0, 0.0
    background, shares = Background(), Shares(clock)
    profiles = Profiles(
        config.profile_steps, record.directory / "train", summaries, job.cluster is None, job.chief, progress.line
    )
    background.do(introduce)
    with contextlib.ExitStack() as stack:
        for resource in (progress, summaries, background, profiles):
            stack.enter_context(contextlib.closing(resource))
        stopping = bool(from_chief(job, 0)) if job.cluster else preemption.requested
        while step < config.train_steps and not stopping:
            # 1. A compiled call, up to the next thing to do.
            cadences = [config.eval_every, config.checkpoint_every, config.pictures_every]
            cadences += [config.histogram_every] if job.cluster else []
            stop = min(next_due(step, every, config.train_steps) for every in cadences)
            limit = config.steps_per_call or (int(CALL_SECONDS / seconds_per_step) if seconds_per_step else 1)
            stop = profiles.stop_of(step, min(stop, step + max(limit, 1)))
            with only_warned("no profile"):
                profiles.begin(step)
            began = time.monotonic()
            with clock.phase("train"), profiles.mark(step):
                watchdog.feed(
                    f"steps {step} to {stop}", config.step_timeout + (config.startup_timeout if call == 0 else 0)
                )
                news = tf.constant([float(preemption.requested), own_seconds], tf.float64)
                results = concrete(tf.constant(step, tf.int64), tf.constant(stop, tf.int64), tf.constant(sums), news)
                windows, sums, finite, (stops, seconds_per_step), waited = (result.numpy() for result in results)
                clock.move("train", "input_wait", waited)
            call += 1
            if call == 2:  # the first calls are short, and the first of all pays for what is done once
                steady_step, steady_began = stop, time.monotonic()
            elif call > 2:
                record.facts["steady"] = {"steps": stop - steady_step, "seconds": time.monotonic() - steady_began}
            took = (time.monotonic() - began) / float(windows[-1, 0] - step)
            if call > 1:
                own_seconds = took
            if job.cluster is None:
                stops, seconds_per_step = preemption.requested, own_seconds
            stopping = stops > 0
            if not finite:
                background.wait()
                good = store.steps()
                raise Diverged(
                    f"the loss or a gradient is not finite at step {windows[-1, 0]:.0f} (gradient norm "
                    f"{windows[-1, 1 + FACTS.index('gradient_norm')]}); the last good checkpoint is "
                    f"{store.path(good[-1]) if good else 'none'}; "
                    "lower --learning_rate or set --clip_norm, and begin in another --run_dir"
                )
            with only_warned("no profile"):
                profiles.end(stop, stop - step, config.train_steps)
            progress.advance(stop)

            # 2. What is due at its steps. It is told and saved in the background, while the next call runs.
            logged, rates = [due(int(row[0]), config.log_every, config.train_steps) for row in windows], []
            for row, is_due in zip(windows, logged, strict=True):
                window_seconds += took * (row[0] - step)
                window_steps += row[0] - step
                step = int(row[0])
                if is_due:
                    rates.append(float(window_steps / window_seconds))
                    window_steps, window_seconds = 0, 0.0
            if rates:
                background.do(tell_windows, windows[logged], rates, shares.take())
            if logged[-1]:
                sums = np.zeros_like(sums)
            if job.cluster and job.chief and config.histogram_every and step % config.histogram_every == 0:
                summaries.histograms(step, model.trainable_variables)
            evaluation = None
            if due(step, config.eval_every, config.train_steps):
                watchdog.feed(f"the evaluation at step {step}")
                with clock.phase("evaluate"), averaged_weights(job):
                    names = ("loss", *eval_metrics(job))
                    evaluation = dict(zip(names, evaluate().numpy().tolist(), strict=True))
                background.do(tell, "eval", [step], [evaluation])
            if job.chief:
                with clock.phase("checkpoint"):
                    better = False
                    if evaluation:
                        watchdog.feed(f"the checkpoint before step {step}")
                        background.wait()
                        better = store.improves(evaluation)
                    if due(step, config.checkpoint_every, config.train_steps) or better or stopping:
                        watchdog.feed(f"the checkpoint of step {step}")
                        background.wait()
                        state = values() | {"loop/sums": sums}
                        background.do(save, step, state, evaluation)
            if job.chief and due(step, config.pictures_every, config.train_steps):
                watchdog.feed(f"the pictures at step {step}")
                with clock.phase("evaluate"), averaged_weights(job), only_warned("no pictures"):
                    pictures.show(job, summaries, step)
        with clock.phase("checkpoint"):
            watchdog.feed(f"the checkpoint of step {step}")
            background.wait()
        summaries.end_of_session(step, step >= config.train_steps)
    if job.cluster:
        watchdog.feed("waiting for the other workers to finish")
        leave_together(job, lambda: job.chief or checkpoints.is_there(store.directory, step))
    if step < config.train_steps:
        if not preemption.requested:
            raise Preempted(f"another worker was told to stop at step {step}; the same command continues")
        grace = time.monotonic() - preemption.requested_at
        held = f"the checkpoint of step {step} was there after {grace:.1f} s" if step > 0 else "no step was finished"
        raise Preempted(f"{preemption.signal_name} came at step {step}; {held}; the same command continues")
    return finish(job, record, clock, step, "complete")


@contextlib.contextmanager
def only_warned(what: str) -> Iterator[None]:
    """Within the block an error is logged and no more: what is only shown must not end a run."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:300]
        logging.warning("%s: %s: %s", what, type(error).__name__, reason)


def restore(job: Job, store: checkpoints.Checkpoints) -> tuple[int, checkpoints.State] | None:
    """The newest whole checkpoint; on every worker the one that the chief has chosen."""
    if job.cluster is None:
        return store.restore_newest()
    restored = store.restore_newest() if job.chief else None
    step = int(from_chief(job, restored[0] if restored else -1))
    if not job.chief and step >= 0:
        restored = step, store.restore(step)
    from_chief(job, 0)
    return restored


def finish(job: Job, record: RunRecord, clock: Clock, step: int, reason: str) -> Summary:
    """Exports if asked, completes run.json and returns the summary."""
    export_path = record.directory / "export"
    if job.config.export and job.chief and not export_path.exists():
        with clock.phase("export"):
            export_model(job, export_path)
    skipped = {"skipped_steps": int(job.loss_scale.skipped.numpy())} if job.loss_scale else {}
    final = {split: {k: v for k, v in record.last(split).items() if k != "split"} for split in ("train", "eval")}
    facts = {"final": final, "seconds": clock.seconds, "step": step, "traces": job.traces} | skipped
    record.end(OK, reason, peak_device_mib=devices.peak_memory_mib(), **facts)
    if job.cluster:
        # Nobody leaves before the chief has done all: alone it could not be started again.
        leave_together(job, lambda: job.chief or bool(completed(job.config)))
    if job.chief:
        say(f"{reason}: {Progress.words(final['eval'])}  in {record.directory}")
    return Summary(step, final["train"], final["eval"], record.directory, job.traces)


def main(config: Config) -> int:
    """Runs `train` as a program: what the user can act on is one line and an exit code, anything else a traceback."""
    logging.set_verbosity(logging.WARNING)
    try:
        train(config)
    except RunEnded as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            traceback.print_exc()
            return CRASHED
        print(
            f"{sys.argv[0]}: the disk of --run_dir {config.run_dir} is full; free space and start again",
            file=sys.stderr,
        )
        return BadConfiguration.exit_code
    except Exception:
        traceback.print_exc()
        return CRASHED
    return OK


def leave(code: int) -> NoReturn:
    """Ends the process at once, everything written. On the interpreter's own way out TensorFlow may wait for ever.

    Its servers wait for peers that are gone, and its input threads for a Python that no longer answers.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    quiet.remove_generated_sources()
    os._exit(code)


if __name__ == "__main__":
    leave(main(CONFIG))
