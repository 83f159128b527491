"""How seconds, memory and speed grow with a size: what is measured of a run, the fitted growth, the tables.

Free of TensorFlow.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainers.show.tables import table

AXES = {
    "replicas": "replicas of one process",
    "workers": "processes of one replica each",
    "parameters": "parameters of mlp, by the width of its two hidden layers",
}
# What grows, and how it is called.
FIGURES = {
    "first_update_seconds": "seconds to the first update",
    "compile_seconds": "of them trace and first call",
    "peak_mib": "peak MiB of a process",
    "steps_per_second": "steps/s",
}
PARAMETERS = (10**5, 10**6, 10**7, 10**8)
# Of digits.
_INPUTS, _CLASSES = 64, 10
# Of the numbers and their copies that a run of AdamW holds at most: weights, two moments, gradients, an update on its
# way, and a checkpoint that is written.
BYTES_A_PARAMETER = 48


class Size(NamedTuple):
    """A point of a sweep: `count` of what `axis` counts."""

    axis: str
    count: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run of a size was like.

    `first_update_seconds`: from the start of the process to the end of its first update, of which `compile_seconds` are
    tracing and the first call; `peak_mib`: of a process; `seconds`: by phase until the end, as run.json has them.
    """

    axis: str
    count: int
    model: str
    parameters: int
    first_update_seconds: float
    compile_seconds: float
    peak_mib: float
    steps_per_second: float
    seconds: Mapping[str, float]

    @property
    def size(self) -> Size:
        """Which point it is."""
        return Size(self.axis, self.count)


def measured(size: Size, facts: Mapping[str, Any]) -> Measured:
    """What run.json tells of a run."""
    first, steady = facts["first_update"], facts["steady"]
    return Measured(
        size.axis,
        size.count,
        facts["flags"]["model"],
        facts["parameters"],
        first["process_seconds"],
        facts["seconds"]["trace"] + first["call_seconds"],
        facts["peak_resident_mib"],
        steady["steps"] / steady["seconds"],
        facts["seconds"],
    )


def mlp_of(parameters: int) -> str:
    """`mlp` for images of 8×8 with about so many parameters, its two hidden layers equally wide."""
    # w² + (inputs + classes + 2) w + classes = parameters
    half = (_INPUTS + _CLASSES + 2) / 2
    width = round(math.sqrt(half**2 + parameters - _CLASSES) - half)
    return f"mlp,width={width}x{width}"


# ----------------------------------------------------------------------------------------------------------------------
# Growth.


@dataclasses.dataclass(frozen=True)
class Growth:
    """`a + b · n`, or `a · n^b` if `power`. `error`: root of the mean square of the errors, relative to the values."""

    a: float
    b: float
    power: bool
    error: float

    def at(self, n: float) -> float:
        """The value at a size."""
        return self.a * n**self.b if self.power else self.a + self.b * n

    def __str__(self) -> str:
        if self.power:
            return f"{self.a:.3g} · n^{self.b:.2f}"
        return f"{self.a:.3g} {'-' if self.b < 0 else '+'} {abs(self.b):.2g} · n"


def fitted(sizes: Sequence[int], values: Sequence[float]) -> Growth | None:
    """The line, or the power law where that has the smaller relative error; None of less than two sizes.

    Two points tell no law from a line, which is taken then.
    """
    if len(sizes) < 2:
        return None
    n, y = np.asarray(sizes, float), np.asarray(values, float)

    def growth(a: float, b: float, power: bool) -> Growth:
        found = a * n**b if power else a + b * n
        return Growth(float(a), float(b), power, float(np.sqrt(np.mean(((found - y) / y) ** 2))))

    # Errors relative to the values: sizes go over several powers of ten.
    a, b = np.linalg.lstsq(np.stack([1 / y, n / y], axis=1), np.ones_like(y), rcond=None)[0]
    line = growth(a, b, False)
    slope, logarithm = np.polyfit(np.log(n), np.log(y), 1)
    power = growth(math.exp(logarithm), slope, True)
    return power if len(sizes) > 2 and power.error < line.error else line


def growths(rows: Sequence[Measured]) -> dict[str, dict[str, Growth]]:
    """By axis and figure, where there are two sizes or more."""
    found: dict[str, dict[str, Growth]] = {}
    for axis in AXES:
        members = of_axis(rows, axis)
        if len(members) > 1:
            sizes = [size_of(row) for row in members]
            found[axis] = {figure: fitted(sizes, [getattr(row, figure) for row in members]) for figure in FIGURES}
    return found


def of_axis(rows: Sequence[Measured], axis: str) -> list[Measured]:
    """The rows of an axis, the smallest first."""
    return sorted((row for row in rows if row.axis == axis), key=lambda row: row.count)


def size_of(row: Measured) -> int:
    """What its figures grow with: the parameters that there really are."""
    return row.parameters if row.axis == "parameters" else row.count


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written.


def describe(rows: Sequence[Measured], left_out: Sequence[str]) -> str:
    """The table of the rows, that of their growth, and what is left out."""
    lines = [
        [
            row.axis,
            f"{size_of(row):,}",
            row.model,
            f"{row.first_update_seconds:.1f}",
            f"{row.compile_seconds:.1f}",
            f"{row.peak_mib:,.0f}",
            f"{row.steps_per_second:.3g}",
        ]
        for axis in AXES
        for row in of_axis(rows, axis)
    ]
    found = growths(rows)
    laws = [
        [axis, name, str(of[figure]), f"{of[figure].error:.0%}"]
        for axis, of in found.items()
        for figure, name in FIGURES.items()
    ]
    parts = [table(["axis", "n", "model", *FIGURES.values()], lines)] if lines else ["nothing was measured"]
    if laws:
        parts.append(table(["axis", "what grows", "with n", "error"], laws))
    return "\n\n".join([*parts, *(f"left out: {line}" for line in left_out)])


def record(rows: Sequence[Measured], left_out: Sequence[str]) -> dict[str, Any]:
    """For the JSON file."""
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "growth": {
            axis: {figure: dataclasses.asdict(growth) | {"text": str(growth)} for figure, growth in of.items()}
            for axis, of in growths(rows).items()
        },
        "left_out": list(left_out),
    }
