"""Tables, and numbers for people."""

import textwrap
from collections.abc import Sequence


def readable(seconds: float) -> str:
    """Three digits and a unit: `1.43 s`, `38 ms`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def times(factor: float) -> str:
    """`43.8×`, `5,720×`."""
    return f"{factor:,.{0 if factor >= 100 else 1 if factor >= 10 else 2}f}×"


def paragraph(text: str) -> str:
    """Text in lines that fit a terminal."""
    return textwrap.fill(text, 110)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that a terminal and Markdown both show."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
