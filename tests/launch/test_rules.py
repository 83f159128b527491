"""The rules of launch/kube/rules.py: what is shipped keeps them, and each finds the mistake that it is there for."""

import copy

import pytest
from rendering import (  # noqa: F401 - fixtures
    STORE,
    container,
    data_jobs,
    failure_rules,
    first,
    good,
    job,
    needs_kustomize,
    pod,
    rendered,
    submissions,
    variable,
)

from launch.kube.documents import COMPONENT, GPU, INSTANCE
from launch.kube.rules import problems

pytestmark = needs_kustomize


def test_no_rule_is_broken_by_what_is_shipped(rendered, submissions, data_jobs):
    for name, group in rendered.items():
        assert problems(group, without=("images",)) == [], name
    for name, group in (*submissions.items(), *data_jobs.items()):
        assert problems(group) == [], name


def test_a_policy_for_another_job_of_data_is_found(data_jobs):
    documents = copy.deepcopy(data_jobs["cifar10", ""])
    first(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"][INSTANCE] = "data-other"
    assert problems(documents) == ["NetworkPolicy data-cifar10 selects no pod of the run"]


def test_a_job_for_data_in_a_store_that_has_a_claim_is_found(data_jobs):
    documents = copy.deepcopy(data_jobs["digits", STORE])
    volumes = first(documents, "Job")["spec"]["template"]["spec"]["volumes"]
    volumes[0] = {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}
    assert any("lies in an object store, and the pod has the claims" in each for each in problems(documents))


def letting_in(**changes):
    """A policy that lets other namespaces in, or another object of that name."""
    spec = {"podSelector": {"matchLabels": {INSTANCE: "first"}}, "policyTypes": ["Ingress"]}
    spec["ingress"] = [{"from": [{"namespaceSelector": {}}]}]
    metadata = {"name": "more", "namespace": "lockstep", "labels": {INSTANCE: "first"}}
    return {"kind": "NetworkPolicy", "metadata": metadata, "spec": spec} | changes


def letting_out():
    """A policy that lets the pods of a run reach the web."""
    spec = {"podSelector": {"matchLabels": {INSTANCE: "first"}}, "policyTypes": ["Egress"]}
    spec["egress"] = [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"protocol": "TCP", "port": 443}]}]
    return letting_in(spec=spec)


MISTAKES = {
    "a way out for a run": (
        lambda d: d.append(letting_out()),
        "lets the run's pods out: only those that prepare data may be",
    ),
    "an image in upper case": (
        lambda d: container(d).update(image="Team/Image:v1@sha256:" + "0" * 64),
        "the repository 'Team/Image' has letters in upper case; write 'team/image'",
    ),
    "a registry that is none": (
        lambda d: container(d).update(image="my_registry.io:x/image"),
        "'my_registry.io:x' is not the name of a registry",
    ),
    "a namespace that is none": (
        lambda d: first(d, "Job")["metadata"].update(namespace="My_NS"),
        "'My_NS' is not a DNS",
    ),
    "a table that pods do not have": (
        lambda d: container(d)["args"].append("--dataset=csv:/home/x.csv"),
        "--dataset=csv:/home/x.csv is a path of this machine",
    ),
    "another number of pods": (lambda d: job(d).update(completions=3), "they must be equal"),
    "another NUM_WORKERS": (lambda d: variable(d, "NUM_WORKERS").update(value="3"), "they must be equal"),
    "no index": (lambda d: job(d).update(completionMode="NonIndexed"), "completionMode is not Indexed"),
    "runs of their own": (
        lambda d: container(d)["args"].__setitem__(0, "--strategy=mirrored"),
        "each would train a run of its own",
    ),
    "another subdomain": (lambda d: pod(d)["spec"].update(subdomain="second"), "must be equal"),
    "another domain": (lambda d: variable(d, "WORKER_DOMAIN").update(value="second"), "must be equal"),
    "another namespace at every port": (lambda d: d.append(letting_in()), "names no port: another namespace would"),
    "a monitor of another run": (
        lambda d: d.append(letting_in(kind="PodMonitor", spec={"selector": {"matchLabels": {INSTANCE: "second"}}})),
        "PodMonitor more selects no pod of the run",
    ),
    "another Service": (
        lambda d: first(d, "Service")["metadata"].update(name="second"),
        "no Service has the name of the subdomain",
    ),
    "a Service with an address": (lambda d: first(d, "Service")["spec"].pop("clusterIP"), "is not headless"),
    "a Service of the ready": (
        lambda d: first(d, "Service")["spec"].pop("publishNotReadyAddresses"),
        "could not find each other",
    ),
    "another job name": (
        lambda d: (variable(d, "JOB_NAME").pop("valueFrom"), variable(d, "JOB_NAME").update(value="second")),
        "calls itself second-0.first, its pod is first-0.first",
    ),
    "a long name": (
        lambda d: (
            [first(d, kind)["metadata"].update(name="n" * 62) for kind in ("Job", "Service")]
            + [pod(d)["spec"].update(subdomain="n" * 62), variable(d, "WORKER_DOMAIN").update(value="n" * 62)]
        ),
        "is longer than 63 characters",
    ),
    "a Service for nobody": (
        lambda d: first(d, "Service")["spec"]["selector"].update({COMPONENT: "worker"}),
        "Service first selects no pod of the run",
    ),
    "a Service for all": (
        lambda d: first(d, "Service")["spec"]["selector"].pop(INSTANCE),
        "Service first selects the pods of other runs too",
    ),
    "a policy for nobody": (
        lambda d: pod(d)["metadata"]["labels"].update({INSTANCE: "second"}),
        "NetworkPolicy first selects no pod of the run",
    ),
    "one port alone": (
        lambda d: first(d, "NetworkPolicy")["spec"]["ingress"][0].update(ports=[{"port": 2222}]),
        "names ports: NCCL takes any",
    ),
    "two workers on a node": (
        lambda d: pod(d)["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0][
            "labelSelector"
        ].update(matchLabels={INSTANCE: "second"}),
        "two workers could share a node",
    ),
    "codes in disorder": (lambda d: failure_rules(d)[2]["onExitCodes"].update(values=[65, 2]), "exit_codes.py wants"),
    "a code too many": (
        lambda d: failure_rules(d)[2]["onExitCodes"].update(values=[2, 65, 75]),
        "exit_codes.py wants",
    ),
    "a lost peer for free": (
        lambda d: failure_rules(d)[1]["onExitCodes"].update(values=[75, 143]),
        "exit_codes.py wants",
    ),
    "rules in disorder": (lambda d: failure_rules(d).reverse(), "exit_codes.py wants"),
    "another container": (
        lambda d: failure_rules(d)[1]["onExitCodes"].update(containerName="main"),
        "is not for container",
    ),
    "a disruption that is false": (
        lambda d: failure_rules(d)[0]["onPodConditions"][0].update(status="False"),
        "not for a DisruptionTarget that is True",
    ),
    "restarted in place": (lambda d: pod(d)["spec"].update(restartPolicy="OnFailure"), "restartPolicy is not Never"),
    "two pods of an index": (lambda d: job(d).pop("podReplacementPolicy"), "two pods could have one index"),
    "a plain limit": (
        lambda d: (job(d).pop("backoffLimitPerIndex"), job(d).update(backoffLimit=3)),
        "would use up one",
    ),
    "going on alone": (lambda d: job(d).update(maxFailedIndexes=1), "would go on without a worker"),
    "another success": (lambda d: job(d).pop("successPolicy"), "that worker 0, the chief, has succeeded"),
    "no deadline": (lambda d: job(d).pop("activeDeadlineSeconds"), "could hold its nodes for ever"),
    "root": (lambda d: pod(d)["spec"]["securityContext"].pop("runAsNonRoot"), "may run as root"),
    "any system call": (lambda d: pod(d)["spec"]["securityContext"].pop("seccompProfile"), "no seccompProfile"),
    "the host's network": (lambda d: pod(d)["spec"].update(hostNetwork=True), "shares a namespace of its host"),
    "a token": (lambda d: pod(d)["spec"].pop("automountServiceAccountToken"), "gets a token"),
    "a folder of the host": (
        lambda d: pod(d)["spec"]["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "a volume of kind hostPath",
    ),
    "more privileges": (
        lambda d: container(d)["securityContext"].update(allowPrivilegeEscalation=True),
        "may gain privileges",
    ),
    "a capability": (
        lambda d: container(d)["securityContext"]["capabilities"].update(add=["IPC_LOCK"]),
        "keeps capabilities",
    ),
    "a root to write to": (
        lambda d: container(d)["securityContext"].update(readOnlyRootFilesystem=False),
        "may write to its root file system",
    ),
    "a port of the host": (
        lambda d: container(d).update(ports=[{"containerPort": 2222, "hostPort": 2222}]),
        "takes a port of its host",
    ),
    "no /tmp": (lambda d: container(d)["volumeMounts"].pop(1), "has no volume at /tmp"),
    "a secret flag": (
        lambda d: container(d)["args"].append("--api_key=abc"),
        "--api_key looks like a secret",
    ),
    "a secret variable": (
        lambda d: container(d)["env"].append({"name": "HUB_TOKEN", "value": "abc"}),
        "the variable HUB_TOKEN looks like a secret",
    ),
    "no memory": (lambda d: container(d)["resources"]["limits"].pop("memory"), "how much CPU and memory"),
    "fewer GPUs asked for": (
        lambda d: container(d)["resources"]["requests"].update({GPU: "1"}),
        "differs between requests and limits",
    ),
    "a large /dev/shm": (
        lambda d: pod(d)["spec"]["volumes"][2]["emptyDir"].update(sizeLimit="40Gi"),
        "more than half of the memory limit",
    ),
    "no grace": (lambda d: pod(d)["spec"].update(terminationGracePeriodSeconds=30), "too short for a save"),
    "a tag": (lambda d: container(d).update(image="lockstep:gpu"), "has no digest"),
}
MISTAKES |= {
    "another run's folder": (
        lambda d: container(d)["args"].__setitem__(1, "--run_dir=/work/runs/second"),
        "run_dir is /work/runs/second, not /work/runs/first",
    ),
    "one dash": (
        lambda d: container(d)["args"].append("-strategy=mirrored"),
        "each would train a run of its own",
    ),
    "no policy": (
        lambda d: d.remove(first(d, "NetworkPolicy")),
        "no NetworkPolicy allows the ingress of the run's own pods",
    ),
    "nothing out": (
        lambda d: first(d, "NetworkPolicy")["spec"].pop("egress"),
        "no NetworkPolicy allows the egress of the run's own pods",
    ),
    "no affinity": (lambda d: pod(d)["spec"].pop("affinity"), "no anti-affinity: two workers could share a node"),
    "a container as root": (
        lambda d: container(d)["securityContext"].update(runAsUser=0),
        "trainer may run as root",
    ),
    "a container that may be root": (
        lambda d: container(d)["securityContext"].update(runAsNonRoot=False),
        "trainer may run as root",
    ),
    "a container without a filter": (
        lambda d: container(d)["securityContext"].update(seccompProfile={"type": "Unconfined"}),
        "trainer has no seccompProfile",
    ),
    "another account": (lambda d: pod(d)["spec"].update(serviceAccountName="default"), "does not run as lockstep"),
    "another claim": (
        lambda d: pod(d)["spec"]["volumes"][0]["persistentVolumeClaim"].update(claimName="mine"),
        "the pod's claims are ['mine'], not runs",
    ),
    "no /dev/shm": (lambda d: container(d)["volumeMounts"].pop(2), "has no volume at /dev/shm"),
    "a /dev/shm without end": (
        lambda d: pod(d)["spec"]["volumes"][2]["emptyDir"].pop("sizeLimit"),
        "a volume in memory has no sizeLimit",
    ),
}
MISTAKES_OF_SETUP = {
    "any pod": (
        lambda d: first(d, "Namespace")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
        "does not enforce the restricted",
    ),
    "all open": (
        lambda d: d.remove(next(x for x in d if x["metadata"]["name"] == "deny-all")),
        "no NetworkPolicy denies",
    ),
    "half open": (
        lambda d: next(x for x in d if x["metadata"]["name"] == "deny-all")["spec"].update(policyTypes=["Ingress"]),
        "no NetworkPolicy denies",
    ),
    "a Service for nothing": (
        lambda d: first(d, "Service")["spec"].update(selector={"app": "board"}),
        "Service tensorboard selects no pod",
    ),
}
MISTAKES_OF_JOBSETS = {
    "several Jobs": (
        lambda d: first(d, "JobSet")["spec"]["replicatedJobs"][0].update(replicas=2),
        "the workers are not in a single Job",
    ),
    "another network": (lambda d: first(d, "JobSet")["spec"].pop("network"), "another subdomain than the Service's"),
    "restarted after its time": (
        lambda d: first(d, "JobSet")["spec"]["failurePolicy"]["rules"].pop(0),
        "the JobSet's failurePolicy is",
    ),
    "restarted alone": (
        lambda d: job(d).update(backoffLimit=1),
        "a single pod would be started again without the others",
    ),
    "no restarts": (lambda d: first(d, "JobSet")["spec"]["failurePolicy"].update(maxRestarts=0), "no maxRestarts"),
    "another index": (
        lambda d: first(d, "JobSet")["spec"]["failurePolicy"]["rules"][1].update(
            onJobFailureMessagePatterns=["matching FailJob rule at index 0$"]
        ),
        "the JobSet's failurePolicy is",
    ),
    "rules of the Job in disorder": (lambda d: failure_rules(d).reverse(), "exit_codes.py wants"),
    "ignored": (lambda d: failure_rules(d)[1].update(action="Ignore"), "exit_codes.py wants"),
}


CASES = [
    (where, name)
    for where, names in (("job", MISTAKES), ("jobset", MISTAKES_OF_JOBSETS), ("setup", MISTAKES_OF_SETUP))
    for name in names
]


@pytest.mark.parametrize(("where", "name"), CASES)
def test_a_rule_finds_its_mistake(good, where, name):
    mistake, said = {"job": MISTAKES, "jobset": MISTAKES_OF_JOBSETS, "setup": MISTAKES_OF_SETUP}[where][name]
    documents = copy.deepcopy(good[where])
    before = problems(documents)
    mistake(documents)
    found = [problem for problem in problems(documents) if problem not in before]
    assert any(said in problem for problem in found), found
