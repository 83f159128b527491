"""A file of answers that grows row by row, and goes on where it was left: a line for each row of the input."""

import contextlib
import csv
import errno
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.input.errors import reason_of
from trainers.record import reading
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files

FORMATS = (".csv", ".jsonl")
# What a file of progress holds of the answers.
_KEPT = {"rows": int, "bytes": int, "complete": bool, "counted": dict}


class AnswerFile:
    """`path` and, beside it, `path.progress.json`: how many rows of the file are whole, and what was counted so far.

    What stands behind these rows, a torn line perhaps, is cut off and written again. Nothing is written before `begin`.

    Raises:
      BadConfiguration: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], identity: Mapping[str, Any]):
        self.path, self.columns, self.identity = path, list(columns), dict(identity)
        self.progress = path.with_name(f"{path.name}.progress.json")
        self._header = _csv_line(self.columns) if path.suffix == ".csv" else b""
        before = self._before()
        self.rows, self.counted = before.get("rows", 0), before.get("counted", {})
        self.complete, self._bytes = before.get("complete", False), before.get("bytes")
        self._file: Any = None

    def begin(self) -> None:
        """Opens the file behind its whole rows."""
        with self._written():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "wb" if self._bytes is None else "r+b")  # noqa: SIM115 - held until the end
            if self._bytes is None:
                self._file.write(self._header)
            else:
                self._file.truncate(self._bytes)
                self._file.seek(0, os.SEEK_END)
        if self._bytes is None:
            self.keep({})

    def _before(self) -> dict[str, Any]:
        """What an earlier call has kept of the same answers; empty if there is nothing yet."""
        try:
            before = reading.read_json(self.progress)
            if before:
                before = {name: kind(before[name]) for name, kind in (_KEPT | {"identity": dict}).items()}
            held = self.path.stat().st_size if self.path.exists() else 0
            # Of a call that ended before it noted anything there is the header at most.
            is_begun = not before and self._header.startswith(self._first_bytes())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadConfiguration(
                f"{self.progress} cannot be read: {reason_of(error)}; remove it and {self.path}"
            ) from None
        if is_begun:
            return {}
        if not before or before["identity"] != self.identity or held < before["bytes"]:
            raise BadConfiguration(
                f"--output {self.path} does not hold the begin of these answers; name another, or remove it and "
                f"{self.progress.name}"
            )
        return before

    def _first_bytes(self) -> bytes:
        """Of the file: one more than the header has."""
        if not self.path.exists():
            return b""
        with open(self.path, "rb") as file:
            return file.read(len(self._header) + 1)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Raises BadConfiguration where the file system refuses what is written in the block."""
        try:
            yield
        except OSError as error:
            remedy = "free space" if error.errno == errno.ENOSPC else "name another"
            raise BadConfiguration(f"--output {self.path} cannot be written: {error.strerror}; {remedy}") from None

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds whole lines, each as it comes."""
        for row in rows:
            line = (
                _csv_line([_cell(row.get(name)) for name in self.columns])
                if self.path.suffix == ".csv"
                else (files.to_json(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
            )
            with self._written():
                self._file.write(line)
            self.rows += 1

    def keep(self, counted: Mapping[str, Any], complete: bool = False) -> None:
        """Brings what is written to the disk, and notes how much that is and what was `counted` of it."""
        with self._written():
            self._file.flush()
            os.fsync(self._file.fileno())
            kept = dict(zip(_KEPT, (self.rows, self._file.tell(), complete, dict(counted)), strict=True))
            files.write_text(self.progress, files.to_json(kept | {"identity": self.identity}))

    def close(self) -> None:
        """Ends it. What is not kept is written again by the next call, so that its loss is no error."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()


def _cell(value: Any) -> str:
    """A line break inside of a cell would make one row two lines."""
    text = "" if value is None else repr(value) if isinstance(value, float) else str(value)
    return (
        text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") if any(c in text for c in "\n\r") else text
    )


def _csv_line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "replace")
