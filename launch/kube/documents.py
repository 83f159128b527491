"""What `launch/k8s.py` changes in rendered manifests, and how it reads them; free of kubectl and a cluster.

Documents are what YAML holds: nested dicts and lists, as `kubectl kustomize` renders them.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.kube.submission import PLACEHOLDER, RUNS, Submission, check_flags
from trainers.record.reading import RUN_AFTER
from trainers.world.cluster import Cluster, from_environment

Document = dict[str, Any]
INSTANCE, COMPONENT = "app.kubernetes.io/instance", "app.kubernetes.io/component"
JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
# What the cluster gives a pod beside its template.
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
SUBMISSION = "lockstep/submission"
GPU = "nvidia.com/gpu"
EVALUATOR = "evaluator"
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def kustomization(submission: Submission, folder: str) -> Document:
    """The kustomization that a submission renders; `folder`: the path to `k8s/`."""
    overlay = "smoke" if not submission.gpus else "single-node" if submission.nodes == 1 else "multi-node"
    # JobSet copies the pod, so what changes it comes before; a queue takes what is there.
    wanted = {"metrics": submission.metrics, "rdma": submission.rdma, "evaluator": submission.evaluator}
    wanted |= {"store": bool(submission.run_store), "jobset": submission.backend == "jobset"}
    wanted["kueue"] = bool(submission.queue)
    return composed(folder, overlay, wanted)


def composed(folder: str, overlay: str, wanted: Mapping[str, bool]) -> Document:
    """The kustomization of an overlay of `k8s/` and of those components that are wanted, in their order."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{folder}/overlays/{overlay}"],
        "components": [f"{folder}/components/{name}" for name, is_wanted in wanted.items() if is_wanted],
    }


def workloads(documents: Sequence[Document]) -> Iterator[tuple[Document, Document, Document]]:
    """`(document, spec of the Job or Deployment, pod template)` for each document that makes pods."""
    for document in documents:
        if document["kind"] in ("Job", "Deployment"):
            yield document, document["spec"], document["spec"]["template"]
        if document["kind"] == "JobSet":
            for job in document["spec"]["replicatedJobs"]:
                yield document, job["template"]["spec"], job["template"]["spec"]["template"]


def is_trainer(template: Document) -> bool:
    """Whether a pod template is that of a run's workers."""
    return template["metadata"]["labels"].get(COMPONENT) == "trainer"


def flag_of(template: Document, name: str) -> str:
    """The value of a trainer's flag, the last that is given."""
    words = template["spec"]["containers"][0].get("args", ())
    pairs = [(word, following) for word, following in zip(words, [*words[1:], ""], strict=True)]
    values = [w.split("=", 1)[1] if "=" in w else after for w, after in pairs if re.match(rf"--?{name}(=|$)", w)]
    return values[-1] if values else ""


def tailored(documents: Sequence[Document], submission: Submission, now: str) -> list[Document]:
    """Rendered documents as those of a run: its name, image, size, flags and queue. `now`: as run.json has times."""
    documents = named(documents, submission.name, submission.namespace)
    for document in documents:
        if document["kind"] in ("Job", "JobSet"):
            document["metadata"].setdefault("annotations", {})[SUBMISSION] = submission.text()
            if submission.queue:
                document["metadata"]["labels"][QUEUE_LABEL] = submission.queue
    for _, spec, template in workloads(documents):
        template["spec"]["containers"][0]["image"] = submission.image
        if is_trainer(template):
            _tailor_trainer(spec, template, submission)
        else:
            _tailor_evaluator(template, submission, now)
    return documents


def named(documents: Sequence[Document], name: str, namespace: str) -> list[Document]:
    """Copies of rendered documents under a name of their own, and in a namespace."""
    documents = copy.deepcopy(list(documents))
    for document in documents:
        metadata = document["metadata"]
        metadata["name"] = name + metadata["name"].removeprefix(PLACEHOLDER)
        metadata["namespace"] = namespace
        _rename_instances(document, name)
    return documents


def _tailor_trainer(spec: Document, template: Document, submission: Submission) -> None:
    """Size and flags of the workers."""
    container = template["spec"]["containers"][0]
    spec["completions"] = spec["parallelism"] = submission.nodes
    template["spec"]["subdomain"] = submission.name
    container["args"] = submission.trainer_flags
    if submission.command:
        container["command"] = submission.command
    if submission.gpus:
        for kind in ("requests", "limits"):
            container["resources"][kind][GPU] = str(submission.gpus)
    values = {"NUM_WORKERS": str(submission.nodes), "WORKER_DOMAIN": submission.name}
    for variable in container["env"]:
        if variable["name"] in values:
            variable["value"] = values[variable["name"]]


def _tailor_evaluator(template: Document, submission: Submission, now: str) -> None:
    """The run that the evaluator follows, and since when; a small one where the run has no GPUs."""
    container = template["spec"]["containers"][0]
    container["args"] = [arg.replace(f"{RUNS}/{PLACEHOLDER}", submission.run_dir) for arg in container["args"]]
    if submission.run_store:
        container["args"].append(f"--cache_dir={RUNS}/cache")
    config = check_flags(submission)
    container["args"] += config.flag_lines(config.own_objects)  # which an evaluator imports only if it is told to
    if submission.command:
        container["command"] = submission.command
    container.setdefault("env", []).append({"name": RUN_AFTER, "value": now})
    if not submission.gpus:
        container["resources"] = {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}


def _rename_instances(value: Any, name: str) -> None:
    """Puts a run's name into its labels and selectors, so that two runs share none."""
    if isinstance(value, dict):
        if value.get(INSTANCE) == PLACEHOLDER:
            value[INSTANCE] = name
        for inner in value.values():
            _rename_instances(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _rename_instances(inner, name)


def job_name(document: Document) -> str:
    """The name of the Job whose pods train: of a JobSet, that of its only child."""
    return document["metadata"]["name"] + ("-worker-0" if document["kind"] == "JobSet" else "")


def environment(document: Document, template: Document, index: int) -> dict[str, str]:
    """What a worker's container finds in its environment."""
    values = {"JOB_COMPLETION_INDEX": str(index)}
    for variable in template["spec"]["containers"][0].get("env", ()):
        path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        values[variable["name"]] = job_name(document) if JOB_NAME_LABEL in path else variable.get("value", "")
    return values


def clusters(documents: Sequence[Document]) -> list[Cluster]:
    """What each worker of a run will find, as the trainer itself reads it."""
    return [
        from_environment(environment(document, template, index))
        for document, spec, template in workloads(documents)
        if is_trainer(template)
        for index in range(spec["completions"])
    ]


def size(quantity: str) -> float:
    """A quantity of memory, in bytes."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity)).groups()
    return float(number) * _UNITS[unit]
