"""Builders of TensorFlow Datasets, wherever they come from: prepared once in `data_dir`, then read."""

import contextlib
import errno
import math
import os
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from models.tasks import DataSpec
from trainers.input.dataset import (
    COMMON_IMAGE_SIZE,
    Dataset,
    Features,
    Request,
    Split,
    fingerprint,
    prepare_image,
    read_whole,
)
from trainers.input.errors import reason_of
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import locks

_PROBE_SECONDS = 10.0
_NO_NETWORK_NEEDED = "--dataset=digits needs no network"

Make = Callable[[], tfds.core.DatasetBuilder]


def prepared(make: Make, request: Request) -> tfds.core.DatasetBuilder:
    """The builder that `make()` gives, with its data in `data_dir`: downloaded and prepared if they are not there.

    Raises:
      BadConfiguration: the data are an incomplete copy, or their host cannot be reached.
    """
    builder = make()
    if _is_prepared(builder):
        return builder
    _prepare(make, request)
    return make()  # only a new one knows what another process has prepared meanwhile


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether its data are there. TFDS's own answer warns each time that they are not."""
    return (Path(builder.data_path) / "dataset_info.json").exists()


def _prepare(make: Make, request: Request) -> None:
    """Downloads and prepares once; processes that start together take turns, where the file system has locks."""
    folder = Path(request.data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadConfiguration(f"--data_dir {folder} {paths.why_no_directory(folder)}") from None
    with open(folder / f".{request.name.partition('/')[0]}.lock", "w") as guard:
        if without := locks.hold(guard, wait=True):
            logging.warning(
                "--data_dir %s cannot be locked (%s): prepare a data set in one process alone", folder, without
            )
        builder = make()
        if _is_prepared(builder):
            return
        if Path(builder.data_path).exists():
            # Prepared data are renamed into place whole, so this is a copy; TFDS would take it for prepared.
            raise BadConfiguration(
                f"--data_dir holds {builder.data_path} without its dataset_info.json, an incomplete copy; "
                "complete or remove it"
            )
        _check_network(builder, request.name)
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
                f"connect this machine or prepare the data elsewhere and copy it; {_NO_NETWORK_NEEDED}"
            ) from None


@contextlib.contextmanager
def readable_errors(request: Request) -> Iterator[None]:
    """Errors of preparing and of reading prepared data, in one line. Not for files of the user's own.

    Raises:
      BadConfiguration: in place of the error.
    """
    name, data_dir = request.full_name, request.data_dir
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason, remedy = "the disk is full", "free space or name another --data_dir"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            reason, remedy = str(error), "name a --data_dir that can be written"
        else:
            reason, remedy = reason_of(error), _NO_NETWORK_NEEDED
        raise BadConfiguration(f"--dataset {name!r} could not be prepared in {data_dir}: {reason}; {remedy}") from error
    except (tf.errors.OpError, tfds.core.download.download_manager.NonMatchingChecksumError) as error:
        raise BadConfiguration(
            f"--dataset {name!r} in {data_dir} cannot be read: {reason_of(error)}; "
            "delete its folder there to prepare it again"
        ) from error


def image_classification(builder: tfds.core.DatasetBuilder, name: str, request: Request) -> Dataset:
    """The data of a builder with features `image` and `label`, as the data set `name`.

    `test` is for evaluation; where there is none, `validation`. Images that vary in size are resized to
    224×224 and stream.

    Raises:
      BadConfiguration: it has other features or splits, or images of varying size are asked to be resident.
    """
    _check_features(builder, name)
    held_out = _held_out_split(builder, name)
    shape = builder.info.features["image"].shape
    num_bytes = math.inf if None in shape else math.prod(shape) * _size(builder, "train")
    resident = request.is_resident(num_bytes)
    if None in shape:
        if resident:
            raise BadConfiguration(f"--input=resident: the images of {name!r} vary in size; use --input=stream")
        shape = (COMMON_IMAGE_SIZE, COMMON_IMAGE_SIZE, shape[-1] or 3)
    splits = [
        read_split(builder, split) if resident else _streamed_split(builder, split, shape)
        for split in ("train", held_out)
    ]
    spec = DataSpec("classification", tuple(shape), num_classes=builder.info.features["label"].num_classes)
    return Dataset(name, spec, *splits, fingerprint(builder.info.full_name, *splits), prepare_image)


def _check_features(builder: tfds.core.DatasetBuilder, name: str) -> None:
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not isinstance(features["label"], tfds.features.ClassLabel):
        raise BadConfiguration(
            f"--dataset {name!r} has features {sorted(features)}; image and label are needed; choose such a set"
        )


def _held_out_split(builder: tfds.core.DatasetBuilder, name: str) -> str:
    splits = builder.info.splits
    held_out = next((split for split in ("test", "validation") if split in splits or not splits), None)
    if (splits and "train" not in splits) or held_out is None:
        raise BadConfiguration(
            f"--dataset {name!r} has splits {sorted(splits)}; train and test or validation are needed; choose another"
        )
    return held_out


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> Split:
    """A split as arrays, in the order of its files."""
    return read_whole(lambda: builder.as_dataset(split=split, shuffle_files=False))


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
