"""What a compiled call returns of its steps: a row for each window between two log steps, with named columns."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainers.run.inner_loop import InnerLoop


class Columns:
    """The columns of a row: the step, facts of its last update, then loss and metrics over the window. float64.

    `facts`: the loop's rates and norms, then the norms of all weights and of how far the last update moved them.
    """

    def __init__(self, loop: InnerLoop):
        self.facts = (*loop.rate_names, *loop.norm_names, "parameter_norm", "update_norm")
        self.measured = loop.sums.names
        self.names = ("step", *self.facts, *self.measured)

    def __len__(self) -> int:
        return len(self.names)

    def column(self, rows: np.ndarray, name: str) -> np.ndarray:
        """A column of rows `[windows, columns]`: `[windows]`."""
        return rows[..., self.names.index(name)]

    def line(self, row: np.ndarray) -> dict[str, float]:
        """A row as metrics.jsonl has it, without the step: what is measured, then the facts."""
        values: Mapping[str, Any] = dict(zip(self.names, row.tolist(), strict=True))
        return {name: values[name] for name in (*self.measured, *self.facts)}
