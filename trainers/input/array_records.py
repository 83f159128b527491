"""Arrays read by index: for what is in the memory of the host and does not fit into that of a device."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from trainers.input.pictures import Pictures
from trainers.input.records import Crop, Example, Records


class ArrayRecords(Records):
    """The rows of `arrays` `[size, …]`, by feature name. `what`: how to name the split in messages.

    `pictures`: how `image`, uint8 `[size, height, width, channels]`, is cut and resized; None where there is none.
    """

    def __init__(self, what: str, arrays: Mapping[str, np.ndarray], pictures: Pictures | None = None):
        self.what, self.size, self.pictures = what, len(next(iter(arrays.values()))), pictures
        # Captured by the pipeline as they are: as constants of its graph they could not be above 2 GiB.
        with tf.init_scope(), tf.device("CPU:0"):
            self._arrays = {key: tf.constant(array) for key, array in arrays.items()}

    def read(self, index: tf.Tensor) -> Example:
        """A row of each array."""
        return {key: tf.gather(array, index) for key, array in self._arrays.items()}

    def decode(self, stored: Example, crop: Crop | None = None) -> Example:
        """The row; an image as `pictures` has it."""
        if self.pictures is None:
            return stored
        image = stored["image"]
        if crop or tuple(image.shape) != self.pictures.shape:
            image = self.pictures.cut(image, crop or self.pictures.evaluation_crop)
        return stored | {"image": tf.ensure_shape(image, self.pictures.shape)}

    def where(self, index: int) -> str:
        """The split, and the number of the row."""
        return f"{self.what}, row {index},"
