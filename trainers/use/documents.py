"""Perplexity by document: how well a language model predicts each document of its run's evaluation split."""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from models.losses import TokenCrossEntropy
from trainers.input.dataset import Split
from trainers.settings.exit_codes import OK, ROWS_UNUSABLE, BadConfiguration
from trainers.show.progress import words
from trainers.use.answer_files import AnswerFile
from trainers.use.predictor import Predictor
from trainers.world import process

DOCUMENTS = "documents"
COLUMNS = ("row", "input", "tokens", "bits_per_token", "perplexity", "error")
# Windows of a split that are read at once, and seconds between what is kept for going on.
_READ_AT_ONCE, _KEEP_EVERY = 256, 2.0
_NOT_FINITE = "its loss is not a finite number"
# e to the power of more is no float.
_MOST_NATS = math.log(sys.float_info.max)


class Document(NamedTuple):
    """A document of a split: the number of its first token there, and its tokens with the separator that ends it."""

    first: int
    tokens: np.ndarray


class Piece(NamedTuple):
    """What a model sees of a document at once: inputs and targets `[length]`; a target of -1 is not to be predicted."""

    inputs: np.ndarray
    targets: np.ndarray


def documents_of(split: Split, separator: int) -> Iterator[Document]:
    """The documents of a split that have a token to predict: two tokens or more. The first and the last may be cut."""
    held, first = np.zeros(0, np.int32), 0
    for part in _tokens_of(split):
        held = np.concatenate([held, part])
        begin = 0
        for end in np.flatnonzero(held == separator) + 1:
            if end - begin > 1:
                yield Document(first + begin, held[begin:end])
            begin = end
        held, first = held[begin:], first + begin
    if len(held) > 1:
        yield Document(first, held)


def _tokens_of(split: Split) -> Iterator[np.ndarray]:
    """All tokens of a split, in order. Each of its windows begins with the last token of the one before."""
    for features in split.examples().batch(_READ_AT_ONCE).as_numpy_iterator():
        windows = features["tokens"].astype(np.int32)
        yield windows[:, :-1].ravel()
    yield windows[-1, -1:]


def pieces_of(tokens: np.ndarray, length: int) -> Iterator[Piece]:
    """A document in pieces that predict each of its tokens but the first once.

    Each is predicted in sight of all tokens before it, or of more than half of `length`.
    """
    begin, done, count = 0, 0, len(tokens) - 1
    while done < count:
        end = min(begin + length, count)
        inputs, targets = np.zeros(length, np.int32), np.full(length, -1, np.int32)
        inputs[: end - begin] = tokens[begin:end]
        targets[done - begin : end - begin] = tokens[done + 1 : end + 1]
        yield Piece(inputs, targets)
        begin, done = end - length // 2, end


def measure(asked: Any, source: Predictor) -> int:
    """Writes a row for each document, and prints what holds for all. Returns the exit code.

    Raises:
      BadConfiguration: there are no documents, or the output holds something else.
    """
    if source.dataset is None:
        raise BadConfiguration("--input=documents are those of a run's evaluation split; name the run, not its export")
    separator = source.spec.separator
    if source.kind != "text" or separator is None:
        raise BadConfiguration(
            f"--input=documents: {source.dataset.name} has no separator that ends a document; name a run on "
            "tokens:PATH whose PATH.json has one"
        )
    out = AnswerFile(asked.output, COLUMNS, {**source.identity, "input": DOCUMENTS})
    with contextlib.closing(out):
        out.begin()
        process.say(f"{source.what}: {DOCUMENTS} → {asked.output}" + (f", from row {out.rows + 1}" if out.rows else ""))
        sums = {name: out.counted.get(name, 0.0) for name in ("documents", "tokens", "nats", "means")}
        if not out.complete:
            found = itertools.islice(documents_of(source.dataset.eval, separator), out.rows, None)
            _measure(source, found, out, sums)
    return _told(sums, out.rows)


def _measure(source: Predictor, documents: Iterator[Document], out: AnswerFile, sums: dict[str, float]) -> None:
    nats_of, kept = _computing(source), time.monotonic()
    for chunk in _chunks(documents, source.raw.length, source.size):
        nats = iter(nats_of([piece for _, pieces in chunk for piece in pieces]).tolist())
        rows = []
        for document, pieces in chunk:
            count = len(document.tokens) - 1
            mean = math.fsum(itertools.islice(nats, len(pieces))) / count
            rows.append(_row(out.rows + len(rows) + 1, document, count, mean))
            if rows[-1]["error"]:
                continue
            for name, value in {"documents": 1, "tokens": count, "nats": mean * count, "means": mean}.items():
                sums[name] += value
        out.write(rows)
        if time.monotonic() - kept > _KEEP_EVERY:
            out.keep(sums)
            kept = time.monotonic()
    out.keep(sums, complete=True)


def _chunks(documents: Iterator[Document], length: int, size: int) -> Iterator[list[tuple[Document, list[Piece]]]]:
    """Documents with their pieces, so many at a time that these are `size` or more."""
    held, count = [], 0
    for document in documents:
        held.append((document, list(pieces_of(document.tokens, length))))
        count += len(held[-1][1])
        if count >= size:
            yield held
            held, count = [], 0
    if held:
        yield held


def _computing(source: Predictor) -> Callable[[list[Piece]], np.ndarray]:
    """The function from pieces to the sum of nats of each, `[pieces]`."""
    loss, length = TokenCrossEntropy(), source.raw.length

    def in_replica(inputs: Any, targets: Any) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        outputs = source.outputs(inputs)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return {"nats": loss.call(targets, logits) * length}, tf.zeros([1])

    compute = source.on_replicas(in_replica)

    def nats_of(pieces: list[Piece]) -> np.ndarray:
        parts = [pieces[at : at + source.size] for at in range(0, len(pieces), source.size)]
        found = [compute(*(np.stack(column) for column in zip(*part, strict=True)))[0]["nats"] for part in parts]
        return np.concatenate(found)

    return nats_of


def _row(number: int, document: Document, count: int, mean: float) -> dict[str, Any]:
    last = document.first + len(document.tokens) - 1
    row = dict(zip(COLUMNS, (number, f"tokens {document.first} to {last}", count, None, None, ""), strict=True))
    if not math.isfinite(perplexity(mean)):
        return row | {"error": _NOT_FINITE}
    return row | {"bits_per_token": mean / math.log(2), "perplexity": perplexity(mean)}


def perplexity(nats: float) -> float:
    """The exponential of nats a token; infinite beyond the largest number."""
    return math.exp(nats) if nats < _MOST_NATS else math.inf


def _told(sums: Mapping[str, float], rows: int) -> int:
    """Prints the perplexity over all tokens, and that in which each document counts the same. Returns the exit code."""
    counted = int(sums["documents"])
    if counted:
        values = {
            "perplexity": perplexity(sums["nats"] / sums["tokens"]),
            "document_perplexity": perplexity(sums["means"] / counted),
        }
        process.show(words(values))
    if counted < rows:
        process.say(f"{rows - counted} of {rows} documents have no perplexity: the loss is not a finite number")
    process.say(f"{counted} documents, {sums['tokens']:.0f} tokens")
    return ROWS_UNUSABLE if counted < rows else OK
