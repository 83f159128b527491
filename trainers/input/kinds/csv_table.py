"""Tables of numbers and words from CSV files, checked cell by cell: `csv:PATH`."""

import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainers.input.dataset import Dataset, Request, Split, standardized_rows
from trainers.input.raw.rows import LARGEST_NUMBER, NUMBER, WITH_COMMA, Layout, class_name, number_of
from trainers.settings.exit_codes import BadConfiguration

# A column with more different words than this is an identifier, not a category.
MOST_CATEGORIES = 100
# A label of whole numbers with at most this many different values is a class.
MOST_CLASSES = 20
LEAST_ROWS = 10
DELIMITERS = (",", ";", "\t")
_HELD_OUT_EVERY = 5
_WITH_THOUSANDS = re.compile(r"[+-]?\d{1,3}([,.' ]\d{3})+([,.]\d+)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as arrays: `features [rows, columns]` float64 and `target [rows]`, float64 or, of `classes`, int64.

    `layout`: the columns of the file that the features come from.
    """

    features: np.ndarray
    target: np.ndarray
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    layout: Layout


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
    identity = f"{table.columns}{table.classes}"
    return standardized_rows(request.full_name, *splits, len(table.classes), identity, table.layout)


def read(path: Path, label: str) -> Table:
    """Reads a table. A column of words becomes a column of 0 and 1 for each word.

    The label is a class if it is a word, or a whole number with at most 20 different values; else a number.

    Raises:
      BadConfiguration: the file, a line, or a cell is unusable; file, line and column are named.
    """
    columns, names, target, classes = [], [], np.zeros(0), ()
    words: dict[str, tuple[str, ...]] = {}
    order: list[str] = []
    for column in _columns(path, label.strip()):
        if column.name == label.strip():
            target, classes = _target(column)
            continue
        order.append(column.name)
        if column.is_numeric:
            columns.append(column.numbers())
            names.append(column.name)
        else:
            words[column.name] = tuple(column.words("remove the column"))
            for word in words[column.name]:
                columns.append(np.array([cell == word for cell in column.cells], np.float64))
                names.append(f"{column.name}={word}")
    if not columns:
        raise BadConfiguration(f"{path} has no column besides the label {label!r}; add one")
    layout = Layout(tuple(order), words, classes, (label.strip(),))
    return Table(np.stack(columns, axis=1), target, tuple(names), classes, layout)


def _target(label: "_Column") -> tuple[np.ndarray, tuple[str, ...]]:
    """The label's values, float64 and without classes, or the index of each row's class, int64, and the classes."""
    numeric = label.is_numeric
    values = label.numbers() if numeric else np.array(label.cells)
    if not numeric:
        label.words("name another column with --label, or join rare words")
    keys, target = np.unique(values, return_inverse=True)
    if len(keys) == 1:
        raise BadConfiguration(
            f"{label.path}, column {label.name!r}, the label, holds {label.cells[0]!r} in every row, so there is "
            "nothing to learn; name another column with --label"
        )
    if numeric and (np.any(values != np.round(values)) or len(keys) > MOST_CLASSES):
        return values, ()
    return target.astype(np.int64), tuple(class_name(key) if numeric else str(key) for key in keys)


@dataclasses.dataclass(frozen=True)
class _Column:
    """The cells of a column, without blanks around them, and the number of each one's line.

    `decimal_comma`: whether the table's numbers are written like 0,5.
    """

    path: Path
    name: str
    lines: tuple[int, ...]
    cells: tuple[str, ...]
    decimal_comma: bool

    def number(self, cell: str) -> float | None:
        """The number that a cell holds; None if it is none, or is written in another way than those of the table."""
        return number_of(cell, self.decimal_comma)

    @property
    def is_numeric(self) -> bool:
        """Whether most cells are numbers; the others are then mistakes.

        Raises:
          BadConfiguration: they would be, were they not written in a way that may be read as another number.
        """
        numbers = sum(self.number(cell) is not None for cell in self.cells)
        doubtful = [i for i, cell in enumerate(self.cells) if self._is_doubtful(cell)]
        if doubtful and numbers + len(doubtful) > len(self.cells) / 2:
            form = "0,5" if self.decimal_comma else "0.5"
            raise self._bad(doubtful[0], f"may be read as two numbers; write it like 1234 or {form}, as the others are")
        return numbers > len(self.cells) / 2

    def _is_doubtful(self, cell: str) -> bool:
        if self.number(cell) is not None:
            return False
        return any(form.fullmatch(cell) for form in (NUMBER, WITH_COMMA, _WITH_THOUSANDS))

    def _bad(self, row: int, what: str) -> BadConfiguration:
        cell = f"holds {self.cells[row]!r}, which" if self.cells[row] else "is empty;"
        return BadConfiguration(f"{self.path}, line {self.lines[row]}, column {self.name!r} {cell} {what}")

    def numbers(self) -> np.ndarray:
        """The cells as numbers, float64."""
        values = np.empty(len(self.cells), np.float64)
        for row, cell in enumerate(self.cells):
            value = self.number(cell)
            if not cell:
                raise self._bad(row, "fill it in or remove the row")
            if value is None or (cell[-1].isalpha() and not np.isfinite(value)):
                raise self._bad(row, "is not a finite number; fill it in or remove the row")
            if abs(value) > LARGEST_NUMBER:
                raise self._bad(row, "is beyond ±3.4e38, the range of float32; correct it or remove the row")
            values[row] = value
        return values

    def words(self, remedy: str) -> list[str]:
        """The different words. `remedy`: what to do where they are too many."""
        for row, cell in enumerate(self.cells):
            if not cell:
                raise self._bad(row, "fill it in or remove the row")
        words = sorted(set(self.cells))
        if len(words) > MOST_CATEGORIES:
            raise BadConfiguration(
                f"{self.path}, column {self.name!r} holds {len(words)} different words, more than {MOST_CATEGORIES}; "
                f"{remedy}"
            )
        return words


def _columns(path: Path, label: str) -> Iterator[_Column]:
    """The columns of a file, whichever of `DELIMITERS` stands between them."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfiguration(f"{path} cannot be read: {error}; name a CSV file in UTF-8") from None
    delimiter = _delimiter(text, label)
    header, rows = _rows(path, text, delimiter)
    if label not in header:
        raise BadConfiguration(f"--label {label!r} is not a column of {path}; choose one of: {', '.join(header)}")
    # Between commas a decimal comma needs quotes, and may as well separate thousands.
    decimal_comma = delimiter != "," and any(WITH_COMMA.fullmatch(cell) for _, row in rows for cell in row)
    lines = tuple(line for line, _ in rows)
    for i, name in enumerate(header):
        yield _Column(path, name, lines, tuple(row[i] for _, row in rows), decimal_comma)


def _reader(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True, delimiter=delimiter)


def _delimiter(text: str, label: str) -> str:
    """What separates the columns: what makes the label one of them and, of several, makes the most."""
    found = {}
    for delimiter in DELIMITERS:
        with contextlib.suppress(csv.Error):
            header = [name.strip() for name in next(_reader(text, delimiter), [])]
            found[delimiter] = label in header, len(header)
    return max(found, key=found.__getitem__, default=",")


def _rows(path: Path, text: str, delimiter: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row with the number of its line, without blanks around the cells."""
    reader = _reader(text, delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise BadConfiguration(f"{path}, line {reader.line_num}: {error}; fix the line") from None
    if len(set(header)) != len(header) or not all(header):
        raise BadConfiguration(f"{path}, line 1: column names {header} are empty or repeated; name each column once")
    for line, row in rows:
        if len(row) != len(header):
            raise BadConfiguration(f"{path}, line {line}: {len(row)} cells, but {len(header)} columns; fix the line")
    if len(rows) < LEAST_ROWS:
        raise BadConfiguration(f"{path} has {len(rows)} rows after its header; at least {LEAST_ROWS} are needed")
    return header, rows
