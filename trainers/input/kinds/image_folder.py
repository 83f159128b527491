"""Image files in folders: `images:DIR`, with `DIR/train/CLASS/…` and `DIR/test/CLASS/…`, or with `DIR/CLASS/…`."""

import functools
import math
from pathlib import Path

import numpy as np
import PIL.Image
import tensorflow as tf
import tensorflow_datasets as tfds

from models.tasks import DataSpec
from trainers.input import builders
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
from trainers.settings.exit_codes import BadConfiguration

_FORMATS = ("JPEG", "PNG", "GIF", "BMP")
_HELD_OUT_EVERY = 5

LabelledFile = tuple[Path, int]


def load(request: Request) -> Dataset:
    """Images by class. Where they are not split into `train` and `test`, every fifth file is for evaluation.

    Images of several sizes are resized to 224×224.

    Raises:
      BadConfiguration: there is no such folder, it holds too few images, or a file is not an image.
    """
    root = request.path
    if not request.argument or not root.is_dir():
        raise BadConfiguration(
            f"--dataset images:{request.argument} is not a folder; write images:DIR, with one folder a class"
        )
    if (root / "train").is_dir():
        builder = tfds.folder_dataset.ImageFolder(str(root))
        return builders.image_classification(builder, request.full_name, request)
    classes, files = _labelled_files(root)
    shape = _common_shape([path for path, _ in files])
    resident = request.is_resident(len(files) * math.prod(shape))
    splits = [
        _split([file for i, file in enumerate(files) if _is_held_out(i) == held_out], shape, resident)
        for held_out in (False, True)
    ]
    spec = DataSpec("classification", shape, num_classes=len(classes))
    return Dataset(request.full_name, spec, *splits, fingerprint(f"{classes}", *splits), prepare_image)


def _is_held_out(index: int) -> bool:
    return index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def _labelled_files(root: Path) -> tuple[list[str], list[LabelledFile]]:
    """The classes, and each file with the index of its class."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [(path, i) for i, c in enumerate(classes) for path in sorted((root / c).iterdir()) if path.is_file()]
    if len(classes) < 2 or len(files) < 10:
        raise BadConfiguration(
            f"{root} holds {len(files)} files in {len(classes)} folders; at least 10 files of 2 classes are needed"
        )
    return classes, files


def _common_shape(paths: list[Path]) -> tuple[int, int, int]:
    """Height, width and channels of all images, or what they are resized to where they differ."""
    sizes = {_image_size(path) for path in paths}
    return (*(sizes.pop() if len(sizes) == 1 else (COMMON_IMAGE_SIZE, COMMON_IMAGE_SIZE)), 3)


def _image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file that opens; anything else is an error that names it."""
    try:
        with PIL.Image.open(path) as image:
            image.verify()
            if image.format not in _FORMATS:
                raise ValueError(f"{image.format} is not JPEG, PNG, GIF or BMP")
            return image.height, image.width
    except (OSError, ValueError, SyntaxError) as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, reason: object) -> BadConfiguration:
    return BadConfiguration(f"{path} is not a usable image ({reason}); remove or replace it")


def _split(files: list[LabelledFile], shape: tuple[int, int, int], resident: bool) -> Split:
    paths, labels = [str(path) for path, _ in files], np.array([label for _, label in files], np.int64)
    read = functools.partial(_example, shape=shape)

    def stream() -> tf.data.Dataset:
        listed = tf.data.Dataset.from_tensor_slices((paths, labels))
        return listed.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    if not resident:
        return Split(len(paths), stream=stream)
    try:
        return read_whole(stream)
    except tf.errors.OpError:
        _raise_for_unreadable(paths, shape)
        raise


def _example(path: tf.Tensor, label: tf.Tensor, shape: tuple[int, int, int]) -> Features:
    """Reads an image: `image: shape` uint8 and its label."""
    image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
    if shape[:2] == (COMMON_IMAGE_SIZE, COMMON_IMAGE_SIZE):
        image = tf.cast(tf.image.resize(image, shape[:2], antialias=True), tf.uint8)
    return {"image": tf.ensure_shape(image, shape), "label": label}


def _raise_for_unreadable(paths: list[str], shape: tuple[int, int, int]) -> None:
    """Names the first file that TensorFlow cannot decode: an error of a stream does not tell which it was."""
    for path in paths:
        try:
            _example(tf.constant(path), tf.constant(0, tf.int64), shape)
        except tf.errors.OpError as error:
            raise _unusable(Path(path), reason_of(error)) from error
