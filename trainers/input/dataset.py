"""What a data set is: its splits, its fingerprint, and how its examples are prepared for a model."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from models.tasks import DataSpec, Mixed
from trainers.input import object_cache
from trainers.input.augment.augmentation import Augmentation
from trainers.input.pictures import Pictures
from trainers.input.pipelines import steady
from trainers.input.raw.form import Features, Raw
from trainers.input.raw.images import HALF, RawImages, normalization
from trainers.input.raw.rows import Layout, RawRows, Scale
from trainers.input.records import Records, Sample
from trainers.settings.exit_codes import BadConfiguration

# A split up to this size is held on each device; a larger one streams. Set --input to decide otherwise.
RESIDENT_BYTES = 1 << 30
# What images of varying size are resized to.
COMMON_IMAGE_SIZE = 224
_READ_BATCH = 1024
# Standard deviations by which a prepared number may be off for being held in float32; relative beyond 1.
DIGITS_LOST = 1e-5


@dataclasses.dataclass(frozen=True)
class Request:
    """What the function that loads a kind of data is given.

    `name`: the part of `--dataset` before the colon; `argument`: what follows it, a file or a folder of the user's.
    `data_dir`: where prepared data lie. `placement`: `resident`, `stream`, or `auto` by size. `label`: the column of a
    table to predict. `images`: how images are prepared. `document_mask`: whether documents are kept apart.
    `needs_images`: the loop that takes nothing but images; empty if it takes more. `cache_dir`: where what lies in
    object stores is kept; empty: the user's folder for such.
    """

    name: str
    argument: str = ""
    data_dir: str = ""
    placement: str = "auto"
    label: str = ""
    images: "ImageOptions" = dataclasses.field(default_factory=lambda: ImageOptions())
    document_mask: bool = False
    needs_images: str = ""
    cache_dir: str = ""

    @property
    def full_name(self) -> str:
        """The name with its argument, as `--dataset` has it."""
        return f"{self.name}:{self.argument}" if self.argument else self.name

    @property
    def path(self) -> Path:
        """The argument as a path. What lies at an address is brought here first."""
        return object_cache.localized(self.argument, self.name, self.cache_dir)

    def is_resident(self, num_bytes: float) -> bool:
        """Whether splits are held on each device. `num_bytes`: the size of the data, infinite where it is not fixed."""
        return self.placement == "resident" or (self.placement == "auto" and num_bytes <= RESIDENT_BYTES)


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """What flags and the model's card say of images.

    `augment`: words of `trainers.settings.augmentation` with their numbers. `size`: height and width that models see; 0
    = that of the images if they are all alike, else `COMMON_IMAGE_SIZE`. `mean`, `deviation`: of each channel, in [0,
    1]; pixels are given to models as differences from the mean, in deviations.
    """

    augment: Mapping[str, float] = dataclasses.field(default_factory=dict)
    size: int = 0
    mean: tuple[float, ...] = HALF
    deviation: tuple[float, ...] = HALF


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split: `arrays` `[size, …]` by feature name, `records`, or `stream()`, an example an element.

    All have the same order. `augmentation`: what is done to the examples in training.
    """

    size: int
    arrays: dict[str, np.ndarray] | None = None
    stream: Callable[[], tf.data.Dataset] | None = None
    records: Records | None = None
    augmentation: Augmentation | None = None

    def sample(self, most: int) -> "Split":
        """All examples or, if there are more than `most`, as many, spaced evenly. They are not augmented."""
        count = min(self.size, most)
        if count == self.size:
            return dataclasses.replace(self, augmentation=None)
        if self.arrays is not None:
            index = np.arange(count) * self.size // count
            return Split(count, arrays={key: array[index] for key, array in self.arrays.items()})
        if self.records:
            return Split(count, records=Sample(self.records, count))
        return Split(count, stream=lambda: _spaced(self.stream(), self.size, count))

    def examples(self) -> tf.data.Dataset:
        """All examples in order, one an element, as evaluation has them."""
        if self.arrays is not None:
            return steady(tf.data.Dataset.from_tensor_slices(self.arrays))
        return self.records.examples() if self.records else steady(self.stream())


def _spaced(stream: tf.data.Dataset, size: int, count: int) -> tf.data.Dataset:
    """`count` of the `size` elements of a stream: those at `i * size // count`. The others are read over."""

    def before(number: tf.Tensor) -> tf.Tensor:
        """How many of them stand before an element."""
        return (number * count + size - 1) // size

    return stream.enumerate().filter(lambda n, _: before(n + 1) > before(n)).map(lambda _, example: example)


def _as_numbers(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set ready for training.

    `prepare(features) -> (inputs, targets)` turns a batch as stored into what the model takes, inside the compiled
    step. `fingerprint`: SHA-256 of what identifies the data. `spec`: what the model is built for. `as_text`: of a
    language, the text of some tokens, for people. `raw`: how examples look to whoever has them; None where only their
    owner knows.
    """

    name: str
    spec: DataSpec
    train: Split
    eval: Split
    fingerprint: str
    prepare: Callable[[Features], tuple[Any, Any]]
    as_text: Callable[[Sequence[int]], str] = _as_numbers
    raw: Raw | None = None

    def zeros(self) -> tf.Tensor:
        """Inputs of one example, all zeros: `[1, *spec.input_shape]`, as `prepare` gives them."""
        return tf.zeros([1, *self.spec.input_shape], self.spec.input_dtype)


def fingerprint(identity: str, *splits: Split) -> str:
    """SHA-256 over the arrays themselves or, where they stream, over a name of the data and the sizes."""
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape"))
    for split in splits:
        digest.update(f"{split.size}".encode())
        for key, array in sorted((split.arrays or {}).items()):
            digest.update(f"{key}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def read_whole(stream: Callable[[], tf.data.Dataset]) -> Split:
    """A resident split: all examples of a stream as arrays. Features that are not numbers are left out."""
    pieces = list(steady(stream().batch(_READ_BATCH)).as_numpy_iterator())
    arrays = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    arrays = {key: array for key, array in arrays.items() if array.dtype.kind in "biuf"}
    return Split(len(next(iter(arrays.values()))), arrays=arrays)


def split_of(records: Records, resident: bool) -> Split:
    """The records as a split, held in memory or read by index.

    Raises:
      BadConfiguration: a record of a resident split cannot be read.
    """
    if not resident:
        return Split(records.size, records=records)
    try:
        return read_whole(records.examples)
    except tf.errors.OpError:
        # An error of a pipeline does not tell which example it was.
        for fault in filter(None, map(records.fault, range(records.size))):
            raise fault from None
        raise


def pictures_for(stored: tuple[int, int] | None, channels: int, options: ImageOptions) -> Pictures:
    """How images are prepared. `stored`: height and width of all of them; None where they differ."""
    size = (options.size, options.size) if options.size else stored or (COMMON_IMAGE_SIZE, COMMON_IMAGE_SIZE)
    same_aspect = stored is not None and stored[0] * size[1] == stored[1] * size[0]
    return Pictures(tuple(size), channels, whole=same_aspect)


def are_resident(request: Request, pictures: Pictures, stored: tuple[int, int] | None, count: int) -> bool:
    """Whether images are held on each device. Where they are held, they are resized already.

    Raises:
      BadConfiguration: they are asked to be, and `inception` needs them as they are stored.
    """
    if "inception" in request.images.augment and stored != pictures.size:
        if request.placement == "resident":
            raise BadConfiguration(
                "--input=resident holds resized images, and --augment inception needs them as they are stored; use "
                "--input=stream"
            )
        return False
    return request.is_resident(count * math.prod(pictures.shape))


def augmented(train: Split, options: ImageOptions, size: tuple[int, int]) -> Split:
    """The training split with what `--augment` names, for images that models see in `size`."""
    if not options.augment:
        return train
    return dataclasses.replace(train, augmentation=Augmentation(options.augment, size))


def image_preparation(options: ImageOptions, channels: int) -> Callable[[Features], tuple[tf.Tensor, Any]]:
    """The function that turns a batch of images into inputs and targets.

    `image: [batch, height, width, channels]` → float32, normalized by channel; `label: [batch]` int64, or `Mixed`
    labels where examples are blends of two.
    """
    scale, offset = normalization(options.mean, options.deviation, channels)

    def prepare(features: Features) -> tuple[tf.Tensor, Any]:
        label = features["label"]
        if "share" in features:
            label = Mixed(label, features["other_label"], features["share"])
        return tf.cast(features["image"], tf.float32) * scale - offset, label

    return prepare


def raw_images(options: ImageOptions, pictures: Pictures, classes: Sequence[str]) -> RawImages:
    """How images that are prepared as `image_preparation` does it look to whoever has them."""
    return RawImages(pictures, tuple(classes), tuple(options.mean), tuple(options.deviation))


def standardized_rows(
    name: str, train: Split, evaluation: Split, num_classes: int, identity: str, layout: Layout | None = None
) -> Dataset:
    """Rows of numbers: splits with `features: [size, columns]` and `target: [size, …]`, float32 or float64.

    Features, and a target that is not a class, are prepared as standard deviations from the mean of the training split.
    They are held in float32 as they are, except for columns that would lose digits there (a time in milliseconds):
    these are held standardized, which is computed in float64. `num_classes`: 0 for regression. `identity`: goes into
    the fingerprint. `layout`: the columns that the features come from.
    """
    keys = ("features",) if num_classes else ("features", "target")
    scales, own, held = {}, {}, [dict(split.arrays) for split in (train, evaluation)]
    for key in keys:
        *arrays, scales[key], own[key], changed = _scaled(*(arrays[key] for arrays in held))
        for split, array in zip(held, arrays, strict=True):
            split[key] = array
        identity += changed
    train, evaluation = (
        dataclasses.replace(split, arrays=arrays) for split, arrays in zip((train, evaluation), held, strict=True)
    )

    def prepare(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
        scaled = {key: (features[key] - mean) / deviation for key, (mean, deviation) in scales.items()}
        return scaled["features"], scaled.get("target", features["target"])

    columns, target_shape = train.arrays["features"].shape[1:], train.arrays["target"].shape[1:]
    task = "classification" if num_classes else "regression"
    spec = DataSpec(task, columns, num_classes=num_classes, target_shape=target_shape)
    raw = RawRows(layout, own["features"], own.get("target"), target_shape) if layout else None
    return Dataset(name, spec, train, evaluation, fingerprint(identity, train, evaluation), prepare, raw=raw)


def _scaled(train: np.ndarray, evaluation: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple, Scale, str]:
    """Both splits as they are held, float32; mean and deviation by which they are prepared; and whose units these are.

    The last tells which columns are changed. It is a part of the fingerprint, and empty if every column is held as it
    is.
    """
    wide = [array.astype(np.float64) for array in (train, evaluation)]
    mean, deviation = wide[0].mean(axis=0), wide[0].std(axis=0)
    # Of equal values the mean, and so the deviation, may be off by a rounding.
    deviation = np.where((deviation > 0) & (np.ptp(wide[0], axis=0) > 0), deviation, 1)
    exact = [(array - mean) / deviation for array in wide]
    narrow_mean, narrow_deviation = mean.astype(np.float32), deviation.astype(np.float32)
    with np.errstate(all="ignore"):
        narrow = [(array.astype(np.float32) - narrow_mean) / narrow_deviation for array in wide]
        apart = [np.abs(a - b) / np.maximum(np.abs(b), 1) for a, b in zip(narrow, exact, strict=True)]
    changed = ~np.all(np.concatenate(apart) <= DIGITS_LOST, axis=0)  # not a number is not below it
    held = [np.where(changed, a, b).astype(np.float32) for a, b in zip(exact, wide, strict=True)]
    scale = np.where(changed, 0, narrow_mean), np.where(changed, 1, narrow_deviation)
    told = f"{np.flatnonzero(changed)}{mean[changed]}{deviation[changed]}" if changed.any() else ""
    units = (np.where(changed, a, b) for a, b in ((mean, narrow_mean), (deviation, narrow_deviation)))
    return *held, scale, Scale(*(tuple(np.ravel(each).tolist()) for each in (*units, changed))), told
