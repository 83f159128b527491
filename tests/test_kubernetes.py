"""The manifests of k8s/, rendered by kubectl and checked without a cluster; the launcher against a recording kubectl.

Each rule is shown to find the mistake that it is there for.
"""

import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from launch import k8s, manifests
from launch.manifests import Submission
from trainers.exit_codes import BadConfiguration

VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35")
DIGEST = "lockstep@sha256:" + "0" * 64
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())
COMPONENTS = ("evaluator", "jobset", "kueue", "rdma")


def has_kustomize() -> bool:
    if shutil.which("kubectl") is None:
        return False
    said = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Kustomize Version: v(\d+)", said)
    return bool(found) and int(found[1]) >= 5


pytestmark = pytest.mark.skipif(not has_kustomize(), reason="no kubectl with kustomize 5 is on the PATH")


def kustomize(folder):
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.fixture(scope="module")
def rendered():
    """What each folder renders to, by its name."""
    found = {name: kustomize(ROOT / "k8s/overlays" / name) for name in OVERLAYS}
    return found | {"setup": kustomize(ROOT / "k8s/setup")}


def submission(**changes) -> Submission:
    values = {"name": "first", "nodes": 2, "gpus": 8, "image": DIGEST, "flags": ("--model=mlp",)}
    return Submission(**(values | changes))


def render(**changes):
    return k8s.Kubectl("", "lockstep").render(submission(**changes))


@pytest.fixture(scope="module")
def submissions():
    """Rendered submissions of every size, backend and component."""
    found = {}
    for nodes, gpus in ((1, 0), (2, 0), (1, 8), (3, 4)):
        for backend, queue, rdma, evaluator in itertools.product(("job", "jobset"), ("", "team"), *[(False, True)] * 2):
            changes = {"nodes": nodes, "gpus": gpus, "backend": backend, "queue": queue}
            changes |= {"rdma": rdma, "evaluator": evaluator}
            # A corner of the combinations is as good as all of them, and rendering takes its time.
            if gpus == 8 or (queue == "" and not rdma):
                found[json.dumps(changes)] = render(**changes)
    return found


def documents_of(rendered, submissions):
    return [document for group in (*rendered.values(), *submissions.values()) for document in group]


def test_every_folder_renders_and_nothing_is_empty(rendered, submissions):
    assert OVERLAYS == ["jobset", "multi-node", "single-node", "smoke", "smoke-setup"]
    assert sorted(path.name for path in (ROOT / "k8s/components").iterdir()) == list(COMPONENTS)
    kinds = {name: sorted(d["kind"] for d in group) for name, group in rendered.items()}
    run = ["Job", "NetworkPolicy", "Service"]
    assert kinds["single-node"] == kinds["multi-node"] == kinds["smoke"] == run
    assert kinds["jobset"] == ["JobSet", "NetworkPolicy", "Service"]
    assert set(kinds["setup"]) == set(kinds["smoke-setup"]) >= {"Namespace", "ResourceQuota", "PersistentVolumeClaim"}
    for text, group in submissions.items():
        changes = json.loads(text)
        expected = [("JobSet" if changes["backend"] == "jobset" else "Job"), "NetworkPolicy", "Service"]
        assert sorted(d["kind"] for d in group) == sorted(expected + ["Job"] * changes["evaluator"])


def test_strict_schemas_of_five_versions_hold(rendered, submissions, tmp_path):
    """Of a JobSet its child Job is checked, by the schema of a Job; its own fields by those that JobSet 0.10 has."""
    documents = []
    for document in documents_of(rendered, submissions):
        if document["kind"] != "JobSet":
            documents.append(document)
            continue
        assert problems_of_jobset(document) == []
        job = document["spec"]["replicatedJobs"][0]["template"]
        documents.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": document["metadata"], **job})
    broken = copy.deepcopy(documents[-1])
    broken["spec"]["parallel"] = 1
    (tmp_path / "documents.json").write_text(json.dumps([*documents, broken]))
    program = """
import json, sys, kubernetes_validate
documents = json.load(open(sys.argv[1]))
found = {}
for version in sys.argv[2:]:
    for i, document in enumerate(documents):
        try:
            used = kubernetes_validate.validate(document, version, strict=True)
            assert used == version, used
        except kubernetes_validate.ValidationError as error:
            found.setdefault(i, []).append(f"{version}: {error.message}")
print(json.dumps(found))
"""
    done = subprocess.run(
        [checker("python"), "-c", program, tmp_path / "documents.json", *VERSIONS],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [int(i) for i in found] == [len(documents)], {i: (documents[int(i)]["kind"], f) for i, f in found.items()}
    assert len(found[str(len(documents))]) == len(VERSIONS)


JOBSET_FIELDS = {
    "": {"replicatedJobs", "network", "failurePolicy", "successPolicy", "startupPolicy", "suspend", "coordinator"}
    | {"managedBy", "ttlSecondsAfterFinished"},
    "network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "rule": {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns", "targetReplicatedJobs"},
    "replicatedJob": {"name", "groupName", "replicas", "template", "dependsOn"},
}
JOBSET_ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
JOB_FAILURE_REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"}
JOB_FAILURE_REASONS |= {"PodFailurePolicy"}


def problems_of_jobset(document) -> list[str]:
    """What a strict schema of JobSet v1alpha2 would say. Source: its API as of version 0.10."""
    spec, found = document["spec"], []

    def known(where, value):
        found.extend(f"{where} has no field {name}" for name in value.keys() - JOBSET_FIELDS[where])

    known("", spec)
    known("network", spec.get("network", {}))
    known("failurePolicy", spec.get("failurePolicy", {}))
    for rule in spec.get("failurePolicy", {}).get("rules", ()):
        known("rule", rule)
        found += [f"no action {rule['action']}"] * (rule["action"] not in JOBSET_ACTIONS)
        found += [f"no reason {r}" for r in rule.get("onJobFailureReasons", ()) if r not in JOB_FAILURE_REASONS]
        if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]):
            found.append(f"{rule['name']} is no name of a rule")
    for job in spec["replicatedJobs"]:
        known("replicatedJob", job)
    return found


def test_the_check_of_jobsets_finds_what_jobset_does_not_know(rendered):
    good = rendered["jobset"][1]
    assert good["kind"] == "JobSet" and problems_of_jobset(good) == []
    broken = copy.deepcopy(good)
    broken["spec"]["failurePolicy"]["rules"][1]["onJobFailureReasons"] = ["DisruptionTarget"]
    broken["spec"]["successPolicies"] = {}
    assert problems_of_jobset(broken) == [" has no field successPolicies", "no reason DisruptionTarget"]


def checker(program: str) -> str:
    """A program of the environment that checks manifests, which is made if it is not there."""
    command = [sys.executable, ROOT / "launch/environment.py", "k8s"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return str(Path(done.stdout.strip()).parent / program)


def test_checkov_finds_nothing_beyond_what_k8s_excuses_with_a_reason(rendered, submissions, tmp_path):
    for name, group in rendered.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(group))
    for i, group in enumerate(submissions.values()):
        (tmp_path / f"submission-{i}.yaml").write_text(yaml.safe_dump_all(group))
    config = ROOT / "k8s/.checkov.yaml"
    command = [checker("checkov"), "--config-file", config, "--directory", tmp_path, "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    answer = json.loads(done.stdout)
    failed = {(c["check_id"], c["resource"]) for c in answer["results"]["failed_checks"]}
    assert not failed and done.returncode == 0
    assert answer["summary"]["passed"] > 1000
    # Each excuse stands under its reason.
    lines = config.read_text().split("skip-check:")[1].strip().splitlines()
    excused = [i for i, line in enumerate(lines) if "CKV" in line]
    assert excused and all(lines[i - 1].strip().startswith("# ") for i in excused)
    broken = copy.deepcopy(rendered["smoke"])
    next(d for d in broken if d["kind"] == "Job")["spec"]["template"]["spec"]["hostNetwork"] = True
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump_all(broken))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert {c["check_id"] for c in json.loads(done.stdout)["results"]["failed_checks"]} == {"CKV_K8S_19"}


def test_yamllint_finds_nothing(tmp_path):
    command = [checker("yamllint"), "--strict", "-c", ROOT / "k8s/.yamllint.yaml"]
    done = subprocess.run([*command, ROOT / "k8s"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (tmp_path / "broken.yaml").write_text("a: 1\na: 2\n")
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=False)
    assert "duplication of key" in done.stdout


def test_no_rule_is_broken_by_what_is_shipped(rendered, submissions):
    for name, group in rendered.items():
        assert manifests.problems(group, without=("images",)) == [], name
    for name, group in submissions.items():
        assert manifests.problems(group) == [], name


def pod(documents):
    return next(template for _, _, template in manifests.workloads(documents) if manifests.is_trainer(template))


def job(documents):
    return next(spec for _, spec, template in manifests.workloads(documents) if manifests.is_trainer(template))


def one(documents, kind):
    return next(document for document in documents if document["kind"] == kind)


def container(documents):
    return pod(documents)["spec"]["containers"][0]


def rules(documents):
    return job(documents)["podFailurePolicy"]["rules"]


def variable(documents, name):
    return next(entry for entry in container(documents)["env"] if entry["name"] == name)


MISTAKES = {
    "another number of pods": (lambda d: job(d).update(completions=3), "they must be one number"),
    "another NUM_WORKERS": (lambda d: variable(d, "NUM_WORKERS").update(value="3"), "they must be one number"),
    "no index": (lambda d: job(d).update(completionMode="NonIndexed"), "completionMode is not Indexed"),
    "runs of their own": (
        lambda d: container(d)["args"].__setitem__(0, "--strategy=mirrored"),
        "each would train a run of its own",
    ),
    "another subdomain": (lambda d: pod(d)["spec"].update(subdomain="second"), "are not one"),
    "another domain": (lambda d: variable(d, "WORKER_DOMAIN").update(value="second"), "are not one"),
    "another Service": (lambda d: one(d, "Service")["metadata"].update(name="second"), "no Service bears the name"),
    "a Service with an address": (lambda d: one(d, "Service")["spec"].pop("clusterIP"), "is not headless"),
    "a Service of the ready": (
        lambda d: one(d, "Service")["spec"].pop("publishNotReadyAddresses"),
        "could not find each other",
    ),
    "another job name": (
        lambda d: (variable(d, "JOB_NAME").pop("valueFrom"), variable(d, "JOB_NAME").update(value="second")),
        "calls itself second-0.first, its pod is first-0.first",
    ),
    "a long name": (
        lambda d: (
            [one(d, kind)["metadata"].update(name="n" * 62) for kind in ("Job", "Service")]
            + [pod(d)["spec"].update(subdomain="n" * 62), variable(d, "WORKER_DOMAIN").update(value="n" * 62)]
        ),
        "is longer than 63 characters",
    ),
    "a Service for nobody": (
        lambda d: one(d, "Service")["spec"]["selector"].update({manifests.COMPONENT: "worker"}),
        "Service first selects no pod of the run",
    ),
    "a Service for all": (
        lambda d: one(d, "Service")["spec"]["selector"].pop(manifests.INSTANCE),
        "Service first selects the pods of other runs too",
    ),
    "a policy for nobody": (
        lambda d: pod(d)["metadata"]["labels"].update({manifests.INSTANCE: "second"}),
        "NetworkPolicy first selects no pod of the run",
    ),
    "one port alone": (
        lambda d: one(d, "NetworkPolicy")["spec"]["ingress"][0].update(ports=[{"port": 2222}]),
        "names ports: NCCL takes any",
    ),
    "two workers on a node": (
        lambda d: pod(d)["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0][
            "labelSelector"
        ].update(matchLabels={manifests.INSTANCE: "second"}),
        "two workers could share a node",
    ),
    "codes in disorder": (lambda d: rules(d)[2]["onExitCodes"].update(values=[65, 2]), "exit_codes.py wants"),
    "a code too many": (
        lambda d: rules(d)[2]["onExitCodes"].update(values=[2, 65, 75]),
        "exit_codes.py wants",
    ),
    "a lost peer for free": (lambda d: rules(d)[1]["onExitCodes"].update(values=[75, 143]), "exit_codes.py wants"),
    "rules in disorder": (lambda d: rules(d).reverse(), "exit_codes.py wants"),
    "another container": (
        lambda d: rules(d)[1]["onExitCodes"].update(containerName="main"),
        "is not for container",
    ),
    "a disruption that is false": (
        lambda d: rules(d)[0]["onPodConditions"][0].update(status="False"),
        "not for a DisruptionTarget that is True",
    ),
    "restarted in place": (lambda d: pod(d)["spec"].update(restartPolicy="OnFailure"), "restartPolicy is not Never"),
    "two pods of an index": (lambda d: job(d).pop("podReplacementPolicy"), "two pods could have one index"),
    "a plain limit": (lambda d: (job(d).pop("backoffLimitPerIndex"), job(d).update(backoffLimit=3)), "would burn one"),
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
        lambda d: container(d)["resources"]["requests"].update({manifests.GPU: "1"}),
        "differs between requests and limits",
    ),
    "a large /dev/shm": (
        lambda d: pod(d)["spec"]["volumes"][2]["emptyDir"].update(sizeLimit="40Gi"),
        "more than half of the memory limit",
    ),
    "no grace": (lambda d: pod(d)["spec"].update(terminationGracePeriodSeconds=30), "too short for a save"),
    "a tag": (lambda d: container(d).update(image="lockstep:gpu"), "has no digest"),
}
MISTAKES_OF_JOBSETS = {
    "restarted alone": (lambda d: job(d).update(backoffLimit=1), "one pod would be started again alone"),
    "no restarts": (lambda d: one(d, "JobSet")["spec"]["failurePolicy"].update(maxRestarts=0), "no maxRestarts"),
    "another index": (
        lambda d: one(d, "JobSet")["spec"]["failurePolicy"]["rules"][0].update(
            onJobFailureMessagePatterns=["matching FailJob rule at index 0$"]
        ),
        "the JobSet's failurePolicy is",
    ),
    "rules of the Job in disorder": (lambda d: rules(d).reverse(), "exit_codes.py wants"),
    "ignored": (lambda d: rules(d)[1].update(action="Ignore"), "exit_codes.py wants"),
}


@pytest.fixture(scope="module")
def good():
    return {backend: render(backend=backend) for backend in ("job", "jobset")}


@pytest.mark.parametrize("name", [*MISTAKES, *MISTAKES_OF_JOBSETS])
def test_a_rule_finds_its_mistake(good, name):
    mistake, said = (MISTAKES | MISTAKES_OF_JOBSETS)[name]
    documents = copy.deepcopy(good["jobset" if name in MISTAKES_OF_JOBSETS else "job"])
    mistake(documents)
    found = manifests.problems(documents)
    assert any(said in one for one in found), found


def test_the_jobset_has_the_pod_of_the_job(rendered):
    assert pod(rendered["jobset"]) == pod(rendered["multi-node"])
    assert pod(render(backend="jobset", rdma=True)) == pod(render(backend="job", rdma=True))


def test_each_worker_finds_the_host_names_of_all(good):
    names = {"job": "first-{}.first:2222", "jobset": "first-worker-0-{}.first:2222"}
    for backend, documents in good.items():
        found = manifests.clusters(documents)
        assert [one.index for one in found] == [0, 1]
        assert {one.addresses for one in found} == {tuple(names[backend].format(i) for i in range(2))}


def test_two_runs_share_no_selector(good):
    others = render(name="second")
    for document in good["job"]:
        if document["kind"] == "Service":
            assert not manifests._matches(document["spec"]["selector"], pod(others))
        if document["kind"] == "NetworkPolicy":
            assert not manifests._matches(document["spec"]["podSelector"]["matchLabels"], pod(others))
    assert {d["metadata"]["name"] for d in good["job"]} == {"first"}


def test_an_evaluator_is_no_worker():
    documents = render(evaluator=True, gpus=0)
    other = next(t for _, _, t in manifests.workloads(documents) if not manifests.is_trainer(t))
    assert not manifests._matches(one(documents, "Service")["spec"]["selector"], other)
    words = other["spec"]["containers"][0]["args"]
    assert words[:2] == ["--mode=evaluate", "--run_dir=/work/runs/first"]
    assert manifests.GPU not in other["spec"]["containers"][0]["resources"]["limits"]


# ----------------------------------------------------------------------------------------------------------------------
# The launcher. kustomize is the real one; what would ask a cluster is answered from a file, and recorded.

FAKE = """#!{python}
import json, os, sys
words = sys.argv[1:]
if "kustomize" in words:
    os.execv({kubectl!r}, ["kubectl", *words])
folder = {folder!r}
given = sys.stdin.read() if "--filename=-" in words else ""
with open(folder + "/calls", "a") as file:
    file.write(json.dumps([words, given]) + "\\n")
answers = json.load(open(folder + "/answers.json"))
for key, (code, out, error) in answers.items():
    if all(word in words for word in key.split()):
        sys.stdout.write(out), sys.stderr.write(error)
        sys.exit(code)
sys.exit(0)
"""


class FakeCluster:
    """A kubectl on a PATH of its own."""

    def __init__(self, folder):
        self.folder = folder
        text = FAKE.format(python=sys.executable, kubectl=shutil.which("kubectl"), folder=str(folder))
        (folder / "kubectl").write_text(text)
        (folder / "kubectl").chmod(0o755)
        self.answer({})

    def answer(self, answers):
        """What `get pods`, say, is answered with: text, or `[code, text, error]`. Forgets the calls so far."""
        values = {key: [0, value, ""] if isinstance(value, str) else value for key, value in answers.items()}
        (self.folder / "answers.json").write_text(json.dumps(values))
        (self.folder / "calls").write_text("")

    def calls(self):
        """Each call's words, and what it was given on standard input."""
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def __call__(self, *words, path=None):
        """Runs the launcher."""
        env = os.environ | {"PATH": path if path is not None else f"{self.folder}:{os.environ['PATH']}"}
        command = [sys.executable, str(ROOT / "launch/k8s.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=ROOT)


@pytest.fixture
def cluster(tmp_path):
    return FakeCluster(tmp_path)


SUBMIT = ("submit", "--name=first", "--nodes=2", "--gpus_per_node=8", f"--image={DIGEST}")
NO_JOBSETS = {"get jobsets": [1, "", "error: the server doesn't have a resource type"]}


def workload(*conditions, **changes):
    text = submission(**changes).text()
    return json.dumps(
        {
            "kind": "Job",
            "metadata": {"name": "first", "annotations": {manifests.SUBMISSION: text}, "labels": {}},
            "spec": {},
            "status": {"active": 2, "failed": 1, "conditions": [{"type": c, "status": "True"} for c in conditions]},
        }
    )


def test_submit_renders_and_applies_what_the_flags_ask_for(cluster):
    cluster.answer(NO_JOBSETS)
    done = cluster(*SUBMIT, "--queue=team", "--", "--model=resnet", "--batch_size=256", "--learning_rate=0.01")
    assert done.returncode == 0, done.stderr
    assert "nodes      2 × 8 GPUs = 16 replicas, --strategy=multi_worker" in done.stderr
    assert "batch      256 examples = 16 × 16" in done.stderr
    assert 'worker 1   first-1.first:2222  TF_CONFIG={"cluster": {"worker": ["first-0.first:2222"' in done.stderr
    (words, given) = cluster.calls()[-1]
    assert words == ["--namespace", "lockstep", "apply", "--filename=-"]
    documents = list(yaml.safe_load_all(given))
    assert manifests.problems(documents) == []
    assert container(documents)["args"] == [
        "--strategy=multi_worker", "--run_dir=/work/runs/first", "--data_dir=/work/runs/data",
        "--model=resnet", "--batch_size=256", "--learning_rate=0.01",
    ]  # fmt: skip
    assert one(documents, "Job")["spec"]["suspend"] is True
    assert one(documents, "Job")["metadata"]["labels"][manifests.QUEUE_LABEL] == "team"


def test_a_dry_run_prints_the_objects_and_asks_no_cluster(cluster):
    done = cluster(*SUBMIT, "--backend=jobset", "--dry_run")
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert sorted(d["kind"] for d in documents) == ["JobSet", "NetworkPolicy", "Service"]
    assert "first-worker-0-1.first:2222" in done.stderr
    assert cluster.calls() == []


REFUSALS = {
    "a bad name": (("--name=First_1",), (), "'First_1' is no DNS label"),
    "a long name": ((f"--name={'n' * 62}",), (), "gives a pod a name of 64 characters; 63 are allowed; use 1 fewer"),
    "a tag": (("--image=lockstep:gpu",), (), "has no digest"),
    "a batch that does not divide": ((), ("--batch_size=100",), "does not divide over 16 replicas; use 96 or 112"),
    "an unknown model": ((), ("--model=nothing",), "--model 'nothing' is not known"),
    "a flag of the launcher": ((), ("--run_dir=/elsewhere",), "--run_dir=/elsewhere is set by the launcher"),
    "no node": (("--nodes=0",), (), "--nodes 0 is below 1"),
    "more replicas than GPUs": ((), ("--replicas=9",), "--replicas 9 is above --gpus_per_node 8"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_submit_refuses(cluster, name):
    words, flags, said = REFUSALS[name]
    done = cluster(*SUBMIT, *words, "--dry_run", "--", *flags)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_no_kubectl_no_cluster_and_a_name_that_exists_are_one_line(cluster):
    done = cluster(*SUBMIT, path=str(cluster.folder / "nowhere"))
    assert done.returncode == 2 and "kubectl is not on the PATH; install it" in done.stderr
    refused = "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
    cluster.answer({"get": [1, "", refused]})
    done = cluster(*SUBMIT)
    assert done.returncode == 2 and "no cluster answers" in done.stderr and "--context" in done.stderr
    cluster.answer(NO_JOBSETS | {"get jobs first": workload()})
    done = cluster(*SUBMIT)
    assert done.returncode == 2 and "--name first exists in namespace lockstep; resume or delete it" in done.stderr
    assert not any("apply" in words for words, _ in cluster.calls())
    cluster.answer(NO_JOBSETS | {"apply": [1, "", 'jobs is forbidden: User "me" cannot create']})
    done = cluster(*SUBMIT)
    assert done.returncode == 2 and "the cluster does not allow it" in done.stderr


def a_pod(index, **status):
    labels = {"batch.kubernetes.io/job-completion-index": str(index), manifests.COMPONENT: "trainer"}
    return {
        "metadata": {"name": f"first-{index}-abcde", "labels": labels},
        "spec": {"nodeName": f"n{index}"},
        "status": status,
    }


def test_status_tells_of_each_pod_why_it_waits_and_how_training_goes(cluster):
    scheduled = {
        "type": "PodScheduled",
        "status": "False",
        "message": "0/4 nodes are available: Insufficient nvidia.com/gpu.",
    }
    pulling = {"restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
    lost = {"restartCount": 0, "state": {"terminated": {"exitCode": 75, "reason": "Error"}}}
    pods = [
        a_pod(0, phase="Running", containerStatuses=[{"restartCount": 0, "state": {"running": {}}}]),
        a_pod(1, phase="Pending", conditions=[scheduled]),
        a_pod(2, phase="Pending", containerStatuses=[pulling]),
        a_pod(3, phase="Failed", containerStatuses=[lost]),
        a_pod(4, phase="Pending", containerStatuses=[]),
    ]
    event = {
        "type": "Warning",
        "reason": "FailedMount",
        "message": "claim runs is lost",
        "involvedObject": {"name": "first-4-abcde"},
    }
    log = "strategy  …\nstep 20/100  train  loss 1.0\nstep 40/100  train  loss 0.5\nstep 40/100  eval   loss 0.6\n"
    cluster.answer(
        NO_JOBSETS
        | {
            "get jobs first": workload(),
            "get pods": json.dumps({"items": pods}),
            "get events": json.dumps({"items": [event]}),
            "logs first-0-abcde": log,
        }
    )
    done = cluster("status", "--name=first")
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("|")}
    assert "Job first: 2 active, 1 failed so far" in done.stdout
    assert "Insufficient nvidia.com/gpu" in rows["first-1-abcde"]
    assert "ImagePullBackOff: not found" in rows["first-2-abcde"]
    assert "code 75 (yes: a worker was lost" in rows["first-3-abcde"]
    assert "FailedMount: claim runs is lost" in rows["first-4-abcde"]
    assert "step 40/100  train  loss 0.5\nstep 40/100  eval   loss 0.6" in done.stdout
    assert "loss 1.0" not in done.stdout


def test_logs_follow_all_workers_with_prefixes(cluster):
    cluster.answer(NO_JOBSETS | {"get jobs first": workload(nodes=16)})
    assert cluster("logs", "--name=first").returncode == 0
    words, _ = cluster.calls()[-1]
    assert words[2:] == [
        "logs", f"--selector={manifests.INSTANCE}=first", "--prefix", "--ignore-errors", "--max-log-requests=34",
        "--tail=100", "--follow",
    ]  # fmt: skip


def test_delete_takes_the_objects_and_leaves_the_run(cluster):
    cluster.answer(NO_JOBSETS | {"get jobs first": workload()})
    done = cluster("delete", "--name=first")
    assert done.returncode == 0 and "the run stays at /work/runs/first" in done.stderr
    words, _ = cluster.calls()[-1]
    assert words[2:5] == ["delete", "job,service,networkpolicy", f"--selector={manifests.INSTANCE}=first"]
    cluster.answer(NO_JOBSETS)
    done = cluster("delete", "--name=first")
    assert done.returncode == 2 and "no such run is in namespace lockstep" in done.stderr


def test_resume_submits_what_was_submitted_on_another_size(cluster):
    cluster.answer(NO_JOBSETS | {"get jobs first": workload()})
    done = cluster("resume", "--name=first")
    assert done.returncode == 2 and "has not ended" in done.stderr
    cluster.answer(NO_JOBSETS | {"get jobs first": workload("Failed")})
    done = cluster("resume", "--name=first", "--nodes=4", "--", "--step_timeout=900")
    assert done.returncode == 0, done.stderr
    calls = cluster.calls()
    assert ["delete" in words for words, _ in calls].index(True) < ["apply" in words for words, _ in calls].index(True)
    documents = list(yaml.safe_load_all(calls[-1][1]))
    assert job(documents)["completions"] == 4
    assert container(documents)["image"] == DIGEST
    assert container(documents)["args"][-2:] == ["--model=mlp", "--step_timeout=900"]
    cluster.answer(NO_JOBSETS | {"get jobs first": workload("Failed")})
    done = cluster("resume", "--name=first", "--nodes=3")
    assert done.returncode == 2 and "does not divide" in done.stderr
    assert not any("delete" in words for words, _ in cluster.calls())


def test_tensorboard_forwards_loopback_alone(cluster):
    done = cluster("tensorboard", "--port=7007")
    assert done.returncode == 0 and "http://127.0.0.1:7007" in done.stderr
    assert cluster.calls()[-1][0][2:] == ["port-forward", "--address=127.0.0.1", "service/tensorboard", "7007:6006"]


def test_a_submission_survives_its_annotation():
    kept = submission(evaluator=True, queue="team")
    assert Submission.from_text(kept.text()) == kept


def test_names_of_evaluators_and_jobsets_count():
    manifests.check_name(submission(name="n" * 61))
    for changes in ({"name": "n" * 54, "backend": "jobset"}, {"name": "n" * 54, "evaluator": True}):
        with pytest.raises(BadConfiguration, match="63 are allowed"):
            manifests.check_name(submission(**changes))
