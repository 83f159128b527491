"""The registry of data sets: names, kinds and sources. Free of TensorFlow, so that flags are checked before it."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from models.options import is_object


@dataclasses.dataclass(frozen=True)
class DataCard:
    """What is known of a data set before it is loaded.

    `task`: the kind of data, which a model's card must name; empty where only the data tells. `load`: `module:function`
    of `(trainers.input.dataset.Request) -> trainers.input.dataset.Dataset`. `argument`: what follows the name, as
    `--help` shows it. `needs_label`: whether `--label` names a column. `images`: whether its examples are images; None
    where only the data tells. `masks`: whether each pixel of an image has a label. `documents`: whether a token may end
    documents.
    """

    task: str
    load: str
    summary: str = ""
    argument: str = ""
    needs_label: bool = False
    images: bool | None = False
    documents: bool = False
    masks: bool = False

    def loader(self) -> Callable[[Any], Any]:
        """The function that `load` names. Imports TensorFlow."""
        module, function = self.load.split(":")
        return getattr(importlib.import_module(module), function)


_EMBEDDED = "trainers.input.kinds.embedded:load"

DATASETS: dict[str, DataCard] = {
    "digits": DataCard(
        "classification", _EMBEDDED, "1,797 hand-written digits of 8×8 pixels, from scikit-learn", images=True
    ),
    "digit_masks": DataCard(
        "segmentation",
        "trainers.input.kinds.digit_masks:load",
        "the digits, enlarged, in noisy pictures of 32×32: which pixels are the digit's",
        images=True,
        masks=True,
    ),
    "diabetes": DataCard("regression", _EMBEDDED, "442 patients, 10 measurements → progression, from scikit-learn"),
    "linnerud": DataCard("regression", _EMBEDDED, "20 people, 3 exercises → 3 measurements, from scikit-learn"),
    "text": DataCard(
        "language",
        "trainers.input.kinds.text:load",
        "bytes of Python's standard library, or of the file PATH",
        "[:PATH]",
    ),
    "tokens": DataCard(
        "language",
        "trainers.input.kinds.tokens:load",
        "packed tokens of the file PATH, which PATH.json describes",
        ":PATH",
        documents=True,
    ),
    "csv": DataCard(
        "",
        "trainers.input.kinds.csv_table:load",
        "a table with a header; --label names the column to predict",
        ":PATH",
        needs_label=True,
    ),
    "images": DataCard(
        "classification",
        "trainers.input.kinds.image_folder:load",
        "image files, one folder a class, or those in train/ and val/",
        ":DIR",
        images=True,
    ),
}
_OWN = DataCard("", "trainers.input.kinds.own:load", "what a function of your own returns", images=None)
_TENSORFLOW_DATASETS = DataCard("classification", "trainers.input.kinds.tfds:load", "TensorFlow Datasets", images=True)


def split_name(name: str) -> tuple[str, str]:
    """`csv:/a/b.csv` → (`csv`, `/a/b.csv`)."""
    kind, _, argument = name.partition(":")
    return kind, argument


def is_own(name: str) -> bool:
    """Whether a data set is a function of the user's own, `module:object`, perhaps with options."""
    return split_name(name)[0] not in DATASETS and is_object(name.partition(",")[0])


def data_card(name: str) -> DataCard:
    """The card of a data set of ours or the user's; any other name is taken for an image classification set of TFDS."""
    return DATASETS.get(split_name(name)[0], _OWN if is_own(name) else _TENSORFLOW_DATASETS)


def is_downloaded(name: str) -> bool:
    """Whether the first use of a data set by its name downloads it."""
    return data_card(name) is _TENSORFLOW_DATASETS and ":" not in name


def is_prepared(name: str) -> bool:
    """Whether a data set is prepared once, in `--data_dir`, by its name alone."""
    return is_downloaded(name) or (":" not in name and data_card(name).load == _EMBEDDED)
