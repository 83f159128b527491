"""Builders of TensorFlow Datasets, wherever they come from: prepared once in `data_dir`, then read."""

import contextlib
import errno
import os
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from models.tasks import DataSpec
from trainers.input import tfrecords
from trainers.input.dataset import (
    Dataset,
    Features,
    Request,
    Split,
    are_resident,
    augmented,
    fingerprint,
    image_preparation,
    pictures_for,
    raw_images,
    read_whole,
    split_of,
)
from trainers.input.errors import reason_of
from trainers.input.pictures import Pictures
from trainers.input.pipelines import calls_at_once
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import locks

# Splits for evaluation, the first that is there: the labels of a test split are sometimes kept secret.
HELD_OUT = ("validation", "test")
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
                "connect this machine or prepare the data elsewhere and copy it (for pods: launch/k8s.py data "
                f"--dataset={name}); {_NO_NETWORK_NEEDED}"
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
        elif error.errno == errno.ENOENT:
            reason, remedy = str(error), "delete its folder there to prepare it again"
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

    `validation` is for evaluation; where there is none, `test`. Images that vary in size are resized.

    Raises:
      BadConfiguration: it has other features or splits, or images of varying size are asked to be resident.
    """
    _check_features(builder, name)
    image = builder.info.features["image"]
    names = ("train", _held_out_split(builder, name))
    stored = None if None in image.shape else image.shape[:2]
    pictures = pictures_for(stored, image.shape[-1] or 3, request.images)
    resident = are_resident(request, pictures, stored, builder.info.splits["train"].num_examples)
    read = _by_index if can_be_indexed(builder) else _from_the_begin
    if read is _from_the_begin and "inception" in request.images.augment and stored != pictures.size:
        raise BadConfiguration(
            f"--augment inception needs images as they are stored, and those of {name!r} cannot be read by index; use "
            "--augment=crop,flip"
        )
    train, held_out = (read(builder, split, pictures, resident) for split in names)
    train = augmented(train, request.images, pictures.size)
    identity = builder.info.full_name
    if train.records:
        identity = tfrecords.identity_of(identity, [each.records.shards for each in (train, held_out)])
    spec = DataSpec("classification", pictures.shape, num_classes=builder.info.features["label"].num_classes)
    prepare = image_preparation(request.images, pictures.channels)
    raw = raw_images(request.images, pictures, builder.info.features["label"].names)
    return Dataset(name, spec, train, held_out, fingerprint(identity, train, held_out), prepare, raw=raw)


def can_be_indexed(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether its images can be read one by one: they lie encoded in TFRecord files."""
    image = builder.info.features["image"]
    return builder.info.file_format == tfds.core.FileFormat.TFRECORD and isinstance(image, tfds.features.Image)


def _by_index(builder: tfds.core.DatasetBuilder, split: str, pictures: Pictures, resident: bool) -> Split:
    """A split whose records are read where they lie."""
    info = builder.info.splits[split]
    paths = tuple(Path(path) for path in info.filepaths)
    index = Path(builder.data_path) / f"{split}.index.npz"
    shards = tfrecords.Shards(paths, tuple(info.shard_lengths), index)
    features = tfds.features.FeaturesDict({name: builder.info.features[name] for name in ("image", "label")})
    encoded = {"image": tfds.decode.SkipDecoding()}

    def parse(record: tf.Tensor) -> Features:
        return features.deserialize_example(record, decoders=encoded)

    records = tfrecords.TFRecordImages(shards, parse, pictures)
    if not resident:
        _ = shards.offsets  # what is wrong with the files is said before anything begins
    return split_of(records, resident)


def _from_the_begin(builder: tfds.core.DatasetBuilder, split: str, pictures: Pictures, resident: bool) -> Split:
    """A split whose files can only be read from their begin."""

    def example(features: Features) -> Features:
        image = features["image"]
        if image.shape.as_list() != list(pictures.shape):
            image = pictures.cut(image, pictures.evaluation_crop)
        return {"image": tf.ensure_shape(image, pictures.shape), "label": features["label"]}

    def stream() -> tf.data.Dataset:
        order = tfds.ReadConfig(try_autocache=False)
        return builder.as_dataset(split=split, shuffle_files=False, read_config=order).map(
            example, num_parallel_calls=calls_at_once(), deterministic=True
        )

    if resident:
        return read_whole(stream)
    logging.warning(
        "%s cannot be read by index: it is read from its begin and shuffled in a window; TFRecord files of 8-bit "
        "images could be",
        builder.info.full_name,
    )
    return Split(builder.info.splits[split].num_examples, stream=stream)


def _check_features(builder: tfds.core.DatasetBuilder, name: str) -> None:
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not isinstance(features["label"], tfds.features.ClassLabel):
        raise BadConfiguration(
            f"--dataset {name!r} has features {sorted(features)}; image and label are needed; choose such a set"
        )
    if features["image"].np_dtype != np.uint8:
        kind = np.dtype(features["image"].np_dtype)
        raise BadConfiguration(f"--dataset {name!r} has images of {kind}; uint8 is needed; choose such a set")


def _held_out_split(builder: tfds.core.DatasetBuilder, name: str) -> str:
    splits = builder.info.splits
    held_out = next((split for split in HELD_OUT if split in splits), None)
    if "train" not in splits or held_out is None:
        raise BadConfiguration(
            f"--dataset {name!r} has splits {sorted(splits)}; train and validation or test are needed; choose another"
        )
    return held_out


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> Split:
    """A split as arrays, in the order of its files."""
    order = tfds.ReadConfig(interleave_cycle_length=1)
    return read_whole(lambda: builder.as_dataset(split=split, shuffle_files=False, read_config=order))


def examples_of(builder: tfds.core.DatasetBuilder, split: str, skip: int = 0) -> Iterator[dict[str, Any]]:
    """The examples of a split in the order of its files; images as the bytes of files, where they are encoded.

    `skip`: how many of the first are left out.
    """
    encoded = "image" in builder.info.features and isinstance(builder.info.features["image"], tfds.features.Image)
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    order = tfds.ReadConfig(interleave_cycle_length=1)
    examples = builder.as_dataset(split=split, shuffle_files=False, read_config=order, decoders=decoders)
    return examples.skip(skip).as_numpy_iterator()
