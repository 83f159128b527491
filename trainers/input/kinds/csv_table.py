"""Tables of numbers and words from CSV files, checked cell by cell: `csv:PATH`."""

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np

from trainers.input.dataset import Dataset, Request, Split, standardized_rows
from trainers.settings.exit_codes import BadConfiguration

# A column with more different words than this is an identifier, not a category.
MOST_CATEGORIES = 100
# A label of whole numbers with at most this many different values is a class.
MOST_CLASSES = 20
_HELD_OUT_EVERY = 5


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as arrays: `features [rows, columns]` float32 and `target [rows]`, float32 or, of `classes`, int64."""

    features: np.ndarray
    target: np.ndarray
    columns: tuple[str, ...]
    classes: tuple[str, ...]


def load(request: Request) -> Dataset:
    """The rows of the file with its column `label` as the target; every fifth row is for evaluation.

    Raises:
      BadConfiguration: the file, a line, a cell or the label is unusable.
    """
    if not request.argument:
        raise BadConfiguration("--dataset csv does not name a file; write csv:PATH")
    table = read(request.path, request.label)
    held_out = np.arange(len(table.target)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    splits = [
        Split(int(rows.sum()), arrays={"features": table.features[rows], "target": table.target[rows]})
        for rows in (~held_out, held_out)
    ]
    return standardized_rows(request.full_name, *splits, len(table.classes), f"{table.columns}{table.classes}")


def read(path: Path, label: str) -> Table:
    """Reads a table. A column of words becomes a column of 0 and 1 for each word.

    The label is a class if it is a word, or a whole number with at most 20 different values; else a number.

    Raises:
      BadConfiguration: the file, a line, or a cell is unusable; file, line and column are named.
    """
    header, rows = _rows(path)
    if label not in header:
        raise BadConfiguration(f"--label {label!r} is not a column of {path}; choose one of: {', '.join(header)}")
    lines = [line for line, _ in rows]
    columns, names, target, classes = [], [], np.zeros(0), ()
    for i, name in enumerate(header):
        cells = [row[i].strip() for _, row in rows]
        if name == label:
            target, classes = _target(path, name, lines, cells)
        elif _is_numeric(cells):
            columns.append(_numbers(path, name, lines, cells))
            names.append(name)
        else:
            for word in _categories(path, name, lines, cells):
                columns.append(np.array([cell == word for cell in cells], np.float64))
                names.append(f"{name}={word}")
    if not columns:
        raise BadConfiguration(f"{path} has no column besides the label {label!r}; add one")
    return Table(np.stack(columns, axis=1).astype(np.float32), target, tuple(names), classes)


def _target(path: Path, name: str, lines: list[int], cells: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The label's values, float32 and without classes, or the index of each row's class, int64, and the classes."""
    numeric = _is_numeric(cells)
    if numeric:
        values = _numbers(path, name, lines, cells)
        if np.any(values != np.round(values)) or len(set(values)) > MOST_CLASSES:
            return values.astype(np.float32), ()
    else:
        _categories(path, name, lines, cells)
        values = np.array(cells)
    keys, target = np.unique(values, return_inverse=True)
    return target.astype(np.int64), tuple(f"{key:g}" if numeric else str(key) for key in keys)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row with the number of its line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfiguration(f"{path} cannot be read: {error}; name a CSV file in UTF-8") from None
    except csv.Error as error:
        raise BadConfiguration(f"{path}, line {reader.line_num}: {error}; fix the line") from None
    if len(set(header)) != len(header) or not all(name.strip() for name in header):
        raise BadConfiguration(f"{path}, line 1: column names {header} are empty or repeated; name each column once")
    for line, row in rows:
        if len(row) != len(header):
            raise BadConfiguration(f"{path}, line {line}: {len(row)} cells, but {len(header)} columns; fix the line")
    if len(rows) < 10:
        raise BadConfiguration(f"{path} has {len(rows)} rows after its header; at least 10 are needed")
    return header, rows


def _numbers(path: Path, name: str, lines: list[int], cells: list[str]) -> np.ndarray:
    values = np.empty(len(cells), np.float64)
    for i, (line, cell) in enumerate(zip(lines, cells, strict=True)):
        value = _number(cell)
        if value is None or not math.isfinite(value):
            what = "is empty" if not cell.strip() else f"holds {cell!r}, which is not a finite number"
            raise BadConfiguration(f"{path}, line {line}, column {name!r} {what}; fill it in or remove the row")
        values[i] = value
    return values


def _is_numeric(cells: list[str]) -> bool:
    """Whether most cells of a column are numbers; the others are then mistakes."""
    return sum(_number(cell) is not None for cell in cells) > len(cells) / 2


def _categories(path: Path, name: str, lines: list[int], cells: list[str]) -> list[str]:
    for line, cell in zip(lines, cells, strict=True):
        if not cell.strip():
            raise BadConfiguration(f"{path}, line {line}, column {name!r} is empty; fill it in or remove the row")
    words = sorted(set(cells))
    if len(words) > MOST_CATEGORIES:
        raise BadConfiguration(
            f"{path}, column {name!r} holds {len(words)} different words, more than {MOST_CATEGORIES}; "
            "remove the column"
        )
    return words
