"""The start and the end of a process: requirements, flags, the exit code. Free of TensorFlow.

A script's last line is `process.main(read, work)`: flags are read, the work is done, and the process ends with a code
of `trainers.settings.exit_codes`.
"""

from __future__ import annotations  # launch/doctor.py runs on Python 3.9 too

import contextlib
import errno
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from trainers.settings.exit_codes import BAD_CONFIGURATION, CRASHED, OK, PREEMPTED, BadConfiguration, RunEnded
from trainers.world import private_api, signals

T = TypeVar("T")
# Seconds that the import of TensorFlow and of the loop took; `main` of a loop sets it.
import_seconds = 0.0
REQUIREMENTS = ("absl", "numpy", "tensorflow", "keras", "tensorflow_datasets")
_ENVIRONMENT = "run launch/local.sh once, then `source .venv/bin/activate` and start this again"


def age() -> float:
    """Seconds since this process began, where a loop's script was started; in any other process 0.

    Where the kernel does not tell, the seconds of the imports.
    """
    if not import_seconds:
        return 0.0
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        if import_seconds <= seconds < 86400:
            return seconds
    return import_seconds


def check_requirements(*packages: str, remedy: str = _ENVIRONMENT) -> None:
    """Ends the process with one line and code 2 if a package is not installed. `packages`: default `REQUIREMENTS`.

    A script calls it before its first import of anything that is not in the standard library.
    """
    for package in packages or REQUIREMENTS:
        if importlib.util.find_spec(package) is None:
            say(f"{sys.argv[0]}: {package} is not installed for {sys.executable}; {remedy}")
            sys.exit(BAD_CONFIGURATION)


def open_streams() -> None:
    """Makes the standard streams fit to be written to, whoever has closed them and whatever their encoding is."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, errors="replace", closefd=False))  # noqa: SIM115 - for the process
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def say(line: str) -> None:
    """Prints a line for the user, on standard error. Where nobody can read it, nothing happens."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def show(line: str) -> None:
    """As `say`, on standard output: for what a script is asked for, beside what it writes."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


def run(work: Callable[[], int | None]) -> int:
    """Does the work and returns the exit code: an error that the user can act on is one line, any other a traceback."""
    try:
        return work() or OK
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else OK
    except RunEnded as error:
        say(f"{sys.argv[0]}: {error}")
        return error.exit_code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            _print_traceback()
            return CRASHED
        where = f" that holds {error.filename}" if error.filename else ""
        say(f"{sys.argv[0]}: the disk{where} is full; free space and start again")
        return BadConfiguration.exit_code
    except KeyboardInterrupt:
        return PREEMPTED  # SIGINT, where a script has Python's own handler, and between two of its statements
    except Exception:
        _print_traceback()
        return CRASHED


def _print_traceback() -> None:
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exc()


def main(read: Callable[[Sequence[str]], T], work: Callable[[T], int | None]) -> NoReturn:
    """Reads the command line with `read(argv)`, does `work` with what it returns, and ends the process."""
    open_streams()
    signals.end_at_once_on_signal()
    leave(run(lambda: work(read(sys.argv))))


def leave(code: int) -> NoReturn:
    """Ends the process at once, after everything is written. Python's own exit may wait for ever.

    TensorFlow's servers wait for peers that are gone, and its input threads for an interpreter that no longer answers.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    private_api.remove_generated_sources()
    os._exit(code)
