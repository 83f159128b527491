"""Keeps what TensorFlow's C++ prints on every import (no CUDA here, oneDNN is on) out of a user's terminal."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_NOISE = re.compile(
    r"All log messages before absl::InitializeLog|oneDNN custom operations are on|Could not find cuda drivers|"
    r"failed call to cuInit|computation_placer already registered|Unable to register cu|"
    r"This TensorFlow binary is optimized|To enable the following instructions"
)


@contextlib.contextmanager
def known_noise_removed() -> Iterator[None]:
    """Within the block standard error is held back, then printed without the lines that are known to mean nothing."""
    sys.stderr.flush()
    held = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed below
    original = os.dup(2)
    os.dup2(held.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)
        os.close(original)
        held.seek(0)
        for line in held.read().decode(errors="replace").splitlines(keepends=True):
            if not _NOISE.search(line):
                sys.stderr.write(line)
        held.close()
