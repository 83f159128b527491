"""Measurements as people look at them: charts as PNG, text and graphs as TensorBoard's files.

matplotlib is imported where it draws: it takes a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.measure.rounds import KINDS, Result
from trainers.show.tables import readable
from trainers.world import files

if TYPE_CHECKING:
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
