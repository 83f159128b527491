"""What a function of the user's own returns, `module:function`: arrays of two splits, or a whole `Dataset`.

The function is called with the options of `--dataset` and returns `(train, eval)`, each a pair `(inputs, targets)` of
arrays with an example a row. Their types tell the kind of data:

- inputs `[size, height, width, channels]` uint8, targets `[size]` integers: images with classes
- the same inputs, targets `[size, height, width]` integers: images with a class for each pixel
- inputs of any kind, targets `[size, labels]` integers: several labels, of which the user's own model knows the meaning
- inputs `[size, …]` numbers, targets `[size]` integers: rows with classes
- inputs `[size, …]` numbers, targets `[size]` or `[size, columns]` floats: regression
- inputs and targets `[size, time]` integers: tokens, with the token to predict at each position

Images are scaled as those of other data sets are; anything else reaches the model as it is, in float32 or int32.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from models import options
from models.options import OptionError
from models.tasks import DataSpec
from trainers.input.array_records import ArrayRecords
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
    split_of,
)
from trainers.input.masked_images import dataset_of
from trainers.input.pictures import Pictures
from trainers.settings.exit_codes import BadConfiguration

PARTS = ("train", "eval")
_FORM = "return (train, eval), each a pair (inputs, targets) of arrays, or a trainers.input.dataset.Dataset"
Arrays = tuple[np.ndarray, np.ndarray]


def load(request: Request) -> Dataset:
    """Calls the function, and makes a data set of what it returns.

    Raises:
      BadConfiguration: it returns something else, or its arrays do not fit each other or a kind of data.
    """
    name = request.full_name
    try:
        made = options.choose("dataset", name).make()
    except OptionError as error:
        raise BadConfiguration(str(error)) from error
    if isinstance(made, Dataset):
        return made
    splits = _arrays(name, made)
    task = _task(name, splits)
    if task == "segmentation":
        return dataset_of(request, *splits, _classes(splits), "own")
    inputs, targets = splits[0]
    if inputs.dtype == np.uint8 and inputs.ndim == 4 and targets.dtype.kind != "f":
        return _images(request, task, splits)
    if request.needs_images:
        raise BadConfiguration(
            f"--dataset {name}: inputs {inputs.dtype} {inputs.shape} and targets {targets.dtype} {targets.shape} are "
            f"no images, which the loop {request.needs_images} needs; give uint8 [size, height, width, channels] and "
            "integers [size]"
        )
    for flag, value in (("augment", ",".join(request.images.augment)), ("image_size", request.images.size)):
        if value:
            raise BadConfiguration(f"--{flag} {value} is for images, and --dataset {name} has none; leave it out")
    return _numbers(request, task, splits)


def _arrays(name: str, made: Any) -> list[Arrays]:
    """Both splits, checked: as many inputs as targets, at least one, of the same shapes in both."""
    try:
        splits = [tuple(np.asarray(part) for part in split) for split in made]
    except (TypeError, ValueError) as error:
        raise BadConfiguration(f"--dataset {name} returns {type(made).__name__} ({error}); {_FORM}") from error
    if len(splits) != 2 or any(len(split) != 2 for split in splits):
        raise BadConfiguration(f"--dataset {name} returns {len(splits)} parts of {[len(s) for s in splits]}; {_FORM}")
    for which, (inputs, targets) in zip(PARTS, splits, strict=True):
        for part, array in (("inputs", inputs), ("targets", targets)):
            if array.dtype.kind not in "biuf" or array.ndim == 0:
                raise BadConfiguration(
                    f"--dataset {name}: the {part} of {which} are {array.dtype} {array.shape}; {_FORM}"
                )
        if len(inputs) != len(targets) or not len(inputs):
            raise BadConfiguration(
                f"--dataset {name}: {which} has {len(inputs)} inputs and {len(targets)} targets; give as many, and one "
                "or more"
            )
    for part, one, other in zip(("inputs", "targets"), *splits, strict=True):
        if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
            raise BadConfiguration(
                f"--dataset {name}: {part} of train are {one.dtype} {one.shape[1:]}, those of eval {other.dtype} "
                f"{other.shape[1:]}; give both alike"
            )
    return splits


def _task(name: str, splits: list[Arrays]) -> str:
    """The kind of data, as the types of the arrays tell."""
    inputs, targets = splits[0]
    if targets.dtype.kind == "f":
        if targets.ndim <= 2:
            return "regression"
    elif any(int(split[1].min()) < 0 for split in splits):
        raise BadConfiguration(f"--dataset {name}: a target is below 0; number classes from 0, or give floats")
    elif targets.ndim == 1:
        return "classification"
    elif targets.ndim == 2 and inputs.shape == targets.shape and inputs.dtype.kind in "iu":
        if any(int(split[0].min()) < 0 for split in splits):
            raise BadConfiguration(f"--dataset {name}: a token is below 0; number tokens from 0")
        return "language"
    elif targets.ndim == 2:
        return "labels"
    elif inputs.dtype == np.uint8 and inputs.ndim == 4 and inputs.shape[:3] == targets.shape:
        return "segmentation"
    raise BadConfiguration(
        f"--dataset {name}: inputs {inputs.dtype} {inputs.shape} and targets {targets.dtype} {targets.shape} are no "
        "kind of data; give targets [size] of integers for classes, floats for regression, [size, time] integers like "
        "the inputs for tokens, or [size, height, width] integers for the pixels of images"
    )


def _images(request: Request, task: str, splits: list[Arrays]) -> Dataset:
    """Images with a class, or with several labels."""
    name, stored = request.full_name, splits[0][0].shape[1:3]
    pictures = pictures_for(stored, splits[0][0].shape[-1], request.images)
    resident = are_resident(request, pictures, stored, len(splits[0][0]))
    made = []
    for part, (images, labels) in zip(PARTS, splits, strict=True):
        arrays = {"image": images, "label": _held(name, f"targets of {part}", labels, np.int64)}
        made.append(_split(f"--dataset {name}: {part}", arrays, resident, pictures))
    train = augmented(made[0], request.images, pictures.size)
    classes = 0 if task == "labels" else _classes(splits)
    spec = DataSpec(task, pictures.shape, num_classes=classes, target_shape=splits[0][1].shape[1:])
    prepare = image_preparation(request.images, pictures.channels)
    return Dataset(name, spec, train, made[1], _fingerprint(splits), prepare)


def _split(what: str, arrays: dict[str, np.ndarray], resident: bool, pictures: Pictures | None = None) -> Split:
    """The arrays as a split: held as models see them, or read by index as they are given."""
    if resident and (pictures is None or arrays["image"].shape[1:] == pictures.shape):
        return Split(len(next(iter(arrays.values()))), arrays=arrays)
    return split_of(ArrayRecords(what, arrays, pictures), resident)


def _numbers(request: Request, task: str, splits: list[Arrays]) -> Dataset:
    """Rows or tokens, held as they are given."""
    name, names = request.full_name, ("tokens", "targets") if task == "language" else ("features", "target")
    dtype = np.float32 if splits[0][0].dtype.kind == "f" else np.int32
    target_dtype = np.float32 if splits[0][1].dtype.kind == "f" else np.int64
    resident = request.is_resident(sum(array.nbytes for array in splits[0]))
    made, held = [], []
    for part, (inputs, targets) in zip(PARTS, splits, strict=True):
        inputs = _held(name, f"inputs of {part}", inputs, dtype)
        targets = _held(name, f"targets of {part}", targets, target_dtype)
        held.append((inputs, targets))
        made.append(_split(f"--dataset {name}: {part}", dict(zip(names, held[-1], strict=True)), resident))

    def prepare(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
        return features[names[0]], features[names[1]]

    inputs, targets = splits[0]
    classes = 0 if task in ("regression", "labels") else _classes(splits)
    if task == "language":
        classes = max(classes, *(int(split[0].max()) + 1 for split in splits))
    spec = DataSpec(task, inputs.shape[1:], np.dtype(dtype).name, num_classes=classes, target_shape=targets.shape[1:])
    return Dataset(name, spec, *made, _fingerprint(held), prepare)


def _held(name: str, what: str, array: np.ndarray, dtype: type) -> np.ndarray:
    """An array in the type in which it is trained on. `what`: which array it is, for messages.

    Raises:
      BadConfiguration: a number is outside of the range of that type; or of int32, which classes and tokens have too.
    """
    if dtype != np.float32:
        range_of = np.iinfo(np.int32)
        for value in (int(array.min(initial=0)), int(array.max(initial=0))):
            if not range_of.min <= value <= range_of.max:
                raise BadConfiguration(
                    f"--dataset {name}: the {what} hold {value}, outside of {range_of.min} to {range_of.max}, the "
                    "range of int32; give smaller numbers, or floats"
                )
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        held = array.astype(dtype, copy=False)
    if held is not array and (lost := np.isinf(held) & np.isfinite(array)).any():
        raise BadConfiguration(
            f"--dataset {name}: the {what} hold {array[lost][0]:g}, beyond ±3.4e38, the range of float32; scale them"
        )
    return held


def _classes(splits: list[Arrays]) -> int:
    return max(int(targets.max()) for _, targets in splits) + 1


def _fingerprint(splits: list[Arrays]) -> str:
    """Of the arrays' bytes, however they are held."""
    return fingerprint("own", *(Split(len(x), arrays={"inputs": x, "targets": y}) for x, y in splits))
