"""Checkpoints that are whole or not there.

A checkpoint is a directory `step-0000000100` with a TensorFlow checkpoint (`state.index`, `state.data-…`, readable
with `tf.train.load_checkpoint`) and `manifest.json`: the step, the run's fixed flags, each variable's shape and type,
and the SHA-256 of each file. It is written aside, brought to the disk and renamed. Values are saved by list, not by
object graph: Keras 3 hides variables from `tf.train.Checkpoint` (16 of 20 of a model that keeps layers in lists).

Where checkpoints follow each other within a second, not each is brought to the disk: a process that is killed loses
nothing by it. A machine that loses its power may leave the others damaged, which are skipped; the newest one on the
disk is kept until a later one is there.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from trainers.record import carriers, reading
from trainers.record.state import State
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files

_ASIDE = ".writing-"
_FORMAT = 1
# Between two checkpoints that are brought to the disk, at least.
_SYNC_SECONDS = 1.0


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best by `metric` (`mode` is `max` or `min`).

    `identity`: what a checkpoint must have been saved with to be read. `complete`: adds to an older version's what it
    did not save yet.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        identity: Mapping[str, Any],
        metric: str,
        mode: str,
        complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ):
        self.run_dir, self.directory, self.keep = run_dir, run_dir / reading.CHECKPOINTS, keep
        self.identity, self.metric, self.mode, self._complete = dict(identity), metric, mode, complete
        # The newest one that this process has brought to the disk, and when; the evaluations of those it has read.
        self._synced, self._synced_at = -1, -math.inf
        self._values: dict[int, float | None] = {}
        self._cleared = False

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first; their contents are not verified."""
        return reading.checkpoint_steps(self.run_dir)

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return reading.checkpoint_folder(self.run_dir, step)

    def is_time_to_sync(self) -> bool:
        """Whether the next checkpoint is one to bring to the disk."""
        return time.monotonic() - self._synced_at >= _SYNC_SECONDS

    def save(self, step: int, state: State, metrics: Mapping[str, float] | None = None, to_disk: bool = True) -> Path:
        """Writes the checkpoint of a step, then drops old ones.

        `state`: every value by name. `metrics`: the evaluation at this very step, by which the best is kept. `to_disk`:
        whether it is brought to the disk.

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
            to_disk = to_disk or step == self._synced  # which it replaces
            if to_disk:
                for path in aside.iterdir():
                    files.sync(path)
            if final.exists():
                shutil.rmtree(final)
            os.replace(aside, final)
            if to_disk:
                files.sync(self.directory)
                self._synced, self._synced_at = step, time.monotonic()
        except (OSError, tf.errors.OpError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not self._lasts(error):
                raise  # a file system that stumbled: a crash, after which the run is started again
            raise BadConfiguration(self._failure(step, error)) from error
        self._values.pop(step, None)
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
            "metrics": files.without_nan(metrics or {}),
            "variables": {n: {"shape": list(state[n].shape), "dtype": dtypes[n]} for n in names},
            "files": {path.name: files.digest(path) for path in sorted(aside.iterdir())},
        }
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in (manifest | {"digest": _own_digest(manifest)}).items()]
        (aside / reading.MANIFEST).write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def _clear_unfinished(self) -> None:
        """Removes what a killed process left half-written. This process alone holds run_dir."""
        if self._cleared:
            return
        self._cleared = True
        for path in self.directory.glob(f"{_ASIDE}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _manifest(self, step: int) -> dict[str, Any]:
        return reading.manifest(self.run_dir, step)

    def best(self) -> tuple[int, float] | None:
        """Step and value of the best evaluated checkpoint, the earliest of equals; None if there is none.

        A value that is not finite is no evaluation.
        """
        values = ((step, self._value(step)) for step in self.steps())
        scored = [(step, value) for step, value in values if value is not None and math.isfinite(value)]
        sign = 1 if self.mode == "min" else -1
        return min(scored, key=lambda pair: (sign * pair[1], pair[0]), default=None)

    def _value(self, step: int) -> float | None:
        """The evaluation of a checkpoint; None if it has none, or cannot be read. Each is read once."""
        if step not in self._values:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._values[step] = self._manifest(step)["metrics"].get(self.metric)
        return self._values.get(step)

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation beats the best checkpoint on disk."""
        best, value = self.best(), metrics[self.metric]
        if not math.isfinite(value):
            return False
        return best is None or (value < best[1] if self.mode == "min" else value > best[1])

    def _retain(self) -> None:
        steps, best = self.steps(), self.best()
        kept = {*steps[-self.keep :], self._synced} | ({best[0]} if best else set())
        for step in steps:
            if step not in kept:
                self._values.pop(step, None)
                # Renamed first: a kill in the middle of the removal leaves nothing that looks like a checkpoint.
                doomed = self.directory / f"{_ASIDE}removed-{step}"
                with contextlib.suppress(OSError):
                    os.replace(self.path(step), doomed)
                    shutil.rmtree(doomed)

    def restore_newest(self, feed: Callable[[str], None] = lambda what: None) -> tuple[int, State] | None:
        """Step and values of the newest whole checkpoint; damaged ones are set aside with a warning.

        `feed`: called with what is waited for, as long as it comes from an object store.

        Raises:
          BadConfiguration: the checkpoint is of another run (other fixed flags), or all are damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                return step, self.read(step, feed)
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

    def read(self, step: int, feed: Callable[[str], None] = lambda what: None) -> State:
        """Values of the checkpoint of a step, verified. `feed`: as in `restore_newest`.

        Raises:
          OSError, ValueError, KeyError, tf.errors.OpError: it is damaged or gone.
          BadConfiguration: it is of another run, or of another format.
        """
        carriers.bring(self.run_dir, step, feed)
        path, manifest = self.path(step), self._manifest(step)
        if manifest.pop("digest", None) != _own_digest(manifest):
            raise ValueError("manifest.json does not have the digest that it names")
        if manifest["format"] != _FORMAT:
            raise BadConfiguration(
                f"{path} has format {manifest['format']}, this version reads {_FORMAT}; use its version"
            )
        before = self._complete(manifest["identity"])
        for key, value in self.identity.items():
            if paths.differs(before, key, value):
                whats = {"data": f"the fingerprint {value} of the data", "loop": f"the loop {value!r}"}
                what, other = whats.get(key, f"--{key} {value}"), f"{before[key]} of {path}"
                raise BadConfiguration(f"{what} differs from {other}; use that, or name another --run_dir")
        for file, expected in manifest["files"].items():
            if files.digest(path / file) != expected:
                raise ValueError(f"{file} does not have the digest that the manifest names")
        reader = tf.train.load_checkpoint(str(path / "state"))
        return {name: np.asarray(reader.get_tensor(name)) for name in manifest["variables"]}
