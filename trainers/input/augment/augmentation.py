"""What `--augment` does to training images. Each number drawn is a pure function of (seed, position of the example)."""

from collections.abc import Mapping

import tensorflow as tf

from models import randomness
from trainers.input.augment import crops, mixing, randaugment
from trainers.input.records import Crop, Example
from trainers.settings.augmentation import mixes

# Features whose pixels move together.
_PICTURES = ("image", "mask")


class Augmentation:
    """The changes that `words` name, of `trainers.settings.augmentation`, for images of `size` (height, width).

    Where an example has `mask`, a label for each pixel, what moves the pixels of the image moves those of the mask too.

    Sources of batches call `crop` and `of_one` for one image, or `of_resident` for many, and `of_batch` for a part of
    the global batch, within `models.randomness.at`: an image gets the same numbers alone and among others.
    """

    def __init__(self, words: Mapping[str, float], size: tuple[int, int]):
        self.words, self.size = dict(words), size

    @property
    def crop(self) -> Crop | None:
        """What part of one image is taken; None if all of it is."""
        least = self.words.get("inception")
        return None if least is None else lambda shape: crops.inception(shape[None], least)[0]

    def of_one(self, example: Example) -> Example:
        """A single decoded and cropped example: `image [height, width, channels]`, uint8; perhaps a `mask`."""
        changed = self._changed({key: example[key][None] for key in _PICTURES if key in example}, alone=True)
        return example | {key: value[0] for key, value in changed.items()}

    def of_resident(self, examples: Example) -> Example:
        """Examples as they are held: `image [batch, height, width, channels]`, uint8. Also crops them."""
        pictures = {key: examples[key] for key in _PICTURES if key in examples}
        if "inception" in self.words:
            images = pictures["image"]
            shape = tf.tile(tf.constant([images.shape[1:3].as_list()]), [tf.shape(images)[0], 1])
            pictures["image"] = crops.resized(images, crops.inception(shape, self.words["inception"]), self.size)
        return examples | self._changed(pictures, alone=False)

    def _changed(self, pictures: Example, alone: bool) -> Example:
        """Images, and masks `[batch, height, width]` by the same numbers. What a shift uncovers is 0 in both."""
        pictures = {key: value[..., None] if key == "mask" else value for key, value in pictures.items()}
        if "flip" in self.words:
            pictures = {key: crops.flipped(value, alone) for key, value in pictures.items()}
        if "crop" in self.words:
            pictures = {key: crops.shifted(value, self.words["crop"], alone) for key, value in pictures.items()}
        if "randaugment" in self.words:
            pictures["image"] = randaugment.randaugmented(pictures["image"], self.words["randaugment"], alone)
        return {key: value[..., 0] if key == "mask" else value for key, value in pictures.items()}

    def of_batch(self, features: Example) -> Example:
        """A part of the global batch: adds `other_label` and `share`, `[batch]`, where examples are mixed.

        `share` is how much of an example is its own; the rest is of the neighbour, whose label is `other_label`.
        """
        words, images = self.words, features["image"]
        if "erase" in words:
            images = mixing.erased(tf.cast(images, tf.float32), words["erase"])
        if not mixes(words):
            return features | {"image": images}
        images, count = tf.cast(images, tf.float32), tf.shape(images)[0]
        results = []
        if "mixup" in words:
            share = mixing.beta(count, words["mixup"], "augment/mixup")
            results.append((mixing.mixed_up(images, share), share))
        if "cutmix" in words:
            results.append(mixing.cut_mixed(images, mixing.beta(count, words["cutmix"], "augment/cutmix")))
        if len(results) == 2:
            # One of them a batch: the draw is that of the batch's first example, wherever the part begins.
            up = randomness.uniform_of_step("augment/mixing") < 0.5
            results[0] = tuple(tf.where(up, a, b) for a, b in zip(*results, strict=True))
        image, share = results[0]
        label = features["label"]
        return features | {"image": image, "share": share, "other_label": mixing.neighbours(label)}
