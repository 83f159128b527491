"""What the doctor finds: rows, and numbers in them for people."""

from __future__ import annotations

from typing import NamedTuple

OK, WARNING, BAD, NOT_HERE = "ok", "warning", "bad", "not here"


class Row(NamedTuple):
    """What was found of one thing: `status` is one of the four above, `remedy` what to do where it is not well."""

    name: str
    status: str
    found: str
    remedy: str = ""


def gib(size: float) -> str:
    """Bytes for people: `640 MiB`, `3.2 GiB`."""
    value = size / 2**30
    return f"{size / 2**20:.0f} MiB" if value < 1 else f"{value:.1f} GiB" if value < 100 else f"{value:.0f} GiB"
