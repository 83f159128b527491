"""The registry of data sets: names, kinds and sources. Free of TensorFlow, so that flags are checked before it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataCard:
    """What is known of a data set before it is loaded.

    `task`: the kind of data, which a model's card must name; empty where only the data tells. `loader`: the function in
    `trainers.input.load` that reads it. `argument`: what follows the name, as `--help` shows it. `needs_label`: whether
    `--label` names a column.
    """

    task: str
    loader: str
    summary: str = ""
    argument: str = ""
    needs_label: bool = False


DATASETS: dict[str, DataCard] = {
    "digits": DataCard("classification", "builder", "1,797 hand-written digits of 8×8 pixels, from scikit-learn"),
    "diabetes": DataCard("regression", "builder", "442 patients, 10 measurements → progression, from scikit-learn"),
    "linnerud": DataCard("regression", "builder", "20 people, 3 exercises → 3 measurements, from scikit-learn"),
    "text": DataCard("language", "text", "bytes of Python's standard library, or of the file PATH", "[:PATH]"),
    "csv": DataCard("", "csv", "a table with a header; --label names the column to predict", ":PATH", needs_label=True),
    "images": DataCard(
        "classification", "images", "image files, one folder a class, or those in train/ and test/", ":DIR"
    ),
}


def split_name(name: str) -> tuple[str, str]:
    """`csv:/a/b.csv` → (`csv`, `/a/b.csv`)."""
    kind, _, argument = name.partition(":")
    return kind, argument


def data_card(name: str) -> DataCard:
    """The card of a data set of ours; any other name is taken for an image classification set of TFDS."""
    return DATASETS.get(split_name(name)[0], DataCard("classification", "builder", "TensorFlow Datasets"))
