"""What a tracker is told, in its own terms: MLflow (`requirements/mlflow.txt`) and W&B (`requirements/wandb.txt`).

Each is called from one thread alone, and may raise or wait as it likes: `trainers.record.tracking` sees to that.
"""

import importlib.util
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trainers.settings.exit_codes import OK, PREEMPTED, BadConfiguration
from trainers.settings.tracker import parse


class _Library(NamedTuple):
    """`package`: what is installed; `module`: what is imported; `variables`: its own, for where they are not set."""

    package: str
    module: str
    variables: Mapping[str, str]


_LIBRARIES = {
    "mlflow": _Library(
        "mlflow-skinny",
        "mlflow",
        {
            # Who has failed is asked again by the thread that waits for nobody.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            # Nothing goes anywhere but to the server that the user names.
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        },
    ),
    "wandb": _Library(
        "wandb",
        "wandb",
        {
            "WANDB_SILENT": "true",  # it asks nothing on the terminal either
            "WANDB_ERROR_REPORTING": "false",
            # Seconds that what it was told may lie in memory, which a process that is killed loses; else 15.
            "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
        },
    ),
}


def check(text: str) -> None:
    """Whether what `--tracker` names can be used here; also sets how its library waits, where nothing says otherwise.

    Free of TensorFlow. The library itself is not imported.

    Raises:
      BadConfiguration: it is not installed, or its environment variables do not say where to.
    """
    tracker = parse(text)
    if tracker is None:
        return
    library = _LIBRARIES[tracker.name]
    if importlib.util.find_spec(library.module) is None:
        raise BadConfiguration(
            f"--tracker {tracker.name} needs {library.package}, which is not installed; pip install --require-hashes "
            f"--no-deps -r requirements/{tracker.name}.txt"
        )
    if tracker.name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        raise BadConfiguration(
            "--tracker mlflow sends to the server that MLFLOW_TRACKING_URI names, which is not set; set it, e.g. to "
            "http://127.0.0.1:5000"
        )
    if tracker.name == "wandb" and not _can_log_in(os.environ):
        raise BadConfiguration(
            "--tracker wandb needs WANDB_API_KEY, which is not set; set it, or WANDB_MODE=offline to write files alone"
        )
    for name, value in library.variables.items():
        os.environ.setdefault(name, value)


def _can_log_in(environment: Mapping[str, str]) -> bool:
    """Whether W&B will not have to ask a person for a key."""
    if environment.get("WANDB_MODE", "online") != "online":
        return True
    files = [environment.get("NETRC", ""), *map(os.path.expanduser, ("~/.netrc", "~/_netrc"))]
    named = any(environment.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    return named or any(path and os.path.exists(path) for path in files)


class Tracked(Protocol):
    """A run as a tracker has it. Every method may raise and take any time.

    It is made of `options` (the tracker's own), the run's name and folder, `known` (`id`, None before it was made, and
    `key`, which is its own), flags, and facts.
    """

    id: str
    where: str  # words for people
    # Seconds after which what it was told outlives a process that is killed.
    keeps_after: float

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Sends lines of metrics.jsonl, as `split/name` at their steps."""

    def end(self, step: int, values: Mapping[str, float], words: Mapping[str, str], code: int | None) -> None:
        """Ends it for this attempt; another may go on with it. `values`: metrics of its last step."""


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line, by `split/name`."""
    numbers = {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}
    return {f"{line['split']}/{name}": float(value) for name, value in numbers.items()}


class Mlflow:
    """As `Tracked`: a run of an MLflow server."""

    keeps_after = 0.0
    _MOST = 1000
    _MOST_PARAMS = 100
    _MOST_CHARACTERS = 5000

    def __init__(
        self,
        options: Mapping[str, str],
        name: str,
        run_dir: Path,
        known: Mapping[str, Any],
        flags: Mapping[str, Any],
        facts: Mapping[str, str],
    ):
        from mlflow import MlflowClient

        self._client = MlflowClient()
        place = self._experiment(options.get("experiment") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default")
        run = self._find(known, place)
        if run is None:
            source = {"mlflow.source.name": "lockstep", "mlflow.source.type": "LOCAL", "lockstep.key": known["key"]}
            source |= {"mlflow.source.git.commit": facts["commit"]} if "commit" in facts else {}
            run = self._client.create_run(place, run_name=name, tags=source)
        elif run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        self.id = run.info.run_id
        self.where = f"mlflow, run {run.info.run_name} ({self.id})"
        self._describe(run.data.params, flags, facts)

    def _find(self, known: Mapping[str, Any], place: str) -> Any:
        """The run that was made before, if it is there."""
        from mlflow.exceptions import MlflowException

        if known["id"]:
            try:
                run = self._client.get_run(known["id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
            return run if run.info.lifecycle_stage == "active" else None
        # It may have been made by an attempt that was killed before it could note the id.
        found = self._client.search_runs([place], f"tags.`lockstep.key` = '{known['key']}'", max_results=1)
        return found[0] if found else None

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which is made if it is not there."""
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def _describe(self, before: Mapping[str, str], flags: Mapping[str, Any], facts: Mapping[str, str]) -> None:
        """Flags as parameters, which cannot be changed: one that an attempt was given another value of is a tag too."""
        from mlflow.entities import Param, RunTag

        texts = {name: str(value)[: self._MOST_CHARACTERS] for name, value in flags.items()}
        tags = {f"lockstep.{name}": value for name, value in facts.items()}
        tags |= {f"lockstep.flag.{name}": text for name, text in texts.items() if before.get(name, text) != text}
        params = [Param(name, text) for name, text in texts.items() if name not in before]
        for part in _parts(params, self._MOST_PARAMS):
            self._client.log_batch(self.id, params=part)
        for part in _parts([RunTag(name, text[: self._MOST_CHARACTERS]) for name, text in tags.items()], 100):
            self._client.log_batch(self.id, tags=part)

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Sends lines, in as few requests as the server takes."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, line["step"]) for line in lines for name, value in _numbers(line).items()]
        for part in _parts(metrics, self._MOST):
            self._client.log_batch(self.id, metrics=part)

    def end(self, step: int, values: Mapping[str, float], words: Mapping[str, str], code: int | None) -> None:
        """Its status is FINISHED, KILLED after SIGTERM, else FAILED."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        tags = [RunTag(f"lockstep.{name}", text[: self._MOST_CHARACTERS]) for name, text in words.items()]
        self._client.log_batch(self.id, metrics=metrics, tags=tags)
        self._client.set_terminated(self.id, {OK: "FINISHED", PREEMPTED: "KILLED"}.get(code, "FAILED"))


class Wandb:
    """As `Tracked`: a run of W&B; in its offline mode, files in `run_dir/wandb`, one folder for each attempt."""

    keeps_after = 5.0  # its process writes each second

    def __init__(
        self,
        options: Mapping[str, str],
        name: str,
        run_dir: Path,
        known: Mapping[str, Any],
        flags: Mapping[str, Any],
        facts: Mapping[str, str],
    ):
        import wandb

        self.id = known["id"] or known["key"]
        self._run = wandb.init(
            project=options.get("project"),  # None: of its own variables
            name=name,
            id=self.id,
            resume="allow",
            dir=None if os.environ.get("WANDB_DIR") else str(run_dir),
            config=dict(flags) | {"lockstep": dict(facts)},
            settings=wandb.Settings(console="off"),  # the terminal is the run's
        )
        # W&B's own step cannot go back, as a run does that goes on from a checkpoint.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.where = f"wandb, run {name} ({self.id})"

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Hands lines to W&B's own process."""
        for line in lines:
            self._run.log(_numbers(line) | {"step": line["step"]})

    def end(self, step: int, values: Mapping[str, float], words: Mapping[str, str], code: int | None) -> None:
        """Returns when all is sent, or in offline mode is in its file."""
        self._run.log({**values, "step": step})
        self._run.summary.update({f"lockstep/{name}": text for name, text in words.items()})
        self._run.finish(exit_code=1 if code is None else code)


def _parts(entries: Sequence[Any], most: int) -> Iterable[Sequence[Any]]:
    """The entries in their order, at most so many at once."""
    return (entries[i : i + most] for i in range(0, len(entries), most))


KINDS = {"mlflow": Mlflow, "wandb": Wandb}
