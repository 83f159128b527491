"""The rows of the table: what the runs of a prover say about each."""

import math
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from launch.proof import differences
from launch.proof.differences import METRICS, REORDERED
from launch.proof.prover import Ended, Prover, Run, digests, error_of, untimed_lines, updates_of
from trainers.record import reading
from trainers.settings.config import Config
from trainers.settings.exit_codes import OK, UnsavedVariable

NOT_SAVED = "a variable is missing from the checkpoint"
NOT_ENDED = "the run itself does not end well"
NOT_RESTORED = "no checkpoint is restored"
OTHER_INPUT = "the order of the data depends on the number of replicas or workers"
NOT_SERVED = "the export does not compute what evaluation does"
INEXACT = "inexact by --batch_norm=per_replica"
# What a line of metrics holds beside metrics of the global batch.
NO_METRICS = ("step", "split", "learning_rate")
# How often a run is made longer that was done before it could be killed.
RESUME_ATTEMPTS = 4


class Verdict(NamedTuple):
    """A row of the table. `holds` is None where a flag of the user's makes the row inexact, or it cannot be judged.

    `text`: what was measured. `steps`: for a row that compares whole runs of the script, their number of updates.
    """

    row: str
    holds: bool | None
    text: str
    cause: str = ""
    steps: int = 0

    def facts(self) -> dict[str, Any]:
        """The verdict as the file of `--json` has it."""
        return {"row": self.row, "holds": self.holds, "found": self.text, "cause": self.cause}


class Failure(NamedTuple):
    """A run that did not end well: what it ended with, and the cause that its error names."""

    text: str
    cause: str


def cause_of(error: str) -> str:
    """The cause that the name of an exception's class gives."""
    return NOT_SAVED if error == UnsavedVariable.__name__ else NOT_ENDED


def failure(runs: Iterable[tuple[str, Run]]) -> Failure | None:
    """The first of these runs, `(name, run)`, that did not end well."""
    for name, run in runs:
        facts = run.facts
        if facts["exit_code"] != OK:
            text = f"{name} ended with code {facts['exit_code']}: {facts['message']}"
            return Failure(text, cause_of(facts.get("error", "")))
    return None


def has_statistics(run: Run) -> bool:
    """Whether the model has batch statistics."""
    return any("moving_mean" in name for name in run.saved)


def is_inexact(config: Config, run: Run) -> bool:
    """Whether a flag makes the sizes differ."""
    return config.batch_norm == "per_replica" and has_statistics(run)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes against each other.


def compare_sizes(prover: Prover, row: str, sizes: Sequence[str], config: Config) -> list[Verdict]:
    """Verdicts on runs of several sizes against that of 1 replica, under SGD and under the chosen optimizer."""
    return [_compare_sizes(prover, f"{row}, {update}", update, sizes, config) for update in updates_of(config)]


def _compare_sizes(prover: Prover, title: str, update: str, sizes: Sequence[str], config: Config) -> Verdict:
    names = [f"{update}, {size}" for size in ("1 replica", "last bits changed", *sizes)]
    if failed := failure((name, prover.runs[name]) for name in names):
        return Verdict(title, False, *failed)
    base, perturbed, *others = (prover.runs[name] for name in names)
    adaptive, parts, holds = update != "SGD", [], True
    for size, other in zip(sizes, others, strict=True):
        each = differences.difference_by_variable(base.saved, other.saved)
        worst, variable = max(((value, name) for name, value in each.items()), default=(0.0, ""))
        whole = differences.difference(base.saved, other.saved)
        parts.append(f"{size} {whole:.0e} (worst {worst:.0e}, {variable.split('/', 2)[-1]})")
        holds &= differences.agree(base.saved, other.saved, base.saved, perturbed.saved, adaptive)
    bound = differences.allowed(base.saved, perturbed.saved, adaptive)
    text = f"{'; '.join(parts)}; allowed {bound:.0e}"
    if not holds and is_inexact(config, base):
        return Verdict(title, None, text, INEXACT)
    return Verdict(title, holds, text)


def compare_metrics(prover: Prover, sizes: Sequence[str]) -> Verdict:
    """Loss and metrics of the sizes, step by step."""
    base, others, failed = _under_sgd(prover, sizes)
    if failed:
        return Verdict("metrics", False, *failed)
    worst = 0.0, ""
    for size, other in others.items():
        if base.lines.keys() != other.lines.keys():
            return Verdict("metrics", False, f"{size} has lines for other steps than 1 replica")
        for (split, step), line in base.lines.items():
            for metric, value in line.items():
                if metric in (*NO_METRICS, "gradient_norm") or reading.is_timing(metric):
                    continue
                apart = differences.metric_difference(value, other.lines[split, step][metric])
                worst = max(worst, (apart, f"{split} {metric} at step {step}, {size}"))
    return Verdict("metrics", worst[0] <= METRICS, f"largest relative difference {worst[0]:.1e} ({worst[1]})")


def compare_inputs(prover: Prover, sizes: Sequence[str]) -> Verdict:
    """Which examples formed each step's global batch, in which order."""
    base, others, failed = _under_sgd(prover, sizes)
    if failed:
        return Verdict("input", False, *failed)
    parts, steps = [], 0
    for size, other in others.items():
        for step, examples in sorted(base.facts["examples"].items(), key=lambda item: int(item[0])):
            expected, actual = in_order(examples), in_order(other.facts["examples"].get(step, {}))
            steps = max(steps, int(step) + 1)
            if expected != actual:
                how = "in another order" if sorted(expected) == sorted(actual) else "other examples"
                parts.append(f"step {step} of {size}: {how}")
                break
    text = "; ".join(parts) or f"the same examples in {steps} steps at every size"
    return Verdict("input", not parts, text, OTHER_INPUT if parts else "")


def _under_sgd(prover: Prover, sizes: Sequence[str]) -> tuple[Run, dict[str, Run], Failure | None]:
    """The run of 1 replica, those of the sizes, and the first of them that failed."""
    base, others = prover.runs["SGD, 1 replica"], {size: prover.runs[f"SGD, {size}"] for size in sizes}
    return base, others, failure([("1 replica", base), *others.items()])


def in_order(parts: Mapping[str, list[str]]) -> list[str]:
    """The global batch, put together from its parts by the place of their first example."""
    return [name for _, names in sorted(parts.items(), key=lambda item: int(item[0])) for name in names]


def compare_resized(prover: Prover, config: Config, sizes: Sequence[int]) -> Verdict:
    """Half of the run on the most replicas, half on two, against 1 replica."""
    base, other = prover.runs["SGD, 1 replica"], prover.runs["resized, second half"]
    runs = [("1 replica", base), ("first half", prover.runs["resized, first half"]), ("second half", other)]
    if failed := failure(runs):
        return Verdict("resize", False, *failed)
    half = prover.steps // 2
    if other.facts["resumed_from"] != half:
        text = f"the second half began at step {other.facts['resumed_from'] or 0}, not {half}"
        return Verdict("resize", False, text, NOT_RESTORED)
    apart = differences.difference(base.saved, other.saved)
    bound = differences.allowed(base.saved, prover.runs["SGD, last bits changed"].saved)
    text = f"{sizes[-1]}, then {sizes[0]} replicas: {apart:.1e}; allowed {bound:.0e}"
    if apart > bound and is_inexact(config, base):
        return Verdict("resize", None, text, INEXACT)
    return Verdict("resize", apart <= bound, text)


# ----------------------------------------------------------------------------------------------------------------------
# A single size.


def compare_traces(prover: Prover) -> Verdict:
    """How often the train step was traced."""
    if failed := failure(prover.runs.items()):
        return Verdict("retrace", False, *failed)
    traces = {name: run.facts["traces"] for name, run in prover.runs.items() if run.facts.get("traces")}
    again = next((name for name, count in traces.items() if count != 1), None)
    if again is None:
        return Verdict("retrace", True, f"once in each of {len(traces)} runs")
    return Verdict("retrace", False, f"traced {traces[again]} times in {again}", "an argument of the step changes")


def compare_graphs(prover: Prover) -> Verdict:
    """Gradients computed eagerly, in a graph, and under XLA.

    At a kink of a ReLU rounding alone makes a gradient jump. What is another computation differs nearby too.
    """
    run = prover.runs["SGD, 1 replica"]
    if failed := failure([("1 replica", run)]):
        return Verdict("graph", False, *failed)
    if "gradients" not in run.facts:
        return Verdict("graph", None, "not judged: the loop has no gradients_of")
    parts, holds = [], True
    for name, values in run.facts["gradients"].items():
        if isinstance(values, str):
            parts.append(f"{name} cannot: {values}")
            continue
        values = [math.inf if value is None else value for value in values]
        least = min(values)
        jump = f" ({values[0]:.1e} where the gradient jumps)" if least <= REORDERED < values[0] else ""
        parts.append(f"{name} {least:.1e} from eager{jump}")
        holds &= least <= REORDERED
    cause = "" if holds else "the step does not compute the same in a graph: it draws, counts or reads in Python"
    return Verdict("graph", holds, f"gradients: {'; '.join(parts)}; allowed {REORDERED:.0e}", cause)


def compare_export(prover: Prover, config: Config) -> Verdict:
    """What the export answers, in a process without the project, against what evaluation computes."""
    name = "SGD, 1 replica"
    run = prover.runs[name]
    if failed := failure([("1 replica", run)]):
        return Verdict("export", False, *failed)
    if not run.facts.get("export"):
        return Verdict("export", None, "not judged: only the loop's author knows what it exports")
    found = prover.served(name)
    if not found:
        return Verdict("export", False, "it could not be loaded without the project", NOT_SERVED)
    allowed = differences.of_outputs(getattr(config, "precision", "float32"))
    signatures = {name: found[name] for name in ("serve", "serve_prepared") if found[name]}
    parts = [f"{name} {max(each.values()):.0e}" for name, each in signatures.items()]
    worst = max(value for each in signatures.values() for value in each.values())
    holds = worst <= allowed and not any(found[name] for name in ("misnamed", "refused", "project"))
    wrong = f"; {found['misnamed']} classes misnamed" if found["misnamed"] else ""
    wrong += f"; {found['refused']} rows refused, the first: {found['reason']}" if found["refused"] else ""
    text = f"{', '.join(parts)} from the evaluation, at batch {' and '.join(found['serve_prepared'])}{wrong}"
    return Verdict("export", holds, f"{text}; allowed {allowed:.0e}", "" if holds else NOT_SERVED)


def compare_resumed(prover: Prover, steps: int, chance: random.Random) -> Verdict:
    """A run killed at a random step and started again, against one left alone: the same bits."""
    for _ in range(RESUME_ATTEMPTS):
        target = max(steps // 10, 1) * chance.randint(1, 6)
        whole, killed, again = _whole_and_killed(prover, steps, target)
        for name, ended in (("whole", whole), ("killed", again)):
            if ended.code != OK:
                text = f"a run ended with code {ended.code}: {ended.last_line}"
                return Verdict("resume", False, text, cause_of(error_of(prover.folder / name)))
        resumed = reading.read_run(prover.folder / "killed").get("resumed_from")
        if killed.code != OK and resumed != steps:
            return _judge_resumed(prover, f"killed after step {target} of {steps}", bool(resumed), steps)
        # It was done before it could be killed: a longer one.
        steps *= 4
        for name in ("whole", "killed"):
            shutil.rmtree(prover.folder / name)
    return Verdict("resume", None, "every run was done before it could be killed; pass more --steps")


def _whole_and_killed(prover: Prover, steps: int, target: int) -> tuple[Ended, Ended, Ended]:
    """A run left alone beside one that is killed at `target` and started again: how the three processes ended."""
    results: dict[str, Ended] = {}

    def leave_alone() -> None:
        results["whole"] = prover.script("whole", prover.resume_flags("whole", steps))

    def kill() -> None:
        flags = prover.resume_flags("killed", steps)
        results["killed"] = prover.script("killed", flags, target)
        results["again"] = prover.script("killed", flags)

    prover.in_parallel([kill, leave_alone])
    return results["whole"], results["killed"], results["again"]


def _judge_resumed(prover: Prover, how: str, was_restored: bool, steps: int) -> Verdict:
    if not was_restored:
        return Verdict("resume", False, f"{how}: it began again at step 0", NOT_RESTORED)
    whole, killed = prover.folder / "whole", prover.folder / "killed"
    if digests(whole) != digests(killed):
        return Verdict("resume", False, f"{how}: other bits", steps=steps)
    if untimed_lines(whole) != untimed_lines(killed):
        return Verdict("resume", False, f"{how}: other metrics", steps=steps)
    return Verdict("resume", True, f"{how}: the same bits and metrics", steps=steps)
