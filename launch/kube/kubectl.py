"""kubectl as a program, and through it the objects of a run in a cluster: rendered, found, given, removed."""

import datetime
import functools
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from launch.kube import data_jobs
from launch.kube.data_jobs import DataJob, is_data
from launch.kube.documents import INSTANCE, SUBMISSION, Document, kustomization, tailored
from launch.kube.submission import PLACEHOLDER, RUNS, Submission
from trainers.settings.exit_codes import BadConfiguration

MANIFESTS = Path(__file__).resolve().parents[2] / "k8s"
REQUEST_TIMEOUT = "--request-timeout=30s"
# What kubectl prints where no cluster answers, and where a kind of object is not installed.
NO_CLUSTER = ("was refused", "no such host", "i/o timeout", "Unable to connect", "current-context", "no route to host")
NO_KIND = "the server doesn't have a resource type"
LONGEST_MESSAGE = 400


class Kubectl:
    """kubectl, with a context and a namespace.

    Raises:
      BadConfiguration: it is not installed.
    """

    def __init__(self, context: str, namespace: str):
        program = shutil.which("kubectl")
        if program is None:
            raise BadConfiguration("kubectl is not on the PATH; install it, 1.31 or newer")
        self.namespace = namespace
        self._base = [program, *(["--context", context] if context else [])]

    def words(self, *words: str) -> list[str]:
        """The command line of a call in the namespace."""
        return [*self._base, "--namespace", self.namespace, *words]

    def run(self, *words: str, text: str | None = None) -> subprocess.CompletedProcess:
        """Runs kubectl in the namespace, with `text` on its standard input, and captures what it prints."""
        return subprocess.run(self.words(*words), input=text, capture_output=True, text=True, check=False)

    def call(self, *words: str, text: str | None = None) -> str:
        """As `run`; returns what it printed on standard output.

        Raises:
          BadConfiguration: kubectl or the cluster has refused.
        """
        done = self.run(*words, text=text)
        if done.returncode:
            raise BadConfiguration(_reason(words, done.stderr))
        return done.stdout

    def objects(self, *words: str) -> list[Document]:
        """The items that a `get` returns."""
        return json.loads(self.call("get", *words, "--output=json", REQUEST_TIMEOUT) or "{}").get("items", [])

    def find(self, kind: str, name: str) -> Document | None:
        """The object of a kind and a name, if there is one."""
        answer = self.call("get", kind, name, "--ignore-not-found", "--output=json", REQUEST_TIMEOUT)
        return json.loads(answer) if answer.strip() else None

    @functools.cached_property
    def has_jobsets(self) -> bool:
        """Whether the cluster knows JobSet."""
        words = ("get", "jobsets", "--output=name", REQUEST_TIMEOUT)
        done = self.run(*words)
        if done.returncode and NO_KIND not in done.stderr:
            raise BadConfiguration(_reason(words, done.stderr))
        return done.returncode == 0

    def render(self, submission: Submission) -> list[Document]:
        """The documents of a submission, rendered from `k8s/`; asks no cluster."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return tailored(self.rendered(lambda folder: kustomization(submission, folder)), submission, now)

    def render_data(self, job: DataJob) -> list[Document]:
        """The documents of a Job for data; asks no cluster."""
        return data_jobs.tailored(self.rendered(lambda folder: data_jobs.kustomization(job, folder)), job)

    def rendered(self, kustomization_in: Callable[[str], Document]) -> list[Document]:
        """What a kustomization renders to, given the path to `k8s/`; asks no cluster."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.relpath(MANIFESTS, Path(folder).resolve())
            (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization_in(path)))
            done = subprocess.run([*self._base, "kustomize", folder], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BadConfiguration(f"kubectl kustomize has failed: {_one_line(done.stderr)}")
        return [document for document in yaml.safe_load_all(done.stdout) if document]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST_MESSAGE]


def _reason(words: Sequence[str], message: str) -> str:
    """A line for a call that has failed, by what kubectl printed."""
    line = _one_line(message)
    if any(sign in message for sign in NO_CLUSTER):
        return f"no cluster answers ({line}); set KUBECONFIG or --context, and look with: kubectl cluster-info"
    if "forbidden" in message.lower():
        return f"the cluster does not allow it ({line}); ask for the right, or take another --namespace"
    return f"kubectl {shlex.join(words[:2])} has failed: {line}"


def as_yaml(documents: Sequence[Document]) -> str:
    """Objects as kubectl takes them."""
    return yaml.safe_dump_all(documents, sort_keys=False)


# ----------------------------------------------------------------------------------------------------------------------
# The objects of a run.


def selector(name: str) -> str:
    """What selects all objects and pods of a run."""
    return f"--selector=app.kubernetes.io/name={PLACEHOLDER},{INSTANCE}={name}"


def workload_of(kubectl: Kubectl, name: str) -> Document | None:
    """The Job or JobSet of a run, if it is in the cluster."""
    kinds = ("jobsets", "jobs") if kubectl.has_jobsets else ("jobs",)
    return next(filter(None, (kubectl.find(kind, name) for kind in kinds)), None)


def existing(kubectl: Kubectl, name: str) -> tuple[Document, Submission]:
    """The Job or JobSet of a run, and what was submitted.

    Raises:
      BadConfiguration: there is none, or it is not of this launcher, or not a run's own.
    """
    workload = workload_of(kubectl, name)
    text = workload["metadata"].get("annotations", {}).get(SUBMISSION) if workload else None
    submission = Submission.from_text(text) if text else None
    if submission is None or submission.name != workload["metadata"]["name"]:
        raise BadConfiguration(
            f"--name {name}: no such run is in namespace {kubectl.namespace}; submit it: with a name that was used it "
            f"continues from {RUNS}/{name}"
        )
    return workload, submission


def known(kubectl: Kubectl, name: str) -> Document:
    """The Job or JobSet of a run or of data.

    Raises:
      BadConfiguration: there is none, or it is not of this launcher.
    """
    workload = workload_of(kubectl, name)
    return workload if workload is not None and is_data(workload) else existing(kubectl, name)[0]


def ended(workload: Document) -> str:
    """How a Job or JobSet has ended, or nothing while it has not."""
    for condition in workload.get("status", {}).get("conditions", ()):
        if condition["type"] in ("Complete", "Completed", "Failed") and condition["status"] == "True":
            message = condition.get("message") or condition.get("reason") or ""
            return f"{condition['type']}: {message}".rstrip(": ")
    return ""


def refuse_without_jobsets(kubectl: Kubectl, submission: Submission) -> None:
    """Raises BadConfiguration if a JobSet is asked for of a cluster that has none."""
    if submission.backend == "jobset" and not kubectl.has_jobsets:
        raise BadConfiguration("--backend=jobset: the cluster has no JobSet; install its controller, or take job")


def refuse_foreign(kubectl: Kubectl, name: str) -> None:
    """Raises BadConfiguration if another owner's Service or NetworkPolicy has the name of a run."""
    for kind in ("service", "networkpolicy"):
        document = kubectl.find(kind, name)
        if document is not None and document["metadata"].get("labels", {}).get(INSTANCE) != name:
            raise BadConfiguration(
                f"--name {name}: namespace {kubectl.namespace} has a {kind} of that name, not of a run; take another"
            )


def apply(kubectl: Kubectl, documents: Sequence[Document]) -> str:
    """Gives the objects of a run to the cluster; its Jobs last, which fails if they are there already."""
    jobs = [document for document in documents if document["kind"] in ("Job", "JobSet")]
    others = [document for document in documents if document not in jobs]
    applied = kubectl.call("apply", "--filename=-", REQUEST_TIMEOUT, text=as_yaml(others)) if others else ""
    return applied + kubectl.call("create", "--filename=-", REQUEST_TIMEOUT, text=as_yaml(jobs))


def remove(kubectl: Kubectl, name: str) -> str:
    """Deletes the objects of a run: its pods first, which save and agree on it, then what they need for that."""
    workloads = "jobset,job" if kubectl.has_jobsets else "job"
    deleted = kubectl.call("delete", workloads, selector(name), "--wait=true", "--cascade=foreground")
    monitors = kubectl.run("delete", "podmonitors", selector(name), REQUEST_TIMEOUT)  # a cluster may not know them
    others = kubectl.call("delete", "service,networkpolicy", selector(name), REQUEST_TIMEOUT)
    return deleted + monitors.stdout + others
