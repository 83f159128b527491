"""What a user asks a cluster for, and whether it can be had: from flags to a checked submission and its plan."""

import argparse
import contextlib
import dataclasses
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from models.options import is_object
from models.sources import NotFound, locate
from trainers.input.manifests import FOLDER
from trainers.record import carriers
from trainers.settings import paths
from trainers.settings.config import DEFAULT_CPU_REPLICAS, Config
from trainers.settings.data_cards import is_downloaded, split_name
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.flags import config_from
from trainers.settings.options import name_of
from trainers.settings.pages import SUPERVISED, TRAINERS, page_of
from trainers.settings.rules import check_batch

# What stands in k8s/ for the name of a run, and the namespace that k8s/setup makes.
PLACEHOLDER = "lockstep"
RUNS = "/work/runs"
# Where the image has the trainers.
TRAINERS_IN_IMAGE = "/app/trainers"
# What k8s/setup and the claim's folder for data are called; a run of that name would take their place.
RESERVED = ("names", "deny-all", "tensorboard", "data")
# Longest name of a host or a label's value (RFC 1123).
LONGEST_NAME = 63
# What Kubernetes adds to the name of a pod, and JobSet counts.
_RANDOM_SUFFIX = len("-abcde")
# How long workers wait for each other where a node or an image may take its time.
STARTUP_SECONDS = 3600
# Where the chief answers Prometheus, as k8s/components/metrics has it.
METRICS_ADDRESS = "0.0.0.0:9400"
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


@dataclasses.dataclass(frozen=True)
class Submission:
    """What a user asks for. `gpus`: of each node; 0 = CPUs. `flags`: the trainer's, without those that are set here.

    `run_store`: the address in an object store under which runs lie; empty: the claim.
    """

    name: str
    nodes: int
    gpus: int
    image: str
    flags: tuple[str, ...] = ()
    backend: str = "job"
    queue: str = ""
    rdma: bool = False
    evaluator: bool = False
    metrics: bool = False
    namespace: str = PLACEHOLDER
    trainer: str = SUPERVISED
    run_store: str = ""

    @property
    def command(self) -> list[str]:
        """What the container runs before its flags; empty for what the image runs by itself."""
        if self.trainer == SUPERVISED:
            return []
        script, *module = page_of(self.trainer).command
        return ["python", f"{TRAINERS_IN_IMAGE}/{Path(script).name}", *module]

    @property
    def folder_in_pod(self) -> str:
        """Where the files of the run lie in the chief's pod."""
        return str(carriers.working(Path(RUNS, "cache"), self.run_dir)) if self.run_store else self.run_dir

    @property
    def run_dir(self) -> str:
        """Where the run lies: on the claim, or in the store."""
        return f"{self.run_store or RUNS}/{self.name}"

    @property
    def strategy(self) -> str:
        """The trainer's strategy: a single pod has no other workers to talk to."""
        return "mirrored" if self.nodes == 1 else "multi_worker"

    @property
    def trainer_flags(self) -> list[str]:
        """The trainer's command line."""
        own = [f"--strategy={self.strategy}", f"--run_dir={self.run_dir}", f"--data_dir={self.run_store or RUNS}/data"]
        own += [f"--cache_dir={RUNS}/cache"] if self.run_store else []
        own += [f"--metrics_port={METRICS_ADDRESS}"] if self.metrics else []
        return [*own, f"--startup_timeout={STARTUP_SECONDS}", *self.flags]

    @property
    def longest_pod_name(self) -> int:
        """The number of characters in the longest name of a pod, with what JobSet counts beside it."""
        suffix = _RANDOM_SUFFIX if self.backend == "jobset" else 0
        evaluator = len(f"{self.name}-evaluator") if self.evaluator else 0
        return max(len(host_name(self, self.nodes - 1)) + suffix, evaluator)

    def text(self) -> str:
        """As JSON, for an annotation."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> "Submission":
        """What `text` gave."""
        values = json.loads(text)
        return cls(**values | {"flags": tuple(values["flags"])})

    @classmethod
    def from_options(cls, options: argparse.Namespace, flags: Sequence[str]) -> "Submission":
        """What the command line of `submit` asks for. `flags`: the trainer's."""
        return cls(
            name=options.name,
            nodes=1 if options.nodes is None else options.nodes,
            gpus=1 if options.gpus_per_node is None else options.gpus_per_node,
            image=options.image or "",
            flags=tuple(flags),
            backend=options.backend or "job",
            queue=options.queue or "",
            rdma=options.rdma,
            evaluator=options.evaluator,
            metrics=options.metrics,
            namespace=options.namespace,
            trainer=getattr(options, "trainer", SUPERVISED),
            run_store=store_of(getattr(options, "run_store", "")),
        )


def store_of(text: str) -> str:
    """The value of `--run_store`. Raises BadConfiguration if it is no address of a folder in a bucket."""
    address = paths.place("--run_store", text) if text else ""
    if address and not paths.is_address(address):
        raise BadConfiguration(f"--run_store {text} is a path; write s3://BUCKET/FOLDER, or leave it out for the claim")
    return address


def how_to_bring(path: str, run_store: str) -> str:
    """What to do with a path of this machine so that pods have it."""
    store = f" --run_store={run_store}" if run_store else ""
    place = f"{run_store or RUNS}/{FOLDER}/{Path(path).name}"
    return f"bring it: launch/k8s.py data --from={path}{store}, and name it {place}"


def host_name(submission: Submission, index: int) -> str:
    """The host name of a worker's pod."""
    return f"{submission.name}{'-worker-0' if submission.backend == 'jobset' else ''}-{index}"


def has_digest(image: str) -> bool:
    """Whether the name of an image says what it holds."""
    return _DIGEST.search(image) is not None


def check_name(submission: Submission) -> None:
    """Checks the name of a run.

    Raises:
      BadConfiguration: it is not a DNS label, k8s/ uses it itself, or its pods' names would be too long.
    """
    name, longest = submission.name, submission.longest_pod_name
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise BadConfiguration(
            f"--name {name!r} is not a DNS label; use lower-case letters, digits and '-', beginning with a letter"
        )
    if name in RESERVED or re.search(r"-(evaluator|worker-[0-9]+)$", name):
        raise BadConfiguration(
            f"--name {name} is a name that k8s/ uses itself ({', '.join(RESERVED)}, …-evaluator, …-worker-N); "
            "take another"
        )
    if longest > LONGEST_NAME:
        raise BadConfiguration(
            f"--name {name} gives a pod a name of {longest} characters; {LONGEST_NAME} are allowed; "
            f"use {longest - LONGEST_NAME} fewer"
        )


@contextlib.contextmanager
def _found_here() -> Iterator[None]:
    """Adds to an error of a module that is not on this machine how submit finds it."""
    try:
        yield
    except BadConfiguration as error:
        text, cause = str(error), error.__cause__
        while cause is not None and not isinstance(cause, NotFound):
            cause = cause.__cause__
        if cause is None or "there is no module" not in text:
            raise
        raise BadConfiguration(
            f"{text.partition(';')[0]}; submit reads it here, too: run it in the folder that holds your package, "
            "or set PYTHONPATH to that folder"
        ) from error


def own_packages(submission: Submission, config: Config) -> list[str]:
    """The packages that a run imports and that are not installed: of its loop and of what its flags choose."""
    named = [name_of(text) for _, _, text in config.chosen if is_object(name_of(text))]
    if len(page_of(submission.trainer).command) > 1:
        named.append(submission.trainer)
    tops = sorted({name.partition(":")[0].partition(".")[0] for name in named})
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return [top for top in tops if not any((locate(top) or Path()).is_relative_to(place) for place in installed)]


def check_flags(submission: Submission) -> Config:
    """Checks the trainer's flags, and returns its configuration.

    Raises:
      BadConfiguration: a flag is wrong, or is set by the launcher.
    """
    for flag in submission.flags:
        if re.match("--?flagfile", flag):
            raise BadConfiguration(
                f"{flag} is read where the trainer runs, not here; write out the flags that it holds"
            )
    with _found_here():
        page = page_of(submission.trainer)
        config = config_from(["trainer", *submission.trainer_flags], "", page.settings)
    if Path(page.command[0]).parent != TRAINERS:
        raise BadConfiguration(
            f"--trainer {submission.trainer} is a path of this machine, which pods do not have; "
            "name a module that the image holds, e.g. my_pkg.my_loop"
        )
    own = {"strategy": submission.strategy, "run_dir": submission.run_dir, "mode": "train", "resume": "auto"}
    for name, value in own.items():
        if getattr(config, name) != value:
            raise BadConfiguration(f"--{name} {getattr(config, name)}: the launcher sets it to {value}; leave it out")
    data = paths.location(config.dataset)
    if submission.run_store and data and not paths.is_address(data):
        raise BadConfiguration(
            f"--dataset {config.dataset} is a path, which pods without a claim do not have; "
            f"{how_to_bring(split_name(config.dataset)[1], submission.run_store)}"
        )
    for field in config.fields():
        path = getattr(config, field.name)
        if field.metadata.get("path") and path and submission.run_store:
            raise BadConfiguration(
                f"--{field.name} {path} is a path, which pods without a claim do not have; leave it out"
            )
        if field.metadata.get("path") and path and not path.startswith(f"{RUNS}/"):
            raise BadConfiguration(
                f"--{field.name} {path} is a path of this machine, which pods do not have; {how_to_bring(path, '')}"
            )
    return config


def replicas_of_node(submission: Submission, config: Config) -> int:
    """Replicas of each node.

    Raises:
      BadConfiguration: they are more than its GPUs.
    """
    if not submission.gpus:
        return (config.replicas or DEFAULT_CPU_REPLICAS) if submission.nodes == 1 else 1
    if config.replicas > submission.gpus:
        raise BadConfiguration(f"--replicas {config.replicas} is above --gpus_per_node {submission.gpus}; use fewer")
    return config.replicas or submission.gpus


def _missing_data(submission: Submission, config: Config) -> list[str]:
    """A line of the plan where the data do not come with the image: pods have no way out to download them."""
    if not is_downloaded(config.dataset) or config.data_dir != f"{submission.run_store or RUNS}/{FOLDER}":
        return []
    store = f" --run_store={submission.run_store}" if submission.run_store else ""
    command = f"launch/k8s.py data --dataset={config.dataset} --image=…{store}"
    return [f"data       {config.dataset} must be in {config.data_dir}, once for all runs: {command}"]


def check(submission: Submission, allow_tag: bool) -> list[str]:
    """Checks a submission without a cluster. Returns its plan.

    Raises:
      BadConfiguration: a name, a size, an image or a flag of the trainer is wrong.
    """
    for name, value, low in (("nodes", submission.nodes, 1), ("gpus_per_node", submission.gpus, 0)):
        if value < low:
            raise BadConfiguration(f"--{name} {value} is below {low}; pass {low} or more")
    check_name(submission)
    if not allow_tag and not has_digest(submission.image):
        raise BadConfiguration(
            f"--image {submission.image} has no digest, so what runs may change; pass IMAGE@sha256:…, or --allow_tag"
        )
    config = check_flags(submission)
    each = replicas_of_node(submission, config)
    replicas = submission.nodes * each
    share = check_batch(config, replicas)
    what = f"model      {config.model}" if submission.trainer == SUPERVISED else f"loop       {submission.trainer}"
    packages = own_packages(submission, config)
    length = f"{config.train_steps} steps" if config.train_steps else f"{config.train_epochs:g} epochs"
    kind = "JobSet" if submission.backend == "jobset" else "Indexed Job"
    node = f"{submission.gpus} GPU{'s' if submission.gpus > 1 else ''}" if submission.gpus else f"{each} CPU devices"
    return [
        f"run        {submission.name} in namespace {submission.namespace}: {kind}"
        + (f", queue {submission.queue}" if submission.queue else "")
        + (", with an evaluator" if submission.evaluator else ""),
        f"nodes      {submission.nodes} × {node} = {replicas} replicas, --strategy={submission.strategy}",
        f"batch      {config.batch_size} examples = {replicas} × {share}",
        f"{what} on {config.dataset}, {length}",
        f"run_dir    {submission.run_dir}{'' if submission.run_store else ' on the claim runs'}",
        *_missing_data(submission, config),
        *(f"package    {name} must be in the image: launch/image.sh --with={name}" for name in packages),
    ]
