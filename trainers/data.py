"""Data sets by name: prepared with TensorFlow Datasets, held as arrays or streamed, and described to the model."""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import os
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from models.tasks import DataSpec
from trainers import builders
from trainers.data_cards import DATASETS, DataCard, data_card
from trainers.exit_codes import BadConfiguration

# A split up to this size is held on each device; a larger one streams. Set --input to decide otherwise.
RESIDENT_BYTES = 1 << 30
# What images of varying size are resized to when they stream.
STREAMED_IMAGE_SIZE = 224
_PROBE_SECONDS = 10.0
_READ_BATCH = 1024

Features = dict[str, Any]


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


def load(name: str, data_dir: str, placement: str = "auto") -> Dataset:
    """Prepares a data set in `data_dir` if it is not there yet, and loads it.

    `placement`: `resident`, `stream`, or `auto` by size.

    Raises:
      BadConfiguration: no such data set, no network for it, no space, or not images with labels.
    """
    card = data_card(name)
    with _readable_errors(name, data_dir):
        builder = _builder(name, data_dir, card)
        _prepare(builder, name, data_dir)
        return _image_classification(builder, name, placement)


def _builder(name: str, data_dir: str, card: DataCard) -> tfds.core.DatasetBuilder:
    if card.builder:
        return getattr(builders, card.builder)(data_dir=data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name, tfds.list_builders(), n=3)
        hint = f"; near it in TensorFlow Datasets: {', '.join(near)}" if near else ""
        raise BadConfiguration(
            f"--dataset {name!r} is not known{hint}; choose one of: {', '.join(sorted(DATASETS))}, "
            "or an image classification set of TensorFlow Datasets such as mnist or cifar10"
        ) from None


def _prepare(builder: tfds.core.DatasetBuilder, name: str, data_dir: str) -> None:
    """Downloads and prepares once; processes that start together take turns."""
    if builder.is_prepared():
        return
    _check_network(builder, name)
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(data_dir) / f".{builder.name}.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        tfds.disable_progress_bar()
        builder.download_and_prepare()


def _check_network(builder: tfds.core.DatasetBuilder, name: str) -> None:
    """Answers within seconds where the downloader would retry for minutes. A proxy resolves names itself: no check."""
    hosts = {urllib.parse.urlsplit(url).hostname for url in builder.url_infos or ()}
    proxy = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    for host in sorted(filter(None, hosts))[:1] if not proxy else ():
        try:
            socket.create_connection((host, 443), timeout=_PROBE_SECONDS).close()
        except OSError as error:
            raise BadConfiguration(
                f"--dataset {name!r} is not in --data_dir and {host} cannot be reached ({error}); "
                "connect this machine or prepare the data elsewhere and copy it; --dataset=digits needs no network"
            ) from None


@contextlib.contextmanager
def _readable_errors(name: str, data_dir: str) -> Iterator[None]:
    try:
        yield
    except BadConfiguration:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason, remedy = "the disk is full", "free space or name another --data_dir"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            reason, remedy = str(error), "name a --data_dir that can be written"
        else:
            reason, remedy = str(error).splitlines()[0], "--dataset=digits needs no network"
        raise BadConfiguration(f"--dataset {name!r} could not be prepared in {data_dir}: {reason}; {remedy}") from error
    except (tf.errors.OpError, tfds.core.download.download_manager.NonMatchingChecksumError) as error:
        line = str(getattr(error, "message", error)).splitlines()[0]
        raise BadConfiguration(
            f"--dataset {name!r} in {data_dir} cannot be read: {line}; delete its folder there to prepare it again"
        ) from error


def _image_classification(builder: tfds.core.DatasetBuilder, name: str, placement: str) -> Dataset:
    features, splits = builder.info.features, builder.info.splits
    if not {"image", "label"} <= set(features) or not isinstance(features["label"], tfds.features.ClassLabel):
        raise BadConfiguration(
            f"--dataset {name!r} has features {sorted(features)}; image and label are needed; choose such a set"
        )
    held_out = next((split for split in ("test", "validation") if split in splits or not splits), None)
    if (splits and "train" not in splits) or held_out is None:
        raise BadConfiguration(
            f"--dataset {name!r} has splits {sorted(splits)}; train and test or validation are needed; choose another"
        )
    shape = features["image"].shape
    fixed = None not in shape
    size = int(np.prod(shape)) * _size(builder, "train") if fixed else None
    resident = placement == "resident" or (placement == "auto" and fixed and size <= RESIDENT_BYTES)
    if resident and not fixed:
        raise BadConfiguration(f"--input=resident: the images of {name!r} vary in size; use --input=stream")
    if not fixed:
        shape = (STREAMED_IMAGE_SIZE, STREAMED_IMAGE_SIZE, shape[-1] or 3)
    make = _resident_split if resident else _streamed_split
    train, evaluation = (make(builder, split, shape) for split in ("train", held_out))
    spec = DataSpec("classification", tuple(shape), num_classes=features["label"].num_classes)
    return Dataset(name, spec, train, evaluation, _fingerprint(builder, train, evaluation), _prepare_image)


def _prepare_image(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
    """`image: [batch, height, width, channels]` uint8 → float32 in [-1, 1]; `label: [batch]` int64."""
    return tf.cast(features["image"], tf.float32) * (2 / 255) - 1, features["label"]


def _resident_split(builder: tfds.core.DatasetBuilder, split: str, shape: tuple[int, ...]) -> Split:
    pieces = list(builder.as_dataset(split=split, shuffle_files=False).batch(_READ_BATCH).as_numpy_iterator())
    arrays = {key: np.concatenate([piece[key] for piece in pieces]) for key in ("image", "label")}
    return Split(len(arrays["label"]), arrays=arrays)


def _streamed_split(builder: tfds.core.DatasetBuilder, split: str, shape: tuple[int, ...]) -> Split:
    def example(features: Features) -> Features:
        image = features["image"]
        if image.shape.as_list() != list(shape):
            image = tf.cast(tf.image.resize(image, shape[:2], antialias=True), tf.uint8)
        return {"image": tf.ensure_shape(image, shape), "label": features["label"]}

    def stream() -> tf.data.Dataset:
        order = tfds.ReadConfig(try_autocache=False)
        return builder.as_dataset(split=split, shuffle_files=False, read_config=order).map(
            example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )

    return Split(_size(builder, split), stream=stream)


def _size(builder: tfds.core.DatasetBuilder, split: str) -> int:
    return int(builder.as_dataset(split=split, shuffle_files=False).cardinality())


def _fingerprint(builder: tfds.core.DatasetBuilder, *splits: Split) -> str:
    """SHA-256 over the arrays themselves or, where they stream, over the builder's full name and sizes."""
    digest = hashlib.sha256(f"{builder.info.full_name}".encode())
    for split in splits:
        digest.update(f"{split.size}".encode())
        for key, array in sorted((split.arrays or {}).items()):
            digest.update(f"{key}{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()
