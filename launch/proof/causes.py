"""Why a row fails: each suspect is tried by a run without it."""

from collections.abc import Sequence

import numpy as np

from launch.proof import differences, inputs
from launch.proof.differences import is_ratio
from launch.proof.prover import LAST_BITS, SGD, Prover, Run, digests, untimed_lines
from launch.proof.verdicts import NO_METRICS, NOT_SAVED, OTHER_INPUT, Verdict, failure
from launch.workers import visible_gpus
from trainers.record import reading
from trainers.settings.config import Config

# Changes that the probe makes, and what is the cause if the sizes agree with one of them.
CHANGES = {
    "no noise": "the same noise on all replicas, or noise that depends on their number",
    "frozen statistics": "batch statistics per replica",
    "no penalties": "a penalty counted once per replica",
}
# What the probe calls the layers that a change is about.
SUSPECTS = {"no noise": "noise", "frozen statistics": "statistics"}
AS_IT_IS, UNCLIPPED, ALL_OFF = "as it is", "without clipping", "with all of it off"
PERTURBED = "SGD, last bits changed"
SHOWN_NAMES = 3


def explained(
    prover: Prover, config: Config, sizes: Sequence[int], verdicts: Sequence[Verdict], compared: Sequence[str]
) -> list[Verdict]:
    """The verdicts, with a cause for each that does not hold. A cause that explains several is looked for once.

    `sizes`: numbers of replicas. `compared`: the sizes, by name, whose metrics were compared.
    """
    with_causes, cause_of_sizes = [], ""
    other_input = any(v.row == "input" and v.holds is False for v in verdicts)
    sizes_differ = any(v.holds is False and v.row.startswith(("replicas", "workers", "resize")) for v in verdicts)
    for verdict in verdicts:
        if verdict.holds is not False or verdict.cause:
            with_causes.append(verdict)
            continue
        prover.say(f"{verdict.row} does not hold; looking for the cause")
        if verdict.row == "augment":
            cause = inputs.diagnose_augmentation(prover, config, sizes)
        elif verdict.row == "resume":
            cause = diagnose_resume(prover, verdict.steps)
        elif verdict.row == "metrics" and not sizes_differ:
            cause = diagnose_metrics(prover, compared)
        elif other_input:
            cause = OTHER_INPUT
        else:
            cause_of_sizes = cause = cause_of_sizes or diagnose_sizes(prover, config, sizes[0])
        with_causes.append(verdict._replace(cause=cause))
    return with_causes


# ----------------------------------------------------------------------------------------------------------------------
# Two sizes.


def diagnose_sizes(prover: Prover, config: Config, size: int) -> str:
    """Why two sizes end with other weights: run again without each suspect; if they then agree, it is the cause."""
    try:
        return _cause_of_sizes(Variants(prover, config, size), size)
    except _Failed as failed:
        return f"not found: {failed}"


def _cause_of_sizes(variants: "Variants", size: int) -> str:
    """The cause, from as few runs as show it: what no layer is suspected of is tried last, all of it together."""
    variants.make(AS_IT_IS)
    if variants.agree(AS_IT_IS):
        return f"not found: 1 and {size} replicas agree under SGD, so it needs what differs in this row"
    suspected = [change for change in CHANGES if variants.layers(change)]
    variants.make(UNCLIPPED, *(f"with {change}" for change in suspected))
    if variants.clipped and variants.agree(UNCLIPPED):
        return f"gradients are clipped before they are summed: without --clip_norm the sizes agree (1 and {size})"
    if cause := variants.wrong_scale(UNCLIPPED):
        return cause
    others = [change for change in CHANGES if change not in suspected]
    for changes, further in ((suspected, ()), (others, (ALL_OFF,))):
        variants.make(*(f"with {change}" for change in changes), *further)
        for change in changes:
            if variants.agree(f"with {change}"):
                cause = f"{CHANGES[change]}{variants.layers(change)}"
                return f"{cause}: with {change} the sizes agree (1 and {size})"
    if cause := variants.wrong_scale(ALL_OFF):
        return cause
    if variants.agree(ALL_OFF):
        causes = (f"{cause}{variants.layers(change)}" for change, cause in CHANGES.items())
        return f"more than one of: {', '.join(causes)}; or --weight_decay or --ema"
    if cause := variants.first_step(ALL_OFF):
        return cause
    found = [names for change in CHANGES if (names := variants.layers(change))]
    looked_at = f"; look at{','.join(found)}" if found else ""
    return f"not found: the sizes differ with {', '.join(CHANGES)} and without clipping too{looked_at}"


class _Failed(Exception):  # noqa: N818 - caught where it is raised for
    """A variant does not end well."""


class Variants:
    """Runs of 1 and of `size` replicas under SGD, with and without each suspect, each made when it is asked for."""

    # Name → flags, changes.
    NAMES = {
        UNCLIPPED: (("--clip_norm=0",), ()),
        **{f"with {change}": (("--clip_norm=0",), (change,)) for change in CHANGES},
        ALL_OFF: (("--clip_norm=0", "--weight_decay=0", "--ema=0"), tuple(CHANGES)),
    }

    def __init__(self, prover: Prover, config: Config, size: int):
        self.prover, self.size = prover, size
        self.clipped = bool(config.clip_norm)

    def make(self, *variants: str) -> None:
        """Makes the runs of these variants that are not there yet; those of the rows are.

        Raises:
          _Failed: one did not end well.
        """
        specs = {}
        for variant in variants:
            flags, changes = self.NAMES.get(variant, ((), ()))
            for count in (1, self.size):
                name = self._name(variant, count)
                specs[name] = self.prover.spec(name, *SGD, f"--replicas={count}", *flags, changes=changes)
        if AS_IT_IS in variants:
            specs[PERTURBED] = self.prover.spec(PERTURBED, *SGD, "--replicas=1", changes=[LAST_BITS])
        new = [spec for name, spec in specs.items() if name not in self.prover.runs]
        # GPUs reduce with collectives, of which one process has one kind. On CPU devices all runs share a process: its
        # start costs more than a run.
        for part in [[spec] for spec in new] if visible_gpus() else [new] * bool(new):
            self.prover.observe(part)
        if failed := failure((name, self.prover.runs[name]) for name in specs):
            raise _Failed(failed.text)

    def _name(self, variant: str, count: int) -> str:
        if variant == AS_IT_IS or (variant == UNCLIPPED and not self.clipped):
            return f"SGD, {count} replica{'s' * (count > 1)}"  # as the rows call them
        return f"{variant}, {count} of {self.size}"

    def pair(self, variant: str) -> tuple[Run, Run]:
        """The runs of 1 and of `size` replicas."""
        return tuple(self.prover.runs[self._name(variant, count)] for count in (1, self.size))

    def agree(self, variant: str) -> bool:
        """Whether both sizes end with the same weights."""
        single, several = self.pair(variant)
        base, perturbed = self.pair(AS_IT_IS)[0], self.prover.runs[PERTURBED]
        return differences.agree(single.saved, several.saved, base.saved, perturbed.saved)

    def layers(self, change: str) -> str:
        """The layers that the probe suspects of what the change takes away, in brackets; empty if there are none."""
        paths = self.pair(AS_IT_IS)[0].facts.get("suspects", {}).get(SUSPECTS.get(change, ""), [])
        more = f" and {len(paths) - SHOWN_NAMES} more" if len(paths) > SHOWN_NAMES else ""
        return f" (layer {', '.join(paths[:SHOWN_NAMES])}{more})" if paths else ""

    def wrong_scale(self, variant: str) -> str:
        """The cause that the ratio of the first gradients shows, or nothing."""
        single, several = (run.lines["train", 1].get("gradient_norm", 0.0) for run in self.pair(variant))
        if not single:  # a loop with several gradients
            return ""
        ratio, size = several / max(single, 1e-30), self.size
        text = f"the first gradient of {size} replicas is {ratio:.2f} times that of 1"
        if is_ratio(ratio, size):
            return f"the loss is divided by the local batch: {text}"
        if is_ratio(ratio, 1 / size):
            return f"gradients are averaged over replicas, not summed: {text}"
        return ""

    def first_step(self, variant: str) -> str:
        """What the first step shows, which both sizes take from the same weights with the same examples, or nothing.

        The loss is computed before the gradient, and a gradient that is wrong by no simple factor has a reason of its
        own.
        """
        single, several = (run.lines["train", 1] for run in self.pair(variant))
        shown = [name for name in single if name not in NO_METRICS and not reading.is_timing(name)]
        apart = {name: differences.metric_difference(single[name], several[name]) for name in shown}
        size, text = self.size, f"at step 1, from the same weights, 1 and {self.size} replicas have"
        if apart["loss"] > differences.METRICS:
            return (
                f"an example's loss depends on the others of its replica, not of the global batch: {text} a loss of "
                f"{single['loss']:.6g} and {several['loss']:.6g}"
            )
        norms = [name for name in apart if name.endswith("gradient_norm") and apart[name] > differences.METRICS]
        if norms:
            ratio = several[norms[0]] / max(single[norms[0]], 1e-30)
            return (
                "what replicas give each other has a wrong gradient (of a gather or a sum within the forward pass): "
                f"{text} the same loss, and with {size} a {norms[0].replace('_', ' ')} {ratio:.2f} times as large"
            )
        return ""


def diagnose_metrics(prover: Prover, sizes: Sequence[str]) -> str:
    """Why metrics differ where weights agree: by their ratio."""
    base = prover.runs["SGD, 1 replica"]
    for size in sizes:
        other = prover.runs[f"SGD, {size}"]
        replicas = other.facts.get("replicas", 0)
        for (split, step), line in base.lines.items():
            for metric, value in line.items():
                if reading.is_timing(metric) or metric in NO_METRICS or not value or not replicas:
                    continue
                ratio = other.lines.get((split, step), {}).get(metric, value) / value
                if is_ratio(ratio, 1 / replicas):
                    text = f"a metric is averaged over replicas instead of summed: {split} {metric}"
                    return f"{text} of {size} is 1/{replicas} of that of 1"
                if is_ratio(ratio, replicas):
                    return f"a mean is summed over replicas: {split} {metric} of {size} is {replicas} times that of 1"
    return "not found: the metrics' ratio is neither the number of replicas nor its inverse"


# ----------------------------------------------------------------------------------------------------------------------
# A restart.


def diagnose_resume(prover: Prover, steps: int) -> str:
    """Why a resumed run ends with other bits: a second whole run, then every variable before and after a restart."""
    prover.script("again", prover.resume_flags("again", steps))
    whole, again = prover.folder / "whole", prover.folder / "again"
    if digests(whole) != digests(again) or untimed_lines(whole) != untimed_lines(again):
        return "a non-deterministic operation: two whole runs with the same flags and --deterministic differ"
    half, flags = max(prover.steps // 2, 1), ("--deterministic", "--replicas=1", f"--run_dir={prover.folder / 'state'}")
    first = prover.experiment("state, before", *flags, f"--train_steps={half}", look=["state"])
    second = prover.experiment("state, after", *flags, f"--train_steps={half + 1}", look=["state"])
    if failed := failure([("the run before", first), ("the run after", second)]):
        return failed.text
    before, after = first.part("end"), second.part("start")
    lost = [name for name in before if name in after and not np.array_equal(before[name], after[name])]
    if lost:
        more = f" and {len(lost) - SHOWN_NAMES} more" if len(lost) > SHOWN_NAMES else ""
        return f"{NOT_SAVED}: {', '.join(lost[:SHOWN_NAMES])}{more} differ before and after a restart"
    return "not found: every variable comes back, so the state lies in Python, or in the position of the input"
