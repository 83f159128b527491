"""The registry of data sets: names, kinds and sources. Free of TensorFlow, so that flags are checked before it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataCard:
    """What is known of a data set before it is loaded.

    `task`: the kind of data, which a model's card must list. `builder`: the class in `trainers.builders` that makes it
    without network, or empty for a name of TensorFlow Datasets.
    """

    task: str
    builder: str = ""
    summary: str = ""


DATASETS: dict[str, DataCard] = {
    "digits": DataCard("classification", "Digits", "1,797 hand-written digits of 8×8 pixels, from scikit-learn"),
}


def data_card(name: str) -> DataCard:
    """The card of an embedded data set; any other name is taken for an image classification set of TFDS."""
    return DATASETS.get(name, DataCard("classification", summary="TensorFlow Datasets"))
