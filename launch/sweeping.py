"""Behind `launch/scaling.py --sweep`: a run for each size, what has been measured already, and what is written."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.workers import visible_gpus
from trainers.measure import charts, growth
from trainers.measure.growth import Measured, Size
from trainers.settings.exit_codes import OK, PREEMPTED, BadConfiguration
from trainers.settings.flags import without
from trainers.world import files, machine

# `run(kind, count, flags, steps)`: the run.json of a run.
Run = Callable[[str, int, Sequence[str], int], dict[str, Any]]
# Of a run: the first call makes one update, and so does the second; what follows is timed. More than a guess may be.
LEAST_STEPS, CALIBRATION_STEPS, MOST_STEPS = 6, 30, 20_000
# Of the memory, what a run may need.
_MEMORY_SHARE = 0.5


def left_out(size: Size) -> str | None:
    """Why a size cannot be measured on this machine; None if it can."""
    if size.axis == "parameters":
        needed, memory = size.count * growth.BYTES_A_PARAMETER, machine.memory()
        if needed > _MEMORY_SHARE * memory:
            return (
                f"{size.count:,} parameters: a run holds about {needed / 2**30:.0f} GiB at most, more than half of the "
                f"{memory / 2**30:.0f} GiB here"
            )
    elif (gpus := len(visible_gpus())) and size.count > gpus:
        return f"{size.count} {size.axis}: here are {gpus} GPUs"
    return None


def measure(size: Size, flags: Sequence[str], steps: int, run: Run) -> Measured:
    """A run of a size.

    Raises:
      BadConfiguration: it has failed.
    """
    if size.axis != "parameters":
        return growth.measured(size, run(size.axis, size.count, flags, steps))
    own = [*without(flags, ["model"]), f"--model={growth.mlp_of(size.count)}"]
    return growth.measured(size, run("replicas", 1, own, steps))


def guessed_rate(size: Size, before: Measured) -> float:
    """Updates a second at a size, by those of a smaller one: no fewer than cores that are shared leave to each."""
    return before.steps_per_second * before.count / size.count


def earlier(path: Path, identity: dict[str, Any]) -> list[Measured]:
    """The rows of a sweep that was left.

    Raises:
      BadConfiguration: the file is of other flags or of another machine, or is none of a sweep.
    """
    try:
        known = json.loads(path.read_text())
        rows = [Measured(**row) for row in known["rows"]]
        before = {name: known[name] for name in identity}
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise BadConfiguration(f"{path} is not what a sweep writes; remove it, or name another --out_dir") from None
    for name, value in identity.items():
        if before[name] != value:
            raise BadConfiguration(
                f"{path} is of a sweep with other {name} ({before[name]}, now {value}); remove it, or name another "
                "--out_dir"
            )
    return rows


def write(out: Path, identity: dict[str, Any], rows: Sequence[Measured], missing: Sequence[str]) -> None:
    """Writes the facts: after each run, which takes long."""
    record = identity | growth.record(rows, missing)
    files.write_text(out / "sweep.json", files.to_json(record, indent=2, ensure_ascii=False) + "\n")


def sweep(sizes: Sequence[Size], flags: Sequence[str], seconds: float, out: Path, run: Run) -> int:
    """Measures what is missing, and writes JSON, table and chart. Returns the exit code; a signal leaves what is there.

    Raises:
      BadConfiguration: a run fails, or `out` holds another sweep.
    """
    identity = {"flags": list(flags), "cores": machine.cores(), "versions": machine.versions()}
    rows, missing, code = earlier(out / "sweep.json", identity), [], OK
    try:
        for size in sizes:
            if why := left_out(size):
                missing.append(why)
                print(f"left out: {why}", flush=True)
            elif size not in [row.size for row in rows]:
                rows.append(measured_in(size, flags, seconds, run, rows))
                write(out, identity, rows, missing)
                print(told(rows[-1]), flush=True)
    except KeyboardInterrupt:
        missing.append("what a signal has kept from being measured; the same command goes on")
        code = PREEMPTED
    write(out, identity, rows, missing)
    text = growth.describe(rows, missing)
    files.write_text(out / "sweep.md", text + "\n")
    if rows:
        charts.write_growth(out / "sweep.png", rows, f"{identity['cores']} CPU cores, {' '.join(flags) or 'no flags'}")
    print(f"\n{text}\n\nwritten to {out}: sweep.json, sweep.md{', sweep.png' if rows else ''}")
    return code


def measured_in(size: Size, flags: Sequence[str], seconds: float, run: Run, rows: Sequence[Measured]) -> Measured:
    """A run of a size whose updates last about `seconds`. The smallest size of an axis has one before, to find out."""
    smaller = [row for row in growth.of_axis(rows, size.axis) if row.count < size.count]
    before = smaller[-1] if smaller else measure(size, flags, CALIBRATION_STEPS, run)
    steps = round(guessed_rate(size, before) * seconds)
    return measure(size, flags, min(max(steps, LEAST_STEPS), MOST_STEPS), run)


def told(row: Measured) -> str:
    """A line while it goes on."""
    return (
        f"{growth.size_of(row):,} {row.axis}: {row.first_update_seconds:.1f} s to the first update, "
        f"{row.compile_seconds:.1f} of them trace and first call, {row.peak_mib:,.0f} MiB, {row.steps_per_second:.3g} "
        "steps/s"
    )
