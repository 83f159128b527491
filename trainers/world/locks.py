"""The lock of an open file, which one process holds at a time."""

import contextlib
import fcntl
from typing import IO


def share(file: IO) -> None:
    """Holds an open file with others that share it, until it is closed, against who would `hold` it alone."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)


def hold(file: IO, wait: bool) -> str:
    """Locks an open file until it is closed. Returns an empty text, or why the file system knows no locks.

    NFS without a lock daemon has none (ENOLCK), nor have some file systems of clusters: who calls goes on without.

    Raises:
      BlockingIOError: another process holds it; only without `wait`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        return error.strerror or str(error)
    return ""
