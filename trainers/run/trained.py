"""A model as a run has left it: built from the run's flags, with the weights of its best checkpoint."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from models import cards, tasks
from models.options import is_object
from models.tasks import Task
from trainers.input import object_cache
from trainers.input.dataset import Dataset
from trainers.input.errors import reason_of
from trainers.record import carriers, reading, weight_files
from trainers.record.checkpoints import Checkpoints
from trainers.record.state import State
from trainers.run import workers
from trainers.settings import options, paths
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.world.devices import World

MODEL, AVERAGE = "model", "ema"


class Trained(NamedTuple):
    """A frozen model with its task, and the checkpoint that its weights are from."""

    model: keras.Model
    task: Task
    checkpoint: Path


def lie_elsewhere(config: Config) -> list[str]:
    """The flags that name a run, or a file of weights, in an object store."""
    stored = [field.name for field in config.fields() if field.metadata.get("path") == "stored"]
    return [name for name in stored if paths.is_address(getattr(config, name))]


def bring_for(config: Config, world: World, feed: Callable[[str], None]) -> None:
    """Brings what `lie_elsewhere` names: of a run the checkpoint that will be read, to who reads it, else the file.

    `feed`: called with what is waited for, as long as it is.

    Raises:
      BadConfiguration: there is no such run or file, or the store refuses.
      StoreLost: the store cannot be reached, or nothing has moved for `--step_timeout`.
    """
    for name in lie_elsewhere(config):
        what, address = f"--{name}", getattr(config, name)
        if name == "init_from" and (config.mode == "evaluate" or reading.checkpoint_steps(Path(config.run_dir))):
            continue
        if weight_files.is_one(address):
            file_at(what, address, config, feed)
            continue
        folder = carriers.folder_of(address)
        flags_of(what, folder)
        if world.chief:
            with contextlib.suppress(FileNotFoundError):  # who reads it tells, and takes another
                carriers.bring(folder, best_of(folder)[1], feed)


def file_at(what: str, place: str, config: Config, feed: Callable[[str], None] = lambda what: None) -> Path:
    """The file of weights that a flag names by its path or its address, on this machine. Raises as `bring_for`."""
    if not paths.is_address(place):
        return Path(place)
    patience = config.step_timeout or 600.0
    return object_cache.brought(what, place, config.cache_dir, feed=feed, patience=patience)


def flags_of(what: str, run_dir: Path) -> Config:
    """The flags that a run's model was built with. `what`: how to name the run in a message, a flag for example.

    Raises:
      BadConfiguration: there is no run with a model and a checkpoint.
    """
    facts = reading.read_run(run_dir)
    if not facts:
        raise BadConfiguration(f"{what} {carriers.shown(run_dir)} holds no run; name a run_dir")
    before = reading.begun_as(facts, Config)
    name = options.name_of(facts.get("flags", {}).get("model") or "")  # a loop without --model has none
    if name not in cards.MODELS and not is_object(name):
        raise BadConfiguration(
            f"{what} {carriers.shown(run_dir)} is a run of the loop {before['loop']!r} without --model; name another"
        )
    if not reading.checkpoint_steps(run_dir):
        raise BadConfiguration(
            f"{what} {carriers.shown(run_dir)} holds no checkpoint; train it first, or name another run_dir"
        )
    names = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in before.items() if name in names})


def best_of(run_dir: Path) -> tuple[Checkpoints, int]:
    """The checkpoints of a run that has some, and the step of the one that is evaluated best; else of the newest."""
    facts = reading.read_run(run_dir)
    store = Checkpoints(run_dir, 1, {}, facts.get("best_metric", "loss"), facts.get("best_mode", "min"))
    best = store.best()
    return store, best[0] if best else store.steps()[-1]


def model_of(
    what: str, run_dir: Path, config: Config, dataset: Dataset, world: World | None = None, step: int | None = None
) -> Trained:
    """Builds the model of a run for data prepared as `dataset` does it, with the weights that the run evaluates best.

    `what`: as in `flags_of`. `config`: that of the run that wants it, whose preparation the model must share. Where the
    run has a moving average, weights are that. Called in the strategy's scope.

    Its task has the model's own loss, whichever the run was trained with. `world`, `step`: as in `values_of`.

    Raises:
      BadConfiguration: there is no such run, its model was trained for other shapes or another preparation, or is an
        object `module:object` of a module that no flag of `config` names.
    """
    own = flags_of(what, run_dir)
    _check_named(f"{what} {carriers.shown(run_dir)}", options.name_of(own.model), config)
    scale = own.card.mean, own.card.deviation
    if scale != (config.card.mean, config.card.deviation):
        raise BadConfiguration(
            f"{what} {carriers.shown(run_dir)}: its model {own.model} takes channels in other units than "
            f"{config.model}; take another"
        )
    model, task = tasks.model_of(own.model, dataset.spec)
    model(task.inputs(dataset.zeros()), training=False)
    found, values = values_of(what, run_dir, world, step)
    try:
        _assign(model, values)
    except BadConfiguration as error:
        raise BadConfiguration(
            f"{what} {carriers.shown(run_dir)}: its model {own.model} does not fit the data of --dataset "
            f"{dataset.name}: {error}; name a run on such data"
        ) from error
    model.trainable = False
    return Trained(model, task, reading.checkpoint_folder(run_dir, found))


def values_of(what: str, run_dir: Path, world: World | None = None, step: int | None = None) -> tuple[int, State]:
    """Step and values of the best checkpoint, or of that of `step`. Where `world` has several workers, one reads them.

    If the best is damaged, it is the newest that can be read, with a warning.

    Raises:
      BadConfiguration: none can be read.
    """
    if world is None or world.cluster is None:
        return _read(what, run_dir, step)
    found = _read(what, run_dir, step) if world.chief else None
    step = int(workers.from_chief(world, found[0] if found else -1))
    return step, workers.broadcast(world, found[1] if found else None)


def _read(what: str, run_dir: Path, step: int | None) -> tuple[int, State]:
    store, best = best_of(run_dir)
    for each in dict.fromkeys([best, *reversed(store.steps())]) if step is None else [step]:
        try:
            return each, store.read(each)
        except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
            if step is not None:
                raise BadConfiguration(
                    f"{what} {carriers.shown(run_dir)}: {store.path(step).name} cannot be read: {reason_of(error)}; "
                    "name another"
                ) from error
            logging.warning("checkpoint %s is damaged and skipped: %s", store.path(each), reason_of(error))
    raise BadConfiguration(
        f"{what} {carriers.shown(run_dir)}: every checkpoint is damaged; restore one, or name another run"
    )


def evaluated(values: State) -> list[tuple[str, np.ndarray]]:
    """The model's variables in a checkpoint, in order, each with its path; of those that have an average it.

    Weights that a run has frozen have none.
    """
    averages: dict[str, list[np.ndarray]] = {}
    for name in sorted(name for name in values if name.startswith(f"{AVERAGE}/")):
        averages.setdefault(_path(name).partition(":")[0].removesuffix("/average"), []).append(values[name])
    names = sorted(name for name in values if name.startswith(f"{MODEL}/"))
    return [(_path(n), averages[_path(n)].pop(0) if averages.get(_path(n)) else values[n]) for n in names]


def _path(name: str) -> str:
    """`model/0003/resnet/stem/kernel` → `resnet/stem/kernel`."""
    return name.split("/", 2)[2]


def _check_named(what: str, name: str, config: Config) -> None:
    """A run.json may be anybody's: what it names is imported only from a module that the user's own flags name."""
    module = name.partition(":")[0]
    if is_object(name) and not any(one.text.startswith(f"{module}:") for one in config.chosen):
        raise BadConfiguration(
            f"{what}: its model is {name}, and no flag names the module {module}, without which it is not imported; if "
            f"you trust it, take the model of this run from there too: --model={module}:…"
        )


def _assign(model: keras.Model, values: State) -> None:
    """Puts the values of a checkpoint into a model: those of its group, and of weights with an average that.

    They are matched by their order: names that Keras makes up differ where there is another model in the process.

    Raises:
      BadConfiguration: their number or a shape differs.
    """
    own = evaluated(values)
    if len(own) != len(model.variables):
        raise BadConfiguration(f"it has {len(model.variables)} variables, and the checkpoint {len(own)}")
    for variable, (_, value) in zip(model.variables, own, strict=True):
        if tuple(variable.shape) != value.shape:
            raise BadConfiguration(
                f"{variable.path} has shape {tuple(variable.shape)}, in the checkpoint {value.shape}"
            )
        variable.assign(value)
