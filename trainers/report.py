"""Runs as one HTML file that opens offline: curves, where the time went, what each run is, and how their flags differ.

python trainers/report.py runs/first
python trainers/report.py runs/first runs/second --out=comparison.html
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements("matplotlib")

import argparse
import contextlib
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainers.record import carriers, goodput, reading
from trainers.settings import paths
from trainers.settings.config import NO_DIFFERENCE
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files, process

# No curve is drawn of these, nor of shares of time, which have a table.
_NO_CURVE = ("step", "split", "examples_per_second", "model_flops_per_second")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1e1e1e }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .8rem; text-align: left; vertical-align: top }
th { background: #f5f5f5 }
figure { display: inline-block; margin: 0 }
svg { max-width: 100%; height: auto }
"""


class Loaded(NamedTuple):
    """A run as it is in its files. `facts`: run.json; `lines`: metrics.jsonl; `goodput`: as `goodput.facts_of`."""

    name: str
    facts: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    goodput: Mapping[str, Any]

    def last(self, split: str) -> Mapping[str, Any]:
        """The last metrics of a split: those of the end of the run or, before that, the last line."""
        final = self.facts.get("final", {}).get(split, {})
        return reading.numbers(final) or next((line for line in reversed(self.lines) if line["split"] == split), {})


def load(directory: Path) -> Loaded:
    """Reads a run_dir.

    Raises:
      BadConfiguration: it holds no run, or its files cannot be read.
    """
    facts = reading.read_run(directory)
    if not facts:
        raise BadConfiguration(f"{carriers.shown(directory)} holds no run.json; name the --run_dir of a run")
    try:
        lines = reading.metric_lines(directory)
    except OSError as error:
        raise BadConfiguration(
            f"{directory / reading.METRICS} cannot be read: {error.strerror}; name the --run_dir of a run"
        ) from None
    return Loaded(directory.name or str(directory), facts, lines, goodput.of_run(directory))


def curves(runs: Sequence[Loaded]) -> str:
    """A chart of each metric over steps: training dashed, evaluation solid, a colour for each run."""
    names: dict[str, None] = {}
    for run in runs:
        for line in run.lines:
            names |= dict.fromkeys(n for n in line if n not in _NO_CURVE and not n.startswith("share_"))
    return "\n".join(f"<figure>{chart(runs, name)}</figure>" for name in names) or "<p>No metrics yet.</p>"


def chart(runs: Sequence[Loaded], name: str) -> str:
    """The chart of a metric, as an `<svg>` element."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text stays text: the page can be searched.
    with rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for i, run in enumerate(runs):
            for split, style in (("train", "--"), ("eval", "-o")):
                points = [(line["step"], line[name]) for line in run.lines if line["split"] == split and name in line]
                if points:
                    label = f"{run.name}, {split}"
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", ms=3, lw=1.2, label=label)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; everything in it is escaped."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ["<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def results(runs: Sequence[Loaded]) -> str:
    """How each run ended, with its last metrics."""
    finals = [run.last("eval") for run in runs]
    names = dict.fromkeys(name for final in finals for name in final if name not in ("step", "split"))
    rows = []
    for run, final in zip(runs, finals, strict=True):
        ended = run.facts.get("exit_reason") or "it has not ended"
        step = max((line["step"] for line in run.lines), default=0)
        rows.append([run.name, ended, step, *(_number(final.get(name)) for name in names)])
    return table(["run", "ended", "step", *(f"eval {name}" for name in names)], rows)


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value or "–")


def breakdown(runs: Sequence[Loaded]) -> str:
    """Seconds of each phase, and their share."""
    phases = dict.fromkeys(phase for run in runs for phase in run.facts.get("seconds", {}))
    rows = []
    for phase in phases:
        row = [phase]
        for run in runs:
            seconds = run.facts.get("seconds", {})
            total = sum(seconds.values()) or 1.0
            row.append(f"{seconds.get(phase, 0.0):.2f} s, {seconds.get(phase, 0.0) / total:.0%}")
        rows.append(row)
    return table(["phase", *(run.name for run in runs)], rows)


def goodputs(runs: Sequence[Loaded]) -> str:
    """What the wall time of all attempts went into, as shares; empty if no run tells of it."""
    known = [run for run in runs if run.goodput]
    if not known:
        return ""
    rows = [
        [words, *(f"{run.goodput['seconds'][part]:.1f} s, {run.goodput['shares'][part]:.1%}" for run in known)]
        for part, words in goodput.PARTS.items()
    ]
    rows.append(["since the first start", *(f"{run.goodput['wall_seconds']:.1f} s" for run in known)])
    return table(["goodput", *(run.name for run in known)], rows)


def differences(runs: Sequence[Loaded]) -> str:
    """The flags in which runs differ."""
    flags = [run.facts.get("flags", {}) for run in runs]
    values = {n: [own.get(n) for own in flags] for n in dict.fromkeys(n for own in flags for n in own)}
    rows = [
        [f"--{name}", *choices]
        for name, choices in values.items()
        if name not in NO_DIFFERENCE and len(set(map(str, choices))) > 1
    ]
    if not rows:
        return "<p>The runs have the same flags.</p>"
    return table(["flag", *(run.name for run in runs)], rows)


def card(run: Loaded) -> str:
    """What a run is."""
    names = ("started", "ended", "host", "commit", "devices", "replicas", "parameters", "flops_per_step", "traces")
    names += ("attempts", "peak_resident_mib", "data_fingerprint")
    rows = [[name, run.facts[name]] for name in names if run.facts.get(name) is not None]
    rows += [[name, version] for name, version in run.facts.get("versions", {}).items()]
    rows += [[f"--{name}", value] for name, value in run.facts.get("flags", {}).items()]
    return f"<details><summary>{html.escape(run.name)}</summary>{table(['', ''], rows)}</details>"


def page(runs: Sequence[Loaded]) -> str:
    """The whole file."""
    title = ", ".join(run.name for run in runs)
    parts = [
        ("Results", results(runs)),
        ("Curves", curves(runs)),
        ("Where the time went", goodputs(runs) + breakdown(runs)),
    ]
    if len(runs) > 1:
        parts.append(("Differences of flags", differences(runs)))
    parts.append(("Run cards", "".join(card(run) for run in runs)))
    body = "\n".join(f"<h2>{name}</h2>\n{text}" for name, text in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def settings_from(argv: Sequence[str]) -> argparse.Namespace:
    """The command line (`argv[0]` is the program): `run_dir`, a list of paths and addresses, and `out`, a path.

    Raises:
      BadConfiguration: `--out` is an address, or a home directory is not known.
      SystemExit: `--help` was given, or a flag is malformed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run_dir", nargs="+", help="runs to show, side by side: paths, or addresses s3://, gs://, az://"
    )
    parser.add_argument(
        "--out", help="the file (default: report.html in the first run_dir; here, if that is an address)"
    )
    options = parser.parse_args(argv[1:])
    options.run_dir = [paths.place("run_dir", text) for text in options.run_dir]
    first = "." if paths.is_address(options.run_dir[0]) else options.run_dir[0]
    options.out = paths.local("--out", options.out) if options.out else Path(first) / "report.html"
    return options


def main(options: argparse.Namespace) -> None:
    """Writes the file and prints its path.

    Raises:
      BadConfiguration: a run cannot be read, or the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        text = page([load(stack.enter_context(carriers.readable(place))) for place in options.run_dir])
    try:
        files.write_text(options.out, text)
    except OSError as error:
        raise BadConfiguration(f"--out {options.out} cannot be written: {error.strerror}; name another file") from None
    print(options.out)


if __name__ == "__main__":
    process.main(settings_from, main)
