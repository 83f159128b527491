"""Contenders take turns in rounds, and ratios are taken within a round: the load of the machine meets all of them.

Free of TensorFlow.
"""

import dataclasses
import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import logging

from trainers.settings.exit_codes import RunEnded
from trainers.show.tables import readable, table
from trainers.world import signals

# `steps(n)`: does n updates of the global batch, and returns the seconds that they took.
Steps = Callable[[int], float]

KINDS = {
    "ceiling": "the ceiling: forward, backward and update on one resident batch, in one call",
    "ours": "our loop as it is run: input, metrics, log lines, TensorBoard, progress",
    "fit": "Model.fit with its defaults",
    "fit_best": "Model.fit at its best steps_per_execution and jit_compile",
    "call": "one Python call for each compiled step, at its best jit_compile",
    "eager": "the eager loop",
    "jax_fit": "Model.fit of Keras 3 on JAX, at its best steps_per_execution and way to be fed",
    "jax_scan": "JAX by hand: jax.lax.scan over updates, or a compiled call for each, at its best length",
    "ours_silent": "our loop without log lines",
    "ours_saving": "our loop with a checkpoint every 100 steps",
}
PEERS = ("fit", "fit_best", "call", "eager", "jax_fit", "jax_scan")


@dataclasses.dataclass(frozen=True)
class Row:
    """A model at a global batch on a number of replicas."""

    model: str
    batch_size: int
    replicas: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {self.replicas} replica{'s'[: self.replicas > 1]}"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to train: `key` of `KINDS`, `name`: the settings it runs at."""

    key: str
    name: str
    steps: Steps


@dataclasses.dataclass
class Result:
    """A row's seconds of one step: a list for each contender, with a number for each round. `names`: their settings."""

    row: Row
    parameters: int
    names: dict[str, str]
    seconds: dict[str, list[float]]

    def ratio(self, key: str, other: str) -> tuple[float, float, float]:
        """How many times as fast `key` is as `other`: median, lowest and highest over the rounds."""
        ratios = [b / a for a, b in zip(self.seconds[key], self.seconds[other], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def best_peer(self) -> str:
        """The fastest peer, by the median."""
        return min((key for key in PEERS if key in self.seconds), key=lambda key: statistics.median(self.seconds[key]))

    def facts(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            **dataclasses.asdict(self.row),
            "parameters": self.parameters,
            "best_peer": self.best_peer(),
            "contenders": {
                key: {
                    "what": KINDS[key],
                    "settings": self.names[key],
                    "seconds_per_step": self.seconds[key],
                    "median_seconds_per_step": statistics.median(self.seconds[key]),
                }
                for key in self.seconds
            },
        }


def calibrated(steps: Steps, seconds: float) -> tuple[int, float]:
    """How many steps last about `seconds`, and the seconds of a step. The first call, which traces, does not count."""
    steps(1)
    count = 1
    while True:
        signals.raise_if_lost()
        took = steps(count)
        if took >= seconds / 4:
            return max(round(seconds / took * count), 1), took / count
        count = min(max(count * 2, int(count * seconds / 3 / max(took, 1e-6))), count * 20)


def best_of(contenders: Iterable[Contender], seconds: float) -> Contender:
    """The fastest in a trial of `seconds` each. A contender that cannot run is left out.

    Raises:
      RunEnded: none can.
    """
    rates, why = [], ""
    for contender in contenders:
        try:
            rate = 1 / calibrated(contender.steps, seconds)[1]
        except Exception as error:
            signals.raise_if_lost()
            logging.info("%s cannot run: %s", contender.name, error)
            why = f"{contender.name}: {' '.join(str(error).split())[:300]}"
            continue
        rates.append((rate, contender))
    if not rates:
        raise RunEnded(f"no way to run a contender works; the last was {why or 'not begun'}")
    return max(rates, key=lambda pair: pair[0])[1]


def measure(row: Row, parameters: int, contenders: Sequence[Contender], repeats: int, seconds: float) -> Result:
    """Rounds in which each contender has about `seconds`; each round begins with another contender."""
    turns = [(contender, calibrated(contender.steps, seconds)[0]) for contender in contenders]
    names = {contender.key: contender.name for contender in contenders}
    result = Result(row, parameters, names, {key: [] for key in names})
    for number in range(repeats):
        first = number % len(turns)
        for contender, count in turns[first:] + turns[:first]:
            gc.collect()
            signals.raise_if_lost()
            result.seconds[contender.key].append(contender.steps(count) / count)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# What is printed.


def cell(numbers: tuple[float, float, float]) -> str:
    """`1.23 (1.20–1.27)`."""
    median, low, high = numbers
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def describe(results: Sequence[Result]) -> str:
    """The table of the ratios, and the time of each contender."""
    columns = {
        "ours ÷ ceiling": lambda result: cell(result.ratio("ours", "ceiling")),
        "ours ÷ best peer": lambda result: cell(result.ratio("ours", result.best_peer())),
        "best peer": Result.best_peer,
        "ours ÷ fit": lambda result: cell(result.ratio("ours", "fit")),
        "cost of logs": lambda result: cell(result.ratio("ours_silent", "ours")),
        "cost of saving": lambda result: cell(result.ratio("ours_silent", "ours_saving")),
    }
    for key in [key for key in ("jax_fit", "jax_scan") if key in results[0].seconds]:
        columns[f"ours ÷ {key}"] = lambda result, key=key: cell(result.ratio("ours", key))
    ratios = [[str(result.row), *(column(result) for column in columns.values())] for result in results]
    times = [
        [str(result.row), *(readable(statistics.median(values)) for values in result.seconds.values())]
        for result in results
    ]
    legend = "\n".join(f"- {key}: {KINDS[key]}" for key in results[0].seconds)
    settings = "\n".join(
        f"- {result.row}: " + "; ".join(f"{key} at {name}" for key, name in result.names.items() if name)
        for result in results
    )
    return "\n\n".join(
        [
            "Throughput, as a ratio: median over the rounds (lowest–highest).",
            table(["row", *columns], ratios),
            "Time of one update of the global batch, median:",
            table(["row", *results[0].seconds], times),
            legend,
            settings,
        ]
    )
