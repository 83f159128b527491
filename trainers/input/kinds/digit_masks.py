"""Digits of scikit-learn in noisy pictures: which pixels are the digit's. Made anew at each start, in half a second."""

import numpy as np
from sklearn import datasets as sklearn_datasets

from trainers.input.dataset import Dataset, Request
from trainers.input.masked_images import Arrays, dataset_of

SIDE = 32
# A digit of 8×8 pixels becomes one of 16×16.
_ENLARGED = 2
_EVERY_NTH_IS_TEST = 5
# Of 16 grey levels: from which on a pixel is the digit's.
_LEVEL = 8
# Brightness of ink and noise, out of 255. Clutter is as bright as the digit: brightness alone does not tell them apart.
_INK, _NOISE, _STROKES, _DOTS = (110, 200), 28.0, 3, 12


def load(request: Request) -> Dataset:
    """Pictures `[32, 32, 1]` and labels `[32, 32]`: 0 around, 1 the digit. A digit is in one split alone, as `digits`.

    Raises:
      BadConfiguration: as `dataset_of`.
    """
    digits = sklearn_datasets.load_digits().images
    test = np.arange(len(digits)) % _EVERY_NTH_IS_TEST == _EVERY_NTH_IS_TEST - 1
    train, evaluation = (_pictures(digits[rows], seed) for seed, rows in enumerate((~test, test)))
    return dataset_of(request, train, evaluation, 2, "digit_masks, version 1", ("background", "digit"))


def _pictures(digits: np.ndarray, seed: int) -> Arrays:
    """A picture of each digit `[n, 8, 8]`, of 16 grey levels, and its labels."""
    chance = np.random.default_rng(seed)
    images = np.zeros([len(digits), SIDE, SIDE, 1], np.uint8)
    masks = np.zeros([len(digits), SIDE, SIDE], np.uint8)
    for image, mask, digit in zip(images, masks, digits, strict=True):
        ink = np.kron(digit >= _LEVEL, np.ones([_ENLARGED, _ENLARGED], bool))
        top, left = chance.integers(0, SIDE - len(ink) + 1, 2)
        mask[top : top + len(ink), left : left + len(ink)] = ink
        bright = np.maximum(_clutter(chance), mask * chance.uniform(*_INK))
        image[..., 0] = np.clip(np.round(bright + 40 + chance.normal(0, _NOISE, [SIDE, SIDE])), 0, 255)
    return images, masks


def _clutter(chance: np.random.Generator) -> np.ndarray:
    """Straight strokes and dots, as wide as the digit's: brightness `[32, 32]`, 0 where there are none."""
    picture, steps = np.zeros([SIDE, SIDE]), np.arange(10)
    for _ in range(_STROKES):
        begin, angle = chance.uniform(0, SIDE, 2), chance.uniform(0, 2 * np.pi)
        rows, columns = (
            np.int64(at + steps * step) for at, step in zip(begin, (np.sin(angle), np.cos(angle)), strict=True)
        )
        _stamp(picture, rows, columns, chance.uniform(*_INK))
    for row, column in chance.integers(0, SIDE, [_DOTS, 2]):
        _stamp(picture, row[None], column[None], chance.uniform(*_INK))
    return picture


def _stamp(picture: np.ndarray, rows: np.ndarray, columns: np.ndarray, bright: float) -> None:
    """Squares of 2×2 pixels with their upper left corners at rows and columns, where they lie in the picture."""
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        y, x = rows + down, columns + right
        inside = (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
        picture[y[inside], x[inside]] = bright
