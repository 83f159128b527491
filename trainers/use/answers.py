"""From a model's outputs to answers: classes by name, numbers in their own units, the next tokens, a mask."""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from models.tasks import Task
from trainers.input.raw.form import Features, Raw, keys_of
from trainers.input.raw.rows import RawRows

# Next tokens that are told.
MOST_TOKENS = 5
Answer = dict[str, tf.Tensor]
# `(outputs, features of the examples) -> tensors by name`, each `[batch, …]`.
Answering = Callable[[Any, Features], Answer]
ERROR = "error"
NOT_FINITE = "the model answers with what is no finite number; a number of the row may be too large"
KINDS = ("classes", "numbers", "masks", "text")
_OUTPUTS = {
    "classes": {
        "class": "the name of the most likely class",
        "probability": "of that class",
        "probabilities": "of all, in the order of data.classes",
    },
    "numbers": {},
    "masks": {
        "class": "the number in data.classes of each pixel's class, [height, width] of the image as given",
        "probability": "of that class",
    },
    "text": {
        "token": f"the {MOST_TOKENS} most likely next tokens, the first is the most likely",
        "probability": "of each",
        "text": "the bytes of each",
    },
}


def kind_of(task: Task, raw: Raw | None) -> str:
    """What the outputs mean, a word of `models.tasks.PICTURES`; empty where only the model's or the data's owner knows.

    A task says how its outputs can be shown by name, and so what they are.
    """
    kind = task.pictures if isinstance(task.pictures, str) else ""
    if raw is None or kind not in _OUTPUTS:
        return ""
    fits = {
        "classes": bool(raw.classes),
        "numbers": bool(raw.targets),
        "masks": bool(raw.classes) and raw.kind == "images",
        "text": raw.kind in ("text", "tokens"),
    }
    return kind if fits[kind] else ""


def answering(kind: str, raw: Raw) -> Answering:
    """The function that answers from outputs of a kind that `kind_of` has found."""
    answer = {"classes": _classes, "numbers": _numbers, "masks": _mask, "text": _next_tokens}[kind]
    return lambda outputs, features: answer(outputs[0] if isinstance(outputs, tuple) else outputs, features, raw)


def described(kind: str, raw: Raw) -> dict[str, str]:
    """What each tensor of an answer is, for the metadata."""
    outputs = dict(_OUTPUTS[kind])
    if kind == "numbers":
        outputs = {key: f"{name}, in its own units" for name, key in target_keys(raw).items()}
    if kind == "text" and not raw.pieces:
        del outputs["text"]
    return outputs | {ERROR: "why an example cannot be used; empty where it can"}


def target_keys(raw: Raw) -> dict[str, str]:
    """Column to predict → the name of its tensor. None is called as the tensor of errors is."""
    keys = keys_of((ERROR, *raw.targets))[1:]
    return dict(zip(raw.targets, keys, strict=True))


def _classes(logits: tf.Tensor, features: Features, raw: Raw) -> Answer:
    probabilities = tf.nn.softmax(tf.cast(logits, tf.float32))
    names = tf.gather(tf.constant(raw.classes), tf.argmax(probabilities, axis=-1))
    return {"class": names, "probability": tf.reduce_max(probabilities, axis=-1), "probabilities": probabilities}


def _numbers(outputs: tf.Tensor, features: Features, raw: RawRows) -> Answer:
    columns = tf.reshape(outputs, [-1, len(raw.targets)])
    own = raw.target_scale.own(columns)
    return {key: own[:, i] for i, key in enumerate(target_keys(raw).values())}


def _mask(logits: tf.Tensor, features: Features, raw: Raw) -> Answer:
    probabilities = tf.nn.softmax(tf.cast(logits, tf.float32))
    classes = tf.argmax(probabilities, axis=-1, output_type=tf.int32)
    of_it = tf.reduce_max(probabilities, axis=-1)
    if "size" in features:  # as large as the image was

        def resized(values: tf.Tensor) -> tf.Tensor:
            return tf.image.resize(values[..., None], features["size"], "nearest")[..., 0]

        classes, of_it = resized(classes), resized(of_it)
    return {"class": classes, "probability": of_it}


def _next_tokens(logits: tf.Tensor, features: Features, raw: Raw) -> Answer:
    last = tf.gather(logits, tf.maximum(features["count"] - 1, 0), batch_dims=1)
    found = tf.math.top_k(tf.nn.softmax(tf.cast(last, tf.float32)), min(MOST_TOKENS, logits.shape[-1]))
    answer = {"token": found.indices, "probability": found.values}
    return answer | ({"text": tf.gather(tf.constant(raw.pieces), found.indices)} if raw.pieces else {})


def are_finite(inputs: tf.Tensor, answer: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Whether prepared inputs and all numbers of the answer are finite, `[batch]` booleans."""
    finite = tf.fill(tf.shape(inputs)[:1], True)
    for values in (inputs, *answer.values()):
        if values.dtype.is_floating:
            finite &= tf.reduce_all(tf.math.is_finite(values), axis=range(1, values.shape.rank))
    return finite


def without_errors(answer: Mapping[str, tf.Tensor], errors: tf.Tensor, inputs: tf.Tensor) -> Answer:
    """The answer with `errors [batch]` beside it; an example that has one is answered by nothing, NaN or -1.

    One whose prepared `inputs` or answer are not finite has one too.
    """
    errors = tf.where(tf.equal(errors, "") & ~are_finite(inputs, answer), NOT_FINITE, errors)

    def blank(values: tf.Tensor) -> tf.Tensor:
        nothing = tf.constant("" if values.dtype == tf.string else -1 if values.dtype.is_integer else float("nan"))
        bad = tf.reshape(tf.not_equal(errors, ""), [-1, *[1] * (values.shape.rank - 1)])
        return tf.where(bad, tf.cast(nothing, values.dtype), values)

    return {name: blank(values) for name, values in answer.items()} | {ERROR: errors}
