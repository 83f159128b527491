"""Runs as one HTML file that opens offline: curves, where the time went, what each run is, and how their flags differ.

python trainers/report.py runs/first
python trainers/report.py runs/first runs/second --out=comparison.html
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainers.record.run_record import NO_DIFFERENCE, write_atomically
from trainers.settings.exit_codes import BAD_CONFIGURATION, OK, BadConfiguration

# What no curve is drawn of: rates and shares have tables of their own.
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
    """A run as its files tell of it."""

    name: str
    facts: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]


def load(directory: Path) -> Loaded:
    """Reads a run_dir.

    Raises:
      BadConfiguration: it is none, or its files cannot be read.
    """
    try:
        facts = json.loads((directory / "run.json").read_text())
        lines = []
        path = directory / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # the last line of a killed process
    except FileNotFoundError:
        raise BadConfiguration(f"{directory} holds no run.json; name the --run_dir of a run") from None
    except (OSError, ValueError) as error:
        raise BadConfiguration(
            f"{directory / 'run.json'} cannot be read: {error}; name the --run_dir of a run"
        ) from None
    return Loaded(directory.name or str(directory), facts, lines)


def curves(runs: Sequence[Loaded]) -> str:
    """A chart of each metric over steps: training dashed, evaluation solid, one colour a run."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names: dict[str, None] = {}
    for run in runs:
        for line in run.lines:
            names |= dict.fromkeys(n for n in line if n not in _NO_CURVE and not n.startswith("share_"))
    charts = []
    for name in names:
        # Text stays text: the page can be searched.
        with rc_context({"svg.fonttype": "none"}):
            figure = Figure(figsize=(5.4, 3.2), layout="constrained")
            axes = figure.subplots()
            for i, run in enumerate(runs):
                for split, style in (("train", "--"), ("eval", "-o")):
                    points = [(one["step"], one[name]) for one in run.lines if one["split"] == split and name in one]
                    if points:
                        label = f"{run.name}, {split}"
                        axes.plot(*zip(*points, strict=True), style, color=f"C{i}", ms=3, lw=1.2, label=label)
            axes.set(title=name, xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
            held = io.StringIO()
            figure.savefig(held, format="svg")
        text = held.getvalue()
        charts.append(f"<figure>{text[text.index('<svg') :]}</figure>")
    return "\n".join(charts) or "<p>No metrics yet.</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; everything in it is escaped."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ["<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def results(runs: Sequence[Loaded]) -> str:
    """How each run ended, with its last metrics."""
    splits = ("train", "eval")
    finals = [{s: run.facts.get("final", {}).get(s, {}) or _last(run, s) for s in splits} for run in runs]
    names = dict.fromkeys(name for final in finals for name in final["eval"] if name not in ("step", "split"))
    head = ["run", "ended", "step", *(f"eval {name}" for name in names)]
    rows = []
    for run, final in zip(runs, finals, strict=True):
        ended = run.facts.get("exit_reason") or "it has not ended"
        step = max((line["step"] for line in run.lines), default=0)
        rows.append([run.name, ended, step, *(_number(final["eval"].get(name)) for name in names)])
    return table(head, rows)


def _last(run: Loaded, split: str) -> Mapping[str, Any]:
    return next((line for line in reversed(run.lines) if line["split"] == split), {})


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


def differences(runs: Sequence[Loaded]) -> str:
    """The flags in which runs differ."""
    flags = [run.facts.get("flags", {}) for run in runs]
    names = [n for n in dict.fromkeys(n for one in flags for n in one) if n not in NO_DIFFERENCE]
    rows = [[f"--{n}", *(one.get(n) for one in flags)] for n in names if len({str(one.get(n)) for one in flags}) > 1]
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
    parts = [("Results", results(runs)), ("Curves", curves(runs)), ("Where the time went", breakdown(runs))]
    if len(runs) > 1:
        parts.append(("Differences of flags", differences(runs)))
    parts.append(("Run cards", "".join(card(run) for run in runs)))
    body = "\n".join(f"<h2>{name}</h2>\n{text}" for name, text in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and writes the file. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="+", type=Path, help="runs to show, side by side")
    parser.add_argument("--out", type=Path, help="the file (default: report.html in the first run_dir)")
    options = parser.parse_args(arguments)
    out = options.out or options.run_dir[0] / "report.html"
    try:
        text = page([load(directory) for directory in options.run_dir])
        try:
            write_atomically(out, text)
        except OSError as error:
            raise BadConfiguration(f"--out {out} cannot be written: {error.strerror}; name another") from None
    except BadConfiguration as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    print(out)
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
