"""A file of answers that grows row by row, and goes on where it was left: a line for each row of the input."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.record import reading
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files

FORMATS = (".csv", ".jsonl")


class AnswerFile:
    """`path` and, beside it, `path.progress.json`: how many rows of the file are whole, and what was counted so far.

    What stands behind these rows, a torn line perhaps, is cut off and written again.

    Raises:
      BadConfiguration: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], identity: Mapping[str, Any]):
        self.path, self.columns, self.identity = path, list(columns), dict(identity)
        self.progress = path.with_name(f"{path.name}.progress.json")
        self.rows, self.counted, self.complete = 0, {}, False
        before = self._before()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "r+b" if before else "wb")  # noqa: SIM115 - held until the end
            if before:
                self.rows, self.counted, self.complete = before["rows"], before["counted"], before["complete"]
                self._file.truncate(before["bytes"])
                self._file.seek(0, os.SEEK_END)
            elif path.suffix == ".csv":
                self._file.write(_csv_line(self.columns))
        except OSError as error:
            raise BadConfiguration(f"--output {path} cannot be written: {error.strerror}; name another") from None
        if not before:
            self.keep({})

    def _before(self) -> dict[str, Any]:
        """What an earlier call has kept of the same answers; empty if there is nothing yet."""
        try:
            before = reading.read_json(self.progress)
            held = self.path.stat().st_size if self.path.exists() else 0
        except (OSError, ValueError) as error:
            raise BadConfiguration(f"{self.progress} cannot be read: {error}; remove it and {self.path}") from None
        if not before and not held:
            return {}
        if not before or before["identity"] != self.identity or held < before["bytes"]:
            raise BadConfiguration(
                f"--output {self.path} does not hold the begin of these answers; name another, or remove it and "
                f"{self.progress.name}"
            )
        return before

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds whole lines."""
        lines = [
            _csv_line([_cell(row.get(name)) for name in self.columns])
            if self.path.suffix == ".csv"
            else (files.to_json(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
            for row in rows
        ]
        self._file.write(b"".join(lines))
        self.rows += len(rows)

    def keep(self, counted: Mapping[str, Any], complete: bool = False) -> None:
        """Brings what is written to the disk, and notes how much that is and what was `counted` of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        facts = {"rows": self.rows, "bytes": self._file.tell(), "complete": complete, "counted": dict(counted)}
        files.write_text(self.progress, json.dumps(facts | {"identity": self.identity}))

    def close(self) -> None:
        """Ends it."""
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
