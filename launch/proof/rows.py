"""Which runs the rows of the table need, and the rows in their order."""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from launch.proof import inputs, verdicts
from launch.proof.causes import explained
from launch.proof.prover import LAST_BITS, SGD, Prover, updates_of
from launch.proof.verdicts import Verdict
from trainers.settings.augmentation import mixes, parse
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration

ROWS = ("replicas", "workers", "metrics", "resume", "resize", "graph", "input", "augment", "retrace", "export")
# Rows that compare sizes; the others are judged on a single device too.
COMPARED = ("replicas", "workers", "metrics", "resize", "input", "augment")
# Replicas that are tried.
SIZES = (2, 4)
VIRTUAL_DEVICES = 4
LEAST_RESUME_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Scope:
    """What is proved. `sizes`: numbers of replicas beside 1. `skipped`: rows that cannot be judged here, and why."""

    config: Config
    rows: tuple[str, ...]
    sizes: tuple[int, ...]
    gpus: int
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def any_of(self, *rows: str) -> bool:
        """Whether a row is judged."""
        return not set(rows).isdisjoint(self.rows)

    @property
    def replicas(self) -> list[str]:
        """Names of the sizes in one process whose runs are made."""
        needed = self.any_of("replicas", "metrics", "input", "retrace")
        return [f"{count} replicas" for count in self.sizes] if needed else []

    @property
    def workers(self) -> list[str]:
        """Names of the sizes in several processes whose runs are made."""
        return ["2 workers"] if "workers" in self.rows else []


def scope_of(config: Config, rows: Sequence[str], gpus: int) -> Scope:
    """What can be proved with `gpus` visible GPUs, or without any on virtual CPU devices.

    Where a single GPU is visible, all rows are asked for and only some can be judged, the others are skipped.

    Raises:
      BadConfiguration: a row is unknown, or a row that compares sizes is named and there is only one size.
    """
    if unknown := [row for row in rows if row not in ROWS]:
        raise BadConfiguration(f"--rows names {unknown[0]!r}; choose among {', '.join(ROWS)}")
    most = gpus or VIRTUAL_DEVICES
    sizes = tuple(n for n in SIZES if n <= most and inputs.fits(config, config.augment, n))
    skipped = {}
    if "augment" in rows and not inputs.has_images(config):
        if set(rows) != set(ROWS):
            raise BadConfiguration("--rows names 'augment', which is for images; leave it out")
        rows, skipped = [row for row in rows if row != "augment"], {"augment": "not judged: it is for images"}
    compared = [row for row in rows if row in COMPARED]
    if sizes or not compared:
        return Scope(config, tuple(rows), sizes, gpus, skipped)
    if gpus != 1:
        raise BadConfiguration(
            f"--batch_size {config.batch_size} does not divide over 2 replicas on {gpus or 'virtual'} devices; "
            f"pass a multiple of {4 if mixes(parse(config.augment)) else 2}"
        )
    if {*rows, *skipped} != set(ROWS):
        raise BadConfiguration(
            f"--rows names {compared[0]!r}, which needs two devices, and one GPU is visible; leave it out, use a "
            "machine with two GPUs, or set CUDA_VISIBLE_DEVICES=-1 for virtual CPU devices"
        )
    reason = "not judged: it needs two devices, and one GPU is visible"
    return Scope(
        config,
        tuple(row for row in rows if row not in COMPARED),
        sizes,
        gpus,
        skipped | dict.fromkeys(compared, reason),
    )


def specs_of(prover: Prover, scope: Scope) -> list[dict[str, Any]]:
    """The runs in one process that the rows need."""
    specs, updates = [], updates_of(scope.config)
    if not scope.any_of("replicas", "workers", "retrace"):
        updates = {"SGD": updates["SGD"]}  # the others look at no run of another optimizer
    for update, flags in updates.items():
        look = ["input"] if update == "SGD" else []
        graph = ["graph"] if update == "SGD" and scope.any_of("graph") else []
        export = ["export"] if update == "SGD" and scope.any_of("export") else []
        own = [*flags, *(f"--{word}" for word in export)]
        specs.append(prover.spec(f"{update}, 1 replica", *own, "--replicas=1", look=[*look, *graph, *export]))
        for name, count in zip(scope.replicas, scope.sizes, strict=False):
            specs.append(prover.spec(f"{update}, {name}", *flags, f"--replicas={count}", look=look))
        if scope.any_of("replicas", "workers", "resize"):
            name = f"{update}, last bits changed"
            specs.append(prover.spec(name, *flags, "--replicas=1", changes=[LAST_BITS]))
    if scope.any_of("resize"):
        run_dir = f"--run_dir={prover.folder / 'resized'}"
        for half, count, steps in (
            ("first", scope.sizes[-1], max(prover.steps // 2, 1)),
            ("second", scope.sizes[0], prover.steps),
        ):
            flags = (*SGD, f"--replicas={count}", f"--train_steps={steps}", run_dir)
            specs.append(prover.spec(f"resized, {half} half", *flags))
    return specs


def make_runs(prover: Prover, scope: Scope) -> Verdict | None:
    """Makes all runs that the rows need. Returns the verdict on `resume`, which repeats its own until one is killed."""
    tasks: list[Callable[[], Any]] = []
    if set(scope.rows) - {"resume", "augment"}:
        specs = specs_of(prover, scope)
        # GPUs reduce with collectives, of which one process has one kind; CPU devices may share a process.
        for part in [[spec] for spec in specs] if scope.gpus else [specs]:
            tasks.append(lambda part=part: prover.observe(part))
    if scope.workers:
        for update, flags in updates_of(scope.config).items():
            look = ["input"] if update == "SGD" else []
            spec = prover.spec(f"{update}, 2 workers", *flags, "--strategy=multi_worker", "--replicas=0", look=look)
            tasks.append(lambda spec=spec: prover.observe([spec], workers=2))
    tasks += looks(prover, scope)
    resumed: list[Verdict] = []
    if scope.any_of("resume"):
        chance, steps = random.Random(time.monotonic()), max(prover.steps, LEAST_RESUME_STEPS)
        tasks.append(lambda: resumed.append(verdicts.compare_resumed(prover, steps, chance)))
    prover.in_parallel(tasks)
    return resumed[0] if resumed else None


def looks(prover: Prover, scope: Scope) -> list[Callable[[], Any]]:
    """What reads examples without training, for the rows on the input."""
    tasks: list[Callable[[], Any]] = []
    for row in ("input", "augment"):
        if not (scope.any_of(row) and inputs.has_images(scope.config)):
            continue
        words = inputs.words_of(scope.config, row)
        specs = inputs.specs_of(prover, row, words, [n for n in scope.sizes if inputs.fits(scope.config, words, n)])
        for part in [[spec] for spec in specs] if scope.gpus else [specs]:
            tasks.append(lambda part=part: prover.observe(part))
        if inputs.fits(scope.config, words, 2):
            workers = inputs.worker_specs_of(prover, row, words)
            tasks.append(lambda workers=workers: prover.observe(workers, workers=2))
    return tasks


def judge_input(prover: Prover, scope: Scope, compared: Sequence[str]) -> Verdict:
    """The examples of the runs and, of images, those of each way of reading."""
    verdict = verdicts.compare_inputs(prover, compared)
    if not (verdict.holds and inputs.has_images(scope.config)):
        return verdict
    looked = inputs.compare(prover, "input", inputs.words_of(scope.config, "input"))
    return looked._replace(text=f"{verdict.text}; {looked.text}")


def judge(prover: Prover, scope: Scope) -> list[Verdict]:
    """Makes the runs, and returns the verdicts with the causes of those that do not hold."""
    config, resumed = scope.config, make_runs(prover, scope)
    compared = [*scope.replicas, *scope.workers]
    judges: dict[str, Callable[[], list[Verdict]]] = {
        "replicas": lambda: verdicts.compare_sizes(prover, "replicas", scope.replicas, config),
        "workers": lambda: verdicts.compare_sizes(prover, "workers", scope.workers, config),
        "metrics": lambda: [verdicts.compare_metrics(prover, compared)],
        "resume": lambda: [resumed],
        "resize": lambda: [verdicts.compare_resized(prover, config, scope.sizes)],
        "graph": lambda: [verdicts.compare_graphs(prover)],
        "input": lambda: [judge_input(prover, scope, compared)],
        "augment": lambda: [inputs.compare(prover, "augment", inputs.words_of(config, "augment"))],
        "retrace": lambda: [verdicts.compare_traces(prover)],
        "export": lambda: [verdicts.compare_export(prover, config)],
    }
    results = []
    for row in ROWS:
        if row in scope.skipped:
            results.append(Verdict(row, None, scope.skipped[row]))
        elif row in scope.rows:
            results += judges[row]()
    return explained(prover, config, scope.sizes, results, compared)
