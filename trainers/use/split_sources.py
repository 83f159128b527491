"""Rows of splits: of the run's own evaluation, and of TensorFlow Datasets or an installed package."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.input.errors import reason_of
from trainers.settings.exit_codes import BadConfiguration
from trainers.use.input_rows import Row, Source, chunks, pictured, readable, with_inputs
from trainers.use.predictor import Predictor

EVALUATION = "eval"
# From numbered examples to rows.
_RowsOf = Callable[[Iterable[tuple[int, Any]]], Iterator[list[Row]]]


def evaluation(predictor: Predictor) -> Source:
    """The evaluation split of a run. Raises BadConfiguration for an export, which has none."""
    dataset = predictor.dataset
    if dataset is None:
        raise BadConfiguration("--input=eval is a run's own evaluation split; name the run, not its export")

    def rows(skip: int) -> Iterator[list[Row]]:
        batches = dataset.eval.examples().skip(skip).batch(predictor.size)
        number = skip
        for features in readable(EVALUATION, f"bring --dataset {dataset.name} back as it was", lambda: batches):
            inputs, targets = (value.numpy() for value in dataset.prepare(features))
            count = inputs.shape[1] if inputs.ndim == 2 else 0
            found = [
                Row(str(number + i + 1), "", x, y, "", count)
                for i, (x, y) in enumerate(zip(inputs, targets, strict=True))
            ]
            number += len(found)
            yield found

    return Source({"data": dataset.fingerprint}, rows)


def prepared_set(argument: str, predictor: Predictor, data_dir: str) -> Source:
    """The examples of a split that TensorFlow Datasets or an installed package has."""
    from trainers.input import builders
    from trainers.input.dataset import Request
    from trainers.input.kinds import embedded, tfds

    name, _, split = argument.rpartition("/")
    request = Request(name, data_dir=data_dir)
    make = embedded.BUILDERS.get(name)
    with builders.readable_errors(request):
        builder = builders.prepared(
            (lambda: make(data_dir=data_dir)) if make else (lambda: tfds.builder_of(request)), request
        )
    if split not in builder.info.splits:
        raise BadConfiguration(
            f"--input tfds:{argument}: {name} has the splits {', '.join(builder.info.splits)}; name one"
        )
    wanted = {"image"} if predictor.raw.kind == "images" else {"features", "target"}
    if not wanted <= set(builder.info.features):
        raise BadConfiguration(f"--input tfds:{argument} has no {' and '.join(sorted(wanted))}; name another set")
    rows_of = (_set_of_images if "image" in wanted else _set_of_rows)(builder, split, predictor)

    def rows(skip: int) -> Iterator[list[Row]]:
        remedy = f"delete {builder.data_path} to prepare it again"
        examples = readable(f"tfds:{argument}", remedy, lambda: builders.examples_of(builder, split, skip))
        return rows_of(enumerate(examples, skip + 1))

    return Source({"data": builder.info.full_name, "data_dir": os.path.realpath(builder.data_path)}, rows)


def _feature(builder: Any, name: str) -> Any:
    """A feature of a set, or None."""
    features = builder.info.features
    return features[name] if name in features else None  # noqa: SIM401 - it is no dictionary


def _set_of_images(builder: Any, split: str, predictor: Predictor) -> _RowsOf:
    raw, label = predictor.raw, _feature(builder, "label")
    known = {i: raw.classes.index(name) for i, name in enumerate(getattr(label, "names", ())) if name in raw.classes}
    decode = tf.function(raw.decoded, input_signature=[tf.TensorSpec([], tf.string)])

    def row_of(item: tuple[int, Any]) -> tuple[Row, Any]:
        number, example = item
        row = Row(f"{split} {number}", target=known.get(int(example["label"])) if "label" in example else None)
        image = example["image"]
        try:
            encoded = isinstance(image, bytes)
            return row, decode(image).numpy() if encoded else raw.features(tf.constant(image)[None])["image"][0].numpy()
        except tf.errors.OpError as error:
            return Row(row.where, reason_of(error)), None

    return lambda examples: pictured(examples, row_of, predictor)


def _set_of_rows(builder: Any, split: str, predictor: Predictor) -> _RowsOf:
    raw, names = predictor.raw, getattr(builder, "names", ())
    if tuple(names) != raw.layout.columns or tuple(builder.targets) != raw.targets:
        raise BadConfiguration(f"--input tfds:{builder.name} has other columns than the model takes; name another set")
    keys, scale = list(raw.keys.values()), raw.target_scale

    def rows_of(examples: Iterable[tuple[int, Any]]) -> Iterator[list[Row]]:
        for chunk in chunks(examples, predictor.size):
            values = np.array([example["features"] for _, example in chunk], np.float64)
            targets = [scale.prepared(scale.held(np.float64(np.ravel(example["target"])))) for _, example in chunk]
            rows = [
                Row(f"{split} {number}", target=np.reshape(np.asarray(target), raw.target_shape))
                for (number, _), target in zip(chunk, targets, strict=True)
            ]
            yield with_inputs(rows, [{key: tf.constant(values[:, i]) for i, key in enumerate(keys)}], predictor)

    return rows_of
