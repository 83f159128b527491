"""Measurements as people look at them: charts as PNG, text and graphs as TensorBoard's files.

matplotlib is imported where it draws: it takes a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.measure import growth
from trainers.measure.rounds import KINDS, Result
from trainers.show.tables import readable
from trainers.world import files

if TYPE_CHECKING:
    from trainers.measure.input_pipelines import InputResult
    from trainers.measure.traces import Timing

_THROUGHPUTS = ("ours", "fit_best", "call", "fit", "eager")


def new_figure(width: float = 11, height: float = 4.5) -> Any:
    """A matplotlib figure, sizes in inches. By itself, without pyplot, it draws with Agg and needs no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_png(path: Path, figure: Any) -> None:
    """Writes a matplotlib figure: the file is whole or not there."""
    with files.aside(path) as place:
        figure.savefig(place, format="png", dpi=120)


def write_throughputs(path: Path, results: Sequence[Result], title: str) -> None:
    """Bars: the throughput of each contender as a share of the ceiling's, with its range over the rounds."""
    keys = [key for key in _THROUGHPUTS if key in results[0].seconds]
    figure = new_figure()
    axes, width = figure.subplots(), 0.8 / len(keys)
    for i, key in enumerate(keys):
        places = [place + (i - (len(keys) - 1) / 2) * width for place in range(len(results))]
        medians, lowest, highest = zip(*(result.ratio(key, "ceiling") for result in results), strict=True)
        below = [median - low for median, low in zip(medians, lowest, strict=True)]
        above = [high - median for median, high in zip(medians, highest, strict=True)]
        bars = axes.bar(places, medians, width, label=KINDS[key])
        axes.errorbar(places, medians, [below, above], fmt="none", color="k", lw=0.8)
        axes.bar_label(bars, [f"{value:.2f}" for value in medians], fontsize=7, padding=2)
    axes.axhline(1.0, color="k", lw=0.8)
    axes.set_xticks(range(len(results)), [str(result.row).replace(", ", "\n") for result in results], fontsize=8)
    axes.set(ylabel="throughput ÷ that of the ceiling")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)  # outside, where it covers no bar
    figure.suptitle(title, fontsize=10)
    write_png(path, figure)


def write_inputs(path: Path, result: "InputResult", title: str) -> None:
    """Bars for each input pipeline: its throughput, seconds to the first batch (logarithmic), and memory."""
    keys = list(result.figures)
    figure = new_figure()
    panels = (
        ("throughput", "images per second", False, {"images/s": "images_per_second"}),
        (
            "until the first batch",
            "seconds",
            True,
            {"of the run": "first_batch_seconds", "in the middle of an epoch": "middle_batch_seconds"},
        ),
        ("memory", "peak MiB", True, {"peak": "peak_mib"}),
    )
    for axes, (name, unit, logarithmic, bars) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for i, (label, value) in enumerate(bars.items()):
            width = 0.8 / len(bars)
            places = [place + (i - (len(bars) - 1) / 2) * width for place in range(len(keys))]
            _draw_figure(axes, result, value, places, width, label)
        axes.set_xticks(range(len(keys)), [key.replace("_", ",\n") for key in keys], fontsize=8)
        axes.set(title=name, ylabel=unit)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter("")
        axes.margins(y=0.25)
        if len(bars) > 1:
            axes.legend(fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=10)
    write_png(path, figure)


def _draw_figure(
    axes: Any, result: "InputResult", figure: str, places: Sequence[float], width: float, label: str
) -> None:
    """Medians as bars, with their range over the rounds. What was not found in time has no bar."""
    known = [(place, key) for place, key in zip(places, result.figures, strict=True) if result.median(key, figure)]
    if not known:
        return
    medians = [result.median(key, figure) for _, key in known]
    rounds = [result.figures[key][figure] for _, key in known]
    below = [median - min(values) for median, values in zip(medians, rounds, strict=True)]
    above = [max(values) - median for median, values in zip(medians, rounds, strict=True)]
    bars = axes.bar([place for place, _ in known], medians, width, label=label)
    axes.errorbar([place for place, _ in known], medians, [below, above], fmt="none", color="k", lw=0.8)
    axes.bar_label(bars, [f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in medians], fontsize=7)


def write_growth(path: Path, rows: Sequence[growth.Measured], title: str) -> None:
    """A column for each axis: seconds to the first update, memory and speed over the size, with the fitted growth."""
    axes_of, laws = [axis for axis in growth.AXES if growth.of_axis(rows, axis)], growth.growths(rows)
    panels = {
        "seconds": ("first_update_seconds", "compile_seconds"),
        "MiB": ("peak_mib",),
        "steps/s": ("steps_per_second",),
    }
    figure = new_figure(3.8 * len(axes_of), 8.5)
    grid = figure.subplots(len(panels), len(axes_of), squeeze=False)
    for column, axis in enumerate(axes_of):
        members = growth.of_axis(rows, axis)
        sizes = [growth.size_of(row) for row in members]
        for axes, (unit, names) in zip(grid[:, column], panels.items(), strict=True):
            for name in names:
                (points,) = axes.plot(sizes, [getattr(row, name) for row in members], "o", label=growth.FIGURES[name])
                if axis in laws:
                    law = laws[axis][name]
                    between = [sizes[0] * (sizes[-1] / sizes[0]) ** (i / 50) for i in range(51)]
                    axes.plot(between, [law.at(n) for n in between], color=points.get_color(), lw=0.8, label=str(law))
            values = [getattr(row, name) for row in members for name in names]
            over_powers = axis == "parameters" and max(values) > min(values)
            axes.set(xscale="log", yscale="log" if over_powers else "linear", ylabel=unit)
            axes.set_xticks(sizes, [f"{size:,}" if size < 1000 else f"{size:.0e}" for size in sizes], minor=False)
            axes.xaxis.set_minor_formatter("")
            if not over_powers:
                axes.set_ylim(0, 1.5 * max(values))  # the legend stands above
            axes.legend(fontsize=7)
        grid[0, column].set_title(growth.AXES[axis], fontsize=8)
        grid[-1, column].set_xlabel(axis)
    figure.suptitle(title, fontsize=10)
    write_png(path, figure)


def write_timings(path: Path, sums: Sequence["Timing"], steps: Sequence["Timing"], title: str) -> None:
    """Bars of both experiments, logarithmic: the first call of each variant, and the time of later ones."""
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    _draw_timings(left, sums, "sum_up_to", "later calls")
    _draw_timings(right, [timing for timing in steps if not timing.failure], "training step", "a step of later calls")
    figure.suptitle(title, fontsize=10)
    write_png(path, figure)


def _draw_timings(axes: Any, timings: Sequence["Timing"], title: str, later: str) -> None:
    for offset, label, values in (
        (-0.2, "first call (with tracing)", [timing.first for timing in timings]),
        (0.2, later, [timing.later for timing in timings]),
    ):
        bars = axes.bar([place + offset for place in range(len(timings))], values, 0.38, label=label)
        axes.bar_label(bars, [readable(value) for value in values], fontsize=7)
    names = [timing.variant.replace(", ", ",\n") for timing in timings]
    axes.set_xticks(range(len(timings)), names, fontsize=8)
    axes.set(yscale="log", ylabel="seconds", title=title)
    axes.margins(y=0.15)
    axes.legend(fontsize=8)


def write_events(directory: Path, text: str, graphs: Mapping[str, Any]) -> None:
    """TensorBoard's files, a folder for each: `tables` has the text, the others a graph or its definition by name."""
    import tensorflow as tf

    with files.aside(directory) as folder:
        for name in ("tables", *graphs):
            writer = tf.summary.create_file_writer(str(folder / name))
            with writer.as_default():
                if name in graphs:
                    tf.summary.graph(graphs[name])
                else:
                    tf.summary.text("graph_benchmark", text, step=0)
            writer.close()
