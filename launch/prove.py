"""Is the mathematics the same at every size, and if not, why not? On this machine, for a model, its data and its flags.

    python launch/prove.py --model=resnet
    python launch/prove.py --model=mine --dataset=csv:rows.csv --label=price --optimizer=momentum
    python launch/prove.py --rows=replicas,resume --model=mlp

Run it after a change of the model, the loss or the loop, before the machines are paid for. It trains a few steps on
virtual devices (or the GPUs that are here) and with real processes for workers, compares, and where a row fails it runs
variants that isolate the cause, and names it. Exit code 0: every row holds; 1: one does not; 2: a flag is wrong.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from launch.workers import environments, free_ports, visible_gpus
from trainers.record.run_record import write_atomically
from trainers.settings.config import Config
from trainers.settings.exit_codes import BAD_CONFIGURATION, OK, PREEMPTED, BadConfiguration
from trainers.settings.flags import config_from
from trainers.show.tables import table

FAILED = 1
# ‖a - b‖ / ‖a‖ of all weights that rounding alone explains; see `allowed`.
ROUNDING = 1e-5
ADAPTIVE = 1e-4
# The largest |a - b| of one variable, over its largest |a| or over SMALL: an offset that has just left zero shows each
# ReLU that rounding flips. Beyond it, the same change of the last bits says what is allowed.
SMALL = 0.01
VARIABLE = 1e-3
# Eager, graph and XLA order sums differently.
REORDERED = 1e-4
METRICS = 1e-3
SGD = ("--optimizer=sgd", "--schedule=constant", "--learning_rate=0.003", "--warmup_steps=0")
ROWS = ("replicas", "workers", "metrics", "resume", "resize", "graph", "input", "retrace")
SHOWN_NAMES = 3


class Stopped(Exception):  # noqa: N818 - the user's wish is no error
    """A signal has come."""


class Verdict(NamedTuple):
    """One row of the table. `holds` is None where a flag of the user's makes the row inexact, or it cannot be run."""

    row: str
    holds: bool | None
    found: str
    cause: str = ""


class Run(NamedTuple):
    """What a probe found: facts, the weights it ended with, and its lines of metrics by (split, step)."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    lines: Mapping[tuple[str, int], Mapping[str, float]]

    @property
    def saved(self) -> dict[str, np.ndarray]:
        """The variables of a checkpoint at the end."""
        return {name[6:]: value for name, value in self.arrays.items() if name.startswith("saved/")}


def is_weight(name: str, value: np.ndarray) -> bool:
    """Whether a variable is one of the model's, of real numbers: a generator's state has a size and no scale."""
    return name.startswith("model/") and value.size > 0 and np.issubdtype(value.dtype, np.floating)


def vector(state: Mapping[str, np.ndarray]) -> np.ndarray:
    """All weights of the model, end to end, in float64."""
    return np.concatenate([v.astype(np.float64).ravel() for name, v in sorted(state.items()) if is_weight(name, v)])


def difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """‖a - b‖ / ‖a‖ over all weights of the model; infinite where one is not a number."""
    a, b = vector(one), vector(other)
    found = float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30))
    return found if np.isfinite(found) else float("inf")


def apart_by_variable(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The largest |a - b| of each weight over its largest |a| (at least `SMALL`); infinite where one is no number."""
    found = {}
    for name, a in one.items():
        if is_weight(name, a):
            scale = max(float(np.abs(a).max()), SMALL)
            value = float(np.abs(a.astype(np.float64) - other[name]).max()) / scale
            found[name] = value if np.isfinite(value) else float("inf")
    return found


def agree(one: Run, twin: Run, other: Run, first: Run | None = None, adaptive: bool = False) -> bool:
    """Whether two runs end with the same weights to rounding: as one vector, and each as far as its own twin shows.

    `twin` is that of `one`, or of `first` where that is another run. `adaptive`: see `allowed`; each weight may then
    differ as far as the one that the twin moved most.
    """
    noise = apart_by_variable((first or one).saved, twin.saved)
    each = apart_by_variable(one.saved, other.saved)
    most = max(noise.values(), default=0.0) if adaptive else 0.0
    within = all(value <= max(VARIABLE, 10 * max(noise[name], most)) for name, value in each.items())
    return within and difference(one.saved, other.saved) <= allowed(first or one, twin, adaptive)


def allowed(one: Run, twin: Run | None, adaptive: bool = False) -> float:
    """What rounding may do: `ROUNDING`, or ten times what a change of the last bits of the first weights has done.

    `adaptive`: an optimizer that divides by what may be nearly 0 makes a whole learning rate of a gradient that is
    rounding and nothing else, now for this weight and now for that. Wrong scales show under SGD.
    """
    least = ADAPTIVE if adaptive else ROUNDING
    return max(least, 10 * difference(one.saved, twin.saved)) if twin else least


class Prover:
    """Starts probes, two at a time, and keeps what they found."""

    def __init__(self, flags: Sequence[str], steps: int, say: Callable[[str], None]):
        self.flags, self.steps, self.say = list(flags), steps, say
        self.folder = Path(tempfile.mkdtemp(prefix="prove-"))
        self.runs: dict[str, Run] = {}
        self.began = time.monotonic()
        self.children: list[subprocess.Popen] = []
        self.stopped = False
        self._guard = threading.Lock()
        self._turns = threading.BoundedSemaphore(max(min(os.cpu_count() or 1, 4), 2))
        self._threads: list[threading.Thread] = []

    def stop(self) -> None:
        """Ends what still runs; nothing more begins, and nobody writes to the folder any more."""
        with self._guard:
            self.stopped = True
            for child in self.children:
                if child.poll() is None:
                    child.kill()
        for child in self.children:
            child.wait()
        for thread in self._threads:
            thread.join()

    def in_parallel(self, groups: Sequence[Callable[[], Any]]) -> None:
        """Does all of it at once. Raises what one of them has raised."""
        raised: list[BaseException] = []

        def one(group: Callable[[], Any]) -> None:
            try:
                group()
            except BaseException as error:
                raised.append(error)

        threads = []
        for group in groups:
            # Daemons, so that a signal need not wait for them; `stop` ends what they wait for.
            threads.append(threading.Thread(target=one, args=(group,), daemon=True))
            threads[-1].start()
            self._threads.append(threads[-1])
        for thread in threads:
            thread.join()
        if raised:
            raise raised[0]

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Starts a process that `stop` ends."""
        with self._guard:
            if self.stopped:
                raise Stopped
            with open(log, "w") as file:
                added = os.environ | dict(env or {})
                child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=added)
            self.children.append(child)
        return child

    def base(self, name: str) -> list[str]:
        """The user's flags, and those of a short run in a folder of its own."""
        short = [f"--train_steps={self.steps}", "--eval_every=0", "--checkpoint_every=0", "--log_every=1"]
        return [*self.flags, "--warmup_steps=0", *short, f"--run_dir={self.folder / name}", "--step_timeout=300"]

    def spec(self, name: str, *flags: str, changes: Sequence[str] = (), look: Sequence[str] = ()) -> dict[str, Any]:
        """One run for the probe."""
        return {"name": name, "flags": [*self.base(name), *flags], "changes": list(changes), "look": list(look)}

    def _probe(self, specs: list[dict[str, Any]], out: Path, env: Mapping[str, str], log: Path) -> subprocess.Popen:
        out.mkdir(parents=True, exist_ok=True)
        specification = out / f"specification-{specs[0]['name']}.json"
        # Virtual devices are made once in a process: as many as its largest run needs. Workers make their own.
        devices = 0 if "TF_CONFIG" in env else max(replicas_of(spec["flags"]) for spec in specs)
        specification.write_text(json.dumps({"out": str(out), "devices": devices, "runs": specs}))
        return self.start([sys.executable, str(ROOT / "launch/proof/probe.py"), str(specification)], log, env)

    def _read(self, name: str, out: Path, log: Path) -> Run:
        try:
            facts = json.loads((out / f"{name}.json").read_text())
        except FileNotFoundError:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            return Run({"exit_code": FAILED, "message": f"the probe died: {''.join(tail)}", "examples": {}}, {}, {})
        with np.load(out / f"{name}.npz", allow_pickle=False) as archive:
            arrays = dict(archive)
        lines = {}
        path = self.folder / name / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            values = json.loads(line)
            lines[values["split"], values["step"]] = values
        return Run(facts, arrays, lines)

    def observe(self, specs: list[dict[str, Any]], workers: int = 1) -> None:
        """Runs specifications one after another in one process (or in one of each worker), and reads the results."""
        with self._turns:
            out, ports = self.folder / "out", free_ports(workers)
            added = environments(workers, ports) if workers > 1 else [{}]
            places = [out / str(i) if workers > 1 else out for i in range(workers)]
            logs = [self.folder / f"{specs[0]['name']}.{i}.log" for i in range(workers)]
            members = [self._probe(specs, *rest) for rest in zip(places, added, logs, strict=True)]
            told = 0
            while any(member.poll() is None for member in members):
                time.sleep(0.1)
                done = logs[0].read_text(errors="replace").count("done: ")
                for spec in specs[told:done]:
                    self.say(f"[{time.monotonic() - self.began:3.0f} s] {spec['name']}")
                told = done
        for spec in specs:
            found = [self._read(spec["name"], place, log) for place, log in zip(places, logs, strict=True)]
            examples: dict[str, dict[str, list[str]]] = {}
            for one in found:
                for step, parts in one.facts.get("examples", {}).items():
                    examples.setdefault(step, {}).update(parts)
            self.runs[spec["name"]] = found[0]._replace(facts={**found[0].facts, "examples": examples})

    def experiment(self, name: str, *flags: str, changes: Sequence[str] = (), look: Sequence[str] = ()) -> Run:
        """One more run, made now unless it has been made."""
        if name not in self.runs:
            self.observe([self.spec(name, *flags, changes=changes, look=look)])
        return self.runs[name]

    # -- the real script, killed and started again -------------------------------------------------------------------

    def resume_flags(self, name: str, steps: int) -> list[str]:
        """A run long enough to be killed in, with checkpoints all along."""
        every = max(steps // 10, 1)
        flags = [f"--train_steps={steps}", f"--checkpoint_every={every}", "--eval_every=0", f"--log_every={every}"]
        return [*self.flags, "--warmup_steps=0", *flags, "--deterministic", f"--run_dir={self.folder / name}"]

    def script(self, name: str, flags: Sequence[str], until: int = 0) -> tuple[int, str]:
        """Runs trainers/custom_loop.py; with `until`, kills it once a checkpoint of that step is there."""
        command = [sys.executable, str(ROOT / "trainers/custom_loop.py"), *flags]
        log = self.folder / f"{name}.script.log"
        with self._turns:
            process = self.start(command, log)
            while process.poll() is None:
                if until and newest_step(self.folder / name) >= until:
                    process.kill()
                time.sleep(0.002 if until else 0.1)
        self.say(f"[{time.monotonic() - self.began:3.0f} s] {name}: ended with {process.returncode}")
        return process.returncode, log.read_text(errors="replace")


def replicas_of(flags: Sequence[str]) -> int:
    """The last `--replicas` of a command line."""
    return next(int(flag.split("=")[1]) for flag in reversed(flags) if flag.startswith("--replicas="))


def newest_step(run_dir: Path) -> int:
    """The newest checkpoint's step, or 0."""
    folder = run_dir / "checkpoints"
    steps = [int(path.name[5:]) for path in folder.glob("step-*") if path.suffix == ""] if folder.exists() else []
    return max(steps, default=0)


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the files of the newest checkpoint: the same bits have the same."""
    manifest = run_dir / "checkpoints" / f"step-{newest_step(run_dir):010d}" / "manifest.json"
    return json.loads(manifest.read_text())["files"]


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in one.items() if not timed(name)} for one in lines]


# ----------------------------------------------------------------------------------------------------------------------
# The rows.


def failure(runs: Iterable[tuple[str, Run]]) -> str:
    """What the first of these runs that did not end well has said, or nothing."""
    for name, run in runs:
        if run.facts["exit_code"] != OK:
            return f"{name} ended with code {run.facts['exit_code']}: {run.facts['message']}"
    return ""


def compare_sizes(prover: Prover, row: str, names: Sequence[str], config: Config) -> list[Verdict]:
    """Verdicts on runs of several sizes against that of one replica, under SGD and under the chosen optimizer."""
    verdicts = []
    for update in updates_of(config):
        one, twin = prover.runs[f"{update}, 1 replica"], prover.runs[f"{update}, last bits changed"]
        others = [(f"{update}, {name}", prover.runs[f"{update}, {name}"]) for name in names]
        title = f"{row}, {update}"
        if said := failure([(f"{update}, 1 replica", one), (f"{update}, last bits changed", twin), *others]):
            verdicts.append(Verdict(title, False, said, named_in(said)))
            continue
        adaptive = update != "SGD"
        bound, found, holds = allowed(one, twin, adaptive), [], True
        for name, other in others:
            each = apart_by_variable(one.saved, other.saved)
            worst, variable = max(((value, key) for key, value in each.items()), default=(0.0, ""))
            apart, short = difference(one.saved, other.saved), name.split(", ", 1)[1]
            found.append(f"{short} {apart:.0e} (worst {worst:.0e}, {variable.split('/', 2)[-1]})")
            holds &= agree(one, twin, other, adaptive=adaptive)
        text = f"{'; '.join(found)}; allowed {bound:.0e}"
        if not holds and config.batch_norm == "per_replica" and has_statistics(one):
            verdicts.append(Verdict(title, None, text, "inexact by --batch_norm=per_replica"))
        else:
            verdicts.append(Verdict(title, holds, text))
    return verdicts


def updates_of(config: Config) -> dict[str, tuple[str, ...]]:
    """The optimizers that are compared, with their flags: SGD, which hides no wrong scale, and the chosen one."""
    return {"SGD": SGD} | ({config.optimizer: ()} if config.optimizer != "sgd" else {})


def has_statistics(run: Run) -> bool:
    """Whether the model has batch statistics."""
    return any("moving_mean" in name for name in run.saved)


def compare_metrics(prover: Prover, names: Sequence[str]) -> Verdict:
    """Loss and metrics that the sizes have told of, step by step."""
    one, worst = prover.runs["SGD, 1 replica"], (0.0, "")
    failed = failure([("1 replica", one), *((name, prover.runs[f"SGD, {name}"]) for name in names)])
    if failed:
        return Verdict("metrics", False, failed, named_in(failed))
    for name in names:
        other = prover.runs[f"SGD, {name}"]
        if one.lines.keys() != other.lines.keys():
            return Verdict("metrics", False, f"{name} has told of other steps than 1 replica")
        for key, line in one.lines.items():
            for metric, value in line.items():
                if metric in ("step", "split", "learning_rate", "gradient_norm") or timed(metric):
                    continue
                theirs = other.lines[key][metric]
                apart = abs(value - theirs) / max(abs(value), 1e-3)
                if not np.isfinite(apart):
                    apart = 0.0 if str(value) == str(theirs) else float("inf")
                worst = max(worst, (apart, f"{key[0]} {metric} at step {key[1]}, {name}"))
    return Verdict("metrics", worst[0] <= METRICS, f"largest relative difference {worst[0]:.1e} ({worst[1]})")


def timed(metric: str) -> bool:
    """Whether a clock decides it."""
    return metric.endswith(("per_second", "utilization")) or metric.startswith("share_")


def compare_inputs(prover: Prover, names: Sequence[str]) -> Verdict:
    """Which examples formed each step's global batch, in which order."""
    said, one, steps = [], prover.runs["SGD, 1 replica"], 0
    failed = failure([("1 replica", one), *((name, prover.runs[f"SGD, {name}"]) for name in names)])
    if failed:
        return Verdict("input", False, failed, named_in(failed))
    for name in names:
        other = prover.runs[f"SGD, {name}"]
        for step, parts in sorted(one.facts["examples"].items(), key=lambda item: int(item[0])):
            mine, theirs = in_order(parts), in_order(other.facts["examples"].get(step, {}))
            steps = max(steps, int(step) + 1)
            if mine != theirs:
                how = "in another order" if sorted(mine) == sorted(theirs) else "other examples"
                said.append(f"step {step} of {name}: {how}")
                break
    cause = "the order of the data depends on the number of replicas or workers" if said else ""
    return Verdict("input", not said, "; ".join(said) or f"the same examples in {steps} steps at every size", cause)


def in_order(parts: Mapping[str, list[str]]) -> list[str]:
    """The global batch, put together from the parts by their first example's place."""
    return [name for _, names in sorted(parts.items(), key=lambda item: int(item[0])) for name in names]


def compare_traces(prover: Prover) -> Verdict:
    """How often the train step was traced."""
    if said := failure(prover.runs.items()):
        return Verdict("retrace", False, said, named_in(said))
    counted = {name: run.facts["traces"] for name, run in prover.runs.items() if run.facts.get("traces")}
    again = [name for name, traces in counted.items() if traces != 1]
    found = f"traced {counted[again[0]]} times in {again[0]}" if again else f"once in each of {len(counted)} runs"
    return Verdict("retrace", not again, found, "an argument of the step changes" if again else "")


def compare_graphs(prover: Prover) -> Verdict:
    """Gradients computed eagerly, in a graph, and under XLA."""
    run = prover.runs["SGD, 1 replica"]
    if said := failure([("1 replica", run)]):
        return Verdict("graph", False, said, named_in(said))
    found, holds = [], True
    for name, value in run.facts["gradients"].items():
        if isinstance(value, str):
            found.append(f"{name} cannot: {value}")
            continue
        found.append(f"{name} {value:.1e} from eager")
        holds &= value <= REORDERED
    cause = "" if holds else "the step does not compute the same in a graph: it draws, counts or reads in Python"
    return Verdict("graph", holds, f"gradients: {'; '.join(found)}; allowed {REORDERED:.0e}", cause)


def resume(prover: Prover, steps: int, chance: random.Random) -> Verdict:
    """A run killed at a random step and started again, against one left alone: the same bits."""
    for _ in range(4):
        every = max(steps // 10, 1)
        target = every * chance.randint(1, 6)
        results: list[tuple[int, str]] = []

        def killed(target: int = target, steps: int = steps, results: list = results) -> None:
            results.append(prover.script("killed", prover.resume_flags("killed", steps), target))
            results.append(prover.script("killed", prover.resume_flags("killed", steps)))

        whole: list[tuple[int, str]] = []

        def left_alone(steps: int = steps, whole: list = whole) -> None:
            whole.append(prover.script("whole", prover.resume_flags("whole", steps)))

        prover.in_parallel([killed, left_alone])
        for code, said in (whole[0], results[1]):
            if code != OK:
                last = (said.strip().splitlines() or ["nothing was said"])[-1]
                return Verdict("resume", False, f"a run ended with code {code}: {last}", named_in(last))
        resumed = json.loads((prover.folder / "killed/run.json").read_text()).get("resumed_from")
        if results[0][0] != OK and resumed != steps:
            break
        # It was done before it could be killed: a longer one.
        steps *= 4
        for name in ("whole", "killed"):
            shutil.rmtree(prover.folder / name)
    else:
        return Verdict("resume", None, "every run was done before it could be killed; pass more --steps")
    if not resumed:
        said = f"killed after step {target} of {steps}: it began again at step 0"
        return Verdict("resume", False, said, "no checkpoint is restored")
    same_bits = digests(prover.folder / "whole") == digests(prover.folder / "killed")
    same_lines = metric_lines(prover.folder / "whole") == metric_lines(prover.folder / "killed")
    found = f"killed after step {target} of {steps}: " + (
        "the same bits and metrics" if same_bits and same_lines else f"other {'bits' if not same_bits else 'metrics'}"
    )
    return Verdict("resume", same_bits and same_lines, found)


def resize(prover: Prover, config: Config, sizes: Sequence[int]) -> Verdict:
    """Half of the run on the most replicas, half on two, against one replica."""
    one, other = prover.runs["SGD, 1 replica"], prover.runs["resized, second half"]
    if said := failure(
        [("1 replica", one), ("first half", prover.runs["resized, first half"]), ("second half", other)]
    ):
        return Verdict("resize", False, said, named_in(said))
    if other.facts["resumed_from"] != prover.steps // 2:
        said = f"the second half began at step {other.facts['resumed_from'] or 0}, not {prover.steps // 2}"
        return Verdict("resize", False, said, "no checkpoint is restored")
    apart, bound = difference(one.saved, other.saved), allowed(one, prover.runs["SGD, last bits changed"])
    text = f"{sizes[-1]}, then {sizes[0]} replicas: {apart:.1e}; allowed {bound:.0e}"
    if apart > bound and config.batch_norm == "per_replica" and has_statistics(one):
        return Verdict("resize", None, text, "inexact by --batch_norm=per_replica")
    return Verdict("resize", apart <= bound, text)


def named_in(said: str) -> str:
    """The cause that an error names itself, or nothing."""
    if "would miss from checkpoints" in said:
        return "a variable is missing from the checkpoint"
    return "the run itself does not end well"


# ----------------------------------------------------------------------------------------------------------------------
# Why a row fails: each suspect is tried by a run without it.

_LAST_BITS = ("other last bits",)
CHANGES = {
    "no noise": "the same noise on all replicas, or noise that depends on their number",
    "frozen statistics": "batch statistics per replica",
    "no penalties": "a penalty counted once per replica",
}


def diagnose_sizes(prover: Prover, config: Config, size: int) -> str:
    """Why two sizes end with other weights: run again without each suspect, the one without which they agree is it."""
    # All in one process, whose start costs more than a run. The twin of the first shows what rounding does to all.
    off = ("--clip_norm=0", "--weight_decay=0", "--ema=0")
    variants = {"as it is": ((), ()), "without clipping": (("--clip_norm=0",), ())}
    variants |= {f"with {name}": (("--clip_norm=0",), (name,)) for name in CHANGES}
    variants["with all of it off"] = off, tuple(CHANGES)
    specs = []
    for name, (flags, changes) in variants.items():
        for count in (1, size):
            given = (*SGD, f"--replicas={count}", *flags)
            specs.append(prover.spec(f"{name}, {count} of {size}", *given, changes=changes))
    specs.append(prover.spec("as it is, twin", *SGD, "--replicas=1", changes=_LAST_BITS))
    # GPUs reduce with collectives, of which one process has one kind.
    for part in [[spec] for spec in specs] if visible_gpus() else [specs]:
        prover.observe(part)

    def found(name: str) -> tuple[Run, Run, Run]:
        names = f"{name}, 1 of {size}", "as it is, twin", f"{name}, {size} of {size}"
        return tuple(prover.runs[one] for one in names)

    def same(name: str) -> bool:
        one, twin, other = found(name)
        first = prover.runs[f"as it is, 1 of {size}"]
        return not failure([("", one), ("", other)]) and agree(one, twin, other, first)

    def wrong_scale(name: str) -> str:
        one, _, other = found(name)
        if failure([("", one), ("", other)]):
            return ""
        ratio = other.lines["train", 1]["gradient_norm"] / max(one.lines["train", 1]["gradient_norm"], 1e-30)
        said = f"the first gradient of {size} replicas is {ratio:.2f} times that of 1"
        if abs(ratio - size) < 0.02 * size:
            return f"the loss is divided by the local batch: {said}"
        if abs(ratio - 1 / size) < 0.02 / size:
            return f"gradients are averaged over replicas, not summed: {said}"
        return ""

    if said := failure([(name, run) for name in variants for run in found(name)]):
        return f"not found: {said}"
    if same("as it is"):
        return f"not found: 1 and {size} replicas agree under SGD, so it needs what differs in this row"
    if config.clip_norm and same("without clipping"):
        return f"gradients are clipped before they are summed: without --clip_norm the sizes agree (1 and {size})"
    if scale := wrong_scale("without clipping"):
        return scale
    for name, cause in CHANGES.items():
        if same(f"with {name}"):
            return f"{cause}: with {name} the sizes agree (1 and {size})"
    if scale := wrong_scale("with all of it off"):
        return scale
    if same("with all of it off"):
        return f"more than one of: {', '.join(CHANGES.values())}; or --weight_decay or --ema"
    return f"not found: the sizes differ with {', '.join(CHANGES)} and without clipping too"


def diagnose_metrics(prover: Prover, names: Sequence[str]) -> str:
    """Why metrics differ where weights agree: by their ratio."""
    one = prover.runs["SGD, 1 replica"]
    for name in names:
        other = prover.runs[f"SGD, {name}"]
        size = other.facts.get("replicas", 0)
        for key, line in one.lines.items():
            for metric, value in line.items():
                if timed(metric) or metric in ("step", "split", "learning_rate") or not value:
                    continue
                ratio = other.lines.get(key, {}).get(metric, value) / value
                if size and abs(ratio - 1 / size) < 0.02 / size:
                    said = f"a metric is averaged over replicas instead of summed: {key[0]} {metric}"
                    return f"{said} of {name} is 1/{size} of that of 1"
                if size and abs(ratio - size) < 0.02 * size:
                    return f"a mean is summed over replicas: {key[0]} {metric} of {name} is {size} times that of 1"
    return "not found: the metrics' ratio is neither the number of replicas nor its inverse"


def diagnose_resume(prover: Prover, steps: int) -> str:
    """Why a resumed run ends with other bits: a second whole run, then every variable before and after a restart."""
    prover.script("again", prover.resume_flags("again", steps))
    whole, again = prover.folder / "whole", prover.folder / "again"
    if digests(whole) != digests(again) or metric_lines(whole) != metric_lines(again):
        return "a non-deterministic operation: two whole runs with the same flags and --deterministic differ"
    half, flags = max(prover.steps // 2, 1), ("--deterministic", "--replicas=1", f"--run_dir={prover.folder / 'state'}")
    first = prover.experiment("state, before", *flags, f"--train_steps={half}", look=["state"])
    second = prover.experiment("state, after", *flags, f"--train_steps={half + 1}", look=["state"])
    if said := failure([("the run before", first), ("the run after", second)]):
        return said
    before = {name[4:]: value for name, value in first.arrays.items() if name.startswith("end/")}
    after = {name[6:]: value for name, value in second.arrays.items() if name.startswith("start/")}
    lost = [name for name in before if name in after and not np.array_equal(before[name], after[name])]
    if lost:
        names = ", ".join(lost[:SHOWN_NAMES]) + (f" and {len(lost) - SHOWN_NAMES} more" if len(lost) > 3 else "")
        return f"a variable is missing from the checkpoint: {names} differ before and after a restart"
    return "not found: every variable comes back, so the state lies in Python, or in the position of the input"


# ----------------------------------------------------------------------------------------------------------------------
# The whole.


def prove(options: argparse.Namespace, flags: list[str], say: Callable[[str], None]) -> list[Verdict]:
    """Runs what the rows need and judges them.

    Raises:
      BadConfiguration: a flag is wrong, or the batch divides over no more than one replica.
    """
    config = config_from(["prove", *flags], "")
    gpus = len(visible_gpus())
    most = gpus or 4
    sizes = [n for n in (2, 4) if n <= most and config.batch_size % (n * config.accumulate) == 0]
    if not sizes:
        raise BadConfiguration(
            f"--batch_size {config.batch_size} does not divide over 2 replicas on {gpus or 'virtual'} devices; "
            "pass an even one, or use a machine with two GPUs"
        )
    rows = options.rows.split(",")
    if unknown := [row for row in rows if row not in ROWS]:
        raise BadConfiguration(f"--rows names {unknown[0]!r}; choose among {', '.join(ROWS)}")
    prover = Prover(flags, options.steps, say)
    try:
        return _judge(prover, config, rows, sizes, gpus)
    finally:
        prover.stop()
        if options.keep:
            say(f"everything that was run lies in {prover.folder}")
        else:
            shutil.rmtree(prover.folder, ignore_errors=True)


def _judge(prover: Prover, config: Config, rows: list[str], sizes: list[int], gpus: int) -> list[Verdict]:
    updates = updates_of(config)
    replicas = [f"{n} replicas" for n in sizes]
    workers = ["2 workers"] if "workers" in rows and (not gpus or gpus >= 2) else []
    groups: list[Callable[[], Any]] = []
    verdicts: list[Verdict] = []
    several = {"replicas", "metrics", "input", "resize", "retrace", "graph", "workers"} & set(rows)
    if several:
        specs = []
        for update, extra in updates.items():
            look = ["input", "graph"] if update == "SGD" else []
            specs.append(prover.spec(f"{update}, 1 replica", *extra, "--replicas=1", look=look))
            if {"replicas", "metrics", "input", "retrace"} & set(rows):
                for n in sizes:
                    look = ["input"] if update == "SGD" else []
                    specs.append(prover.spec(f"{update}, {n} replicas", *extra, f"--replicas={n}", look=look))
            if {"replicas", "workers", "resize"} & set(rows):
                changed = ["other last bits"]
                specs.append(prover.spec(f"{update}, last bits changed", *extra, "--replicas=1", changes=changed))
        if "resize" in rows:
            for half, n, steps in (("first", sizes[-1], prover.steps // 2), ("second", sizes[0], prover.steps)):
                name, same = f"resized, {half} half", f"--run_dir={prover.folder / 'resized'}"
                specs.append(prover.spec(name, *SGD, f"--replicas={n}", f"--train_steps={max(steps, 1)}", same))
        # GPUs reduce with collectives, of which one process has one kind; CPU devices may share a process.
        for part in [[spec] for spec in specs] if gpus else [specs]:
            groups.append(lambda part=part: prover.observe(part))
    if workers:
        for update, extra in updates.items():
            look = ["input"] if update == "SGD" else []
            spec = prover.spec(f"{update}, 2 workers", *extra, "--strategy=multi_worker", "--replicas=0", look=look)
            groups.append(lambda spec=spec: prover.observe([spec], workers=2))
    steps = max(prover.steps, 20)
    if "resume" in rows:
        chance = random.Random(prover.began)
        groups.append(lambda: verdicts.append(resume(prover, steps, chance)))
    prover.in_parallel(groups)
    resumed = {verdict.row: verdict for verdict in verdicts}
    found: list[Verdict] = []
    if "replicas" in rows:
        found += compare_sizes(prover, "replicas", replicas, config)
    if workers:
        found += compare_sizes(prover, "workers", workers, config)
    compared = (replicas if several - {"workers", "graph", "resize"} else []) + workers
    if "metrics" in rows:
        found.append(compare_metrics(prover, compared))
    if "resume" in rows:
        found.append(resumed["resume"])
    if "resize" in rows:
        found.append(resize(prover, config, sizes))
    if "graph" in rows:
        found.append(compare_graphs(prover))
    if "input" in rows:
        found.append(compare_inputs(prover, compared))
    if "retrace" in rows:
        found.append(compare_traces(prover))
    return _explained(prover, config, sizes, found, compared)


def _explained(
    prover: Prover, config: Config, sizes: list[int], found: list[Verdict], compared: list[str]
) -> list[Verdict]:
    """The verdicts, with a cause for each that does not hold. A cause that explains several is looked for once."""
    explained, cause_of_sizes = [], ""
    other_input = any(v.row == "input" and v.holds is False for v in found)
    sizes_differ = any(v.holds is False and v.row.startswith(("replicas", "workers", "resize")) for v in found)
    for verdict in found:
        if verdict.holds is not False or verdict.cause:
            explained.append(verdict)
            continue
        prover.say(f"[{time.monotonic() - prover.began:3.0f} s] {verdict.row} does not hold; looking for the cause")
        if verdict.row == "resume":
            cause = diagnose_resume(prover, int(verdict.found.split(" of ")[1].split(":")[0]))
        elif verdict.row == "metrics" and not sizes_differ:
            cause = diagnose_metrics(prover, compared)
        elif other_input:
            cause = "the order of the data depends on the number of replicas or workers"
        else:
            cause_of_sizes = cause = cause_of_sizes or diagnose_sizes(prover, config, sizes[0])
        explained.append(verdict._replace(cause=cause))
    return explained


def report(verdicts: Sequence[Verdict]) -> str:
    """The table, and the causes under it."""
    words = {True: "holds", False: "FAILS", None: "–"}
    rows = [[verdict.row, words[verdict.holds], verdict.found] for verdict in verdicts]
    causes = [f"{verdict.row}: {verdict.cause}" for verdict in verdicts if verdict.cause]
    return "\n".join([table(["row", "", "found"], rows), *(["", *causes] if causes else [])])


def main(arguments: list[str]) -> int:
    """Parses the command line, proves, prints. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which to judge (default: {','.join(ROWS)})")
    parser.add_argument("--steps", type=int, default=50, help="updates of each run (default: 50)")
    parser.add_argument("--json", default="runs/prove.json", help="the verdicts' file (default: runs/prove.json)")
    parser.add_argument("--keep", action="store_true", help="keep what was run")
    options, flags = parser.parse_known_args(arguments)
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        if options.steps < 2:
            raise BadConfiguration(f"--steps {options.steps} is below 2; pass 2 or more")
        verdicts = prove(options, flags, lambda line: print(line, file=sys.stderr, flush=True))
        holds = all(verdict.holds is not False for verdict in verdicts)
        print(report(verdicts))
        print(
            f"\n{'every row holds' if holds else 'not every row holds'}; {time.monotonic() - began:.0f} s", flush=True
        )
        facts = {"flags": flags, "holds": holds, "rows": [verdict._asdict() for verdict in verdicts]}
        try:
            Path(options.json).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(options.json), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise BadConfiguration(f"--json {options.json} cannot be written: {error.strerror}; name another") from None
    except (KeyboardInterrupt, Stopped):
        return PREEMPTED
    except BadConfiguration as error:
        print(f"launch/prove.py: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    return OK if holds else FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
