"""Images with a label for each pixel, held or read by index."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from models.tasks import DataSpec
from trainers.input.dataset import (
    Dataset,
    Features,
    Request,
    Split,
    augmented,
    fingerprint,
    image_preparation,
    raw_images,
)
from trainers.input.pictures import Pictures
from trainers.input.records import Crop, Example, Records
from trainers.settings import augmentation

Arrays = tuple[np.ndarray, np.ndarray]


class ArrayRecords(Records):
    """The rows of arrays in the memory of the host, `[size, …]` by feature name."""

    def __init__(self, name: str, arrays: dict[str, np.ndarray]):
        self.name, self.size = name, len(next(iter(arrays.values())))
        with tf.init_scope(), tf.device("CPU:0"):
            self._arrays = {key: tf.constant(array) for key, array in arrays.items()}

    def read(self, index: tf.Tensor) -> Example:
        """The row of each array."""
        return {key: array[index] for key, array in self._arrays.items()}

    def decode(self, stored: Example, crop: Crop | None = None) -> Example:
        """The same."""
        return stored

    def where(self, index: int) -> str:
        """The row of the data set."""
        return f"row {index} of {self.name}"


def dataset_of(
    request: Request,
    train: Arrays,
    evaluation: Arrays,
    num_classes: int,
    identity: str,
    classes: Sequence[str] = (),
) -> Dataset:
    """A data set of images `[size, height, width, channels]` uint8 and labels `[size, height, width]` from 0 on.

    The fingerprint is that of the arrays, and of `identity`, however they are held. `classes`: their names; without
    them nobody but the owner knows what a label means.

    Raises:
      BadConfiguration: `--augment` or `--image_size` would move pixels away from their labels.
    """
    augmentation.check_masks(request.full_name, request.images.augment, request.images.size)
    # As few bytes as the labels need: they lie beside the images on the device.
    kind = np.uint8 if num_classes <= 256 else np.int32
    held = [{"image": images, "mask": labels.astype(kind)} for images, labels in (train, evaluation)]
    whole = [Split(len(arrays["image"]), arrays=arrays) for arrays in held]
    told = fingerprint(identity, *whole)
    if not request.is_resident(sum(array.nbytes for array in held[0].values())):
        whole = [Split(len(a["image"]), records=ArrayRecords(request.full_name, a)) for a in held]
    shape = train[0].shape[1:]
    scaled = image_preparation(request.images, shape[-1])

    def prepare(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
        labels = tf.cast(features["mask"], tf.int32)
        return scaled(features | {"label": labels})

    spec = DataSpec("segmentation", shape, num_classes=num_classes, target_shape=shape[:2])
    raw = raw_images(request.images, Pictures(shape[:2], shape[-1], whole=True), classes) if classes else None
    augmenting = augmented(whole[0], request.images, shape[:2])
    return Dataset(request.full_name, spec, augmenting, whole[1], told, prepare, raw=raw)
