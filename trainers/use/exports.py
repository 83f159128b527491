"""What `--export` writes of a model that is trained on data of a known kind, and what is told of it.

A SavedModel has these signatures, `serve` is the default:

- `serve`: a batch as its user has it → answers, see `trainers.use.answers`, and `error`, why a row cannot be used
- `serve_encoded`, for images: the bytes of files `[batch]` → the same
- `generate_step`, for language models that keep a cache: tokens and the cache → logits of the next token, and the cache
- `serve_prepared`: inputs as the data set prepares them → the model's own outputs

Where only the owner of the model or of the data knows what inputs or outputs mean, there is `serve_prepared` alone.
"""

import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from models import generation
from models.tasks import Task
from trainers.input.dataset import Dataset
from trainers.run import saved_model
from trainers.run.saved_model import Endpoint
from trainers.use import answers
from trainers.use.answers import Answering

PREPARED, STEP = "serve_prepared", "generate_step"


def write(path: Path, formats: str, model: keras.Model, task: Task, dataset: Dataset) -> None:
    """Writes a model that answers in the terms of whoever has the data. `formats`: the value of `--export`."""
    kind = answers.kind_of(task, dataset.raw)
    if not kind:
        what = "the data" if dataset.raw is None else "the outputs of the model's Task"
        logging.warning("--export: only you know what %s mean, so the export has %s alone", what, PREPARED)
    answer = answers.answering(kind, dataset.raw) if kind else None
    write_with(path, formats, model, task.inputs, dataset, answer, _reading(model) if kind == "text" else {})


def _reading(model: keras.Model) -> dict[str, Endpoint]:
    """How a language model reads tokens one after another, if it keeps a cache."""
    steps = generation.with_cache(model)
    if steps is None:
        return {}

    def generate_step(tokens: tf.Tensor, cache: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        logits, now = steps.step(tokens, cache)
        return {"logits": logits, **now}

    return {STEP: Endpoint(generate_step, (tf.TensorSpec([None, None], tf.int32, "tokens"), dict(steps.specs)))}


def write_features(
    path: Path, formats: str, encoder: keras.Model, inputs_of: Callable[[Any], Any], dataset: Dataset
) -> None:
    """Writes an encoder, which answers with `features [batch, features]`."""
    answer = (lambda outputs, _: {"features": outputs}) if dataset.raw else None
    write_with(path, formats, encoder, inputs_of, dataset, answer)


def write_with(
    path: Path,
    formats: str,
    model: keras.Model,
    inputs_of: Callable[[Any], Any],
    dataset: Dataset,
    answer: Answering | None,
    more: Mapping[str, Endpoint] = types.MappingProxyType({}),
) -> None:
    """As `write`, with another answer, and `more` endpoints. `inputs_of`: from the data set's inputs to the model's."""
    spec = dataset.spec
    prepared = tf.TensorSpec([None, *spec.input_shape], spec.input_dtype, name="inputs")

    def outputs(inputs: tf.Tensor) -> Any:
        return model(inputs_of(inputs), training=False)

    endpoints = _serving(dataset, outputs, answer) if answer else {}
    endpoints |= more
    endpoints[PREPARED] = Endpoint(outputs, (prepared,))
    saved_model.write_all(path, formats, model, endpoints)


def _serving(dataset: Dataset, outputs: Callable[[tf.Tensor], Any], answer: Answering) -> dict[str, Endpoint]:
    raw = dataset.raw

    def serve(*batch: Any) -> answers.Answer:
        features = raw.features(*batch)
        inputs = raw.inputs(features)
        return answers.without_errors(answer(outputs(inputs), features), raw.errors(*batch), inputs)

    endpoints = {"serve": Endpoint(serve, raw.signature())}
    if hasattr(raw, "decoded"):

        def serve_encoded(encoded: tf.Tensor) -> answers.Answer:
            pixels = tf.TensorSpec(raw.pictures.shape, tf.uint8)
            features = {"image": tf.map_fn(raw.decoded, encoded, fn_output_signature=pixels)}
            inputs = raw.inputs(features)
            return answers.without_errors(answer(outputs(inputs), features), tf.fill(tf.shape(encoded), ""), inputs)

        endpoints["serve_encoded"] = Endpoint(serve_encoded, (tf.TensorSpec([None], tf.string, name="encoded"),))
    return endpoints


def facts(task: Task, dataset: Dataset) -> Mapping[str, Any]:
    """What the metadata says of data and answers, so that both can be used and rebuilt without the run."""
    kind, spec = answers.kind_of(task, dataset.raw), dataset.spec
    return {
        "data": dataset.raw.facts() if dataset.raw else None,
        "answers": kind,
        "outputs": answers.described(kind, dataset.raw) if kind else {},
        "spec": {
            "task": spec.task,
            "input_shape": list(spec.input_shape),
            "input_dtype": spec.input_dtype,
            "num_classes": spec.num_classes,
            "target_shape": list(spec.target_shape),
            "separator": spec.separator,
            "document_mask": spec.document_mask,
        },
    }
