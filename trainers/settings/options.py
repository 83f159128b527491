"""Choices of flags with options, `NAME,key=value,…`: as `models.options` reads them, for the configuration.

Here errors are those that end a run with one line. What a module of the user's own raises while it is imported is shown
as a traceback of the user's lines.
"""

import contextlib
import hashlib
import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from models import options, signatures, sources
from models.options import Choice, OptionError
from trainers.settings.exit_codes import BadConfiguration

KINDS = tuple(options.FILLED)
_MOST_FRAMES = 8


def check(kind: str, text: str, task: str = "") -> str:
    """The canonical spelling of a choice, checked without TensorFlow. `kind`: `model`, `loss`, `optimizer`, ….

    Raises:
      BadConfiguration: an unknown name or option, or a value of the wrong type; the message is one line.
    """
    return choice(kind, text, task).text


def choice(kind: str, text: str, task: str = "") -> Choice:
    """As `models.options.choose`. Raises BadConfiguration."""
    with one_line():
        return options.choose(kind, text, task)


def name_of(text: str) -> str:
    """The name without its options."""
    return text.partition(",")[0]


def asks_for_help(text: str | None) -> bool:
    """Whether `help` is among the options."""
    return options.HELP in (text or "").split(",")[1:]


def help_table(kind: str, text: str, task: str = "") -> str:
    """The options with types and defaults. Raises BadConfiguration."""
    with one_line(), user_traceback(kind, name_of(text)):
        return options.table(kind, text, task)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Errors of options become BadConfiguration."""
    try:
        yield
    except OptionError as error:
        raise BadConfiguration(str(error)) from error


@contextlib.contextmanager
def blamed(kind: str, text: str) -> Iterator[None]:
    """What does not work with the options that a user has given becomes BadConfiguration; without options nothing."""
    try:
        yield
    except ValueError as error:
        if name_of(text) == text:
            raise
        raise BadConfiguration(f"--{kind} {text}: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def user_traceback(flag: str, name: str) -> Iterator[None]:
    """What the import of a user's module raises becomes BadConfiguration with its traceback, the user's lines alone."""
    try:
        yield
    except (BadConfiguration, OptionError):
        raise
    except (Exception, SystemExit) as error:
        raise BadConfiguration(
            f"--{flag} {name} raised while it was imported:\n{shortened(error, name.partition(':')[0])}"
        ) from error


def shortened(error: BaseException, module: str) -> str:
    """The traceback of an error without the lines of Python, of installed packages and of this project."""
    root = Path(__file__).resolve().parents[2]
    foreign = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    foreign += [str(root / room) for room in ("models", "trainers", "launch")]
    try:
        own = sources.locate(module)
    except sources.NotFound:
        own = None
    folder = f"{own.parent}{os.sep}" if own else None

    def is_users(file: str) -> bool:
        if folder and file.startswith(folder):
            return True
        return not file.startswith(("<", *(f"{place}{os.sep}" for place in foreign)))

    lines = []
    for frame, number in _frames(error.__traceback__):
        file = frame.co_filename
        if is_users(file):
            lines.append(f'  File "{file}", line {number}, in {frame.co_name}')
            if source := linecache.getline(file, number).strip():
                lines.append(f"    {source}")
    lines = lines[-2 * _MOST_FRAMES :]
    return "\n".join([*lines, *(line.rstrip("\n") for line in traceback.format_exception_only(error))])


def _frames(step: TracebackType | None) -> Iterator[tuple]:
    while step is not None:
        yield step.tb_frame.f_code, step.tb_lineno
        step = step.tb_next


def import_objects(chosen: Iterable[tuple[str, str, str]]) -> None:
    """Imports the objects of the user's own, before anything is built with them.

    `chosen`: the flag, the kind and the text of each choice, as `Config.chosen` has them.

    Raises:
      BadConfiguration: a module raises while it is imported, with the user's lines of its traceback; it does not define
        the object; or an option does not fit.
    """
    for flag, kind, text in chosen:
        if not options.is_object(name_of(text)):
            continue
        one = choice(kind, text)
        with one_line(), user_traceback(flag, one.name):
            one.function()


def warn_of_changes(before: Mapping[str, Mapping[str, str]], chosen: Iterable[tuple[str, str, str]], run: str) -> None:
    """One line for each object whose source is not what it was. `before`: as `sources_of`; `run`: what it began."""
    from absl import logging  # here: launch/workers.py starts without a package

    for flag, now in sources_of(chosen).items():
        was = before.get(flag, now)
        if was["object"] == now["object"] and was["sha256"] != now["sha256"]:
            logging.warning(
                "--%s %s: %s has changed since %s was last trained: the run goes on with what it is now",
                flag,
                now["object"],
                now["file"],
                run,
            )


def sources_of(chosen: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, str]]:
    """File and SHA-256 of each object of the user's own, by flag, as run.json holds them."""
    found = {}
    for flag, _, text in chosen:
        if not options.is_object(name_of(text)) or (path := signatures.source_of(name_of(text))) is None:
            continue
        with contextlib.suppress(OSError):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            number = sum(key.partition(" ")[0] == flag for key in found)
            found[f"{flag} {number + 1}" if number else flag] = {
                "object": name_of(text),
                "file": str(path.resolve()),
                "sha256": digest,
            }
    return found
