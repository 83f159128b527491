"""How measurements are told: tables, numbers for people, charts, and the machine they were taken on."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.record.run_record import versions


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


def machine() -> dict[str, Any]:
    """What the times were taken on."""
    # Here and not above: tables and charts need no TensorFlow, which takes seconds to import.
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else "CPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": f"GPU:0 ({name})" if gpus else "CPU:0",
        "cores": cores,
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }


def write_png(path: Path, figure: Any) -> None:
    """Writes a matplotlib figure, aside first."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(aside, format="png", dpi=120)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
