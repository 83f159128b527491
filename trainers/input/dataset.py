"""What a data set is: its splits, its fingerprint, and how its examples are prepared for a model."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from models.tasks import DataSpec
from trainers.settings import paths

# A split up to this size is held on each device; a larger one streams. Set --input to decide otherwise.
RESIDENT_BYTES = 1 << 30
# What images of varying size are resized to.
COMMON_IMAGE_SIZE = 224
_READ_BATCH = 1024

Features = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the function that loads a kind of data is given.

    `name`: the part of `--dataset` before the colon; `argument`: what follows it, a file or a folder of the user's.
    `data_dir`: where prepared data lie. `placement`: `resident`, `stream`, or `auto` by size. `label`: the column of a
    table to predict.
    """

    name: str
    argument: str = ""
    data_dir: str = ""
    placement: str = "auto"
    label: str = ""

    @property
    def full_name(self) -> str:
        """The name with its argument, as `--dataset` has it."""
        return f"{self.name}:{self.argument}" if self.argument else self.name

    @property
    def path(self) -> Path:
        """The argument as a path."""
        return paths.local(f"--dataset={self.name}:", self.argument)

    def is_resident(self, num_bytes: float) -> bool:
        """Whether splits are held on each device. `num_bytes`: the size of the data, infinite where it is not fixed."""
        return self.placement == "resident" or (self.placement == "auto" and num_bytes <= RESIDENT_BYTES)


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split: `arrays` `[size, …]` by feature name, or `stream()`, one example an element.

    `stream` always yields the examples in the same order; `arrays` stand in that order too.
    """

    size: int
    arrays: dict[str, np.ndarray] | None = None
    stream: Callable[[], tf.data.Dataset] | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set ready for training.

    `prepare(features) -> (inputs, targets)` turns a batch as stored into what the model takes, inside the compiled
    step. `fingerprint`: SHA-256 of what identifies the data. `spec`: what the model is built for.
    """

    name: str
    spec: DataSpec
    train: Split
    eval: Split
    fingerprint: str
    prepare: Callable[[Features], tuple[Any, Any]]


def fingerprint(identity: str, *splits: Split) -> str:
    """SHA-256 over the arrays themselves or, where they stream, over a name of the data and the sizes."""
    digest = hashlib.sha256(identity.encode())
    for split in splits:
        digest.update(f"{split.size}".encode())
        for key, array in sorted((split.arrays or {}).items()):
            digest.update(f"{key}{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def read_whole(stream: Callable[[], tf.data.Dataset]) -> Split:
    """A resident split: all examples of a stream as arrays. Features that are not numbers are left out."""
    pieces = list(stream().batch(_READ_BATCH).as_numpy_iterator())
    arrays = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    arrays = {key: array for key, array in arrays.items() if array.dtype.kind in "biuf"}
    return Split(len(next(iter(arrays.values()))), arrays=arrays)


def prepare_image(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
    """`image: [batch, height, width, channels]` uint8 → float32 in [-1, 1]; `label: [batch]` int64."""
    return tf.cast(features["image"], tf.float32) * (2 / 255) - 1, features["label"]


def standardized_rows(name: str, train: Split, evaluation: Split, num_classes: int, identity: str) -> Dataset:
    """Rows of numbers: splits with `features: [size, columns]` and `target: [size, …]`.

    Features, and a target that is not a class, are prepared as standard deviations from the mean of the training split.
    `num_classes`: 0 for regression. `identity`: goes into the fingerprint.
    """
    mean, deviation = _scale(train.arrays["features"])
    target_mean, target_deviation = (0, 1) if num_classes else _scale(train.arrays["target"])

    def prepare(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
        inputs = (features["features"] - mean) / deviation
        return inputs, features["target"] if num_classes else (features["target"] - target_mean) / target_deviation

    columns, target_shape = train.arrays["features"].shape[1:], train.arrays["target"].shape[1:]
    task = "classification" if num_classes else "regression"
    spec = DataSpec(task, columns, num_classes=num_classes, target_shape=target_shape)
    return Dataset(name, spec, train, evaluation, fingerprint(identity, train, evaluation), prepare)


def _scale(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, float32; a column that is constant is divided by 1."""
    wide = array.astype(np.float64)
    deviation = wide.std(axis=0)
    return wide.mean(axis=0).astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)
