"""Text as a sequence of bytes, for language models: `text`, or `text:PATH`."""

import sysconfig
from pathlib import Path

import numpy as np
import tensorflow as tf

from models.tasks import DataSpec
from trainers.input.dataset import Dataset, Features, Request, Split, fingerprint
from trainers.settings.exit_codes import BadConfiguration

# Tokens that a language model sees at once, and how much of the standard library is its default text.
TEXT_LENGTH = 128
STANDARD_TEXT_BYTES = 2_000_000
_LEAST_WINDOWS = 20


def load(request: Request) -> Dataset:
    """The bytes of a file in windows of `TEXT_LENGTH`; the last tenth is for evaluation.

    Raises:
      BadConfiguration: the file cannot be read or is too short.
    """
    content = np.frombuffer(_bytes_of(request), np.uint8)
    window = TEXT_LENGTH + 1
    count = (len(content) - 1) // TEXT_LENGTH
    if count < _LEAST_WINDOWS:
        least = _LEAST_WINDOWS * TEXT_LENGTH + 1
        raise BadConfiguration(
            f"{request.argument} holds {len(content)} bytes; at least {least} are needed; name a longer text"
        )
    # Each window overlaps the next by one byte: its last target is the first input of the next.
    windows = np.stack([content[i * TEXT_LENGTH : i * TEXT_LENGTH + window] for i in range(count)])
    cut = count - count // 10
    splits = [Split(len(part), arrays={"tokens": part}) for part in (windows[:cut], windows[cut:])]
    spec = DataSpec("language", (TEXT_LENGTH,), "int32", num_classes=256)
    return Dataset(request.full_name, spec, *splits, fingerprint(request.name, *splits), _prepare)


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


def _prepare(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
    """`tokens: [batch, time + 1]` uint8 → all but the last, and all but the first, as int32."""
    tokens = tf.cast(features["tokens"], tf.int32)
    return tokens[:, :-1], tokens[:, 1:]
