"""Checkpoints that are whole or not there.

A checkpoint is a directory `step-0000000100` with a TensorFlow checkpoint (`state.index`, `state.data-…`, readable
with `tf.train.load_checkpoint`) and `manifest.json`: the step, the run's fixed flags, each variable's shape and type,
and the SHA-256 of each file. It is written aside, brought to the disk and renamed. Values are saved by list, not by
object graph: Keras 3 hides variables from `tf.train.Checkpoint` (16 of 20 of a model that keeps layers in lists).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from trainers.settings.exit_codes import BadConfiguration

_NAME = re.compile(r"step-(\d{10})$")
_ASIDE = ".writing-"
_FORMAT = 1
State = dict[str, np.ndarray | tf.Tensor]


def name_variables(group: str, variables: Iterable[Any]) -> dict[str, Any]:
    """Names for a list of Keras or TensorFlow variables, unique and in order: `model/0003/resnet/stem/kernel`."""
    return {f"{group}/{i:04d}/{getattr(v, 'path', v.name)}": v for i, v in enumerate(variables)}


def reader(variables: Mapping[str, Any]) -> Callable[[], State]:
    """A function that gives the variables' values on the host, fast enough to be called between two steps.

    Later updates do not reach what it gave. On a CPU nothing is copied, they are tensors: TensorFlow gives a variable
    that is updated while somebody holds its value new memory.
    """
    held = {}
    for name, variable in variables.items():
        component = first_component(variable)
        on_host = (lambda value: value) if "CPU" in component.device else np.asarray
        held[name] = component.handle, component.dtype, on_host
    return lambda: {
        name: on_host(tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype))
        for name, (handle, dtype, on_host) in held.items()
    }


def values_of(variables: Mapping[str, Any]) -> State:
    """The variables' values as arrays, once. Later updates do not reach them."""
    return {name: np.asarray(value) for name, value in reader(variables)().items()}


def _native(variable: Any) -> tf.Variable:
    """The TensorFlow variable under a Keras variable."""
    return getattr(variable, "value", variable) if not isinstance(variable, tf.Variable) else variable


def _components(variable: Any) -> tuple[tf.Variable, ...]:
    """One variable for each replica."""
    native = _native(variable)
    return tuple(getattr(native, "values", (native,)))


def first_component(variable: Any) -> tf.Variable:
    """A variable as it lies on this process's first device."""
    return _components(variable)[0]


def _ordering_tokens(strategy: tf.distribute.Strategy) -> list[tf.Variable]:
    """Variables by which TensorFlow keeps collectives in order; they hold no value of the run."""
    operations = (getattr(strategy.extended, f"_{where}cross_device_ops", None) for where in ("", "host_"))
    launchers = [launcher for one in operations for launcher in getattr(one, "_launchers", ())]
    return [launcher._ordering_token for launcher in launchers if hasattr(launcher, "_ordering_token")]


def check_complete(strategy: tf.distribute.Strategy, variables: Mapping[str, Any], *functions: Any) -> None:
    """Checks that each variable that a compiled function touches is among those that are saved.

    Raises:
      BadConfiguration: one is not: a plain `tf.Variable` that Keras does not track, for instance.
    """
    saved = {id(component.handle) for v in variables.values() for component in _components(v)}
    saved |= {id(token.handle) for token in _ordering_tokens(strategy)}
    for function in functions:
        for outer, _ in function.graph.captures:
            if outer.dtype != tf.resource or id(outer) in saved or not hasattr(outer, "_handle_data"):
                continue
            data = outer._handle_data
            if data is None or not data.is_set:
                continue  # an iterator or a table: no value of its own
            name = getattr(outer, "_name", "") or f"of shape {data.shape_and_type[0].shape}"
            raise BadConfiguration(
                f"variable {name} is used in training but would miss from checkpoints; "
                "make it with add_weight, or assign the layer that holds it to an attribute of the model"
            )


def _directory_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:010d}"


def is_there(directory: Path, step: int) -> bool:
    """Whether a step's checkpoint lies in the directory of all checkpoints; it is not verified.

    A shared file system may show a folder as it was a minute ago, but not a file that is opened.
    """
    return (_directory_of(directory, step) / "manifest.json").exists()


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best by `metric` (`mode` is `max` or `min`)."""

    def __init__(self, directory: Path, keep: int, identity: Mapping[str, Any], metric: str, mode: str):
        self.directory, self.keep = directory, keep
        self.identity, self.metric, self.mode = dict(identity), metric, mode

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first; their contents are not verified."""
        if not self.directory.is_dir():
            return []
        found = (_NAME.match(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return _directory_of(self.directory, step)

    def save(self, step: int, state: State, metrics: Mapping[str, float] | None = None) -> Path:
        """Writes the checkpoint of a step, then drops old ones.

        `state`: every value by name. `metrics`: the evaluation at this very step, by which the best is kept.

        Raises:
          BadConfiguration: the disk is full or run_dir has become unwritable.
          OSError, tf.errors.OpError: it could not be written for another reason, which may pass.
        """
        final = self.path(step)
        aside = self.directory / f"{_ASIDE}{final.name}-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear_unfinished()
            aside.mkdir()
            self._write(aside, step, state, metrics)
            if final.exists():
                shutil.rmtree(final)
            os.replace(aside, final)
            _sync(self.directory)
        except (OSError, tf.errors.OpError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not self._lasts(error):
                raise  # a file system that stumbled: a crash, after which the run is started again
            raise BadConfiguration(self._failure(step, error)) from error
        self._retain()
        return final

    def _full(self, error: Exception) -> bool:
        """Whether an error of writing is that of a full disk; TensorFlow does not always say so."""
        said = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        return said or shutil.disk_usage(self.directory.parent).free < 1 << 20

    def _lasts(self, error: Exception) -> bool:
        """Whether an error of writing lasts until somebody does something: no space, no right."""
        lasting = (errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
        said = isinstance(error, tf.errors.PermissionDeniedError) or getattr(error, "errno", None) in lasting
        return (
            said or any(words in str(error) for words in ("Disk quota", "Read-only file system")) or self._full(error)
        )

    def _failure(self, step: int, error: Exception) -> str:
        reason = "the disk is full" if self._full(error) else str(error).splitlines()[0]
        steps = self.steps()
        last = f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
        where = f"the checkpoint of step {step} cannot be written to {self.directory}"
        return f"{where}: {reason}; {last}; free space, start again"

    def _write(self, aside: Path, step: int, state: State, metrics: Mapping[str, float] | None) -> None:
        names = sorted(state)
        with tf.device("CPU:0"):
            tf.raw_ops.SaveV2(
                prefix=str(aside / "state"),
                tensor_names=names,
                shape_and_slices=[""] * len(names),
                tensors=[state[name] for name in names],
            )
        dtypes = {name: tf.as_dtype(value.dtype).name for name, value in state.items()}
        manifest = {
            "format": _FORMAT,
            "step": step,
            "identity": self.identity,
            "metrics": dict(metrics or {}),
            "variables": {n: {"shape": list(state[n].shape), "dtype": dtypes[n]} for n in names},
            "files": {path.name: digest(path) for path in sorted(aside.iterdir())},
        }
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in (manifest | {"digest": _own_digest(manifest)}).items()]
        (aside / "manifest.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        for path in aside.iterdir():
            _sync(path)

    def _clear_unfinished(self) -> None:
        """Removes what a killed process left half-written. This process alone holds run_dir."""
        for path in self.directory.glob(f"{_ASIDE}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _manifest(self, step: int) -> dict[str, Any]:
        return json.loads((self.path(step) / "manifest.json").read_text())

    def best(self) -> tuple[int, float] | None:
        """Step and value of the best evaluated checkpoint, the earliest of equals; None if none was evaluated."""
        scored = []
        for step in self.steps():
            with contextlib.suppress(OSError, ValueError, KeyError):
                scored.append((step, self._manifest(step)["metrics"][self.metric]))
        sign = 1 if self.mode == "min" else -1
        return min(scored, key=lambda pair: (sign * pair[1], pair[0]), default=None)

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation beats the best checkpoint on disk."""
        best, value = self.best(), metrics[self.metric]
        return best is None or (value < best[1] if self.mode == "min" else value > best[1])

    def _retain(self) -> None:
        steps, best = self.steps(), self.best()
        kept = set(steps[-self.keep :]) | ({best[0]} if best else set())
        for step in steps:
            if step not in kept:
                # Renamed first: a kill in the middle of the removal leaves nothing that looks like a checkpoint.
                doomed = self.directory / f"{_ASIDE}removed-{step}"
                with contextlib.suppress(OSError):
                    os.replace(self.path(step), doomed)
                    shutil.rmtree(doomed)

    def restore(self, step: int) -> State:
        """Values of the checkpoint of a step, verified.

        Raises:
          BadConfiguration: it cannot be read here: run_dir is not one folder that all workers share.
        """
        try:
            return self.read(step)
        except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadConfiguration(
                f"the chief continues from step {step}, but {self.path(step)} cannot be read here: {reason}; "
                "--run_dir must be one folder that all workers share"
            ) from error

    def restore_newest(self) -> tuple[int, State] | None:
        """Step and values of the newest whole checkpoint; damaged ones are set aside with a warning.

        Raises:
          BadConfiguration: the checkpoint is of another run (other fixed flags), or all are damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                return step, self.read(step)
            except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logging.warning("checkpoint %s is damaged and skipped: %s", self.path(step), reason)
                damaged.append(step)
                aside = self.path(step).with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.path(step), aside)
        if damaged:
            raise BadConfiguration(
                f"every checkpoint in {self.directory} is damaged (steps {damaged}); restore one from a copy, "
                "or name another --run_dir to begin again"
            )
        return None

    def read(self, step: int) -> State:
        """Values of the checkpoint of a step, verified.

        Raises:
          OSError, ValueError, KeyError, tf.errors.OpError: it is damaged or gone.
          BadConfiguration: it is of another run, or of another format.
        """
        path, manifest = self.path(step), self._manifest(step)
        if manifest.pop("digest", None) != _own_digest(manifest):
            raise ValueError("manifest.json does not have the digest that it names")
        if manifest["format"] != _FORMAT:
            raise BadConfiguration(
                f"{path} has format {manifest['format']}, this version reads {_FORMAT}; use its version"
            )
        for key, value in self.identity.items():
            if manifest["identity"].get(key, value) != value:
                what = f"--{key} {value}" if key != "data" else f"the fingerprint {value} of the data"
                other = f"{manifest['identity'][key]} of {path}"
                raise BadConfiguration(f"{what} differs from {other}; use that, or name another --run_dir")
        for file, expected in manifest["files"].items():
            if digest(path / file) != expected:
                raise ValueError(f"{file} does not have the digest that the manifest names")
        reader = tf.train.load_checkpoint(str(path / "state"))
        return {name: np.asarray(reader.get_tensor(name)) for name in manifest["variables"]}


def assign(variables: Mapping[str, Any], state: State) -> None:
    """Puts a checkpoint's values into the variables.

    Raises:
      BadConfiguration: a variable is missing, left over, or of another shape: the model's code has changed.
    """
    missing, left = variables.keys() - state.keys(), state.keys() - variables.keys()
    if missing or left:
        names = f"missing: {sorted(missing)[:3]}, left over: {sorted(left)[:3]}"
        raise BadConfiguration(
            f"the checkpoint does not fit the model ({names}); restore the model's code, or name another --run_dir"
        )
    for name, variable in variables.items():
        value = state[name]
        if tuple(variable.shape) != value.shape:
            raise BadConfiguration(
                f"{name} has shape {tuple(variable.shape)}, in the checkpoint {value.shape}; "
                "restore the model's code, or name another --run_dir"
            )
        _native(variable).assign(value)
