"""Uses TensorFlow like NumPy, as a check of the machine: values against NumPy, and speeds beside NumPy's.

python trainers/tensor_check.py
python trainers/tensor_check.py --size=2048 --repeats=20 --json=check.json

Every operation runs on every visible GPU or, with no GPU, on the CPU; then the replicas sum vectors.
Measure on an idle machine: NumPy's matrix products wait for their threads by spinning, and lose far more speed than
TensorFlow's when another process takes a core. Values do not depend on the load.
Exit code: 0 if every value agrees with NumPy, 1 if a value does not, 2 for a flag that breaks a rule.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements()

import dataclasses
import platform
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import flags, logging

from trainers.settings import paths
from trainers.settings.config import Config
from trainers.settings.exit_codes import OK, BadConfiguration, RunEnded
from trainers.settings.flags import fill
from trainers.world import files, machine, process, quiet

if TYPE_CHECKING:
    from trainers.measure.comparison import Operation, Result

DISAGREES = RunEnded.exit_code
# The slowest operation, a singular value decomposition, grows with the cube of the side.
MAX_SIDE = 8192
MAX_REPLICAS = 64


# ----------------------------------------------------------------------------------------------------------------------
# Flags.


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of the flags. `json`: path of the file to write; empty: none."""

    size: int = 512
    repeats: int = 5
    replicas: int = 0
    json: str = ""


_HELP = {
    "size": f"side of the matrices, 8 to {MAX_SIDE}",
    "repeats": "timed calls of each operation, after one that is not timed; the median is printed",
    "replicas": "replicas that all-reduce; 0 = every visible GPU or, with no GPU, 2 virtual CPU devices",
    "json": "a file for the results",
}


def help_page() -> str:
    """The page behind `--help`."""
    lines = [__doc__.strip(), "", "Flags:"]
    for field in dataclasses.fields(Settings):
        text = textwrap.fill(f"{_HELP[field.name]} (default: {'none' if field.default == '' else field.default})", 88)
        lines += [f"  --{field.name}", textwrap.indent(text, "        ")]
    return "\n".join(lines)


def settings_from(argv: Sequence[str]) -> Settings:
    """The settings of a command line (`argv[0]` is the program).

    Raises:
      BadConfiguration: a flag is unknown, malformed or breaks a rule.
      SystemExit: `--help` was given and its page has been printed; code 0.
    """
    values = flags.FlagValues()
    for field in dataclasses.fields(Settings):
        define = flags.DEFINE_integer if field.type is int else flags.DEFINE_string
        define(field.name, field.default, _HELP[field.name], flag_values=values)
    flags.DEFINE_bool("help", False, "print this page", short_name="h", flag_values=values)
    fill(values, argv, help_page)
    settings = Settings(**{field.name: values[field.name].value for field in dataclasses.fields(Settings)})
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    for name, low, high in (("size", 8, MAX_SIDE), ("repeats", 1, None), ("replicas", 0, MAX_REPLICAS)):
        value = getattr(settings, name)
        if value < low:
            raise BadConfiguration(f"--{name} {value} is below {low}; use {low} or more")
        if high is not None and value > high:
            raise BadConfiguration(f"--{name} {value} is above {high}; use {high} or less")
    if settings.json:
        path = paths.local("--json", settings.json)
        if path.is_dir():
            raise BadConfiguration(f"--json {path} is a directory; name a file")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            why = "is not writable" if path.parent.is_dir() else "does not exist"
            raise BadConfiguration(f"--json {path}: the folder {path.parent} {why}; name a file in another")


# ----------------------------------------------------------------------------------------------------------------------
# The table and the file.


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _microseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:,.0f}"


def _line(*cells: str) -> str:
    name, device, inputs, microseconds, numpy_microseconds, rate, numpy_rate, unit, difference, tolerance, note = cells
    return (
        f"  {name:<21}{device:<8}{inputs:<22}{microseconds:>10}{numpy_microseconds:>10}{rate:>11}{numpy_rate:>8} "
        f"{unit:<8}{difference:>7}{tolerance:>7} {note}"
    ).rstrip()


HEADING = "\n".join(
    (
        _line("", "", "", "TensorFlow", "NumPy", "TensorFlow", "NumPy", "", "differ-", "toler-", ""),
        _line("operation", "device", "first input", "µs", "µs", "rate", "rate", "unit", "ence", "ance", ""),
    )
)


def row(result: "Result") -> str:
    """A line of the table."""
    return _line(
        result.operation,
        result.device,
        result.inputs,
        _microseconds(result.tensorflow_seconds),
        _microseconds(result.numpy_seconds),
        _rate(result.tensorflow_rate),
        _rate(result.numpy_rate),
        result.unit or "–",
        "–" if result.difference is None else f"{result.difference:.0e}" if result.difference else "0",
        f"{result.tolerance:.0e}" if result.tolerance else "0",
        "" if result.agrees else "WRONG",
    )


def _printer() -> Callable[["Result"], None]:
    """A function that prints each result, under the heading of its group."""
    group = None

    def report(result: "Result") -> None:
        nonlocal group
        if result.group != group:
            print(result.group)
            group = result.group
        print(row(result), flush=True)

    return report


def _write_json(settings: Settings, results: Sequence["Result"]) -> None:
    record = {
        "host": platform.node(),
        "versions": machine.versions(),
        "flags": dataclasses.asdict(settings),
        "results": [dataclasses.asdict(result) | {"agrees": result.agrees} for result in results],
    }
    text = files.to_json(record, indent=2, ensure_ascii=False) + "\n"
    try:
        files.write_text(paths.local("--json", settings.json), text)
    except OSError as error:
        raise BadConfiguration(
            f"--json {settings.json} cannot be written: {error.strerror}; name another file"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# The script.


def run(settings: Settings, operations: Sequence["Operation"] | None = None) -> int:
    """Prints the table, names what is wrong on standard error, and returns the exit code.

    Args:
      settings: the values of the flags.
      operations: what is compared; default: all of `trainers.measure.operations`.

    Raises:
      BadConfiguration: there are fewer GPUs than replicas, or the results cannot be written.
    """
    quiet.import_tensorflow()
    import numpy as np
    import tensorflow as tf

    from trainers.measure.comparison import compare, compare_all_reduce
    from trainers.measure.operations import OPERATIONS
    from trainers.world import devices

    world = devices.set_up(Config(strategy="mirrored", replicas=settings.replicas))
    print(f"TensorFlow {tf.__version__}, NumPy {np.__version__}; medians of {settings.repeats}")
    print("difference: relative to NumPy's largest magnitude; where the tolerance is 0, unequal elements")
    print(HEADING)
    report = _printer()
    results = compare(OPERATIONS if operations is None else operations, settings.size, settings.repeats, report)
    results.append(compare_all_reduce(world.strategy, settings.size, settings.repeats))
    report(results[-1])
    wrong = [result for result in results if not result.agrees]
    print(f"{len(results) - len(wrong)} of {len(results)} agree with NumPy", flush=True)
    for result in wrong:
        process.say(f"{sys.argv[0]}: {result.complaint}")
    if settings.json:
        _write_json(settings, results)
    return DISAGREES if wrong else OK


def main(settings: Settings) -> int:
    """Runs the check; returns the exit code."""
    logging.set_verbosity(logging.WARNING)
    return run(settings)


if __name__ == "__main__":
    process.main(settings_from, main)
