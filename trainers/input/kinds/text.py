"""Text as a sequence of bytes, for language models: `text`, or `text:PATH`."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.tasks import DataSpec
from trainers.input.dataset import Dataset, Request, fingerprint
from trainers.input.raw.texts import RawText
from trainers.input.token_windows import LEAST_WINDOWS, TokenFile, count_windows, preparation, resident_splits
from trainers.settings.exit_codes import BadConfiguration

# Tokens that a language model sees at once, and how much of the standard library is its default text.
TEXT_LENGTH = 128
STANDARD_TEXT_BYTES = 2_000_000
_VOCABULARY = 256


def load(request: Request) -> Dataset:
    """The bytes of a file in windows of `TEXT_LENGTH`; the last tenth is for evaluation.

    Raises:
      BadConfiguration: the file cannot be read or is too short.
    """
    identity = request.name
    if request.argument and not _is_held(request):
        num_bytes = request.path.stat().st_size
        _check_length(request, num_bytes)
        file = TokenFile(request.path, np.dtype(np.uint8), _VOCABULARY, TEXT_LENGTH, num_bytes)
        splits = file.splits(request)
        identity += f"\nby index\n{file.sample()}"
    else:
        content = np.frombuffer(_bytes_of(request), np.uint8)
        _check_length(request, len(content))
        splits = resident_splits(content, TEXT_LENGTH)
    spec = DataSpec("language", (TEXT_LENGTH,), "int32", _VOCABULARY, (TEXT_LENGTH,))
    raw = RawText(TEXT_LENGTH, tuple(bytes([number]) for number in range(_VOCABULARY)))
    return Dataset(request.full_name, spec, *splits, fingerprint(identity, *splits), preparation(), _as_text, raw)


def _is_held(request: Request) -> bool:
    """Whether the file's bytes are held on each device; what is no file, a pipe say, can only be read whole.

    Raises:
      BadConfiguration: it is asked to be streamed and is no file.
    """
    if not request.path.exists():
        return True  # and is named where it is read
    if request.path.is_file():
        return request.is_resident(request.path.stat().st_size)
    if request.placement == "stream":
        raise BadConfiguration(
            f"--dataset {request.full_name} is not a file, and --input=stream reads by index; name a file"
        )
    return True


def _check_length(request: Request, num_bytes: int) -> None:
    if count_windows(num_bytes, TEXT_LENGTH) < LEAST_WINDOWS:
        least = LEAST_WINDOWS * TEXT_LENGTH + 1
        raise BadConfiguration(
            f"{request.argument} holds {num_bytes} bytes; at least {least} are needed; name a longer text"
        )


def _bytes_of(request: Request) -> bytes:
    """A file's bytes; without a path, the modules of Python's standard library, one after another, up to 2 MB."""
    if request.argument:
        try:
            return request.path.read_bytes()
        except OSError as error:
            raise BadConfiguration(
                f"--dataset {request.full_name} cannot be read: {error.strerror}; name a file"
            ) from None
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    content = b"".join(path.read_bytes() for path in modules)[:STANDARD_TEXT_BYTES]
    if not content:
        raise BadConfiguration(
            "--dataset text: Python's standard library is not installed as files; name a file, text:PATH"
        )
    return content


def _as_text(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")
