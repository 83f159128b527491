"""Data sets by name: prepared with TensorFlow Datasets, held as arrays or streamed, and described to the model."""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import os
import socket
import sysconfig
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tensorflow as tf
import tensorflow_datasets as tfds

from models.tasks import DataSpec
from trainers.input.kinds import csv_table as tables
from trainers.input.kinds import embedded as builders
from trainers.settings.data_cards import DATASETS, data_card, split_name
from trainers.settings.exit_codes import BadConfiguration

# A split up to this size is held on each device; a larger one streams. Set --input to decide otherwise.
RESIDENT_BYTES = 1 << 30
# What images of varying size are resized to when they stream.
STREAMED_IMAGE_SIZE = 224
# Tokens that a language model sees at once, and how much of the standard library is its default text.
TEXT_LENGTH = 128
STANDARD_TEXT_BYTES = 2_000_000
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


def load(name: str, data_dir: str, placement: str = "auto", label: str = "") -> Dataset:
    """Prepares a data set in `data_dir` if it is not there yet, and loads it.

    `name`: of `trainers.settings.data_cards`, with its argument, or of TensorFlow Datasets. `placement`: `resident`, `stream`,
    or `auto` by size. `label`: the column to predict, of a table.

    Raises:
      BadConfiguration: no such data set, no network for it, no space, or unusable data.
    """
    kind, argument = split_name(name)
    with _readable_errors(name, data_dir):
        return _LOADERS[data_card(name).loader](kind, argument, data_dir, placement, label)


def _load_built(name: str, argument: str, data_dir: str, placement: str, label: str) -> Dataset:
    """A builder of ours or of TensorFlow Datasets."""
    builder = _builder(name, data_dir)
    if not _is_prepared(builder):
        _prepare(name, data_dir)
        builder = _builder(name, data_dir)  # only a new one knows what another process has prepared meanwhile
    if "target" in builder.info.features:
        return _table(builder, name)
    return _image_classification(builder, name, placement)


def _load_csv(name: str, argument: str, data_dir: str, placement: str, label: str) -> Dataset:
    """`csv:PATH`: every fifth row is for evaluation."""
    if not argument:
        raise BadConfiguration("--dataset csv names no file; write csv:PATH")
    table = tables.read(Path(argument).expanduser(), label)
    train, evaluation = _every_fifth({"features": table.features, "target": table.target})
    return _rows_dataset(f"{name}:{argument}", train, evaluation, len(table.classes), f"{table.columns}{table.classes}")


def _load_text(name: str, argument: str, data_dir: str, placement: str, label: str) -> Dataset:
    """`text` or `text:PATH`: the bytes of a file; the last tenth is for evaluation."""
    content = np.frombuffer(_text(argument), np.uint8)
    window = TEXT_LENGTH + 1
    count = (len(content) - 1) // TEXT_LENGTH
    if count < 20:
        least = 20 * TEXT_LENGTH + 1
        raise BadConfiguration(
            f"{argument} holds {len(content)} bytes; at least {least} are needed; name a longer text"
        )
    # Each window overlaps the next by one byte: the last target of one is the first input of the next.
    windows = np.stack([content[i * TEXT_LENGTH : i * TEXT_LENGTH + window] for i in range(count)])
    cut = count - count // 10
    train, evaluation = ({"tokens": part} for part in (windows[:cut], windows[cut:]))
    splits = [Split(len(part["tokens"]), arrays=part) for part in (train, evaluation)]
    spec = DataSpec("language", (TEXT_LENGTH,), "int32", num_classes=256)
    return Dataset(
        f"{name}:{argument}" if argument else name, spec, *splits, _fingerprint(name, *splits), _prepare_text
    )


def _text(path: str) -> bytes:
    """A file's bytes; without a path, the modules of Python's standard library, one after another, up to 2 MB."""
    if path:
        try:
            return Path(path).expanduser().read_bytes()
        except OSError as error:
            raise BadConfiguration(f"--dataset text:{path} cannot be read: {error.strerror}; name a file") from None
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    content = b"".join(path.read_bytes() for path in modules)[:STANDARD_TEXT_BYTES]
    if not content:
        raise BadConfiguration("--dataset text: Python's standard library is not here as files; name a file, text:PATH")
    return content


def _load_images(name: str, argument: str, data_dir: str, placement: str, label: str) -> Dataset:
    """`images:DIR`: `DIR/train/CLASS/…` and `DIR/test/…`, or `DIR/CLASS/…`, of which every fifth file is held out."""
    root = Path(argument).expanduser()
    if not argument or not root.is_dir():
        raise BadConfiguration(f"--dataset images:{argument} is no folder; write images:DIR, with one folder a class")
    if (root / "train").is_dir():
        builder = tfds.folder_dataset.ImageFolder(str(root))
        return _image_classification(builder, f"{name}:{argument}", placement)
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [(path, i) for i, c in enumerate(classes) for path in sorted((root / c).iterdir()) if path.is_file()]
    if len(classes) < 2 or len(found) < 10:
        raise BadConfiguration(
            f"{root} holds {len(found)} files in {len(classes)} folders; 10 files of 2 classes are needed"
        )
    sizes = {_image_size(path) for path, _ in found}
    height, width = sizes.pop() if len(sizes) == 1 else (STREAMED_IMAGE_SIZE, STREAMED_IMAGE_SIZE)
    resident = placement == "resident" or (placement == "auto" and len(found) * height * width * 3 <= RESIDENT_BYTES)

    def split(held_out: bool) -> Split:
        chosen = [pair for i, pair in enumerate(found) if (i % 5 == 4) == held_out]
        paths, labels = [str(path) for path, _ in chosen], [label for _, label in chosen]

        def example(path: tf.Tensor, label: tf.Tensor) -> Features:
            image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
            if (height, width) == (STREAMED_IMAGE_SIZE, STREAMED_IMAGE_SIZE):
                image = tf.cast(tf.image.resize(image, (height, width), antialias=True), tf.uint8)
            return {"image": tf.ensure_shape(image, (height, width, 3)), "label": label}

        def stream() -> tf.data.Dataset:
            listed = tf.data.Dataset.from_tensor_slices((paths, np.array(labels, np.int64)))
            return listed.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

        return _held(stream) if resident else Split(len(paths), stream=stream)

    splits = split(False), split(True)
    spec = DataSpec("classification", (height, width, 3), num_classes=len(classes))
    return Dataset(f"{name}:{argument}", spec, *splits, _fingerprint(f"{classes}", *splits), _prepare_image)


def _image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file that opens; anything else is an error that names it."""
    try:
        with PIL.Image.open(path) as image:
            image.verify()
            if image.format not in ("JPEG", "PNG", "GIF", "BMP"):
                raise ValueError(f"{image.format} is not JPEG, PNG, GIF or BMP")
            return image.height, image.width
    except (OSError, ValueError, SyntaxError) as error:
        raise BadConfiguration(f"{path} is no usable image ({error}); remove or replace it") from None


_LOADERS = {"builder": _load_built, "csv": _load_csv, "text": _load_text, "images": _load_images}


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if name in builders.BUILDERS:
        return builders.BUILDERS[name](data_dir=data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name, tfds.list_builders(), n=3)
        hint = f"; near it in TensorFlow Datasets: {', '.join(near)}" if near else ""
        raise BadConfiguration(
            f"--dataset {name!r} is not known{hint}; choose one of: {', '.join(sorted(DATASETS))}, "
            "or an image classification set of TensorFlow Datasets such as mnist or cifar10"
        ) from None


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether its data are there. TFDS's own answer warns each time that they are not."""
    return (Path(builder.data_path) / "dataset_info.json").exists()


def _prepare(name: str, data_dir: str) -> None:
    """Downloads and prepares once; processes that start together take turns."""
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(data_dir) / f".{name.partition('/')[0]}.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        builder = _builder(name, data_dir)
        if not _is_prepared(builder):
            if Path(builder.data_path).exists():
                # Prepared data are renamed into place whole, so this is a copy; TFDS would take it for prepared.
                raise BadConfiguration(
                    f"--data_dir holds {builder.data_path} without its dataset_info.json, a copy that is not complete; "
                    "complete or remove it"
                )
            _check_network(builder, name)
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
    return Dataset(
        name, spec, train, evaluation, _fingerprint(builder.info.full_name, train, evaluation), _prepare_image
    )


def _prepare_image(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
    """`image: [batch, height, width, channels]` uint8 → float32 in [-1, 1]; `label: [batch]` int64."""
    return tf.cast(features["image"], tf.float32) * (2 / 255) - 1, features["label"]


def _resident_split(builder: tfds.core.DatasetBuilder, split: str, shape: tuple[int, ...]) -> Split:
    return _held(lambda: builder.as_dataset(split=split, shuffle_files=False))


def _held(stream: Callable[[], tf.data.Dataset]) -> Split:
    """A split that is read into arrays."""
    pieces = list(stream().batch(_READ_BATCH).as_numpy_iterator())
    arrays = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    arrays = {key: array for key, array in arrays.items() if array.dtype.kind in "biuf"}
    return Split(len(next(iter(arrays.values()))), arrays=arrays)


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


def _fingerprint(identity: str, *splits: Split) -> str:
    """SHA-256 over the arrays themselves or, where they stream, over a name of the data and the sizes."""
    digest = hashlib.sha256(identity.encode())
    for split in splits:
        digest.update(f"{split.size}".encode())
        for key, array in sorted((split.arrays or {}).items()):
            digest.update(f"{key}{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def _prepare_text(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
    """`tokens: [batch, time + 1]` uint8 → all but the last, and all but the first, as int32."""
    tokens = tf.cast(features["tokens"], tf.int32)
    return tokens[:, :-1], tokens[:, 1:]


def _table(builder: tfds.core.DatasetBuilder, name: str) -> Dataset:
    train, test = (_resident_split(builder, split, ()) for split in ("train", "test"))
    return _rows_dataset(name, train, test, 0, builder.info.full_name)


def _every_fifth(arrays: dict[str, np.ndarray]) -> tuple[Split, Split]:
    held_out = np.arange(len(next(iter(arrays.values())))) % 5 == 4
    train, test = ({key: array[rows] for key, array in arrays.items()} for rows in (~held_out, held_out))
    return Split(int((~held_out).sum()), arrays=train), Split(int(held_out.sum()), arrays=test)


def _rows_dataset(name: str, train: Split, test: Split, num_classes: int, identity: str) -> Dataset:
    """Rows of numbers; features, and a target that is no class, in standard deviations of the training split."""

    def scale(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wide, deviation = array.astype(np.float64), array.astype(np.float64).std(axis=0)
        return wide.mean(axis=0).astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)

    mean, deviation = scale(train.arrays["features"])
    target_mean, target_deviation = (0, 1) if num_classes else scale(train.arrays["target"])

    def prepare(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
        inputs = (features["features"] - mean) / deviation
        return inputs, features["target"] if num_classes else (features["target"] - target_mean) / target_deviation

    columns, target_shape = train.arrays["features"].shape[1:], train.arrays["target"].shape[1:]
    task = "classification" if num_classes else "regression"
    spec = DataSpec(task, columns, num_classes=num_classes, target_shape=target_shape)
    return Dataset(name, spec, train, test, _fingerprint(identity, train, test), prepare)
