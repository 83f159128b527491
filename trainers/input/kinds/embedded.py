"""Data that installed packages ship, as builders of TensorFlow Datasets: prepared once, without network."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from trainers.input import builders
from trainers.input.dataset import Dataset, Request, standardized_rows
from trainers.input.raw.rows import Layout

_EVERY_NTH_IS_TEST = 5


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 hand-written digits of 8×8 pixels with 16 grey levels, as scikit-learn ships them.

    Splits: every fifth example is `test` (359), the rest `train` (1,438). Source: E. Alpaydin and C. Kaynak, "Optical
    recognition of handwritten digits", UCI Machine Learning Repository, 1998 (its test set).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The 1,797 images of scikit-learn; grey levels 0 to 16 scaled to 0 to 255."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn import datasets  # a second of each start, and needed once

        digits = datasets.load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        for index, (image, label) in enumerate(zip(images, digits.target, strict=True)):
            if (index % _EVERY_NTH_IS_TEST == _EVERY_NTH_IS_TEST - 1) == test:
                yield index, {"image": image, "label": int(label)}


class _Table(tfds.core.GeneratorBasedBuilder):
    """Rows of numbers with a target of numbers. Every fifth row is `test`."""

    VERSION = tfds.core.Version("1.0.0")
    columns = 0
    target_shape: tuple[int, ...] = ()
    # Names of the columns of features and of the target.
    names: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "features": tfds.features.Tensor(shape=(self.columns,), dtype=np.float32),
                "target": tfds.features.Tensor(shape=self.target_shape, dtype=np.float32),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=type(self).__doc__, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (row, target) in enumerate(zip(*self._rows(), strict=True)):
            if (index % _EVERY_NTH_IS_TEST == _EVERY_NTH_IS_TEST - 1) == test:
                yield index, {"features": row.astype(np.float32), "target": target.astype(np.float32)}


class Diabetes(_Table):
    """Ten measurements of 442 patients and the progression of their disease a year later. Every fifth row is `test`.

    Source: Efron et al., "Least angle regression", Annals of Statistics 2004, as scikit-learn ships it.
    """

    columns = 10
    names = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
    targets = ("progression",)

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn import datasets

        return datasets.load_diabetes(return_X_y=True, scaled=False)


class Linnerud(_Table):
    """Three exercises of 20 people, and their weight, waist and pulse. Every fifth row is `test`.

    Source: M. Tenenhaus, "La régression PLS", 1998, as scikit-learn ships it.
    """

    columns = 3
    target_shape = (3,)
    names, targets = ("Chins", "Situps", "Jumps"), ("Weight", "Waist", "Pulse")

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn import datasets

        return datasets.load_linnerud(return_X_y=True)


BUILDERS = {"digits": Digits, "diabetes": Diabetes, "linnerud": Linnerud}


def load(request: Request) -> Dataset:
    """The set `request.name` of `BUILDERS`, prepared in `data_dir`: images with labels, or rows of numbers.

    Raises:
      BadConfiguration: `data_dir` cannot be written or is full, or holds an incomplete copy.
    """
    with builders.readable_errors(request):
        builder = builders.prepared(lambda: BUILDERS[request.name](data_dir=request.data_dir), request)
        if "target" not in builder.info.features:
            return builders.image_classification(builder, request.name, request)
        splits = [builders.read_split(builder, split) for split in ("train", "test")]
        layout = Layout(builder.names, {}, (), builder.targets)
        return standardized_rows(request.name, *splits, 0, builder.info.full_name, layout)
