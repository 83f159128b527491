"""Starts runs under observation (`launch/proof/probe.py`) and the trainer itself, and keeps what they leave."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.workers import environments, free_ports
from trainers.record import reading
from trainers.settings.config import EPOCHS, Config
from trainers.settings.exit_codes import CRASHED
from trainers.settings.flags import name_of, without
from trainers.settings.pages import SUPERVISED, Page, page_of

ROOT = Path(__file__).resolve().parents[2]
PROBE = ROOT / "launch/proof/probe.py"
SERVED = ROOT / "launch/proof/served.py"
CALL = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](*sys.argv[2:])"
SGD = ("--optimizer=sgd", "--schedule=constant", "--learning_rate=0.003", "--warmup_steps=0")
# A change that the probe makes: every first weight in its last bits, which shows what rounding does.
LAST_BITS = "other last bits"


class Stopped(Exception):  # noqa: N818 - the user's wish is not an error
    """A signal has come."""


class Run(NamedTuple):
    """What a run under observation left: facts, arrays, and its lines of metrics by (split, step).

    Facts: `exit_code`, `message`, `error` (name of the exception's class), `traces`, `replicas`, `resumed_from`,
    `examples` (step → first example of a part → digests of its examples), `gradients`, `suspects` (kind → paths of the
    layers that depend on the number of replicas).
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    lines: Mapping[tuple[str, int], Mapping[str, float]]

    @property
    def saved(self) -> dict[str, np.ndarray]:
        """The variables that a checkpoint at the end would hold."""
        return self.part("saved")

    def part(self, group: str) -> dict[str, np.ndarray]:
        """The arrays of a group (`saved`, `start`, `end`) by the name of the variable."""
        return {name.removeprefix(f"{group}/"): v for name, v in self.arrays.items() if name.startswith(f"{group}/")}


class Ended(NamedTuple):
    """How the trainer's script ended: its exit code and everything that it printed."""

    code: int
    output: str

    @property
    def last_line(self) -> str:
        """The last line of the output."""
        return (self.output.strip().splitlines() or ["nothing was printed"])[-1]


class Prover:
    """Starts processes, as many at once as the machine has cores for, and keeps the results by the runs' names."""

    def __init__(self, flags: Sequence[str], steps: int, say: Callable[[str], None], page: Page | None = None):
        # Runs have as many steps as a row needs, not as many epochs as the user's.
        self.flags = without(flags, EPOCHS.values())
        self.steps, self.page = steps, page or page_of(SUPERVISED)
        self._names = {field.name for field in self.page.settings.fields()}
        self.folder = Path(tempfile.mkdtemp(prefix="prove-"))
        self.runs: dict[str, Run] = {}
        self._say, self._began = say, time.monotonic()
        self._stopped = False
        self._guard = threading.Lock()
        self._turns = threading.BoundedSemaphore(max(min(os.cpu_count() or 1, 4), 2))
        self._children: list[subprocess.Popen] = []
        self._threads: list[threading.Thread] = []

    def say(self, line: str) -> None:
        """Prints a line after the seconds since the beginning."""
        self._say(f"[{time.monotonic() - self._began:3.0f} s] {line}")

    def stop(self) -> None:
        """Ends what still runs. Afterwards nothing begins, and nothing is written to the folder."""
        with self._guard:
            self._stopped = True
            for child in self._children:
                if child.poll() is None:
                    child.kill()
        for child in self._children:
            child.wait()
        for thread in self._threads:
            thread.join()

    def in_parallel(self, tasks: Sequence[Callable[[], Any]]) -> None:
        """Does all tasks at once. Raises what the first that failed has raised."""
        raised: list[BaseException] = []

        def attempt(task: Callable[[], Any]) -> None:
            try:
                task()
            except BaseException as error:
                raised.append(error)

        # Daemons, so that a signal need not wait for them; `stop` ends what they wait for.
        threads = [threading.Thread(target=attempt, args=(task,), daemon=True) for task in tasks]
        for thread in threads:
            thread.start()
            self._threads.append(thread)
        for thread in threads:
            thread.join()
        if raised:
            raise raised[0]

    def _start(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Starts a process that `stop` ends."""
        with self._guard:
            if self._stopped:
                raise Stopped
            with open(log, "w") as file:
                merged = os.environ | dict(env or {})
                child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=merged)
            self._children.append(child)
        return child

    # -- runs under observation ----------------------------------------------------------------------------------------

    def spec(self, name: str, *flags: str, changes: Sequence[str] = (), look: Sequence[str] = ()) -> dict[str, Any]:
        """A short run for the probe, with the user's flags and then `flags`, in a folder of its own."""
        short = [f"--train_steps={self.steps}", "--eval_every=0", "--checkpoint_every=0", "--log_every=1"]
        own = ["--warmup_steps=0", *short, f"--run_dir={self.folder / name}", "--step_timeout=300", *flags]
        known = [*self.flags, *self._known(own)]
        return {"name": name, "flags": known, "changes": list(changes), "look": list(look)}

    def _known(self, flags: Sequence[str]) -> list[str]:
        """Those flags that the loop has."""
        return [flag for flag in flags if name_of(flag) in self._names]

    def observe(self, specs: Sequence[Mapping[str, Any]], workers: int = 1) -> None:
        """Makes runs one after another in one process, or in one for each worker, and keeps the results."""
        first = specs[0]["name"]
        with self._turns:
            out = self.folder / "out"
            places = [out / str(i) if workers > 1 else out for i in range(workers)]
            logs = [self.folder / f"{first}.{i}.log" for i in range(workers)]
            envs = environments(workers, free_ports(workers)) if workers > 1 else [{}]
            members = [self._probe(specs, *each) for each in zip(places, envs, logs, strict=True)]
            self._follow(members, logs[0], [spec["name"] for spec in specs])
        for spec in specs:
            runs = [self._read(spec["name"], place, log) for place, log in zip(places, logs, strict=True)]
            examples: dict[str, dict[str, list[str]]] = {}
            for run in runs:
                for step, parts in run.facts.get("examples", {}).items():
                    examples.setdefault(step, {}).update(parts)
            self.runs[spec["name"]] = runs[0]._replace(facts={**runs[0].facts, "examples": examples})

    def experiment(self, name: str, *flags: str, changes: Sequence[str] = (), look: Sequence[str] = ()) -> Run:
        """A single run, made now unless it was made before."""
        if name not in self.runs:
            self.observe([self.spec(name, *flags, changes=changes, look=look)])
        return self.runs[name]

    def _probe(
        self, specs: Sequence[Mapping[str, Any]], out: Path, env: Mapping[str, str], log: Path
    ) -> subprocess.Popen:
        out.mkdir(parents=True, exist_ok=True)
        specification = out / f"specification-{specs[0]['name']}.json"
        # Virtual devices are made once in a process: as many as its largest run needs. Workers make their own.
        devices = 0 if "TF_CONFIG" in env else max(replicas_of(spec["flags"]) for spec in specs)
        facts = {"trainer": self.page.trainer, "out": str(out), "devices": devices, "runs": list(specs)}
        specification.write_text(json.dumps(facts))
        return self._start([sys.executable, str(PROBE), str(specification)], log, env)

    def _follow(self, members: Sequence[subprocess.Popen], log: Path, names: Sequence[str]) -> None:
        """Waits for the members, and reports each run when it is done."""
        reported = 0
        while any(member.poll() is None for member in members):
            time.sleep(0.1)
            done = log.read_text(errors="replace").count("done: ")
            for name in names[reported:done]:
                self.say(name)
            reported = done

    def _read(self, name: str, out: Path, log: Path) -> Run:
        facts = reading.read_json(out / f"{name}.json")
        if not facts:
            last = "".join(log.read_text(errors="replace").strip().splitlines()[-1:])
            return Run({"exit_code": CRASHED, "message": f"the probe died: {last}", "examples": {}}, {}, {})
        with np.load(out / f"{name}.npz", allow_pickle=False) as archive:
            arrays = dict(archive)
        lines = {(line["split"], line["step"]): line for line in reading.metric_lines(self.folder / name)}
        return Run(facts, arrays, lines)

    def served(self, name: str) -> dict[str, Any]:
        """What `launch/proof/served.py` has found of the export of a run; empty if it died. It imports no project."""
        out, log = self.folder / "out", self.folder / f"{name}.served.log"
        result = out / f"{name}.served.json"
        command = [str(self.folder / name / reading.EXPORT), str(out / f"{name}.expected.npz"), str(result)]
        with self._turns:
            # On a GPU other runs may have memory too.
            env = {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}
            self._start([sys.executable, "-I", "-c", CALL, str(SERVED), *command], log, env).wait()
        return reading.read_json(result)

    # -- the trainer's script, killed and started again ----------------------------------------------------------------

    def resume_flags(self, name: str, steps: int) -> list[str]:
        """A run long enough to be killed in, with checkpoints all along."""
        every = max(steps // 10, 1)
        flags = [f"--train_steps={steps}", f"--checkpoint_every={every}", "--eval_every=0", f"--log_every={every}"]
        own = ["--warmup_steps=0", *flags, "--deterministic", f"--run_dir={self.folder / name}"]
        return [*self.flags, *self._known(own)]

    def script(self, name: str, flags: Sequence[str], until: int = 0) -> Ended:
        """Runs the loop's script; with `until`, kills it once a checkpoint of that step is there."""
        log = self.folder / f"{name}.script.log"
        with self._turns:
            process = self._start([sys.executable, *self.page.command, *flags], log, self.page.environment)
            while process.poll() is None:
                if until and newest_step(self.folder / name) >= until:
                    process.kill()
                time.sleep(0.002 if until else 0.1)
        self.say(f"{name}: ended with {process.returncode}")
        return Ended(process.returncode, log.read_text(errors="replace"))


def updates_of(config: Config) -> dict[str, tuple[str, ...]]:
    """The optimizers that are compared, with their flags: SGD, which hides no wrong scale, and the chosen one."""
    if "optimizer" in config.left_out:
        return {"SGD": SGD}
    # Runs have folders of these names, and an option may be a path.
    return {"SGD": SGD} | ({config.optimizer.replace("/", "_"): ()} if config.optimizer != "sgd" else {})


def replicas_of(flags: Sequence[str]) -> int:
    """The last `--replicas` of a command line."""
    return next(int(flag.split("=")[1]) for flag in reversed(flags) if flag.startswith("--replicas="))


def newest_step(run_dir: Path) -> int:
    """The newest checkpoint's step, or 0."""
    return max(reading.checkpoint_steps(run_dir), default=0)


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the files of the newest checkpoint: the same bits have the same."""
    return reading.manifest(run_dir, newest_step(run_dir))["files"]


def untimed_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides."""
    return [
        {name: value for name, value in line.items() if not reading.is_timing(name)}
        for line in reading.metric_lines(run_dir)
    ]


def error_of(run_dir: Path) -> str:
    """The name of the exception that ended a run, as its run.json has it; empty if there is none."""
    return (reading.read_run(run_dir).get("exit_reason") or "").partition(":")[0]
