"""The words of `--augment`: how training images are changed. Free of TensorFlow, so that they are checked before it."""

import dataclasses
from collections.abc import Mapping

from models.names import unknown
from trainers.settings.exit_codes import BadConfiguration


@dataclasses.dataclass(frozen=True)
class Word:
    """A change, and its one number: the value without `=`, and its bounds. `default=None`: it takes no number.

    `masks`: whether it is for images with a label for each pixel: it moves no pixel, or the labels with them.
    """

    meaning: str
    default: float | None = None
    low: float = 0.0
    high: float = 1.0
    masks: bool = False


WORDS: dict[str, Word] = {
    "inception": Word("a part of 0.08 (or VALUE) to 1 of the area, aspect 3/4 to 4/3, resized", 0.08, 0.01, 1.0),
    "crop": Word("shifted by up to an eighth of the size (or VALUE of it), over black", 0.125, 0.01, 0.5, masks=True),
    "flip": Word("left and right exchanged in every second image", masks=True),
    "randaugment": Word("two of 14 operations, of strength 10 (or VALUE) out of 10", 10.0, 0.0, 10.0),
    "erase": Word("with probability 0.25 (or VALUE) a rectangle becomes noise", 0.25, masks=True),
    "mixup": Word("blended with its neighbour in the batch; share ~ Beta(0.2, 0.2), or VALUE", 0.2, 0.01, 10.0),
    "cutmix": Word("a rectangle from its neighbour in the batch; area ~ Beta(1, 1), or VALUE", 1.0, 0.01, 10.0),
}
# These pair the examples of a batch.
MIXING = ("mixup", "cutmix")


def parse(text: str) -> dict[str, float]:
    """`flip,mixup=0.2` → `{"flip": 1.0, "mixup": 0.2}`.

    Raises:
      BadConfiguration: an unknown or repeated word, or a number that is out of bounds.
    """
    words: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, equals, number = part.partition("=")
        if name not in WORDS:
            raise BadConfiguration(unknown("--augment", name, WORDS))
        if name in words:
            raise BadConfiguration(f"--augment names {name} twice; name it once")
        words[name] = _number(name, number) if equals else _default(name)
    return words


def _default(name: str) -> float:
    default = WORDS[name].default
    return 1.0 if default is None else default


def _number(name: str, text: str) -> float:
    word = WORDS[name]
    if word.default is None:
        raise BadConfiguration(f"--augment {name}={text}: {name} takes no number; write {name}")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not word.low <= value <= word.high:
        raise BadConfiguration(
            f"--augment {name}={text} is not a number from {word.low:g} to {word.high:g}; pass e.g. "
            f"{name}={word.default:g}"
        )
    return value


def mixes(words: Mapping[str, float]) -> bool:
    """Whether examples of a batch are paired."""
    return any(name in words for name in MIXING)


def check_masks(dataset: str, words: Mapping[str, float], size: int) -> None:
    """Whether the labels of pixels stay with them. `size`: of `--image_size`.

    Raises:
      BadConfiguration: a word would move an image away from its labels, or images would be resized.
    """
    fit = ", ".join(name for name, word in WORDS.items() if word.masks)
    for name in words:
        if not WORDS[name].masks:
            raise BadConfiguration(
                f"--augment {name} does not move the labels of pixels, which --dataset {dataset} has; choose of: {fit}"
            )
    if size:
        raise BadConfiguration(
            f"--image_size {size} would resize images and not their labels, of which --dataset {dataset} has one for "
            "each pixel; leave it out"
        )


def described() -> str:
    """All words, for `--help`."""
    return "; ".join(f"{name}: {word.meaning}" for name, word in WORDS.items())
