"""Runs of the trainer under observation, for launch/prove.py: what they end with, and what they saw on the way.

python launch/proof/probe.py SPECIFICATION.json

The specification: `{"out": DIRECTORY, "devices": N, "runs": [{"name", "flags", "changes", "look"}, …]}`. Each run is
`train` of `trainers/custom_loop.py` as it stands, edited or not, and leaves `NAME.json` and `NAME.npz` in DIRECTORY.
`changes` are made to the model before it is traced (`CHANGES`); `look` says what else is recorded: `input`, `state`,
`graph`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import hashlib
import json
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
from absl import logging

from trainers.settings.config import Config
from trainers.settings.exit_codes import CRASHED, OK, RunEnded
from trainers.settings.flags import config_from
from trainers.world import quiet

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with quiet.known_noise_removed(), quiet.not_installed("sklearn", "matplotlib"):
    import tensorflow as tf

from trainers import custom_loop
from trainers.record import checkpoints
from trainers.run.job import Job
from trainers.world import devices

# Steps whose examples are recorded.
NUM_INPUT_STEPS = 15
# A change of every weight in its last bits: what rounding does, done once on purpose.
LAST_BITS = 6e-8


def _without_noise(job: Job) -> None:
    """Every layer that draws numbers in training draws none."""
    for layer in job.model._flatten_layers():
        for name in ("rate", "stddev"):
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)


def _with_frozen_statistics(job: Job) -> None:
    """Batch normalization uses its moving statistics in training too."""
    for layer in job.model._flatten_layers():
        if hasattr(layer, "moving_mean"):
            layer.trainable = False


def _without_penalties(job: Job) -> None:
    """The model has no losses of its own."""
    for layer in job.model._flatten_layers():
        layer.add_loss = lambda *_: None
        if getattr(layer, "activity_regularizer", None) is not None:
            layer.activity_regularizer = None
    for variable in job.model.variables:
        variable.regularizer = None


def _with_other_last_bits(job: Job) -> None:
    """Every weight is changed in its last bits."""
    chance = np.random.default_rng(0)
    for variable in job.model.trainable_variables:
        value = variable.numpy()
        variable.assign(value * (1 + LAST_BITS * chance.choice([-1.0, 1.0], value.shape)).astype(value.dtype))


CHANGES: dict[str, Callable[[Job], None]] = {
    "no noise": _without_noise,
    "frozen statistics": _with_frozen_statistics,
    "no penalties": _without_penalties,
    "other last bits": _with_other_last_bits,
}


class Observation:
    """What one run shows. Within the block, the trainer's functions tell of themselves."""

    def __init__(self, run: Mapping[str, Any]):
        self.changes, self.look = run.get("changes", ()), run.get("look", ())
        self.job: Job | None = None
        self.source: Any = None
        self.concrete: Any = None
        self.at_start: dict[str, np.ndarray] = {}
        self.examples: dict[int, dict[int, list[str]]] = {}
        self._patches: list[Any] = []

    def __enter__(self) -> "Observation":
        build, make = custom_loop.build_job, custom_loop.make_train_call

        def build_job(*arguments: Any) -> Job:
            job = self.job = build(*arguments)
            with job.strategy.scope():
                for change in self.changes:
                    CHANGES[change](job)
            return job

        def make_train_call(job: Job, source: Any, *rest: Any) -> Any:
            self.job, self.source = job, source
            seen = _Recorded(source, self._record) if "input" in self.look else source
            return _Traced(make(job, seen, *rest), self)

        replaced = {"build_job": build_job, "make_train_call": make_train_call}
        self._patches = [mock.patch.object(custom_loop, name, value) for name, value in replaced.items()]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _record(self, step: np.ndarray, first: np.ndarray, *features: np.ndarray) -> None:
        if step < NUM_INPUT_STEPS:
            rows = [b"".join(array[i].tobytes() for array in features) for i in range(len(features[0]))]
            names = [hashlib.blake2b(row, digest_size=8).hexdigest() for row in rows]
            self.examples.setdefault(int(step), {})[int(first)] = names

    def variables(self) -> dict[str, np.ndarray]:
        """Every variable that the compiled call touches or that the job knows of, saved in checkpoints or not."""
        job = self.job
        known: dict[str, Any] = {}
        for group, members in (("model", job.model.variables), ("optimizer", job.optimizer.variables)):
            known |= checkpoints.name_variables(group, members)
        known |= checkpoints.name_variables("ema", job.ema) | job.variables
        values = {name: checkpoints.first_component(variable).numpy() for name, variable in known.items()}
        seen = {id(one.handle) for variable in known.values() for one in checkpoints._components(variable)}
        seen |= {id(token.handle) for token in checkpoints._ordering_tokens(job.strategy)}
        for outer, _ in self.concrete.graph.captures:
            data = getattr(outer, "_handle_data", None)
            if outer.dtype != tf.resource or id(outer) in seen or data is None or not data.is_set:
                continue
            kind = tf.as_dtype(data.shape_and_type[0].dtype)
            name = f"unknown/{len(values):04d}/{getattr(outer, '_name', None) or kind.name}"
            values[name] = tf.raw_ops.ReadVariableOp(resource=outer, dtype=kind).numpy()
        return values

    def gradients(self) -> dict[str, float | str]:
        """‖a - b‖ / ‖a‖ of the first batch's gradients: a computed eagerly, b in a graph, and b under XLA."""
        job, source = self.job, self.source
        zero = tf.constant(0, tf.int64)
        count = job.config.batch_size // job.config.accumulate // job.replicas
        source.start(0)
        feed, _ = source.feed()
        features, _ = job.strategy.run(
            lambda feed: source.share(feed, source.order(zero, zero + 1), zero, zero, 0, count), args=(feed,)
        )

        def computed(how: Callable[[Callable], Callable]) -> np.ndarray:
            function = how(lambda features: custom_loop.gradients_of_part(job, features, zero, zero)[0])
            found = job.strategy.run(function, args=(features,))
            return np.concatenate([gradient.numpy().astype(np.float64).ravel() for gradient in found])

        eager, found = computed(lambda function: function), {}
        for name, jit in (("graph", False), ("XLA", True)):
            try:
                other = computed(lambda function, jit=jit: tf.function(function, jit_compile=jit, autograph=False))
                found[name] = float(np.linalg.norm(eager - other) / max(np.linalg.norm(eager), 1e-30))
            except (tf.errors.OpError, ValueError, TypeError) as error:
                found[name] = next(iter(str(error).splitlines()), "it cannot be computed")[:200]
        return found


class _Recorded:
    """A source of batches that tells which examples each replica gets, outside of what XLA compiles."""

    def __init__(self, source: Any, record: Callable[..., None]):
        self._source, self._record = source, record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def share(self, feed: Any, order: Any, step: Any, first: Any, *rest: Any) -> Any:
        """The source's own, recorded."""
        features, weights = self._source.share(feed, order, step, first, *rest)
        tf.numpy_function(self._record, [step, first, *(features[name] for name in sorted(features))], [])
        return features, weights


class _Traced:
    """The train call, whose variables are read right after it is traced: a checkpoint is restored by then."""

    def __init__(self, call: Any, observation: Observation):
        self._call, self._observation = call, observation

    def get_concrete_function(self) -> Any:
        """The traced call."""
        concrete = self._observation.concrete = self._call.get_concrete_function()
        if "state" in self._observation.look:
            self._observation.at_start = self._observation.variables()
        return concrete


def observe(run: Mapping[str, Any], out: Path) -> None:
    """Makes one run and writes what it showed."""
    facts: dict[str, Any] = {"exit_code": OK, "message": ""}
    arrays: dict[str, np.ndarray] = {}
    with Observation(run) as observation:
        try:
            config: Config = config_from(["probe", *run["flags"]], "")
            summary = custom_loop.train(config)
            job = observation.job
            record = json.loads((summary.run_dir / "run.json").read_text()) if job.chief else {}
            facts["resumed_from"] = record.get("resumed_from")
            facts |= {"traces": summary.traces, "step": summary.step, "replicas": job.replicas, "chief": job.chief}
            if job.chief:
                state = checkpoints.values_of(job.variables)
                arrays |= {f"saved/{name}": value for name, value in state.items()}
            if "state" in run.get("look", ()):
                arrays |= {f"start/{name}": value for name, value in observation.at_start.items()}
                arrays |= {f"end/{name}": value for name, value in observation.variables().items()}
            if "graph" in run.get("look", ()):
                facts["gradients"] = observation.gradients()
        except RunEnded as error:
            facts |= {"exit_code": error.exit_code, "message": str(error)}
        except Exception as error:
            traceback.print_exc()
            facts |= {
                "exit_code": CRASHED,
                "message": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}",
            }
    facts["examples"] = observation.examples
    np.savez(out / f"{run['name']}.npz", **arrays)
    aside = out / f".{run['name']}.json"
    aside.write_text(json.dumps(facts))
    os.replace(aside, out / f"{run['name']}.json")


def main(specification: Mapping[str, Any]) -> int:
    """Makes all runs, one after another. Returns the exit code of the last."""
    logging.set_verbosity(logging.ERROR)
    out = Path(specification["out"])
    if specification["devices"]:
        devices.configure_devices(specification["devices"])
    for run in specification["runs"]:
        observe(run, out)
        print(f"done: {run['name']}", flush=True)
    return int(json.loads((out / f"{run['name']}.json").read_text())["exit_code"])


if __name__ == "__main__":
    custom_loop.leave(main(json.loads(Path(sys.argv[1]).read_text())))
