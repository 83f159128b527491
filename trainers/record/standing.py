"""How a run stands, from its files alone: `python trainers/record/standing.py RUN_DIR…`. Free of TensorFlow.

`launch/status.py` is the same for people; `launch/k8s.py status` starts this in a pod, whose image holds no more.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie two above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time

import argparse
import collections
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.record import fleet, goodput, reading
from trainers.settings import paths
from trainers.settings.exit_codes import OK, BadConfiguration
from trainers.world import process

# Of an attempt, what an update costs in the long run.
_LOOP = ("updates", "input", "evaluation", "saving", "peers", "other")
_SECONDS, _LISTEN_SECONDS = 2.0, 0.2
_CLEAR = "\x1b[H\x1b[2J"


def facts_of(run_dir: Path, ear: fleet.Ear | None = None) -> dict[str, Any]:
    """What is told of a run. What is not known is None. `ear`: of who looks more than once; else nobody is silent.

    `state` (words), `ended` (whether the last attempt has), `final` (with a code after which nobody starts it again),
    `step`, `steps` (in all), `seconds_left`, `goodput` (as `goodput.facts_of`), `evaluation` (the last line),
    `restarts` (why each attempt but the last has ended), `last_end` (what the last of them has said), `slowest`
    (words), `hang` (words).

    Raises:
      BadConfiguration: it holds no run, or its run.json cannot be read.
    """
    run = reading.read_run(run_dir)
    if not run:
        raise BadConfiguration(f"{run_dir} holds no run.json; name the --run_dir of a run")
    told = fleet.told_by_all(run_dir, ear or fleet.Ear())
    chief = next((one for one in told if one["worker"] == 0), {})
    told = [one for one in told if one["worker"] < chief.get("workers", 1)]
    hang = reading.read_hang(run_dir)
    attempts = goodput.attempts_of(run, chief, hang)
    line = reading.last_line(run_dir, "train")
    now = attempts[-1] if attempts else {"step": line.get("step", 0), "began": 0.0}
    ended = run.get("ended") is not None
    return {
        "state": _ended_state(run) if ended else _state(chief),
        "ended": ended,
        "final": _is_final(run),
        "step": now["step"] if not ended else max(now["step"], run.get("step", 0)),
        "steps": run.get("flags", {}).get("train_steps"),
        "seconds_left": None if ended else seconds_left(now, run.get("flags", {}).get("train_steps")),
        "goodput": goodput.facts_of(attempts) if attempts else None,
        "evaluation": reading.last_line(run_dir, "eval") or None,
        "restarts": [_why(entry) for entry in attempts[:-1] for _ in range(entry.get("merged", 1))],
        "last_end": attempts[-2]["reason"] if len(attempts) > 1 else None,
        "slowest": None if ended else _slowest(told),
        "hang": hang.get("line") if goodput.is_of_attempt(hang, run.get("attempts"), now["began"]) else None,
    }


def _ended_state(run: Mapping[str, Any]) -> str:
    """Why an attempt has ended, in words; with its code where the run may be started again."""
    reason = str(run.get("exit_reason"))
    return reason if _is_final(run) else f"{reason} (code {run['exit_code']}: it may be started again)"


def _is_final(run: Mapping[str, Any]) -> bool:
    """Whether nobody starts a run again. Where no code was told, nothing says that somebody does."""
    return run.get("ended") is not None and ("exit_code" not in run or reading.has_ended(run))


def _state(chief: Mapping[str, Any]) -> str:
    """What a run that has not ended does, in words."""
    if not chief:
        return "it has not begun to tell"
    # When a run stopped to tell before anybody looked, only clocks know.
    state, ago = fleet.state_of(chief), max(time.time() - chief["time"], chief[fleet.UNHEARD])
    if not state:
        return f"{fleet.place(chief)}, {chief['workers']} workers" if chief["workers"] > 1 else fleet.place(chief)
    words = {"gone": "killed", "stopped": "stopped (SIGSTOP)", "silent": "not heard of"}
    return f"{words[state]}: last heard of {goodput.span(ago)} ago in: {fleet.place(chief)}"


def seconds_left(entry: Mapping[str, Any], steps: int | None) -> float | None:
    """At the pace of this attempt, with its evaluations and savings; not known before it has done a call."""
    seconds = sum(entry.get("seconds", {}).get(part, 0.0) for part in _LOOP)
    done = entry["step"] - entry.get("first", 0)
    return (steps - entry["step"]) * seconds / done if steps and done > 0 and seconds > 0 else None


def _why(entry: Mapping[str, Any]) -> str:
    """Why an attempt has ended."""
    if entry["code"] is None:
        return "killed"
    return f"code {entry['code']} ({(entry['reason'] or '').partition(':')[0]})"


def _slowest(told: Sequence[Mapping[str, Any]]) -> str | None:
    found = fleet.slowest(told)
    if found is None:
        return None
    worst, ratio = found
    pace = worst["pace"]
    return (
        f"worker {worst['worker']} ({worst['host']}): {1e3 * pace['compute']:.3g} ms of compute and "
        f"{1e3 * pace['input']:.3g} ms of input a step, {ratio - 1:+.0%} to the median of the others"
    )


def lines(run_dir: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    """A block of lines for people."""
    yield str(run_dir)
    yield f"  state     {facts['state']}"
    left = facts["seconds_left"]
    yield f"  step      {facts['step']}/{facts['steps']}" + (f", {goodput.span(left)} left" if left is not None else "")
    if facts["goodput"]:
        yield f"  {goodput.line(facts['goodput']).replace('goodput ', 'goodput   ', 1)}"
    if facts["evaluation"]:
        values = {name: value for name, value in facts["evaluation"].items() if name not in ("step", "split")}
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        yield f"  eval      step {facts['evaluation']['step']}: {words}"
    if facts["restarts"]:
        counts = collections.Counter(facts["restarts"])
        words = ", ".join(f"{n} × {why}" for why, n in counts.items())
        told = f"; the last: {facts['last_end']}" if facts["last_end"] else ""
        yield f"  restarts  {len(facts['restarts'])}: {words}{told}"
    for name in ("slowest", "hang"):
        if facts[name]:
            yield f"  {name:<8}  {facts[name]}"


def settings_from(argv: Sequence[str]) -> argparse.Namespace:
    """The command line: `run_dir`, a list of paths, and `watch`.

    Raises:
      BadConfiguration: a path is an address, or its home directory is not known.
      SystemExit: `--help` was given, or a flag is malformed.
    """
    parser = argparse.ArgumentParser(description="How runs stand, from their files alone.", allow_abbrev=False)
    parser.add_argument("run_dir", nargs="+", help="runs, of any machine that writes where this one can read")
    parser.add_argument(
        "--watch", action="store_true", help="draw it again every two seconds, until all have ended for good"
    )
    options = parser.parse_args(argv[1:])
    options.run_dir = [paths.local("run_dir", text) for text in options.run_dir]
    return options


def _listen(run_dirs: Sequence[Path], ear: fleet.Ear) -> None:
    """Returns when each run was heard of again, or is silent. Of those of this machine the kernel tells."""

    def is_unknown(run_dir: Path) -> bool:
        chief = next((one for one in fleet.told_by_all(run_dir, ear) if one["worker"] == 0), None)
        if chief is None or fleet.is_of_here(chief) or ear.has_news(run_dir, 0) or fleet.state_of(chief):
            return False
        return reading.read_run(run_dir).get("ended") is None

    while any([is_unknown(run_dir) for run_dir in run_dirs]):
        time.sleep(_LISTEN_SECONDS)


def main(options: argparse.Namespace) -> int:
    """Prints how the runs stand.

    Raises:
      BadConfiguration: one of them holds no run.
    """
    ear = fleet.Ear()
    known = {run_dir: facts_of(run_dir, ear) for run_dir in options.run_dir}
    if not options.watch:
        _listen(options.run_dir, ear)
    while True:
        known = {run_dir: facts_of(run_dir, ear) for run_dir in options.run_dir}
        text = "\n\n".join("\n".join(lines(run_dir, facts)) for run_dir, facts in known.items())
        clear = _CLEAR if options.watch and os.isatty(sys.stdout.fileno()) else ""
        print(clear + text, flush=True)
        if not options.watch or all(facts["final"] for facts in known.values()):
            return OK
        time.sleep(_SECONDS)


if __name__ == "__main__":
    process.main(settings_from, main)
