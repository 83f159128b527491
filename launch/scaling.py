"""How throughput grows with replicas and workers, the global batch fixed (strong) or growing with them (weak).

    python launch/scaling.py -- --model=resnet
    python launch/scaling.py --replicas=1,2,4,8 --workers=1,2 -- --model=resnet50 --batch_size=256
    python launch/scaling.py --sweep -- --model=resnet                  # what a start costs, and how that grows
    python launch/scaling.py --sweep=replicas,parameters --replicas=1,2 -- --model=resnet

Each point is `trainers/custom_loop.py` in a process of its own (one for each worker), as it is run: with input, metrics
and log lines. The rounds are interleaved; a point is the median over them. Virtual CPU devices share the cores, so two
have no more to compute with than one: there a perfect loop keeps its throughput, and an efficiency of 1/N is perfect.

With --sweep: seconds from the start of a process to the end of its first update, memory and steps a second, against
replicas and workers (the global batch is fixed) and parameters (of mlp, from 10^5 to 10^8), with the fitted growth. One
run for each size; a size that sweep.json in --out_dir holds is not measured again, so Ctrl-C costs a size at most.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements(*process.REQUIREMENTS, "matplotlib")

import argparse
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import sweeping
from launch.workers import visible_gpus
from trainers.measure.charts import new_figure, write_png
from trainers.measure.growth import AXES, PARAMETERS, Size
from trainers.record import reading
from trainers.settings import paths
from trainers.settings.config import EPOCHS, Config
from trainers.settings.exit_codes import OK, PREEMPTED, BadConfiguration
from trainers.settings.flags import config_from, without
from trainers.show.tables import table
from trainers.world import files, process

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION_STEPS = 50
# A run finds out how long a step is before it is timed: what that takes, on top of `--seconds`.
UNTIMED_SECONDS = 3
HEAD = ("scaling", "size", "global batch", "steps/s", "examples/s", "lowest–highest", "efficiency")


class Point(NamedTuple):
    """A size: `kind` is `replicas` of one process or `workers` of one replica each."""

    kind: str
    count: int
    batch_size: int


# Points by the name of the series, the smallest first.
Series = Mapping[str, Sequence[Point]]


class Settings(NamedTuple):
    """The command line: the script's own options, the trainer's flags, and the points that they ask for.

    `sizes`: those of a sweep, in place of `series`.
    """

    options: argparse.Namespace
    flags: list[str]
    series: Series
    sizes: tuple[Size, ...] = ()


class Measurements(NamedTuple):
    """Updates a second of each point in each round, and the devices that it ran on."""

    rates: dict[Point, list[float]]
    devices: dict[Point, list[str]]

    def median(self, point: Point) -> float:
        """The median over the rounds, updates a second."""
        return statistics.median(self.rates[point])


def run_of(kind: str, count: int, flags: Sequence[str], steps: int) -> dict[str, Any]:
    """The run.json of a run of so many replicas or workers, which is gone.

    Raises:
      BadConfiguration: the trainer ends with an error; its last line is the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = [*without(flags, EPOCHS.values()), f"--train_steps={steps}", f"--run_dir={folder}/run"]
        run += ["--eval_every=0", "--checkpoint_every=0", "--warmup_steps=0"]
        if kind == "workers":
            command = [sys.executable, str(ROOT / "launch/workers.py"), f"--workers={count}", "--"]
        else:
            command = [sys.executable, str(ROOT / "trainers/custom_loop.py"), f"--replicas={count}"]
        env = dict(os.environ)
        if gpus := visible_gpus():  # a worker has one, as a replica has
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:count])
        words = [*command, *run]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        try:
            output, _ = child.communicate()
        except KeyboardInterrupt:
            child.terminate()  # launch/workers.py passes it on
            child.wait()
            raise
        if child.returncode:
            last = (output.strip() or "it printed nothing").splitlines()[-1]
            raise BadConfiguration(f"{count} {kind} ended with code {child.returncode}: {last}")
        facts = reading.read_run(Path(folder, "run"))
    if "steady" not in facts:
        raise BadConfiguration(f"{steps} steps of {count} {kind} are too few to time; pass more --seconds")
    return facts


def measure(point: Point, flags: list[str], steps: int) -> tuple[float, list[str]]:
    """Updates a second of a run once it is under way, and the devices that it ran on.

    Raises:
      BadConfiguration: as `run_of`.
    """
    facts = run_of(point.kind, point.count, [*flags, f"--batch_size={point.batch_size}"], steps)
    return facts["steady"]["steps"] / facts["steady"]["seconds"], facts["devices"]


def points_of(config: Config, replicas: list[int], workers: list[int]) -> dict[str, list[Point]]:
    """The points of strong and of weak scaling.

    Raises:
      BadConfiguration: there is none, or the batch does not divide over one.
    """
    batch, series = config.batch_size, {}
    for kind, counts in (("replicas", replicas), ("workers", workers)):
        counts = sorted(set(counts))
        if not counts:
            continue
        for count in counts:
            if batch % count:
                raise BadConfiguration(f"--batch_size {batch} does not divide over {count} {kind}; pass a multiple")
        series[f"strong, {kind}"] = [Point(kind, count, batch) for count in counts]
        series[f"weak, {kind}"] = [Point(kind, count, batch * count // counts[0]) for count in counts]
    if not series:
        raise BadConfiguration("--replicas and --workers are both empty; pass e.g. --replicas=1,2")
    return series


def sizes_of(config: Config, options: argparse.Namespace) -> tuple[Size, ...]:
    """The sizes of a sweep, axis by axis.

    Raises:
      BadConfiguration: an axis is not known, has no size, or the batch does not divide over one.
    """
    chosen = [word.strip() for word in options.sweep.split(",") if word.strip()]
    if not chosen or not set(chosen) <= set(AXES):
        raise BadConfiguration(
            f"--sweep {options.sweep!r} is not made of {', '.join(AXES)}; pass some of them, or none"
        )
    counts = {"replicas": options.replicas, "workers": options.workers, "parameters": PARAMETERS}
    if empty := next((axis for axis in chosen if not counts[axis]), None):
        raise BadConfiguration(f"--{empty} is empty and --sweep asks for it; pass e.g. --{empty}=1,2,4")
    sizes = tuple(Size(axis, count) for axis in AXES if axis in chosen for count in sorted(set(counts[axis])))
    for axis, count in sizes:
        if axis != "parameters" and config.batch_size % count:
            raise BadConfiguration(
                f"--batch_size {config.batch_size} does not divide over {count} {axis}; pass a multiple"
            )
    return sizes


def efficiency(points: Sequence[Point], measured: Measurements) -> list[float]:
    """Examples a second for each replica, relative to the smallest size."""
    each = [measured.median(point) * point.batch_size / point.count for point in points]
    return [value / each[0] for value in each]


def measure_all(settings: Settings) -> Measurements:
    """Measures every point in interleaved rounds."""
    options, flags = settings.options, settings.flags
    points = list(dict.fromkeys(point for members in settings.series.values() for point in members))
    measured, steps = Measurements({point: [] for point in points}, {}), {}
    for point in points:
        rate, measured.devices[point] = measure(point, flags, CALIBRATION_STEPS)
        steps[point] = max(int(rate * (options.seconds + UNTIMED_SECONDS)), CALIBRATION_STEPS)
    for turn in range(options.repeats):
        for point in points[turn % len(points) :] + points[: turn % len(points)]:
            rate = measure(point, flags, steps[point])[0]
            measured.rates[point].append(rate)
            print(f"round {turn + 1}: {point.count} {point.kind}, batch {point.batch_size}: {rate:.4g}/s")
    return measured


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def report(series: Series, measured: Measurements) -> str:
    """The table, and under it what virtual devices mean for it."""
    rows = []
    for name, members in series.items():
        for point, share in zip(members, efficiency(members, measured), strict=True):
            rate, rates = measured.median(point), measured.rates[point]
            examples, low, high = (value * point.batch_size for value in (rate, min(rates), max(rates)))
            numbers = f"{rate:.4g}", f"{examples:.4g}", f"{low:.4g}–{high:.4g}", f"{share:.2f}"
            rows.append([name, str(point.count), str(point.batch_size), *numbers])
    text = table(HEAD, rows)
    if any("CPU" in device for devices in measured.devices.values() for device in devices):
        text += (
            f"\n{num_cores()} CPU cores; virtual CPU devices and workers share them: an efficiency of 1/size is "
            "perfect here."
        )
    return text


def write_chart(path: Path, series: Series, measured: Measurements) -> None:
    """Throughput over size, relative to the smallest, beside the line of perfect scaling."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for name, points in series.items():
        sizes = [point.count / points[0].count for point in points]
        speedups = [size * e for size, e in zip(sizes, efficiency(points, measured), strict=True)]
        axes.plot(sizes, speedups, "o-", label=name)
    longest = max(points[-1].count / points[0].count for points in series.values())
    axes.plot([1, longest], [1, longest], "k--", lw=0.8, label="each replica has a device of its own")
    axes.axhline(1, color="k", lw=0.8, ls=":", label="all replicas share the device of one")
    axes.set(xlabel="size ÷ the smallest", ylabel="examples a second ÷ those of the smallest", ylim=(0, None))
    axes.legend(fontsize=8)
    write_png(path, figure)


def counts(text: str) -> list[int]:
    """`1,2,4` as numbers."""
    values = [int(part) for part in text.split(",") if part.strip()]
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: sizes are 1 or more")
    return values


def settings_from(argv: Sequence[str]) -> Settings:
    """Reads a command line; `argv[0]` is the program.

    Raises:
      BadConfiguration: a flag is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=counts, help="replicas of one process (default: 1,2; with --sweep 1,2,4,8)")
    parser.add_argument("--workers", type=counts, help="worker processes, as --replicas (empty: none)")
    parser.add_argument(
        "--sweep", nargs="?", const=",".join(AXES), help=f"what a start costs, over {', '.join(AXES)} (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts (default: 3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, about (default: 4)")
    parser.add_argument("--out_dir", default="runs/scaling", help="where table, figures and chart go")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="-- and flags of trainers/custom_loop.py")
    options = parser.parse_args(argv[1:])
    flags = options.flags[1:] if options.flags[:1] == ["--"] else options.flags
    config = config_from(["scaling", *flags], "")
    default = [1, 2] if options.sweep is None else [1, 2, 4, 8]
    options.replicas, options.workers = (
        default if each is None else each for each in (options.replicas, options.workers)
    )
    if options.sweep is None:
        return Settings(options, flags, points_of(config, options.replicas, options.workers))
    if parser.get_default("repeats") != options.repeats:
        raise BadConfiguration("--repeats: a sweep makes one run for each size; leave it out")
    return Settings(options, flags, {}, sizes_of(config, options))


def main(settings: Settings) -> int:
    """Measures every point, writes JSON, table and chart, and prints the table. Returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    out = paths.local("--out_dir", settings.options.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if settings.sizes:
            return sweeping.sweep(settings.sizes, settings.flags, settings.options.seconds, out, run_of)
        measured = measure_all(settings)
        text = report(settings.series, measured)
        points = [
            {**point._asdict(), "steps_per_second": rates, "devices": measured.devices[point]}
            for point, rates in measured.rates.items()
        ]
        facts = {"flags": settings.flags, "cores": num_cores(), "points": points}
        files.write_text(out / "scaling.json", files.to_json(facts, indent=2))
        files.write_text(out / "scaling.md", text + "\n")
        write_chart(out / "scaling.png", settings.series, measured)
    except KeyboardInterrupt:
        return PREEMPTED
    except OSError as error:
        raise BadConfiguration(f"--out_dir {out}: {error.strerror}; name another") from None
    print(f"{text}\nwritten to {out}: scaling.json, scaling.md, scaling.png")
    return OK


if __name__ == "__main__":
    process.main(settings_from, main)
