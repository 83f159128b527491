"""Outside programs, asked with a bound on their time. Python 3.9 and its standard library are enough."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Seconds that a program has.
SECONDS = 10.0
# Process groups of the programs that run now.
_running: set[int] = set()


def one_line(text: str, longest: int = 300) -> str:
    """Text without line breaks, at most `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


class Answer(NamedTuple):
    """What a program printed. `code` is None where it could not be run or did not end in time; `error` says why."""

    code: int | None
    output: str
    error: str

    @property
    def said(self) -> str:
        """All that it said, on one line."""
        return one_line(f"{self.error} {self.output}" if self.code else f"{self.output} {self.error}")


def ask(words: Sequence[str], seconds: float | None = None, env: Mapping[str, str] | None = None) -> Answer:
    """Runs a program and returns what it printed; never raises, nor waits longer than `seconds` (default `SECONDS`)."""
    seconds = SECONDS if seconds is None else seconds
    try:
        program = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        return Answer(None, "", error.strerror or str(error))
    _running.add(program.pid)
    try:
        output, said = program.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(program.pid)
        try:
            output, said = program.communicate(timeout=1)
        except subprocess.TimeoutExpired:  # in a call of the kernel that never ends, as of a driver that hangs
            output = said = ""
        return Answer(None, output, f"{said}\nno answer within {seconds:g} s".lstrip())
    finally:
        _running.discard(program.pid)
    return Answer(program.returncode, output, said)


def _kill(group: int) -> None:
    """Ends a program with all that it has started, which may hold its output open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def end_all() -> None:
    """Ends what runs now, for a process that ends before it has an answer."""
    for group in list(_running):
        _kill(group)
