"""Answers for all rows of an input: read, computed on all replicas, written in order, and measured where labels are."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm

from trainers.input.errors import one_line
from trainers.record import carriers
from trainers.settings.exit_codes import OK, ROWS_UNUSABLE, BadConfiguration
from trainers.show.progress import words
from trainers.use import answers, documents, predictor, row_sources
from trainers.use.answer_files import AnswerFile
from trainers.use.input_rows import Row
from trainers.use.predictor import Predictor
from trainers.world import process

# Seconds between what is kept for going on.
_KEEP_EVERY = 2.0


def predict(asked: Any) -> int:
    """Writes the answers that the options of `trainers/predict.py` ask for. Returns the exit code.

    Raises:
      BadConfiguration: the model, the input or the output is unusable.
    """
    with carriers.readable(asked.model_path) as folder:
        return _predict(asked, predictor.of(folder, asked))


def _predict(asked: Any, source: Predictor) -> int:
    if asked.input == documents.DOCUMENTS:
        return documents.measure(asked, source)
    if source.kind == "masks" and asked.output.suffix == ".csv":
        raise BadConfiguration(f"--output {asked.output}: a mask does not fit into a cell; name a file .jsonl")
    rows = row_sources.source_of(asked.input, source, str(asked.data_dir or _data_dir()))
    out = AnswerFile(asked.output, columns_of(source), {**source.identity, "input": asked.input, **rows.state})
    chunks = _begun(rows.rows(out.rows)) if not out.complete else iter(())
    with contextlib.closing(out):
        out.begin()
        process.say(
            f"{source.what}: {asked.input} → {asked.output}" + (f", from row {out.rows + 1}" if out.rows else "")
        )
        counted = Counted(source, out.counted)
        if not out.complete:
            _answer(source, chunks, out, counted)
    return counted.told(out.rows)


def _begun(chunks: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """The same, of which the first is read: what is wrong with the input is said before the output is touched."""
    first = next(chunks, [])

    def all_of() -> Iterator[list[Row]]:
        yield first
        yield from chunks

    return all_of()


class Counted:
    """What is summed over rows: for metrics, and of rows and labels that cannot be used."""

    def __init__(self, source: Predictor, before: Mapping[str, Any]):
        self.source = source
        self.sums = np.array(before.get("sums", [0.0] * source.sums.width), np.float64)
        self.labelled, self.unusable = before.get("labelled", 0), before.get("unusable", 0)
        self.doubts, self.doubt = before.get("doubts", 0), before.get("doubt", "")
        self.reason = before.get("reason", "")

    def add(self, row: Row) -> None:
        """Counts a row that is answered, or has a reason why not."""
        where = one_line(row.where)
        if row.reason:
            self.unusable += 1
            self.reason = self.reason or f"{where}: {row.reason}"
        self.labelled += row.target is not None and not row.reason
        if row.doubt:
            self.doubts += 1
            self.doubt = self.doubt or f"{where}: {one_line(row.doubt)}"

    def facts(self) -> dict[str, Any]:
        """For going on."""
        names = ("labelled", "unusable", "doubts", "doubt", "reason")
        sums = [str(value) for value in self.sums.tolist()]  # JSON has no word for what is not finite
        return {"sums": sums} | {name: getattr(self, name) for name in names}

    def told(self, rows: int) -> int:
        """Prints the metrics, and what could not be used. Returns the exit code."""
        if self.labelled:
            sums = self.source.sums
            values = dict(zip(sums.names, sums.values(tf.constant(self.sums)).numpy().tolist(), strict=True))
            if not self.source.has_loss:
                del values["loss"]
            process.show(words(values))
        if self.doubts:
            process.say(f"{self.doubts} labels could not be used and are not measured, the first: {self.doubt}")
        if 0 < self.labelled < rows:
            process.say(f"measured on {self.labelled} of {rows} rows")
        if self.unusable:
            process.say(f"{self.unusable} of {rows} rows could not be used, the first: {self.reason}")
        process.say(f"{rows} rows answered" if not self.unusable else f"{rows - self.unusable} of {rows} rows answered")
        return ROWS_UNUSABLE if self.unusable else OK


def _answer(source: Predictor, chunks: Iterator[list[Row]], out: AnswerFile, counted: Counted) -> None:
    """Answers the rows that the file does not have yet."""
    compute, kept = source.compiled(), time.monotonic()
    with tqdm.tqdm(unit="row", initial=out.rows, disable=not sys.stderr.isatty(), file=sys.stderr) as bar:
        for rows in chunks:
            out.write(_lines(source, compute, rows, out.rows, counted))
            bar.update(len(rows))
            if time.monotonic() - kept > _KEEP_EVERY:
                out.keep(counted.facts())
                kept = time.monotonic()
    out.keep(counted.facts(), complete=True)


def _lines(source: Predictor, compute: Any, rows: list[Row], before: int, counted: Counted) -> Iterator[dict[str, Any]]:
    """A line for each row; one at a time, since that of a mask is a hundred times as large as its array."""
    usable = [row for row in rows if not row.reason]
    found: dict[str, np.ndarray] = {}
    if usable:
        spec = source.spec
        kind = np.float32 if spec.num_classes == 0 else np.int64
        weights = np.array([row.target is not None for row in usable], np.float32)
        targets = [np.zeros(spec.target_shape, kind) if row.target is None else row.target for row in usable]
        counts = np.array([row.count for row in usable], np.int32)
        arrays = np.stack([row.inputs for row in usable]), counts, np.stack(targets).astype(kind), weights
        found, sums = compute(*arrays)
        counted.sums += sums
        for row, finite in zip(usable, found[predictor.FINITE], strict=True):
            row.reason = "" if finite else answers.NOT_FINITE
    places = {id(row): at for at, row in enumerate(usable)}
    for number, row in enumerate(rows, before + 1):
        row.reason = one_line(row.reason)
        counted.add(row)
        line = {"row": number, "input": row.where}
        if not row.reason:
            line |= _cells(source, {name: values[places[id(row)]] for name, values in found.items()}, row)
        yield line | {"error": row.reason}


def columns_of(source: Predictor) -> list[str]:
    """The columns of a CSV file of answers."""
    raw = source.raw
    own = {
        "classes": ["class", "probability", *(f"probability of {name}" for name in raw.classes)],
        "numbers": list(_names_of(raw.targets)),
        "text": ["next", "token", "probability"],
        "masks": ["class", "probability"],
    }
    return ["row", "input", *own[source.kind], "error"]


def _names_of(targets: Sequence[str]) -> list[str]:
    """Names of targets, none as the columns beside them."""
    return [f"{name}_" if name in ("row", "input", "error") else name for name in targets]


def _cells(source: Predictor, answer: Mapping[str, np.ndarray], row: Row) -> dict[str, Any]:
    """A row's answer by column. What CSV has no room for is in JSON alone."""
    raw = source.raw
    if source.kind == "classes":
        shares = answer["probabilities"].tolist()
        line = {"class": answer["class"].decode(), "probability": float(answer["probability"])}
        return line | {f"probability of {name}": share for name, share in zip(raw.classes, shares, strict=True)}
    if source.kind == "numbers":
        keys = answers.target_keys(raw).values()
        return {name: float(answer[key]) for name, key in zip(_names_of(raw.targets), keys, strict=True)}
    if source.kind == "masks":
        classes, shares = answer["class"], answer["probability"]
        if row.size:  # as large as the image was
            down, right = (np.arange(size) * own // size for size, own in zip(row.size, classes.shape, strict=True))
            classes, shares = (values[down][:, right] for values in (classes, shares))
        return {"class": classes.tolist(), "probability": np.round(shares.astype(float), 4).tolist()}
    texts = [text.decode("utf-8", "replace") for text in answer["text"]] if "text" in answer else []
    tokens, shares = answer["token"].tolist(), answer["probability"].tolist()
    line = {"next": texts[0] if texts else "", "token": tokens[0], "probability": shares[0]}
    others = [{"token": token, "probability": share} for token, share in zip(tokens, shares, strict=True)]
    return line | {"most likely": [one | ({"text": texts[i]} if texts else {}) for i, one in enumerate(others)]}


def _data_dir() -> Path:
    from trainers.settings import paths
    from trainers.settings.config import Config

    return paths.local("--data_dir", Config.data_dir if paths.has_home() else paths.DATA_WITHOUT_HOME)
