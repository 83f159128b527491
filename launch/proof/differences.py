"""Numbers of the proof: how far two runs are apart, and how far rounding alone may take them. Needs NumPy only.

A state maps the name of a variable to its array, as a checkpoint has it.
"""

from collections.abc import Mapping

import numpy as np

State = Mapping[str, np.ndarray]

# ‖a - b‖ / ‖a‖ of all weights that rounding alone explains; see `allowed`.
ROUNDING = 1e-5
ADAPTIVE = 1e-4
# The largest |a - b| of a variable, over its largest |a| or over SMALL: an offset that has just left zero shows each
# ReLU that rounding flips. Beyond it, the same change of the last bits says what is allowed.
SMALL = 0.01
VARIABLE = 1e-3
# Eager, graph and XLA order sums differently.
REORDERED = 1e-4
# Of outputs in half precision, which compilers round elsewhere.
HALF_PRECISION = 3e-2
METRICS = 1e-3
# Relative distance from a ratio that is recognized: 2 replicas, a gradient 1.98 to 2.02 times as large.
RATIO = 0.02


def of_outputs(precision: str) -> float:
    """How far outputs may be apart, over the largest, where they are computed in a precision."""
    return REORDERED if precision == "float32" else HALF_PRECISION


def is_weight(name: str, value: np.ndarray) -> bool:
    """Whether a variable is one of the model's, of real numbers: a generator's state has a size and no scale."""
    return name.startswith("model/") and value.size > 0 and np.issubdtype(value.dtype, np.floating)


def vector(state: State) -> np.ndarray:
    """All weights of the model, end to end, in float64."""
    return np.concatenate([v.astype(np.float64).ravel() for name, v in sorted(state.items()) if is_weight(name, v)])


def difference(a: State, b: State) -> float:
    """‖a - b‖ / ‖a‖ over all weights of the model; infinite where a value is not a number."""
    reference, other = vector(a), vector(b)
    ratio = float(np.linalg.norm(reference - other) / max(np.linalg.norm(reference), 1e-30))
    return ratio if np.isfinite(ratio) else float("inf")


def difference_by_variable(a: State, b: State) -> dict[str, float]:
    """The largest |a - b| of each weight over its largest |a| (at least `SMALL`); infinite if one is not a number."""
    differences = {}
    for name, value in a.items():
        if is_weight(name, value):
            scale = max(float(np.abs(value).max()), SMALL)
            ratio = float(np.abs(value.astype(np.float64) - b[name]).max()) / scale
            differences[name] = ratio if np.isfinite(ratio) else float("inf")
    return differences


def allowed(base: State, perturbed: State, adaptive: bool = False) -> float:
    """What rounding may do: `ROUNDING`, or ten times what a change of the last bits of the first weights has done.

    `base`, `perturbed`: the ends of two runs that differ in those bits alone. `adaptive`: an optimizer that divides by
    what may be nearly 0 makes a whole learning rate of a gradient that is nothing but rounding, now for this weight and
    now for that. Wrong scales show under SGD.
    """
    return max(ADAPTIVE if adaptive else ROUNDING, 10 * difference(base, perturbed))


def agree(a: State, b: State, base: State, perturbed: State, adaptive: bool = False) -> bool:
    """Whether two runs end with the same weights up to rounding: as one vector, and each variable on its own.

    `base`, `perturbed`, `adaptive`: see `allowed`. A variable may differ ten times as far as it does between those two;
    if `adaptive`, as far as the variable that differs most between them.
    """
    noise = difference_by_variable(base, perturbed)
    most = max(noise.values(), default=0.0) if adaptive else 0.0
    each = difference_by_variable(a, b)
    within = all(value <= max(VARIABLE, 10 * max(noise[name], most)) for name, value in each.items())
    return within and difference(a, b) <= allowed(base, perturbed, adaptive)


def metric_difference(a: float, b: float) -> float:
    """|a - b| / |a| of a metric; 0 where both are not finite in the same way."""
    ratio = abs(a - b) / max(abs(a), 1e-3)
    if np.isfinite(ratio):
        return ratio
    return 0.0 if str(a) == str(b) else float("inf")


def is_ratio(ratio: float, expected: float) -> bool:
    """Whether a measured ratio is an expected one, up to `RATIO`."""
    return abs(ratio - expected) < RATIO * expected
