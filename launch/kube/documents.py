"""What `launch/k8s.py` does to rendered manifests, and the rules that they must keep; free of kubectl and a cluster.

Documents are what YAML holds: nested dicts and lists, as `kubectl kustomize` renders them.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainers.record.run_record import RUN_AFTER
from trainers.settings.exit_codes import NEVER_RETRIED, RETRIED_FREE, BadConfiguration
from trainers.world import cluster

Document = dict[str, Any]
# What stands in k8s/ for the name of a run.
PLACEHOLDER = "lockstep"
INSTANCE, COMPONENT = "app.kubernetes.io/instance", "app.kubernetes.io/component"
JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
SUBMISSION = "lockstep/submission"
GPU = "nvidia.com/gpu"
RUNS = "/work/runs"
SERVICE_ACCOUNT, CLAIM, EVALUATOR = "lockstep", "runs", "evaluator"
# What k8s/setup and the claim's folder for data are called; a run of that name would take their place.
RESERVED = ("names", "deny-all", "tensorboard", "data")
# Longest name of a host or a label's value (RFC 1123).
LONGEST_NAME = 63
LEAST_GRACE_SECONDS = 120
# What Kubernetes adds to the name of a pod, and JobSet counts.
_RANDOM_SUFFIX = len("-abcde")
# How long workers wait for each other where a node or an image may take its time.
STARTUP_SECONDS = 3600
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECRET = re.compile(r"(password|passwd|secret|token|credential|api_?key|access_?key)", re.IGNORECASE)
_RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
_RESTRICTED_VOLUMES |= {"secret", "name"}


@dataclasses.dataclass(frozen=True)
class Submission:
    """What a user asks for. `gpus`: of each node; 0 = CPUs. `flags`: the trainer's, without those that are set here."""

    name: str
    nodes: int
    gpus: int
    image: str
    flags: tuple[str, ...] = ()
    backend: str = "job"
    queue: str = ""
    rdma: bool = False
    evaluator: bool = False
    namespace: str = PLACEHOLDER

    @property
    def run_dir(self) -> str:
        """Where the run lies on the claim."""
        return f"{RUNS}/{self.name}"

    @property
    def strategy(self) -> str:
        """One pod needs no workers to talk to."""
        return "mirrored" if self.nodes == 1 else "multi_worker"

    @property
    def trainer_flags(self) -> list[str]:
        """The trainer's command line."""
        own = [f"--strategy={self.strategy}", f"--run_dir={self.run_dir}", f"--data_dir={RUNS}/data"]
        return [*own, f"--startup_timeout={STARTUP_SECONDS}", *self.flags]

    def text(self) -> str:
        """As JSON, for an annotation."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> "Submission":
        """What `text` gave."""
        values = json.loads(text)
        return cls(**values | {"flags": tuple(values["flags"])})


def check_name(submission: Submission) -> None:
    """Checks the name of a run.

    Raises:
      BadConfiguration: it is no DNS label, or its pods' names would be too long.
    """
    name, last = submission.name, submission.nodes - 1
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise BadConfiguration(
            f"--name {name!r} is no DNS label; use lower-case letters, digits and '-', beginning with a letter"
        )
    if name in RESERVED or re.search(r"-(evaluator|worker-[0-9]+)$", name):
        raise BadConfiguration(
            f"--name {name} is one that k8s/ uses itself ({', '.join(RESERVED)}, …-evaluator, …-worker-N); take another"
        )
    suffix = _RANDOM_SUFFIX if submission.backend == "jobset" else 0
    longest = max(len(host_name(submission, last)) + suffix, len(f"{name}-evaluator") if submission.evaluator else 0)
    if longest > LONGEST_NAME:
        raise BadConfiguration(
            f"--name {name} gives a pod a name of {longest} characters; {LONGEST_NAME} are allowed; "
            f"use {longest - LONGEST_NAME} fewer"
        )


def host_name(submission: Submission, index: int) -> str:
    """The host name of a worker's pod."""
    return f"{submission.name}{'-worker-0' if submission.backend == 'jobset' else ''}-{index}"


def kustomization(submission: Submission, folder: str) -> Document:
    """The kustomization that a submission renders; `folder`: the way to `k8s/`."""
    overlay = "smoke" if not submission.gpus else "single-node" if submission.nodes == 1 else "multi-node"
    # JobSet copies the pod, so what changes it comes before; a queue takes what is there.
    wanted = {"rdma": submission.rdma, "evaluator": submission.evaluator, "jobset": submission.backend == "jobset"}
    wanted["kueue"] = bool(submission.queue)
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


def tailored(documents: Sequence[Document], submission: Submission, now: str) -> list[Document]:
    """Rendered documents as those of one run: its name, image, size, flags and queue. `now`: as run.json has times."""
    documents = copy.deepcopy(list(documents))
    for document in documents:
        metadata = document["metadata"]
        metadata["name"] = submission.name + metadata["name"].removeprefix(PLACEHOLDER)
        metadata["namespace"] = submission.namespace
        _rename_instances(document, submission.name)
        if document["kind"] in ("Job", "JobSet"):
            metadata.setdefault("annotations", {})[SUBMISSION] = submission.text()
            if submission.queue:
                metadata["labels"][QUEUE_LABEL] = submission.queue
    for _, spec, template in workloads(documents):
        container = template["spec"]["containers"][0]
        container["image"] = submission.image
        if not is_trainer(template):
            container["args"] = [arg.replace(f"{RUNS}/{PLACEHOLDER}", submission.run_dir) for arg in container["args"]]
            container.setdefault("env", []).append({"name": RUN_AFTER, "value": now})
            if not submission.gpus:
                container["resources"] = {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
            continue
        spec["completions"] = spec["parallelism"] = submission.nodes
        template["spec"]["subdomain"] = submission.name
        container["args"] = submission.trainer_flags
        if submission.gpus:
            for kind in ("requests", "limits"):
                container["resources"][kind][GPU] = str(submission.gpus)
        values = {"NUM_WORKERS": str(submission.nodes), "WORKER_DOMAIN": submission.name}
        for variable in container["env"]:
            if variable["name"] in values:
                variable["value"] = values[variable["name"]]
    return documents


def _rename_instances(value: Any, name: str) -> None:
    """Labels and selectors of a run bear its name, so that two runs share none."""
    if isinstance(value, dict):
        if value.get(INSTANCE) == PLACEHOLDER:
            value[INSTANCE] = name
        for inner in value.values():
            _rename_instances(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _rename_instances(inner, name)


def job_name(document: Document) -> str:
    """The name of the Job whose pods train: of a JobSet, that of its one child."""
    return document["metadata"]["name"] + ("-worker-0" if document["kind"] == "JobSet" else "")


def environment(document: Document, template: Document, index: int) -> dict[str, str]:
    """What a worker's container finds in its environment."""
    found = {"JOB_COMPLETION_INDEX": str(index)}
    for variable in template["spec"]["containers"][0].get("env", ()):
        path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        found[variable["name"]] = job_name(document) if JOB_NAME_LABEL in path else variable.get("value", "")
    return found


def clusters(documents: Sequence[Document]) -> list[cluster.Cluster]:
    """What each worker of a run will find, as the trainer itself reads it."""
    return [
        cluster.resolve(environment(document, template, index))
        for document, spec, template in workloads(documents)
        if is_trainer(template)
        for index in range(spec["completions"])
    ]


def size(quantity: str) -> float:
    """A quantity of memory, in bytes."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity)).groups()
    return float(number) * _UNITS[unit]


# ----------------------------------------------------------------------------------------------------------------------
# Rules that no schema knows. Each takes all documents of a run and yields what is wrong.


def _trainers(documents: Sequence[Document]) -> Iterator[tuple[Document, Document, Document]]:
    return (found for found in workloads(documents) if is_trainer(found[2]))


def _flag(template: Document, name: str) -> str:
    """The value of a trainer's flag, the last that is given."""
    words = template["spec"]["containers"][0].get("args", ())
    return next((w.split("=", 1)[1] for w in reversed(words) if re.match(rf"--?{name}=", w)), "")


def _sizes(documents: Sequence[Document]) -> Iterator[str]:
    for document, spec, template in _trainers(documents):
        workers = environment(document, template, 0).get("NUM_WORKERS")
        found = spec.get("completions"), spec.get("parallelism"), workers
        if len({str(one) for one in found}) != 1:
            yield f"completions, parallelism and NUM_WORKERS are {found}; they must be one number"
        if spec.get("completionMode") != "Indexed":
            yield "completionMode is not Indexed: pods would have no index"
        given = _flag(template, "strategy")
        if workers != "1" and given != "multi_worker":
            yield f"{workers} workers, but the strategy {given}: each would train a run of its own"
        instance = template["metadata"]["labels"].get(INSTANCE)
        if _flag(template, "run_dir") != f"{RUNS}/{instance}":
            yield f"run_dir is {_flag(template, 'run_dir')}, not {RUNS}/{instance}"


def _names(documents: Sequence[Document]) -> Iterator[str]:
    services = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Service"}
    for document, _, template in _trainers(documents):
        name, subdomain = document["metadata"]["name"], template["spec"].get("subdomain")
        domain = environment(document, template, 0).get("WORKER_DOMAIN")
        if not name == subdomain == domain:
            yield f"the name {name}, subdomain {subdomain} and WORKER_DOMAIN {domain} are not one"
        if subdomain not in services:
            yield f"no Service bears the name of the subdomain {subdomain}: pods would have no names"
            continue
        service = services[subdomain]
        if service.get("clusterIP") != "None":
            yield f"Service {subdomain} is not headless: its name would be one address for all workers"
        if not service.get("publishNotReadyAddresses"):
            yield f"Service {subdomain} has no publishNotReadyAddresses: workers could not find each other at the start"
        try:
            found = clusters([document])
        except BadConfiguration as error:
            yield str(error)
            continue
        for one in found:
            host = one.addresses[one.index].split(":")[0]
            expected = f"{job_name(document)}-{one.index}.{subdomain}"
            if host != expected:
                yield f"worker {one.index} calls itself {host}, its pod is {expected}"
            if len(host.split(".")[0]) > LONGEST_NAME:
                yield f"host name {host.split('.')[0]} is longer than {LONGEST_NAME} characters"


def _matches(selector: Mapping[str, str], template: Document) -> bool:
    labels = template["metadata"]["labels"]
    return all(labels.get(key) == value for key, value in selector.items())


def _selectors(documents: Sequence[Document]) -> Iterator[str]:
    trainers = [template for _, _, template in _trainers(documents)]
    for document in documents:
        if INSTANCE not in document["metadata"].get("labels", {}):
            continue  # not of a run, but of the namespace
        where, spec = f"{document['kind']} {document['metadata']['name']}", document["spec"]
        found = []
        if document["kind"] == "Service":
            found.append(spec["selector"])
        if document["kind"] == "NetworkPolicy":
            found.append(spec["podSelector"].get("matchLabels", {}))
            for way in (*spec.get("ingress", ()), *spec.get("egress", ())):
                found += [p["podSelector"].get("matchLabels", {}) for p in way.get("from", way.get("to", ()))]
                if way.get("ports"):
                    yield f"{where} names ports: NCCL takes any"
        for selector in found:
            if not selector.get(INSTANCE):
                yield f"{where} selects the pods of other runs too"
            if not all(_matches(selector, template) for template in trainers):
                yield f"{where} selects no pod of the run"
    for template in trainers:
        yield from _reach(documents, template)
        affinity = template["spec"].get("affinity", {}).get("podAntiAffinity", {})
        on_gpus = GPU in template["spec"]["containers"][0].get("resources", {}).get("limits", {})
        if on_gpus and _flag(template, "strategy") == "multi_worker" and not affinity:
            yield "no anti-affinity: two workers could share a node"
        for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution", ()):
            if not _matches(term["labelSelector"]["matchLabels"], template):
                yield "the anti-affinity does not select the run's own pods: two workers could share a node"


def _reach(documents: Sequence[Document], template: Document) -> Iterator[str]:
    """Under a policy that denies everything, one of the run's own must let its pods reach each other, both ways."""
    ways = {"from": "ingress", "to": "egress"}
    found = set()
    for document in documents:
        if document["kind"] != "NetworkPolicy" or not _matches(
            document["spec"]["podSelector"].get("matchLabels", {}), template
        ):
            continue
        for end, way in ways.items():
            peers = [peer for rule in document["spec"].get(way, ()) for peer in rule.get(end, ())]
            if any(_matches(peer.get("podSelector", {}).get("matchLabels", {}), template) for peer in peers):
                found.add(way)
    for way in sorted(set(ways.values()) - found):
        yield f"no NetworkPolicy allows the {way} of the run's own pods"


def _fates(documents: Sequence[Document]) -> Iterator[str]:
    """The fate of each exit code is what `trainers/settings/exit_codes.py` says."""
    for document, spec, template in workloads(documents):
        if document["kind"] == "Deployment":
            continue
        where, container = document["metadata"]["name"], template["spec"]["containers"][0]["name"]
        free = "FailJob" if document["kind"] == "JobSet" else "Ignore"
        # In a JobSet a free retry is a restart of all, which the JobSet decides by the index of the rule.
        expected = [(free, "disruption"), (free, list(RETRIED_FREE)), ("FailJob", list(NEVER_RETRIED))]
        found = []
        for rule in spec.get("podFailurePolicy", {}).get("rules", ()):
            codes = rule.get("onExitCodes", {})
            if codes and (codes.get("operator"), codes.get("containerName")) != ("In", container):
                yield f"{where}: a rule for exit codes is not for container {container}"
            conditions = rule.get("onPodConditions", ())
            if conditions and conditions != [{"type": "DisruptionTarget", "status": "True"}]:
                yield f"{where}: a rule for conditions is not for a DisruptionTarget that is True"
            found.append((rule["action"], codes["values"] if codes else "disruption"))
        if found != expected:
            yield f"{where}: podFailurePolicy is {found}; trainers/settings/exit_codes.py wants {expected}"
        if template["spec"].get("restartPolicy") != "Never":
            yield f"{where}: restartPolicy is not Never, which podFailurePolicy needs"
        if spec.get("podReplacementPolicy") != "Failed":
            yield f"{where}: podReplacementPolicy is not Failed: two pods could have one index"
        if document["kind"] == "JobSet":
            yield from _fates_of_jobset(document, spec)
        elif is_trainer(template):
            if spec.get("backoffLimit") is not None or not spec.get("backoffLimitPerIndex"):
                yield f"{where}: backoffLimit, not backoffLimitPerIndex: an incident would burn one for each worker"
            if spec.get("maxFailedIndexes") != 0:
                yield f"{where}: maxFailedIndexes is not 0: the others would go on without a worker"
        if is_trainer(template) and spec.get("successPolicy") != {"rules": [{"succeededIndexes": "0"}]}:
            yield f"{where}: successPolicy is not that worker 0, the chief, has succeeded"
        if not spec.get("activeDeadlineSeconds"):
            yield f"{where}: no activeDeadlineSeconds: a run could hold its nodes for ever"


def _fates_of_jobset(document: Document, spec: Document) -> Iterator[str]:
    where, policy = document["metadata"]["name"], document["spec"].get("failurePolicy", {})
    never = len(spec.get("podFailurePolicy", {}).get("rules", ())) - 1
    reason = ["PodFailurePolicy"]
    expected = [
        {"action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
        {
            "action": "FailJobSet",
            "onJobFailureReasons": reason,
            "onJobFailureMessagePatterns": [f"matching FailJob rule at index {never}$"],
        },
        {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": reason},
    ]
    found = [{key: value for key, value in rule.items() if key != "name"} for rule in policy.get("rules", ())]
    if found != expected:
        yield f"{where}: the JobSet's failurePolicy is {found}; it must be {expected}"
    if [job.get("replicas", 1) for job in document["spec"]["replicatedJobs"]] != [1]:
        yield f"{where}: not one Job with all workers: their names would be others"
    if document["spec"].get("network", {}).get("enableDNSHostnames") is not False:
        yield f"{where}: JobSet would give the pods another subdomain than the Service's"
    if not policy.get("maxRestarts"):
        yield f"{where}: no maxRestarts: the first lost worker would end the run"
    if spec.get("backoffLimit") != 0:
        yield f"{where}: backoffLimit is not 0: one pod would be started again alone"


def _security(documents: Sequence[Document]) -> Iterator[str]:
    """The restricted Pod Security Standard, and what it leaves open."""
    for document, _, template in workloads(documents):
        where, spec = document["metadata"]["name"], template["spec"]
        pod = spec.get("securityContext", {})
        if not pod.get("runAsNonRoot") or not pod.get("runAsUser"):
            yield f"{where}: the pod may run as root"
        if pod.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{where}: no seccompProfile"
        if any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{where}: the pod shares a namespace of its host"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{where}: the pod gets a token"
        if spec.get("serviceAccountName") != SERVICE_ACCOUNT:
            yield f"{where}: the pod does not run as {SERVICE_ACCOUNT}, which k8s/setup makes"
        volumes = spec.get("volumes", ())
        claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]
        if claims != [CLAIM]:
            yield f"{where}: the pod's claims are {claims}, not {CLAIM}, which k8s/setup makes"
        for volume in spec.get("volumes", ()):
            if unfit := volume.keys() - _RESTRICTED_VOLUMES:
                yield f"{where}: a volume of kind {sorted(unfit)[0]}"
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            own = container.get("securityContext", {})
            if own.get("runAsUser") == 0 or own.get("runAsNonRoot") is False:
                yield f"{where}: {container['name']} may run as root"
            if own.get("seccompProfile", {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
                yield f"{where}: {container['name']} has no seccompProfile"
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{where}: {container['name']} may gain privileges"
            if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
                yield f"{where}: {container['name']} keeps capabilities"
            if not own.get("readOnlyRootFilesystem"):
                yield f"{where}: {container['name']} may write to its root file system"
            if any("hostPort" in port for port in container.get("ports", ())):
                yield f"{where}: {container['name']} takes a port of its host"
            mounts = {mount["mountPath"] for mount in container.get("volumeMounts", ())}
            needed = {"/tmp", RUNS, *(["/dev/shm"] if is_trainer(template) else [])}
            if absent := sorted(needed - mounts):
                yield f"{where}: {container['name']} has no volume at {absent[0]}"
            yield from _secrets(where, container)


def _secrets(where: str, container: Document) -> Iterator[str]:
    for argument in container.get("args", ()):
        if _SECRET.search(argument.split("=")[0]):
            yield f"{where}: the argument {argument.split('=')[0]} looks like a secret; put it into a Secret"
    for variable in container.get("env", ()):
        if _SECRET.search(variable["name"]) and "value" in variable:
            yield f"{where}: the variable {variable['name']} looks like a secret; take it from a Secret"


def _resources(documents: Sequence[Document]) -> Iterator[str]:
    for document, _, template in workloads(documents):
        where, spec = document["metadata"]["name"], template["spec"]
        for container in spec["containers"]:
            requests, limits = (container.get("resources", {}).get(kind, {}) for kind in ("requests", "limits"))
            if not requests.get("cpu") or not requests.get("memory") or not limits.get("memory"):
                yield f"{where}: {container['name']} does not say how much CPU and memory it needs"
                continue
            for name in {*requests, *limits}:
                if "/" in name and requests.get(name) != limits.get(name):
                    yield f"{where}: {name} differs between requests and limits"
            for volume in spec.get("volumes", ()):
                held = volume.get("emptyDir", {})
                if held.get("medium") != "Memory":
                    continue
                if "sizeLimit" not in held:
                    yield f"{where}: a volume in memory has no sizeLimit"
                elif size(held["sizeLimit"]) > size(limits["memory"]) / 2:
                    yield f"{where}: /dev/shm may take more than half of the memory limit"
        grace = spec.get("terminationGracePeriodSeconds", 30)
        if document["kind"] != "Deployment" and grace < LEAST_GRACE_SECONDS:
            yield f"{where}: terminationGracePeriodSeconds {grace} is below {LEAST_GRACE_SECONDS}: too short for a save"


def _images(documents: Sequence[Document]) -> Iterator[str]:
    for document, _, template in workloads(documents):
        for container in template["spec"]["containers"]:
            if not re.search(r"@sha256:[0-9a-f]{64}$", container["image"]):
                yield f"{document['metadata']['name']}: the image {container['image']} has no digest"


def _setup(documents: Sequence[Document]) -> Iterator[str]:
    """What a namespace of runs must have; nothing for the documents of a run."""
    namespaces = [document for document in documents if document["kind"] == "Namespace"]
    if not namespaces:
        return
    if namespaces[0]["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "the Namespace does not enforce the restricted Pod Security Standard"
    templates = [template for _, _, template in workloads(documents)]
    policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    closed = [one for one in policies if not one["podSelector"] and not {"ingress", "egress"} & one.keys()]
    if not any(set(one["policyTypes"]) == {"Ingress", "Egress"} for one in closed):
        yield "no NetworkPolicy denies what no other one allows"
    for document in documents:
        if document["kind"] == "Service" and not any(_matches(document["spec"]["selector"], t) for t in templates):
            yield f"Service {document['metadata']['name']} selects no pod"


RULES: dict[str, Callable[[Sequence[Document]], Iterator[str]]] = {
    "sizes": _sizes,
    "names": _names,
    "selectors": _selectors,
    "fates": _fates,
    "security": _security,
    "resources": _resources,
    "setup": _setup,
    "images": _images,
}


def problems(documents: Sequence[Document], without: Sequence[str] = ()) -> list[str]:
    """What is wrong with the documents of a run, by every rule but those named in `without`; empty if nothing is."""
    return [found for name, rule in RULES.items() if name not in without for found in rule(documents)]
