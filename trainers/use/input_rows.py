"""Rows of an input on their way to a model, wherever they come from."""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.input.errors import reason_of
from trainers.settings.exit_codes import BadConfiguration
from trainers.use.predictor import Predictor

_DECODED_AT_ONCE = 8


@dataclasses.dataclass
class Row:
    """A row of the input: where it stands, and its prepared `inputs` or the `reason` why it cannot be used.

    `target`: prepared, None where it is not known; `doubt`: why what stands there is no target. `count`: tokens that
    are the row's. `size`: height and width of an image as given.
    """

    where: str
    reason: str = ""
    inputs: Any = None
    target: Any = None
    doubt: str = ""
    count: int = 0
    size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What an input is. `state`: tells it from one of the same name that holds something else.

    `rows(skip)`: its rows behind the first `skip`, in order, some at a time. Raises BadConfiguration.
    """

    state: dict[str, Any]
    rows: Callable[[int], Iterator[list[Row]]]


def chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size`, the last may be shorter."""
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def readable(text: str, remedy: str, examples: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """`examples()`, one by one. Raises BadConfiguration if one cannot be read."""
    try:
        yield from examples()
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise BadConfiguration(f"--input {text} cannot be read: {reason_of(error)}; {remedy}") from error


def with_inputs(rows: list[Row], batch: Sequence[Any], predictor: Predictor) -> list[Row]:
    """Rows with the inputs of a batch, one for each row without a reason so far."""
    usable = [row for row in rows if not row.reason]
    if usable:
        features, raw = predictor.raw.features(*batch), predictor.raw
        inputs, errors = raw.inputs(features).numpy(), raw.errors(*batch).numpy()
        counts = features["count"].numpy() if "count" in features else np.zeros(len(usable), np.int32)
        for row, *found in zip(usable, inputs, errors, counts, strict=True):
            row.inputs, row.reason, row.count = found[0], found[1].decode(errors="replace"), int(found[2])
    return rows


def pictured(
    items: Iterable[Any], row_of: Callable[[Any], tuple[Row, Any]], predictor: Predictor
) -> Iterator[list[Row]]:
    """Rows with decoded pixels, several decoded at once."""
    with concurrent.futures.ThreadPoolExecutor(_DECODED_AT_ONCE) as pool:
        for chunk in chunks(items, predictor.size):
            found = list(pool.map(row_of, chunk))
            pixels = [image for row, image in found if not row.reason]
            if pixels:
                inputs = predictor.raw.inputs({"image": np.stack(pixels)}).numpy()
                for row, one in zip((row for row, _ in found if not row.reason), inputs, strict=True):
                    row.inputs = one
            yield [row for row, _ in found]
