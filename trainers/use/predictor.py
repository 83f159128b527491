"""What answers: the checkpoint of a run, on all replicas, or an export alone."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models import cards, tasks
from models.options import is_object
from models.sums import Sums
from models.tasks import DataSpec, Task
from trainers.input import load
from trainers.input.dataset import Dataset
from trainers.input.errors import reason_of
from trainers.input.raw.described import raw_of
from trainers.input.raw.form import Raw
from trainers.record import carriers, reading
from trainers.run import trained
from trainers.settings import options, paths
from trainers.settings.config import Config
from trainers.settings.data_cards import is_own
from trainers.settings.exit_codes import BadConfiguration
from trainers.use import answers
from trainers.world import devices, process

# Rows that an export answers at once.
ROWS_AT_ONCE = 64
BEST, LAST = "best", "last"
# Among answers: whether a row's are finite.
FINITE = "finite"


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model, how its examples look, and what its outputs mean.

    `what`: how people call it. `identity`: what tells it from another. `outputs(inputs)`: of prepared inputs, in a
    replica. `size`: rows at once, over all replicas. `dataset`, `model`: those of the run; None for an export.
    `exported`: what an export holds; None for a run. `has_loss`: whether the loss of the task is that of the run; one
    of the user's own is not imported.
    """

    what: str
    identity: dict[str, Any]
    raw: Raw
    kind: str
    task: Task
    outputs: Callable[[tf.Tensor], Any]
    strategy: tf.distribute.Strategy
    size: int
    spec: DataSpec
    dataset: Dataset | None = None
    model: keras.Model | None = None
    exported: Any = None
    has_loss: bool = True

    @property
    def sums(self) -> Sums:
        """Loss and metrics, as the evaluation has them."""
        return Sums(dict(self.task.metrics) | dict(self.task.eval_metrics))

    def compiled(self) -> Callable[..., tuple[answers.Answer, np.ndarray]]:
        """The function `(inputs, counts, targets, weights) -> answers by name, sums of loss and metrics`.

        All `[rows, …]`, at most `size`. A weight of 0 leaves a row out of the sums, and so does an answer that is not
        finite: `FINITE` among the answers says which are.
        """
        sums_of, answer = self.sums, answers.answering(self.kind, self.raw)

        def in_replica(inputs: Any, counts: Any, targets: Any, weights: Any) -> tuple[answers.Answer, tf.Tensor]:
            outputs = self.outputs(inputs)
            answered = answer(outputs, {"count": counts})
            finite = answers.are_finite(inputs, answered)
            weights = tf.where(finite, weights, 0)
            outputs = tf.nest.map_structure(lambda each: _without(weights, each), outputs)  # 0 times NaN is NaN
            losses = self.task.loss(targets, outputs)
            return answered | {FINITE: finite}, sums_of.of_examples(targets, outputs, losses, weights)

        return self.on_replicas(in_replica)

    def on_replicas(self, in_replica: Callable[..., Any]) -> Callable[..., tuple[answers.Answer, np.ndarray]]:
        """The function of arrays `[rows, …]`, at most `size`, that computes with a share of them in each replica.

        `in_replica(*shares)` → values `[share, …]` by name, and a vector of sums. Rows that fill up repeat the first;
        their last array is 0.
        """
        strategy = self.strategy
        compute = tf.function(lambda *arguments: strategy.run(in_replica, args=arguments))

        def call(*arrays: np.ndarray) -> tuple[answers.Answer, np.ndarray]:
            count = len(arrays[0])
            # Always as many rows, so that there is one trace.
            filled = [np.concatenate([a, np.repeat(a[:1], self.size - count, axis=0)]) for a in arrays]
            filled[-1][count:] = 0
            answered, sums = compute(*(self._shared(array) for array in filled))
            found = {
                name: np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])[:count]
                for name, value in answered.items()
            }
            return found, np.sum([part.numpy() for part in strategy.experimental_local_results(sums)], 0, np.float64)

        return call

    def _shared(self, array: np.ndarray) -> Any:
        """Rows, cut for the replicas."""
        share = self.size // self.strategy.num_replicas_in_sync

        def of_replica(context: Any) -> tf.Tensor:
            number = context.replica_id_in_sync_group
            return tf.constant(array[number * share : (number + 1) * share])

        return self.strategy.experimental_distribute_values_from_function(of_replica)


def _without(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`values [batch, …]`, zeros where an example has no weight."""
    return tf.where(tf.reshape(weights > 0, [-1, *[1] * (values.shape.rank - 1)]), values, tf.zeros_like(values))


def of(path: Path, asked: Any) -> Predictor:
    """The predictor of a run directory or an export. `asked`: the options of `trainers/predict.py`.

    Raises:
      BadConfiguration: it is neither, or only its owner knows what its inputs or outputs mean.
    """
    if (path / reading.METADATA).exists() and not (path / reading.RUN).exists():
        return _of_export(path)
    return _of_run(path, asked)


def _of_run(run_dir: Path, asked: Any) -> Predictor:
    facts, own = reading.read_run(run_dir), trained.flags_of("RUN_DIR_OR_EXPORT", run_dir)
    name = carriers.shown(run_dir)
    if is_own(own.dataset):
        raise BadConfiguration(
            f"run {name} is trained on {own.dataset}, of which only you know what an example is; use serve_prepared "
            "of its export"
        )
    config = _found_here(own, facts, asked)
    wanting = dataclasses.replace(config, model=asked.model) if asked.model else config
    if is_object(options.name_of(own.model)) and not asked.model:
        raise BadConfiguration(
            f"run {name}: its model {own.model} is of somebody's own and is not imported unasked; if you trust it, "
            f"pass --model={options.name_of(own.model)}"
        )
    options.import_objects([each for each in wanting.chosen if each.flag == "model"])
    world = devices.set_up(config, None, process.say)
    dataset = load.load_for(config)
    if facts.get("data_fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise BadConfiguration(
            f"run {name} was trained on other data than --dataset {own.dataset} holds now, and its preparation "
            "is not known; bring them back, or use its export"
        )
    loss = "" if is_object(options.name_of(own.loss)) else own.loss
    dataset = dataclasses.replace(dataset, spec=dataclasses.replace(dataset.spec, loss=loss))
    chosen = _step_of(run_dir, asked.checkpoint)
    with world.strategy.scope():
        found = trained.model_of("run", run_dir, wanting, dataset, step=chosen)
    model, task = found.model, found.task
    kind = _known(f"run {name}", answers.kind_of(task, dataset.raw))
    # As many at once as a replica of the run had: the whole batch may be too much for a device.
    share = max(own.batch_size // facts.get("replicas", 1) // max(own.parts or 1, 1), 1)
    identity = {"run": carriers.identity(run_dir), "checkpoint": found.checkpoint.name, "started": facts.get("started")}
    what = f"{found.checkpoint.name} of {name}, on {world.replicas} replica{'s' * (world.replicas > 1)}"
    rest = (world.strategy, share * world.replicas, dataset.spec, dataset, model)
    return Predictor(
        what,
        identity,
        dataset.raw,
        kind,
        task,
        lambda inputs: model(task.inputs(inputs), training=False),
        *rest,
        has_loss=not is_object(options.name_of(own.loss)),
    )


def _found_here(own: Config, facts: Mapping[str, Any], asked: Any) -> Config:
    """The flags of a run with what the options `asked` say of devices, and where its data lie for this process."""
    data_dir = str(asked.data_dir) if asked.data_dir else own.data_dir
    dataset = reading.dataset_of(reading.begun_as(facts, Config))
    here = {"strategy": asked.strategy, "replicas": asked.replicas, "data_dir": data_dir, "dataset": dataset}
    here["cache_dir"] = paths.cache_dir("")
    return dataclasses.replace(own, export="", **here)


def _of_export(path: Path) -> Predictor:
    try:
        facts = reading.read_json(path / reading.METADATA)
        if not facts.get("data"):
            _known(f"export {path}", "")
        raw, spec, flags = raw_of(facts["data"]), DataSpec(**facts["spec"]), facts["flags"]
        step, name, loss = facts["step"], options.name_of(flags["model"]), flags.get("loss") or ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadConfiguration(f"{path / reading.METADATA} cannot be read: {error}; export again") from None
    kind = _known(f"export {path}", facts.get("answers", ""))
    if not (path / "saved_model.pb").exists():
        raise BadConfiguration(f"{path} holds no SavedModel; export again with --export=saved_model")
    spec = dataclasses.replace(spec, loss="" if is_object(options.name_of(loss)) else loss)
    make = {"classes": tasks.classification, "numbers": tasks.regression, "masks": tasks.segmentation}
    task = tasks.model_of(flags["model"], spec)[1] if name in cards.MODELS else make.get(kind, tasks.language)(spec)
    world = devices.set_up(Config(strategy="one_device"), None, process.say)
    try:
        loaded = tf.saved_model.load(str(path))
        outputs = loaded.serve_prepared
    except Exception as error:  # a damaged or half-copied file raises whatever the reader runs into
        raise BadConfiguration(
            f"export {path} cannot be loaded: {reason_of(error)}; copy it again or export again"
        ) from error
    identity = {"export": carriers.identity(path), "step": step, "started": facts.get("started")}
    what = f"export {path} of step {step}"
    has_loss = name in cards.MODELS and not is_object(options.name_of(loss))
    rest = (world.strategy, ROWS_AT_ONCE, spec)
    return Predictor(what, identity, raw, kind, task, outputs, *rest, exported=loaded, has_loss=has_loss)


def _known(what: str, kind: str) -> str:
    if kind not in answers.KINDS:
        raise BadConfiguration(
            f"{what} has no answers: only its owner knows what data or outputs mean; use serve_prepared of its export"
        )
    return kind


def _step_of(run_dir: Path, checkpoint: str) -> int | None:
    """The step of a checkpoint that is not the best; None for that."""
    if checkpoint == BEST:
        return None
    steps = reading.checkpoint_steps(run_dir)
    if checkpoint == LAST:
        return steps[-1]
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        known = ", ".join(map(str, steps))
        raise BadConfiguration(f"--checkpoint {checkpoint!r} is not there; choose {BEST}, {LAST}, or one of: {known}")
    return int(checkpoint)
