"""How throughput grows with replicas and workers, the global batch fixed (strong) or growing with them (weak).

    python launch/scaling.py -- --model=resnet
    python launch/scaling.py --replicas=1,2,4,8 --workers=1,2 -- --model=resnet50 --batch_size=256

Each point is `trainers/custom_loop.py` in a process of its own (one for each worker), as it is run: with input, metrics
and log lines. The rounds are interleaved; a point is the median over them. Virtual CPU devices share the cores, so two
have no more to compute with than one: there, a perfect loop keeps its throughput, and an efficiency of 1/N is perfect.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainers.world import process

process.check_requirements()

from launch.workers import visible_gpus
from trainers.measure.charts import write_png
from trainers.record import files, reading
from trainers.settings.config import Config
from trainers.settings.exit_codes import BAD_CONFIGURATION, OK, PREEMPTED, BadConfiguration
from trainers.settings.flags import config_from
from trainers.show.tables import table

CALIBRATION_STEPS = 50


class Point(NamedTuple):
    """One size: `kind` is `replicas` of one process or `workers` of one replica each."""

    kind: str
    count: int
    batch_size: int


def measure(point: Point, flags: list[str], steps: int) -> tuple[float, list[str]]:
    """Updates a second of a run once it is under way, and the devices that it ran on.

    Raises:
      BadConfiguration: the trainer ends with an error; its last line is the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = [*flags, f"--batch_size={point.batch_size}", f"--train_steps={steps}", f"--run_dir={folder}/run"]
        run += ["--eval_every=0", "--checkpoint_every=0", "--warmup_steps=0"]
        if point.kind == "workers":
            command = [sys.executable, str(ROOT / "launch/workers.py"), f"--workers={point.count}", "--"]
        else:
            command = [sys.executable, str(ROOT / "trainers/custom_loop.py"), f"--replicas={point.count}"]
        env = dict(os.environ)
        if gpus := visible_gpus():  # a worker has one, as a replica has
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[: point.count])
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
            raise BadConfiguration(f"{point.count} {point.kind} ended with code {child.returncode}: {last}")
        facts = reading.read_run(Path(folder, "run"))
    if "steady" not in facts:
        raise BadConfiguration(f"{steps} steps of {point.count} {point.kind} are too few to time; pass more --seconds")
    return facts["steady"]["steps"] / facts["steady"]["seconds"], facts["devices"]


def points_of(config: Config, replicas: list[int], workers: list[int]) -> dict[str, list[Point]]:
    """Strong and weak scaling's points by the name of the series, the smallest first."""
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
    return series


def efficiency(points: list[Point], rates: dict[Point, float]) -> list[float]:
    """Examples a second for each replica, relative to the smallest size."""
    each = [rates[point] * point.batch_size / point.count for point in points]
    return [value / each[0] for value in each]


def write_chart(path: Path, series: dict[str, list[Point]], rates: dict[Point, float]) -> None:
    """Throughput over size, relative to the smallest, beside the line of perfect scaling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        sizes = [point.count / points[0].count for point in points]
        axes.plot(sizes, [s * e for s, e in zip(sizes, efficiency(points, rates), strict=True)], "o-", label=name)
    longest = max(points[-1].count / points[0].count for points in series.values())
    axes.plot([1, longest], [1, longest], "k--", lw=0.8, label="each replica has a device of its own")
    axes.axhline(1, color="k", lw=0.8, ls=":", label="all replicas share what one had")
    axes.set(xlabel="size ÷ the smallest", ylabel="examples a second ÷ those of the smallest", ylim=(0, None))
    axes.legend(fontsize=8)
    write_png(path, figure)


def scale(options: argparse.Namespace, flags: list[str]) -> str:
    """Measures every point, writes JSON and chart, and returns the table."""
    config = config_from(["scaling", *flags], "")
    series = points_of(config, options.replicas, options.workers)
    points = list(dict.fromkeys(point for members in series.values() for point in members))
    if not points:
        raise BadConfiguration("--replicas and --workers are both empty; pass e.g. --replicas=1,2")
    out = Path(options.out_dir).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    steps, devices = {}, {}
    for point in points:
        rate, devices[point] = measure(point, flags, CALIBRATION_STEPS)
        # The first calls, which find out how long a step is, are not timed: three seconds' worth on top.
        steps[point] = max(int(rate * (options.seconds + 3)), CALIBRATION_STEPS)
    rates_of: dict[Point, list[float]] = {point: [] for point in points}
    for turn in range(options.repeats):
        for point in points[turn % len(points) :] + points[: turn % len(points)]:
            rates_of[point].append(measure(point, flags, steps[point])[0])
            print(
                f"round {turn + 1}: {point.count} {point.kind}, batch {point.batch_size}: {rates_of[point][-1]:.4g}/s"
            )
    rates = {point: statistics.median(values) for point, values in rates_of.items()}
    rows = []
    for name, members in series.items():
        for point, share in zip(members, efficiency(members, rates), strict=True):
            each = [rate * point.batch_size for rate in (rates[point], min(rates_of[point]), max(rates_of[point]))]
            numbers = f"{rates[point]:.4g}", f"{each[0]:.4g}", f"{each[1]:.4g}–{each[2]:.4g}", f"{share:.2f}"
            rows.append([name, str(point.count), str(point.batch_size), *numbers])
    head = ["scaling", "size", "global batch", "steps/s", "examples/s", "lowest–highest", "efficiency"]
    virtual = any("CPU" in device for names in devices.values() for device in names)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    note = f"\n{cores} CPU cores; virtual CPU devices and workers share them: an efficiency of 1/size is perfect here."
    text = table(head, rows) + (note if virtual else "")
    figures: list[dict[str, Any]] = [
        {**point._asdict(), "steps_per_second": rates_of[point], "devices": devices[point]} for point in points
    ]
    files.write_text(out / "scaling.json", json.dumps({"flags": flags, "cores": cores, "points": figures}, indent=2))
    files.write_text(out / "scaling.md", text + "\n")
    write_chart(out / "scaling.png", series, rates)
    return f"{text}\nwritten to {out}: scaling.json, scaling.md, scaling.png"


def counts(text: str) -> list[int]:
    """`1,2,4` as numbers."""
    values = [int(part) for part in text.split(",") if part.strip()]
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: sizes are 1 or more")
    return values


def main(arguments: list[str]) -> int:
    """Parses the command line and measures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=counts, default=[1, 2], help="replicas of one process (default: 1,2)")
    parser.add_argument("--workers", type=counts, default=[1, 2], help="worker processes (default: 1,2; empty: none)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts (default: 3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, about (default: 4)")
    parser.add_argument("--out_dir", default="runs/scaling", help="where table, figures and chart go")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="-- and flags of trainers/custom_loop.py")
    options = parser.parse_args(arguments)
    flags = options.flags[1:] if options.flags[:1] == ["--"] else options.flags
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        print(scale(options, flags))
    except KeyboardInterrupt:
        return PREEMPTED
    except BadConfiguration as error:
        print(f"launch/scaling.py: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    except OSError as error:
        print(f"launch/scaling.py: --out_dir {options.out_dir}: {error.strerror}; name another", file=sys.stderr)
        return BAD_CONFIGURATION
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
