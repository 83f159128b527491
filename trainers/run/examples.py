"""What a model does with examples of the evaluation split, for people to look at."""

import itertools
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from models import generation
from models.generation import Generation
from models.sampling import Sampling
from models.tasks import Predictions, Task
from trainers.input.dataset import Dataset, Features, Split
from trainers.show import drawings
from trainers.show.summaries import Summaries

# Examples of the evaluation split that are looked at.
MOST_EXAMPLES = 5000
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
    rows = []
    for features in _parts(dataset.eval, size):
        inputs, targets = dataset.prepare(features)
        outputs = model(task.inputs(inputs), training=False)
        row = (inputs, targets, outputs, task.loss(targets, outputs))
        rows.append(tf.nest.map_structure(lambda value: value.numpy(), row))
    columns = zip(*rows, strict=True)
    return Predictions(*(tf.nest.map_structure(lambda *values: np.concatenate(values), *column) for column in columns))


def _parts(split: Split, size: int) -> Iterator[Features]:
    """The first examples of a split, `size` of them at a time."""
    yield from split.examples().take(MOST_EXAMPLES).batch(size)


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
