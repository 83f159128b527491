"""The weights that a run begins with, taken from another run or a file: every variable is accounted for."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainers.record import carriers, reading, weight_files
from trainers.record.state import State, put
from trainers.run import trained
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files, private_api
from trainers.world.devices import World

_FLAG = "--init_from"
# Names that the plan shows of each list; run.json has all.
_MOST_SHOWN = 6


class Source(NamedTuple):
    """Values by name, with what run.json says of where they are from. `places`: names are places in Keras's files.

    `state`: everything in a run's checkpoint.
    """

    values: dict[str, np.ndarray]
    facts: dict[str, Any]
    places: bool = False
    state: State | None = None


@dataclasses.dataclass
class Table:
    """What became of each variable of a model, and what of the source was not used. All by path or name."""

    taken: list[str] = dataclasses.field(default_factory=list)
    resized: dict[str, str] = dataclasses.field(default_factory=dict)
    left: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    lacking: list[str] = dataclasses.field(default_factory=list)
    optimizer: list[str] = dataclasses.field(default_factory=list)


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_SHOWN])
    return shown + (f" and {len(names) - _MOST_SHOWN} more, see run.json" if len(names) > _MOST_SHOWN else "")


def begin(
    config: Config, world: World, model: keras.Model, optimizers: Mapping[str, Any], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Puts the values of `--init_from` into a built model and, if asked for, into its optimizers: what run.json says.

    `named`: the loop's variables by their names in checkpoints, which those of optimizers are matched by.

    Raises:
      BadConfiguration: the source cannot be read, or a variable is neither in it nor left out by `--init_skip`.
    """
    source = source_of(config, world)
    table, chosen = fit(model, source, config.init_skip)
    slots = _slots(config, source.state, optimizers, named, table) if config.init_optimizer else []
    _check(config, table)
    put((variable, value.astype(tf.as_dtype(variable.dtype).as_numpy_dtype)) for variable, value in [*chosen, *slots])
    return source.facts | {name: of for name, of in dataclasses.asdict(table).items() if name != "lacking"}


def rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """What the plan says of what `begin` did: a row for each list that is not empty."""
    if not facts:
        return {}
    step = f", step {facts['step']}" + (" (average)" if facts["average"] else "") if "step" in facts else ""
    found = {name: list(facts[name]) for name in ("taken", "resized", "left", "unused", "optimizer")}
    found["resized"] = [f"{name} ({sizes})" for name, sizes in facts["resized"].items()]
    lists = {name: f"{len(of)}: {_shortened(of)}" for name, of in found.items() if of}
    return {"begins": f"with weights of {facts['from']}{step}"} | lists


def source_of(config: Config, world: World) -> Source:
    """What `--init_from` names: a run, which one worker reads, or a file. Raises BadConfiguration."""
    name = config.init_from
    if weight_files.is_one(name) and not Path(name).is_dir():
        path = trained.file_at(_FLAG, name, config)
        values = weight_files.read(_FLAG, path)
        return Source(values, {"from": name, "sha256": files.digest(path)}, weight_files.names_are_places(path))
    path = carriers.folder_of(name)
    trained.flags_of(_FLAG, path)
    step, state = trained.values_of(_FLAG, path, world)
    values = dict(trained.evaluated(state))
    averaged = any(name.startswith(f"{trained.AVERAGE}/") for name in state)
    facts = {"from": name, "step": step, "average": averaged}
    if world.chief:  # who writes them down, and sees the folder as it has read it
        facts["sha256"] = reading.manifest(path, step)["digest"]
    return Source(values, facts, state=state)


def fit(model: keras.Model, source: Source, skip: str) -> tuple[Table, list[tuple[Any, np.ndarray]]]:
    """What becomes of each variable of a model, and the values that fit, each with its variable."""
    table, chosen, used = Table(), [], set()
    places = private_api.places_in_weight_files(model) if source.places else {}
    find = _finder(source.values)
    for variable in model.weights:
        if skip and re.search(skip, variable.path):
            table.left.append(variable.path)
            continue
        name = places.get(id(variable)) if source.places else find(variable.path)
        if name not in source.values:
            table.lacking.append(f"{variable.path} {_size(variable.shape)}")
            continue
        value = source.values[name]
        fitted = _fitted(model, variable, value)
        if fitted is None:
            table.lacking.append(f"{variable.path} {_size(variable.shape)}, there {_size(value.shape)} {value.dtype}")
            continue
        used.add(name)
        chosen.append((variable, fitted))
        if fitted.shape == value.shape:
            table.taken.append(variable.path)
        else:
            table.resized[variable.path] = f"{_size(value.shape)} → {_size(fitted.shape)}"
    table.unused = [f"{name} {_size(value.shape)}" for name, value in source.values.items() if name not in used]
    return table, chosen


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _finder(values: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Finds a path among names: as it is, or where either has no name of a model before it. Names may have dots."""
    exact: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for name in values:
        path = name.replace(".", "/").removesuffix(":0")
        exact.setdefault(path, []).append(name)
        below.setdefault(path.partition("/")[2], []).append(name)

    def find(path: str) -> str | None:
        rest = path.partition("/")[2]
        for aliases, key in ((exact, path), (exact, rest), (below, path), (below, rest)):
            if key and len(aliases.get(key, ())) == 1:
                return aliases[key][0]
        return None

    return find


def _fitted(model: keras.Model, variable: Any, value: np.ndarray) -> np.ndarray | None:
    """The value, or what the layer that holds the variable makes of one of another shape; None if it does not fit."""
    kinds = [np.dtype(kind).kind if str(kind) != "bfloat16" else "f" for kind in (variable.dtype, value.dtype)]
    if kinds[0] != kinds[1]:
        return None
    if tuple(variable.shape) == value.shape:
        return value
    for layer in private_api.layers_of(model):
        if hasattr(layer, "resized") and (made := layer.resized(variable, value)) is not None:
            return made
    return None


def _slots(
    config: Config, state: State | None, optimizers: Mapping[str, Any], named: Mapping[str, Any], table: Table
) -> list[tuple[Any, np.ndarray]]:
    """What optimizers know of each weight. Their counters begin at 0, as the run's step and its schedule do."""
    if state is None:
        raise BadConfiguration(
            f"--init_optimizer needs a run directory, and {_FLAG} {config.init_from} is a file; leave it out"
        )
    held = {_without_number(name): value for name, value in state.items()}
    chosen = []
    for name, variable in named.items():
        if name.partition("/")[0] not in optimizers or not len(variable.shape):
            continue
        if config.init_skip and re.search(config.init_skip, name):
            table.left.append(name)
            continue
        value = held.get(_without_number(name))
        if value is None or value.shape != tuple(variable.shape):
            table.lacking.append(f"{name} {_size(variable.shape)}")
            continue
        table.optimizer.append(name)
        chosen.append((variable, value))
    return chosen


def _without_number(name: str) -> str:
    """`optimizer/0003/adamw/stem_kernel_momentum` → `optimizer/adamw/stem_kernel_momentum`."""
    group, _, rest = name.split("/", 2) if name.count("/") > 1 else (name, "", "")
    return f"{group}/{rest}"


def _check(config: Config, table: Table) -> None:
    what = f"{_FLAG} {config.init_from}"
    if config.init_skip and not table.left:
        names = ", ".join([*table.taken, *table.resized, *table.lacking])
        raise BadConfiguration(
            f"--init_skip: {config.init_skip!r} is found in the path of no weight; there are: {names}"
        )
    if table.lacking:
        raise BadConfiguration(
            f"{what} has no value that fits: {'; '.join(table.lacking)}. It has, and nothing takes: "
            f"{'; '.join(table.unused) or 'nothing'}. Name what is to begin anew with --init_skip, or another source"
        )
    if not table.taken and not table.resized:
        raise BadConfiguration(f"--init_skip: {config.init_skip!r} leaves nothing to take from {what}; leave both out")
