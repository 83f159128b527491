"""Rules that manifests of a run must keep and that no schema knows. Each takes all documents and yields what is wrong.

Free of kubectl and a cluster.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from launch.kube.documents import (
    COMPONENT,
    GPU,
    INDEX_LABEL,
    INSTANCE,
    Document,
    clusters,
    environment,
    flag_of,
    is_trainer,
    job_name,
    size,
    workloads,
)
from launch.kube.names import places, syntax
from launch.kube.submission import LONGEST_NAME, RUNS, has_digest
from trainers.settings import paths
from trainers.settings.exit_codes import NEVER_RETRIED, RETRIED_FREE, BadConfiguration

SERVICE_ACCOUNT, CLAIM, DATA_COMPONENT = "lockstep", "runs", "data"
LEAST_GRACE_SECONDS = 120
_SECRET = re.compile(r"(password|passwd|secret|token|credential|api_?key|access_?key)", re.IGNORECASE)
_RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
_RESTRICTED_VOLUMES |= {"secret", "name"}
_SECCOMP_PROFILES = ("RuntimeDefault", "Localhost")
Problems = Iterator[str]


def problems(documents: Sequence[Document], without: Sequence[str] = ()) -> list[str]:
    """What is wrong with the documents of a run, by every rule but those named in `without`; empty if nothing is."""
    return [problem for name, rule in RULES.items() if name not in without for problem in rule(documents)]


def matches(selector: Mapping[str, str], template: Document) -> bool:
    """Whether labels that are selected are those of a pod template."""
    labels = template["metadata"]["labels"]
    return all(labels.get(key) == value for key, value in selector.items())


def _trainers(documents: Sequence[Document]) -> Iterator[tuple[Document, Document, Document]]:
    return (workload for workload in workloads(documents) if is_trainer(workload[2]))


# ----------------------------------------------------------------------------------------------------------------------
# Who the workers are, and how they find each other.


def _sizes(documents: Sequence[Document]) -> Problems:
    for document, spec, template in _trainers(documents):
        workers = environment(document, template, 0).get("NUM_WORKERS")
        numbers = spec.get("completions"), spec.get("parallelism"), workers
        if len({str(number) for number in numbers}) != 1:
            yield f"completions, parallelism and NUM_WORKERS are {numbers}; they must be equal"
        if spec.get("completionMode") != "Indexed":
            yield "completionMode is not Indexed: pods would have no index"
        strategy = flag_of(template, "strategy")
        if workers != "1" and strategy != "multi_worker":
            yield f"{workers} workers, but the strategy {strategy}: each would train a run of its own"
        instance = template["metadata"]["labels"].get(INSTANCE)
        run_dir = flag_of(template, "run_dir")
        if run_dir != f"{RUNS}/{instance}" and not (paths.is_address(run_dir) and run_dir.endswith(f"/{instance}")):
            yield f"run_dir is {run_dir}, not {RUNS}/{instance}"


def _names(documents: Sequence[Document]) -> Problems:
    services = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Service"}
    for document, _, template in _trainers(documents):
        name, subdomain = document["metadata"]["name"], template["spec"].get("subdomain")
        domain = environment(document, template, 0).get("WORKER_DOMAIN")
        if not name == subdomain == domain:
            yield f"the name {name}, subdomain {subdomain} and WORKER_DOMAIN {domain} must be equal"
        if subdomain not in services:
            yield f"no Service has the name of the subdomain {subdomain}: pods would have no names"
            continue
        service = services[subdomain]
        if service.get("clusterIP") != "None":
            yield f"Service {subdomain} is not headless: its name would be one address for all workers"
        if not service.get("publishNotReadyAddresses"):
            yield f"Service {subdomain} has no publishNotReadyAddresses: workers could not find each other at the start"
        yield from _addresses(document, subdomain)


def _addresses(document: Document, subdomain: str) -> Problems:
    """The addresses that workers expect of each other are those that their pods have."""
    try:
        workers = clusters([document])
    except BadConfiguration as error:
        yield str(error)
        return
    for worker in workers:
        host = worker.addresses[worker.index].split(":")[0]
        expected = f"{job_name(document)}-{worker.index}.{subdomain}"
        if host != expected:
            yield f"worker {worker.index} calls itself {host}, its pod is {expected}"
        if len(host.split(".")[0]) > LONGEST_NAME:
            yield f"host name {host.split('.')[0]} is longer than {LONGEST_NAME} characters"


def _selectors(documents: Sequence[Document]) -> Problems:
    trainers = [template for _, _, template in _trainers(documents)]
    labels = {COMPONENT: DATA_COMPONENT}
    data = [template for _, _, template in workloads(documents) if matches(labels, template)]
    for document in documents:
        if INSTANCE not in document["metadata"].get("labels", {}):
            continue  # not of a run, but of the namespace
        where = f"{document['kind']} {document['metadata']['name']}"
        for selector in _selectors_of(document):
            if not selector.get(INSTANCE):
                yield f"{where} selects the pods of other runs too"
            if not all(matches(selector, template) for template in (data if _is_for_data(document) else trainers)):
                yield f"{where} selects no pod of the run"
        if document["kind"] == "NetworkPolicy":
            rules = (*document["spec"].get("ingress", ()), *document["spec"].get("egress", ()))
            for rule in rules:
                peers = rule.get("from", rule.get("to", ()))
                from_pods = all(peer.keys() == {"podSelector"} for peer in peers)
                if rule.get("ports") and from_pods:
                    yield f"{where} names ports: NCCL takes any"
                if not rule.get("ports") and not from_pods:
                    yield f"{where} names no port: another namespace would reach all of them"
                if any("ipBlock" in peer for peer in peers) and not _is_for_data(document):
                    yield f"{where} lets the run's pods out: only those that prepare data may be"
    for template in trainers:
        yield from _reach(documents, template)
        yield from _affinity(template)


def _is_for_data(document: Document) -> bool:
    """Whether it is a policy for the pods that prepare data."""
    if document["kind"] != "NetworkPolicy":
        return False
    return document["spec"]["podSelector"].get("matchLabels", {}).get(COMPONENT) == DATA_COMPONENT


def _selectors_of(document: Document) -> list[Mapping[str, str]]:
    """The labels by which a Service, a NetworkPolicy or a PodMonitor selects pods of the run."""
    spec, kind = document["spec"], document["kind"]
    if kind == "Service":
        return [spec["selector"]]
    if kind == "PodMonitor":
        labels = spec["selector"].get("matchLabels", {})
        return [{name: value for name, value in labels.items() if name != INDEX_LABEL}]
    if kind != "NetworkPolicy":
        return []
    peers = [peer for rule in spec.get("ingress", ()) for peer in rule.get("from", ())]
    peers += [peer for rule in spec.get("egress", ()) for peer in rule.get("to", ())]
    own = [peer for peer in peers if peer.keys() == {"podSelector"}]
    return [each["podSelector"].get("matchLabels", {}) for each in (spec, *own)]


def _affinity(template: Document) -> Problems:
    """No two workers share a node, if they have GPUs."""
    affinity = template["spec"].get("affinity", {}).get("podAntiAffinity", {})
    on_gpus = GPU in template["spec"]["containers"][0].get("resources", {}).get("limits", {})
    if on_gpus and flag_of(template, "strategy") == "multi_worker" and not affinity:
        yield "no anti-affinity: two workers could share a node"
    for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution", ()):
        if not matches(term["labelSelector"]["matchLabels"], template):
            yield "the anti-affinity does not select the run's own pods: two workers could share a node"


def _reach(documents: Sequence[Document], template: Document) -> Problems:
    """Under a policy that denies everything, one of the run's own must let its pods reach each other, both ways."""
    directions = {"from": "ingress", "to": "egress"}
    allowed = set()
    for document in documents:
        if document["kind"] != "NetworkPolicy" or not matches(
            document["spec"]["podSelector"].get("matchLabels", {}), template
        ):
            continue
        for end, direction in directions.items():
            peers = [peer for rule in document["spec"].get(direction, ()) for peer in rule.get(end, ())]
            if any(matches(peer.get("podSelector", {}).get("matchLabels", {}), template) for peer in peers):
                allowed.add(direction)
    for direction in sorted(set(directions.values()) - allowed):
        yield f"no NetworkPolicy allows the {direction} of the run's own pods"


# ----------------------------------------------------------------------------------------------------------------------
# What happens after each exit code: as trainers/settings/exit_codes.py says.


def _fates(documents: Sequence[Document]) -> Problems:
    for document, spec, template in workloads(documents):
        if document["kind"] == "Deployment":
            continue
        where = document["metadata"]["name"]
        yield from _pod_failure_policy(document, spec, template)
        if template["spec"].get("restartPolicy") != "Never":
            yield f"{where}: restartPolicy is not Never, which podFailurePolicy needs"
        if spec.get("podReplacementPolicy") != "Failed":
            yield f"{where}: podReplacementPolicy is not Failed: two pods could have one index"
        if document["kind"] == "JobSet":
            yield from _fates_of_jobset(document, spec)
        elif is_trainer(template):
            if spec.get("backoffLimit") is not None or not spec.get("backoffLimitPerIndex"):
                yield f"{where}: backoffLimit, not backoffLimitPerIndex: an incident would use up one for each worker"
            if spec.get("maxFailedIndexes") != 0:
                yield f"{where}: maxFailedIndexes is not 0: the others would go on without a worker"
        if is_trainer(template) and spec.get("successPolicy") != {"rules": [{"succeededIndexes": "0"}]}:
            yield f"{where}: successPolicy is not that worker 0, the chief, has succeeded"
        if not spec.get("activeDeadlineSeconds"):
            yield f"{where}: no activeDeadlineSeconds: a run could hold its nodes for ever"


def _pod_failure_policy(document: Document, spec: Document, template: Document) -> Problems:
    where, container = document["metadata"]["name"], template["spec"]["containers"][0]["name"]
    # In a JobSet a free retry is a restart of all, which the JobSet decides by the index of the rule.
    free = "FailJob" if document["kind"] == "JobSet" else "Ignore"
    expected = [(free, "disruption"), (free, list(RETRIED_FREE)), ("FailJob", list(NEVER_RETRIED))]
    actual = []
    for rule in spec.get("podFailurePolicy", {}).get("rules", ()):
        codes = rule.get("onExitCodes", {})
        if codes and (codes.get("operator"), codes.get("containerName")) != ("In", container):
            yield f"{where}: a rule for exit codes is not for container {container}"
        conditions = rule.get("onPodConditions", ())
        if conditions and conditions != [{"type": "DisruptionTarget", "status": "True"}]:
            yield f"{where}: a rule for conditions is not for a DisruptionTarget that is True"
        actual.append((rule["action"], codes["values"] if codes else "disruption"))
    if actual != expected:
        yield f"{where}: podFailurePolicy is {actual}; trainers/settings/exit_codes.py wants {expected}"


def _fates_of_jobset(document: Document, spec: Document) -> Problems:
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
    actual = [{key: value for key, value in rule.items() if key != "name"} for rule in policy.get("rules", ())]
    if actual != expected:
        yield f"{where}: the JobSet's failurePolicy is {actual}; it must be {expected}"
    if [job.get("replicas", 1) for job in document["spec"]["replicatedJobs"]] != [1]:
        yield f"{where}: the workers are not in a single Job: their names would be others"
    if document["spec"].get("network", {}).get("enableDNSHostnames") is not False:
        yield f"{where}: JobSet would give the pods another subdomain than the Service's"
    if not policy.get("maxRestarts"):
        yield f"{where}: no maxRestarts: the first lost worker would end the run"
    if spec.get("backoffLimit") != 0:
        yield f"{where}: backoffLimit is not 0: a single pod would be started again without the others"


# ----------------------------------------------------------------------------------------------------------------------
# The restricted Pod Security Standard, and what it leaves open.


def _security(documents: Sequence[Document]) -> Problems:
    for document, _, template in workloads(documents):
        where, spec = document["metadata"]["name"], template["spec"]
        yield from _security_of_pod(where, spec, stored=_is_stored(template))
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            yield from _security_of_container(where, container)
            mounts = {mount["mountPath"] for mount in container.get("volumeMounts", ())}
            needed = {"/tmp", RUNS, *(["/dev/shm"] if is_trainer(template) else [])}
            if absent := sorted(needed - mounts):
                yield f"{where}: {container['name']} has no volume at {absent[0]}"
            yield from _secrets(where, container)


def _is_stored(template: Document) -> bool:
    """Whether what a pod writes lies in an object store: a run or, of a Job for data, these."""
    return paths.is_address(flag_of(template, "run_dir") or flag_of(template, "data_dir"))


def _security_of_pod(where: str, spec: Document, stored: bool) -> Problems:
    pod = spec.get("securityContext", {})
    if not pod.get("runAsNonRoot") or not pod.get("runAsUser"):
        yield f"{where}: the pod may run as root"
    if pod.get("seccompProfile", {}).get("type") not in _SECCOMP_PROFILES:
        yield f"{where}: no seccompProfile"
    if any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield f"{where}: the pod shares a namespace of its host"
    if spec.get("automountServiceAccountToken") is not False:
        yield f"{where}: the pod gets a token"
    if spec.get("serviceAccountName") != SERVICE_ACCOUNT:
        yield f"{where}: the pod does not run as {SERVICE_ACCOUNT}, which k8s/setup makes"
    volumes = spec.get("volumes", ())
    claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]
    if stored and claims:
        yield f"{where}: the run lies in an object store, and the pod has the claims {claims}"
    if not stored and claims != [CLAIM]:
        yield f"{where}: the pod's claims are {claims}, not {CLAIM}, which k8s/setup makes"
    for volume in volumes:
        if unfit := volume.keys() - _RESTRICTED_VOLUMES:
            yield f"{where}: a volume of kind {sorted(unfit)[0]}"


def _security_of_container(where: str, container: Document) -> Problems:
    own, name = container.get("securityContext", {}), container["name"]
    if own.get("runAsUser") == 0 or own.get("runAsNonRoot") is False:
        yield f"{where}: {name} may run as root"
    if own.get("seccompProfile", {}).get("type", "RuntimeDefault") not in _SECCOMP_PROFILES:
        yield f"{where}: {name} has no seccompProfile"
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield f"{where}: {name} may gain privileges"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
        yield f"{where}: {name} keeps capabilities"
    if not own.get("readOnlyRootFilesystem"):
        yield f"{where}: {name} may write to its root file system"
    if any("hostPort" in port for port in container.get("ports", ())):
        yield f"{where}: {name} takes a port of its host"


def _secrets(where: str, container: Document) -> Problems:
    for argument in container.get("args", ()):
        if _SECRET.search(argument.split("=")[0]):
            yield f"{where}: the argument {argument.split('=')[0]} looks like a secret; put it into a Secret"
    for variable in container.get("env", ()):
        if _SECRET.search(variable["name"]) and "value" in variable:
            yield f"{where}: the variable {variable['name']} looks like a secret; take it from a Secret"


# ----------------------------------------------------------------------------------------------------------------------
# Resources, images, and the namespace.


def _resources(documents: Sequence[Document]) -> Problems:
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


def _images(documents: Sequence[Document]) -> Problems:
    for document, _, template in workloads(documents):
        for container in template["spec"]["containers"]:
            if not has_digest(container["image"]):
                yield f"{document['metadata']['name']}: the image {container['image']} has no digest"


def _setup(documents: Sequence[Document]) -> Problems:
    """What a namespace of runs must have; nothing for the documents of a run."""
    namespaces = [document for document in documents if document["kind"] == "Namespace"]
    if not namespaces:
        return
    if namespaces[0]["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "the Namespace does not enforce the restricted Pod Security Standard"
    templates = [template for _, _, template in workloads(documents)]
    policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    closed = [policy for policy in policies if not policy["podSelector"] and not {"ingress", "egress"} & policy.keys()]
    if not any(set(policy["policyTypes"]) == {"Ingress", "Egress"} for policy in closed):
        yield "no NetworkPolicy denies what no other one allows"
    for document in documents:
        if document["kind"] == "Service" and not any(matches(document["spec"]["selector"], t) for t in templates):
            yield f"Service {document['metadata']['name']} selects no pod"


RULES: dict[str, Callable[[Sequence[Document]], Problems]] = {
    "sizes": _sizes,
    "names": _names,
    "selectors": _selectors,
    "fates": _fates,
    "security": _security,
    "syntax": syntax,
    "places": places,
    "resources": _resources,
    "setup": _setup,
    "images": _images,
}
