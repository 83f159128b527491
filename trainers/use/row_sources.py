"""Where rows to be answered come from: files, folders, or a split."""

import csv
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorflow as tf

from trainers.input import image_files, object_cache
from trainers.input.errors import one_line, reason_of
from trainers.input.kinds import csv_table, image_folder
from trainers.input.raw.rows import WITH_COMMA, RawRows, number_of
from trainers.input.raw.texts import RawText
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration
from trainers.use import split_sources
from trainers.use.input_rows import Row, Source, chunks, pictured, with_inputs
from trainers.use.predictor import Predictor
from trainers.world import files

_NO_UTF8 = "is not UTF-8; save the file as UTF-8"
# Of the number of a token.
_MOST_DIGITS = 10
# Bytes of a line that are read at once.
_BLOCK = 1 << 20
# Kind of input → kinds of `trainers.input.raw` that take it.
KINDS = {"csv": ("rows",), "images": ("images",), "text": ("text", "tokens"), "tfds": ("images", "rows")}


def source_of(text: str, predictor: Predictor, data_dir: str) -> Source:
    """The rows of `--input`, which names what is there.

    Raises:
      BadConfiguration: the input cannot be read, or is not what the model takes.
    """
    if text == split_sources.EVALUATION:
        return split_sources.evaluation(predictor)
    kind, argument = text.partition(":")[::2]
    raw = predictor.raw
    if raw.kind not in KINDS[kind]:
        fit = [name for name, kinds in KINDS.items() if raw.kind in kinds]
        raise BadConfiguration(f"--input {text}: the model takes {raw.kind}; pass {' or '.join(f'{n}:…' for n in fit)}")
    if kind == "tfds":
        return split_sources.prepared_set(argument, predictor, data_dir)
    if paths.is_address(argument):
        path = object_cache.brought(kind, argument, "")
    else:
        path = paths.local(f"--input={kind}:", argument)
    return {"csv": _table, "images": _images, "text": _lines}[kind](path, predictor)


def _file_state(path: Path) -> dict[str, Any]:
    try:
        known = path.stat()
    except OSError as error:
        raise BadConfiguration(f"{path} cannot be read: {error.strerror}; name another") from None
    return {"bytes": known.st_size, "changed": known.st_mtime_ns}


# Tables ---------------------------------------------------------------------------------------------------------------


def _table(path: Path, predictor: Predictor) -> Source:
    """The rows of a CSV file. Columns are found by name, in any order; others are left out."""
    raw, names = predictor.raw, predictor.raw.layout.columns
    found = {}
    for delimiter in csv_table.DELIMITERS:
        header = [cell.strip() for cell in next(_cells(path, delimiter), (0, [], ""))[1]]
        found[delimiter] = header
    delimiter = max(found, key=lambda each: len(set(names) & set(found[each])))
    header = found[delimiter]
    if not any(header):
        raise BadConfiguration(f"{path} is empty, or its first line is; the first line names the columns")
    if not all(map(_is_utf8, header)) and not set(names) <= set(header):
        raise BadConfiguration(f"{path}, line 1, {_NO_UTF8}")
    if missing := [name for name in names if name not in header]:
        raise BadConfiguration(
            f"{path} has no column {', '.join(map(repr, missing))}, which the model needs; it has "
            f"{one_line(', '.join(map(repr, header)))}; add what is missing"
        )
    needed = [*names, *(name for name in raw.layout.targets if name in header)]
    if double := [name for name in needed if header.count(name) > 1]:
        raise BadConfiguration(f"{path}, line 1: column {double[0]!r} stands there twice; name each column once")
    places = {name: header.index(name) for name in needed}
    numbers = [at for name, at in places.items() if name in raw.targets or name in set(names) - set(raw.layout.words)]

    def lines(skip: int) -> Iterator[tuple[int, list[str], str]]:
        return itertools.islice(_cells(path, delimiter), 1 + skip, None)

    comma = delimiter != "," and any(
        WITH_COMMA.fullmatch(cells[at].strip())
        for _, cells, _ in lines(0)
        if len(cells) == len(header)
        for at in numbers
    )
    return Source(_file_state(path), lambda skip: _table_rows(lines(skip), places, len(header), raw, comma, predictor))


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Line, cells and what is wrong with them. A byte that is no UTF-8 becomes a surrogate."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True, delimiter=delimiter)
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield reader.line_num, [], str(error)
                    continue
                if cells:
                    yield reader.line_num, cells, ""
    except OSError as error:
        raise BadConfiguration(f"{path} cannot be read: {error.strerror}; name a CSV file") from None


def _is_utf8(text: str) -> bool:
    """Whether it was. UTF-16 has zeros where its letters are those of ASCII."""
    return "\0" not in text and not any("\udc80" <= letter <= "\udcff" for letter in text)


def _table_rows(
    lines: Iterator[tuple[int, list[str], str]],
    places: dict[str, int],
    width: int,
    raw: RawRows,
    comma: bool,
    predictor: Predictor,
) -> Iterator[list[Row]]:
    for chunk in chunks(lines, predictor.size):
        rows, columns = [], {key: [] for key in raw.keys.values()}
        for line, cells, fault in chunk:
            row = Row(
                f"line {line}", fault or ("" if len(cells) == width else f"{len(cells)} cells, but {width} columns")
            )
            rows.append(row)
            if row.reason:
                continue
            own = {name: cells[at].strip() for name, at in places.items()}
            values, row.reason = _values(own, raw, comma)
            if row.reason:
                continue
            for key, value in values.items():
                columns[key].append(value)
            targets = {name: own[name] for name in raw.layout.targets if own.get(name)}
            try:
                row.target = raw.target_of(targets, comma)
            except ValueError as error:
                row.doubt = str(error)
        kinds = {key: spec.dtype for key, spec in raw.signature()[0].items()}
        yield with_inputs(rows, [{key: tf.constant(cells, kinds[key]) for key, cells in columns.items()}], predictor)


def _values(cells: dict[str, str], raw: RawRows, comma: bool) -> tuple[dict[str, Any], str]:
    """What a row's cells say by tensor, and what is wrong with the first that says nothing."""
    values: dict[str, Any] = {}
    for name, key in raw.keys.items():
        cell = cells[name]
        if not cell:
            return {}, f"column {name!r} is empty"
        if not _is_utf8(cell):
            return {}, f"column {name!r} {_NO_UTF8}"
        if name in raw.layout.words:
            values[key] = cell.encode()
        elif (number := number_of(cell, comma)) is None:
            return {}, f"column {name!r} holds {cell!r}, which is not a number"
        else:
            values[key] = number
    return values, ""


# Images ---------------------------------------------------------------------------------------------------------------


def _images(folder: Path, predictor: Predictor) -> Source:
    """The image files of a folder at any depth, by name. A folder that has the name of a class is a label."""
    raw = predictor.raw
    try:
        root = folder.parent if folder.is_file() else folder
        found = [folder] if root != folder else filter(image_folder.is_meant, files.walk(folder))
        names = sorted(str(path.relative_to(root)) for path in found)
        known = [os.stat(root / name) for name in names]
    except OSError as error:
        raise BadConfiguration(
            f"--input images:{folder}: {error.filename} cannot be read: {error.strerror}; make it readable"
        ) from None
    if not names:
        raise BadConfiguration(f"--input images:{folder} holds no images; name another folder")
    tops = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
    labelled = predictor.kind == "classes" and any(top in raw.classes for top in tops)
    listed = [f"{name}\0{each.st_size}\0{each.st_mtime_ns}\0" for name, each in zip(names, known, strict=True)]

    decode = tf.function(raw.decoded, input_signature=[tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)])

    def row_of(item: tuple[str, str]) -> tuple[Row, Any]:
        name, top = item
        look = image_files.header(root / name)
        if isinstance(look, str):
            return Row(name, look), None
        row = Row(name, size=look[:2])
        if labelled and top in raw.classes:
            row.target = raw.class_number(top)
        elif labelled:
            row.doubt = "it lies in no folder of a class"
        try:
            return row, decode((root / name).read_bytes(), look[2]).numpy()
        except (OSError, tf.errors.OpError) as error:
            return Row(name, reason_of(error)), None

    items = list(zip(names, tops, strict=True))
    state = {"files": len(names), "digest": hashlib.sha256(os.fsencode("".join(listed))).hexdigest()}
    return Source(state, lambda skip: pictured(items[skip:], row_of, predictor))


# Text -----------------------------------------------------------------------------------------------------------------


def _lines(path: Path, predictor: Predictor) -> Source:
    """Each line is a text that goes on; of tokens, their numbers with blanks between them."""
    most = predictor.raw.length if isinstance(predictor.raw, RawText) else None

    def lines(skip: int) -> Iterator[tuple[int, bytes]]:
        try:
            with open(path, "rb") as file:
                yield from itertools.islice(enumerate(_ends(file, most), 1), skip, None)
        except OSError as error:
            raise BadConfiguration(f"{path} cannot be read: {error.strerror}; name a text file") from None

    return Source(_file_state(path), lambda skip: _continued(lines(skip), predictor))


def _ends(file: BinaryIO, most: int | None) -> Iterator[bytes]:
    """The last `most` bytes of each line, without its break. A line need not fit into memory; None = all of it."""
    end, is_open = b"", False
    while block := file.readline(_BLOCK):
        end, is_open = end + block, not block.endswith(b"\n")
        if not is_open:
            end = end.rstrip(b"\r\n")
        # Behind what is kept there may be a break.
        end = end if most is None else end[-most - 2 * is_open :]
        if not is_open:
            yield end
            end = b""
    if is_open:
        end = end.rstrip(b"\r\n")
        yield end if most is None else end[-most:]


def _continued(lines: Iterator[tuple[int, bytes]], predictor: Predictor) -> Iterator[list[Row]]:
    raw = predictor.raw
    for chunk in chunks(lines, predictor.size):
        rows, texts = [Row(f"line {number}") for number, _ in chunk], []
        for row, (_, line) in zip(rows, chunk, strict=True):
            if isinstance(raw, RawText):
                texts.append(line)
                continue
            words = line.split()
            if all(_is_token(word) for word in words):
                texts.append([int(word) for word in words])
            else:
                row.reason = "it is not numbers of tokens with blanks between them"
        if not isinstance(raw, RawText):
            longest = max([1, *map(len, texts)])
            texts = np.array([text + [-1] * (longest - len(text)) for text in texts], np.int32)
        yield with_inputs(rows, [tf.constant(texts)] if len(texts) else [], predictor)


def _is_token(word: bytes) -> bool:
    # Python refuses to read thousands of digits.
    return word.isdigit() and len(word) <= _MOST_DIGITS and int(word) < 2**31
