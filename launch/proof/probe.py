"""Runs of the trainer under observation, for launch/prove.py: what they end with, and what they saw on the way.

python launch/proof/probe.py SPECIFICATION.json

The specification: `{"trainer": LOOP, "out": DIRECTORY, "devices": N, "runs": [{"name", "flags", "changes", "look"},
…]}`. Each run is `train` of the loop's script as it stands, edited or not, and leaves `NAME.json` and `NAME.npz` in
DIRECTORY. `changes` are made to the model before it is traced (`CHANGES`); `look` says what else is recorded: `input`,
`state`, `graph`, `export`; with `examples`, nothing is trained, and the examples of some steps are read.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie two above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements()

import importlib
import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from trainers.world import private_api, process, quiet

quiet.import_tensorflow()
import tensorflow as tf

from launch.proof import expected
from launch.proof.differences import REORDERED
from launch.proof.examples import digest, examples_of
from trainers.record import reading, state
from trainers.run import replica_layers
from trainers.run.hooks import Hooks
from trainers.run.models_loop import ModelsLoop
from trainers.settings.exit_codes import CRASHED, OK, RunEnded
from trainers.settings.flags import config_from
from trainers.settings.pages import Page, page_of
from trainers.world import devices, files

# Steps whose examples are recorded.
NUM_INPUT_STEPS = 15
# A change of every weight in its last bits: what rounding does, done once on purpose.
RELATIVE_CHANGE = 6e-8
# A change by which the weights leave a point at which the gradient jumps, and how many points are looked at. After 3
# steps of `resnet` one ReLU of 65,536 had an input of 4e-7 eager and -7e-8 under XLA, and 6e-4 of the gradient with it;
# of 16 points this far away none was more than 2e-5 apart.
AWAY, POINTS = 1e-3, 5


def _without_noise(loop: ModelsLoop) -> None:
    """Every layer that draws numbers in training draws none."""
    replica_layers.without_training(_suspects(loop, replica_layers.NOISE))
    for layer in _layers(loop):
        for name in ("rate", "stddev"):
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)


def _with_frozen_statistics(loop: ModelsLoop) -> None:
    """Batch normalization uses its moving statistics in training too."""
    normalizing = [layer for layer in _layers(loop) if hasattr(layer, "moving_mean")]
    replica_layers.without_training([*_suspects(loop, replica_layers.STATISTICS), *normalizing])


def _suspects(loop: ModelsLoop, kind: str) -> list[Any]:
    return [suspect.layer for suspect in loop.suspects() if suspect.kind == kind]


def _layers(loop: ModelsLoop) -> list[Any]:
    return [layer for model in loop.models.values() for layer in private_api.layers_of(model)]


def _without_penalties(loop: ModelsLoop) -> None:
    """The model has no losses of its own."""
    for layer in _layers(loop):
        layer.add_loss = lambda *_: None
        if getattr(layer, "activity_regularizer", None) is not None:
            layer.activity_regularizer = None
    for model in loop.models.values():
        for variable in model.variables:
            variable.regularizer = None


def _with_other_last_bits(loop: ModelsLoop) -> None:
    """Every weight is changed in its last bits."""
    _move(loop, RELATIVE_CHANGE)


def _move(loop: ModelsLoop, relative_change: float) -> None:
    chance = np.random.default_rng(0)
    for variable in loop.weights:
        value = variable.numpy()
        variable.assign(value * (1 + relative_change * chance.choice([-1.0, 1.0], value.shape)).astype(value.dtype))


CHANGES: dict[str, Callable[[ModelsLoop], None]] = {
    "no noise": _without_noise,
    "frozen statistics": _with_frozen_statistics,
    "no penalties": _without_penalties,
    "other last bits": _with_other_last_bits,
}


class Observation(Hooks):
    """Changes a run as its specification says, and keeps what it shows."""

    def __init__(self, run: Mapping[str, Any]):
        self.changes, self.look = run.get("changes", ()), run.get("look", ())
        self.loop: ModelsLoop | None = None
        self.batches: Any = None
        self.concrete: Any = None
        self.at_start: dict[str, np.ndarray] = {}
        # Kind → paths of the layers that depend on the number of replicas.
        self.suspects: dict[str, list[str]] = {}
        # Step → position of the first example of a part → digests of the part's examples.
        self.examples: dict[int, dict[int, list[str]]] = {}

    def built(self, loop: ModelsLoop) -> None:
        """Makes the changes."""
        self.loop = loop
        for suspect in loop.suspects():
            self.suspects.setdefault(suspect.kind, []).append(suspect.path)
        for change in self.changes:
            CHANGES[change](loop)

    def source(self, loop: ModelsLoop, source: Any) -> Any:
        """The source, or one that also records which examples it gives."""
        self.batches = source
        return _Recorded(source, self._record) if "input" in self.look else source

    def traced(self, loop: ModelsLoop, concrete: Any) -> None:
        """Reads all variables before the first update: a checkpoint is restored by then."""
        self.concrete = concrete
        if "state" in self.look:
            self.at_start = self.variables()

    def _record(self, step: np.ndarray, first: np.ndarray, *features: np.ndarray) -> None:
        if step < NUM_INPUT_STEPS:
            digests = [digest(*(array[i] for array in features)) for i in range(len(features[0]))]
            self.examples.setdefault(int(step), {})[int(first)] = digests

    def variables(self) -> dict[str, np.ndarray]:
        """Every variable that the compiled call uses or that the loop holds, saved in checkpoints or not."""
        loop, known = self.loop, {}
        for group, holder in {**loop.models, **loop.optimizers, **loop.averages}.items():
            known |= state.name_variables(group, holder.variables)
        known |= loop.variables
        values = state.values_of(known)
        for name, handle, dtype, _ in state.unsaved_variables(loop.world.strategy, known, self.concrete):
            value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype).numpy()
            values[f"unknown/{len(values):04d}/{name or dtype.name}"] = value
        return values

    def gradients(self) -> dict[str, list[float] | str]:
        """‖a - b‖ / ‖a‖ of the first batch's gradients: a computed eagerly, b in a graph, and b under XLA.

        One number where the weights are or, where it is more than rounding of a smooth function, several: the weights
        are moved by `AWAY`, up to `POINTS`, until it is not. They stay there.

        Raises:
          NotImplementedError: the loop gives no gradients.
        """
        loop, source, strategy = self.loop, self.batches, self.loop.world.strategy
        zero = tf.constant(0, tf.int64)
        source.start(0)
        feed, _ = source.feed()
        features, _, _ = strategy.run(lambda f: source.part(f, source.order(zero, zero + 1), zero, 0), args=(feed,))

        def eagerly(features: Any) -> list[tf.Tensor]:
            return loop.gradients_of(features, zero, zero)

        def computed(function: Callable) -> np.ndarray:
            gradients = strategy.run(function, args=(features,))
            return np.concatenate([gradient.numpy().astype(np.float64).ravel() for gradient in gradients])

        compiled = {
            name: tf.function(eagerly, jit_compile=jit, autograph=False)
            for name, jit in (("graph", False), ("XLA", True))
        }
        found: dict[str, list[float] | str] = {name: [] for name in compiled}
        for point in range(POINTS):
            pending = [name for name, values in found.items() if not values or _jumps(values)]
            if not pending:
                break
            if point:
                _move(loop, AWAY)
            eager = computed(eagerly)
            for name in pending:
                try:
                    apart = np.linalg.norm(eager - computed(compiled[name]))
                    found[name].append(float(apart / max(np.linalg.norm(eager), 1e-30)))
                except (tf.errors.OpError, ValueError, TypeError) as error:
                    found[name] = next(iter(str(error).splitlines()), "it cannot be computed")[:200]
        return found


def _jumps(values: list[float] | str) -> bool:
    """Whether the last of the differences is more than rounding of a smooth function."""
    return not isinstance(values, str) and not values[-1] <= REORDERED


class _Recorded:
    """A source of batches that records which examples each replica gets, outside of what XLA compiles."""

    def __init__(self, source: Any, record: Callable[..., None]):
        self._source, self._record = source, record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def part(self, feed: Any, order: Any, step: tf.Tensor, number: int) -> tuple[Any, tf.Tensor, tf.Tensor]:
        """The source's own part, recorded."""
        features, weights, first = self._source.part(feed, order, step, number)
        tf.numpy_function(self._record, [step, first, *(features[name] for name in sorted(features))], [])
        return features, weights, first


def observe(page: Page, run: Mapping[str, Any], out: Path) -> int:
    """Makes a run, writes what it showed, and returns its exit code."""
    facts: dict[str, Any] = {"exit_code": OK, "message": "", "error": ""}
    arrays: dict[str, np.ndarray] = {}
    observation = Observation(run)
    try:
        config = config_from(["probe", *run["flags"]], "", page.settings)
        if "examples" in observation.look:
            observation.examples = examples_of(config)
            return _write(run["name"], out, facts | {"examples": observation.examples}, arrays)
        summary = module_of(page).train(config, observation)
        world = observation.loop.world
        facts |= {"traces": summary.traces, "step": summary.step, "replicas": world.replicas, "chief": world.chief}
        if world.chief:
            facts["resumed_from"] = reading.read_run(summary.run_dir).get("resumed_from")
            arrays |= _named("saved", state.values_of(observation.loop.variables))
        if "state" in observation.look:
            arrays |= _named("start", observation.at_start) | _named("end", observation.variables())
        if "export" in observation.look:
            facts["export"] = expected.write(out / f"{run['name']}.expected.npz", observation.loop)
        if "graph" in observation.look:
            with devices.full_float32():
                facts["gradients"] = observation.gradients()
    except RunEnded as error:
        facts |= {"exit_code": error.exit_code, "message": str(error), "error": type(error).__name__}
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
        facts |= {"exit_code": CRASHED, "message": message, "error": type(error).__name__}
    return _write(
        run["name"], out, facts | {"examples": observation.examples, "suspects": observation.suspects}, arrays
    )


def module_of(page: Page) -> Any:
    """The loop's script as a module."""
    if str(page.path.parent) not in sys.path and page.command == (str(page.path),):
        sys.path.append(str(page.path.parent))
    return importlib.import_module(page.module)


def _write(name: str, out: Path, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
    np.savez(out / f"{name}.npz", **arrays)
    files.write_text(out / f"{name}.json", files.to_json(facts))
    return facts["exit_code"]


def _named(group: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{group}/{name}": value for name, value in values.items()}


def main(specification: Mapping[str, Any]) -> int:
    """Makes all runs, one after another. Returns the exit code of the last."""
    logging.set_verbosity(logging.ERROR)
    page, out, code = page_of(specification["trainer"]), Path(specification["out"]), OK
    if specification["devices"]:
        devices.configure_devices(specification["devices"])
    for run in specification["runs"]:
        code = observe(page, run, out)
        print(f"done: {run['name']}", flush=True)
    return code


if __name__ == "__main__":
    process.leave(process.run(lambda: main(json.loads(Path(sys.argv[1]).read_text()))))
