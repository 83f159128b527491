"""What a model does with examples of the evaluation split, for people to look at."""

import itertools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models import generation
from models.generation import Generation
from models.sampling import Sampling
from models.tasks import Predictions, Task
from trainers.input.dataset import Dataset, Split
from trainers.show import drawings
from trainers.show.summaries import Summaries

# Examples of the evaluation split that are looked at, and the bytes that these and their outputs may take: 400 photos.
MOST_EXAMPLES, MOST_BYTES = 5000, 256 << 20
# Tokens that a language model is given, and that it continues with.
PROMPT, CONTINUATION = 48, 80


def show(summaries: Summaries, step: int, model: keras.Model, task: Task, dataset: Dataset, size: int) -> None:
    """Writes to `eval/` what the task shows of an evaluation. `size`: examples that are computed with at once."""
    if summaries.silent or not task.pictures:
        return
    if task.pictures == "text":
        summaries.text("eval", step, "sample", continued_text(model, task, dataset))
        return
    draw = drawings.KINDS.get(task.pictures) or drawings.of_own(task.pictures)
    draw(summaries, step, predict(model, task, dataset, size))


def predict(model: keras.Model, task: Task, dataset: Dataset, size: int) -> Predictions:
    """The model's outputs for the first examples of the evaluation split, `size` of them at a time."""
    rows, done, most = [], 0, MOST_EXAMPLES
    batches = dataset.eval.examples().take(MOST_EXAMPLES).batch(size)

    def predicted(features: Any) -> tuple[Any, Any, Any, tf.Tensor]:
        inputs, targets = dataset.prepare(features)
        outputs = model(task.inputs(inputs), training=False)
        return inputs, targets, outputs, task.loss(targets, outputs)

    # A graph is made in the time of a few batches; eager, a deep model's pictures took longer than its evaluation.
    compiled = tf.function(predicted, autograph=False).get_concrete_function(batches.element_spec)
    for features in batches:
        rows.append(tf.nest.map_structure(lambda value: value.numpy(), compiled(features)))
        if not done:
            of_one = sum(value.nbytes / len(value) for value in tf.nest.flatten(rows[0]))
            most = max(min(MOST_EXAMPLES, int(MOST_BYTES // of_one)), 1)
        done += len(rows[-1][-1])
        if done >= most:
            break
    columns = zip(*rows, strict=True)
    joined = (tf.nest.map_structure(lambda *values: np.concatenate(values)[:most], *column) for column in columns)
    return Predictions(*joined)


def _first_window(split: Split) -> np.ndarray:
    """The first window of tokens of a split: `[time + 1]`."""
    if split.arrays is not None:
        return split.arrays["tokens"][0]
    return next(split.examples().take(1).as_numpy_iterator())["tokens"]


def continued_text(model: keras.Model, task: Task, dataset: Dataset) -> str:
    """How a language model continues the beginning of the evaluation split, each time with its most likely token."""
    length = dataset.spec.input_shape[0]
    steps = generation.with_cache(model)
    steps = steps or generation.without_cache(lambda tokens: model(task.inputs(tokens), training=False), length)
    prompt = [int(token) for token in _first_window(dataset.eval)[: min(PROMPT, length)]]
    loop = Generation(steps, Sampling(temperature=0))
    parts = loop.continued(prompt, CONTINUATION)
    prompt, rest = dataset.as_text(prompt), dataset.as_text(list(itertools.chain(*parts)))
    return f"Given:\n\n```\n{prompt}\n```\n\nContinued with:\n\n```\n{rest}\n```"
