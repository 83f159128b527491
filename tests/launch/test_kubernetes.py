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

from launch import k8s
from launch.kube import documents as documents_lib
from launch.kube import rules as rules_lib
from launch.kube.submission import Submission, check_name
from trainers.record.reading import RUN_AFTER
from trainers.settings.exit_codes import BadConfiguration

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
    """Of a JobSet its child Job is checked, by the schema of a Job."""
    documents = []
    for document in documents_of(rendered, submissions):
        if document["kind"] != "JobSet":
            documents.append(document)
            continue
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


def test_jobsets_keep_their_schema(rendered, submissions, tmp_path):
    """schemas/jobset.json has JobSet's own fields of version 0.10; the Job within is checked by Kubernetes' schema."""
    good = [document for document in documents_of(rendered, submissions) if document["kind"] == "JobSet"]
    broken = {}
    for name, change in {
        "an unknown field": lambda spec: spec.update(successPolicies={}),
        "an unknown reason": lambda spec: spec["failurePolicy"]["rules"][2].update(
            onJobFailureReasons=["DisruptionTarget"]
        ),
        "an unknown action": lambda spec: spec["failurePolicy"]["rules"][0].update(action="Fail"),
        "a rule without a name": lambda spec: spec["failurePolicy"]["rules"][0].pop("name"),
        "a name with a dash": lambda spec: spec["failurePolicy"]["rules"][0].update(name="too-long"),
        "a number in words": lambda spec: spec["failurePolicy"].update(maxRestarts="3"),
        "no jobs": lambda spec: spec.pop("replicatedJobs"),
    }.items():
        broken[name] = copy.deepcopy(good[0])
        change(broken[name]["spec"])
    (tmp_path / "documents.json").write_text(json.dumps([*good, *broken.values()]))
    program = """
import json, sys, jsonschema
schema, documents = (json.load(open(path)) for path in sys.argv[1:])
jsonschema.Draft202012Validator.check_schema(schema)
found = jsonschema.Draft202012Validator(schema)
print(json.dumps([found.is_valid(document) for document in documents]))
"""
    schema = ROOT / "tests/launch/schemas/jobset.json"
    command = [checker("python"), "-c", program, schema, tmp_path / "documents.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True] * len(good) + [False] * len(broken)


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
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
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
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
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
        assert rules_lib.problems(group, without=("images",)) == [], name
    for name, group in submissions.items():
        assert rules_lib.problems(group) == [], name


def pod(documents):
    return next(template for _, _, template in documents_lib.workloads(documents) if documents_lib.is_trainer(template))


def job(documents):
    return next(spec for _, spec, template in documents_lib.workloads(documents) if documents_lib.is_trainer(template))


def one(documents, kind):
    return next(document for document in documents if document["kind"] == kind)


def container(documents):
    return pod(documents)["spec"]["containers"][0]


def rules(documents):
    return job(documents)["podFailurePolicy"]["rules"]


def variable(documents, name):
    return next(entry for entry in container(documents)["env"] if entry["name"] == name)


MISTAKES = {
    "another number of pods": (lambda d: job(d).update(completions=3), "they must be equal"),
    "another NUM_WORKERS": (lambda d: variable(d, "NUM_WORKERS").update(value="3"), "they must be equal"),
    "no index": (lambda d: job(d).update(completionMode="NonIndexed"), "completionMode is not Indexed"),
    "runs of their own": (
        lambda d: container(d)["args"].__setitem__(0, "--strategy=mirrored"),
        "each would train a run of its own",
    ),
    "another subdomain": (lambda d: pod(d)["spec"].update(subdomain="second"), "must be equal"),
    "another domain": (lambda d: variable(d, "WORKER_DOMAIN").update(value="second"), "must be equal"),
    "another Service": (
        lambda d: one(d, "Service")["metadata"].update(name="second"),
        "no Service has the name of the subdomain",
    ),
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
        lambda d: one(d, "Service")["spec"]["selector"].update({documents_lib.COMPONENT: "worker"}),
        "Service first selects no pod of the run",
    ),
    "a Service for all": (
        lambda d: one(d, "Service")["spec"]["selector"].pop(documents_lib.INSTANCE),
        "Service first selects the pods of other runs too",
    ),
    "a policy for nobody": (
        lambda d: pod(d)["metadata"]["labels"].update({documents_lib.INSTANCE: "second"}),
        "NetworkPolicy first selects no pod of the run",
    ),
    "one port alone": (
        lambda d: one(d, "NetworkPolicy")["spec"]["ingress"][0].update(ports=[{"port": 2222}]),
        "names ports: NCCL takes any",
    ),
    "two workers on a node": (
        lambda d: pod(d)["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0][
            "labelSelector"
        ].update(matchLabels={documents_lib.INSTANCE: "second"}),
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
        lambda d: container(d)["resources"]["requests"].update({documents_lib.GPU: "1"}),
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
        lambda d: d.remove(one(d, "NetworkPolicy")),
        "no NetworkPolicy allows the ingress of the run's own pods",
    ),
    "nothing out": (
        lambda d: one(d, "NetworkPolicy")["spec"].pop("egress"),
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
        lambda d: one(d, "Namespace")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
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
        lambda d: one(d, "Service")["spec"].update(selector={"app": "board"}),
        "Service tensorboard selects no pod",
    ),
}
MISTAKES_OF_JOBSETS = {
    "several Jobs": (
        lambda d: one(d, "JobSet")["spec"]["replicatedJobs"][0].update(replicas=2),
        "the workers are not in a single Job",
    ),
    "another network": (lambda d: one(d, "JobSet")["spec"].pop("network"), "another subdomain than the Service's"),
    "restarted after its time": (
        lambda d: one(d, "JobSet")["spec"]["failurePolicy"]["rules"].pop(0),
        "the JobSet's failurePolicy is",
    ),
    "restarted alone": (
        lambda d: job(d).update(backoffLimit=1),
        "a single pod would be started again without the others",
    ),
    "no restarts": (lambda d: one(d, "JobSet")["spec"]["failurePolicy"].update(maxRestarts=0), "no maxRestarts"),
    "another index": (
        lambda d: one(d, "JobSet")["spec"]["failurePolicy"]["rules"][1].update(
            onJobFailureMessagePatterns=["matching FailJob rule at index 0$"]
        ),
        "the JobSet's failurePolicy is",
    ),
    "rules of the Job in disorder": (lambda d: rules(d).reverse(), "exit_codes.py wants"),
    "ignored": (lambda d: rules(d)[1].update(action="Ignore"), "exit_codes.py wants"),
}


@pytest.fixture(scope="module")
def good(rendered):
    return {backend: render(backend=backend) for backend in ("job", "jobset")} | {"setup": rendered["setup"]}


CASES = [
    (where, name)
    for where, names in (("job", MISTAKES), ("jobset", MISTAKES_OF_JOBSETS), ("setup", MISTAKES_OF_SETUP))
    for name in names
]


@pytest.mark.parametrize(("where", "name"), CASES)
def test_a_rule_finds_its_mistake(good, where, name):
    mistake, said = {"job": MISTAKES, "jobset": MISTAKES_OF_JOBSETS, "setup": MISTAKES_OF_SETUP}[where][name]
    documents = copy.deepcopy(good[where])
    before = rules_lib.problems(documents)
    mistake(documents)
    found = [problem for problem in rules_lib.problems(documents) if problem not in before]
    assert any(said in problem for problem in found), found


def test_the_jobset_has_the_pod_of_the_job(rendered):
    assert pod(rendered["jobset"]) == pod(rendered["multi-node"])
    assert pod(render(backend="jobset", rdma=True)) == pod(render(backend="job", rdma=True))


def test_each_worker_finds_the_host_names_of_all(good):
    names = {"job": "first-{}.first:2222", "jobset": "first-worker-0-{}.first:2222"}
    for backend in names:
        documents = good[backend]
        found = documents_lib.clusters(documents)
        assert [one.index for one in found] == [0, 1]
        assert {one.addresses for one in found} == {tuple(names[backend].format(i) for i in range(2))}


def test_two_runs_share_no_selector(good):
    others = render(name="second")
    for document in good["job"]:
        if document["kind"] == "Service":
            assert not rules_lib.matches(document["spec"]["selector"], pod(others))
        if document["kind"] == "NetworkPolicy":
            assert not rules_lib.matches(document["spec"]["podSelector"]["matchLabels"], pod(others))
    assert {d["metadata"]["name"] for d in good["job"]} == {"first"}


def test_an_evaluator_is_no_worker():
    documents = render(evaluator=True, gpus=0)
    other = next(t for _, _, t in documents_lib.workloads(documents) if not documents_lib.is_trainer(t))
    assert not rules_lib.matches(one(documents, "Service")["spec"]["selector"], other)
    words = other["spec"]["containers"][0]["args"]
    assert words[:2] == ["--mode=evaluate", "--run_dir=/work/runs/first"]
    assert other["spec"]["containers"][0]["resources"]["limits"] == {"memory": "2Gi"}


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

    def __call__(self, *words, path=None, cwd=ROOT):
        """Runs the launcher."""
        env = os.environ | {"PATH": path if path is not None else f"{self.folder}:{os.environ['PATH']}"}
        command = [sys.executable, str(ROOT / "launch/k8s.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=cwd)


@pytest.fixture
def cluster(tmp_path):
    return FakeCluster(tmp_path)


SUBMIT = ("submit", "--name=first", "--nodes=2", "--gpus_per_node=8", f"--image={DIGEST}")
NO_JOBSETS = {"get jobsets": [1, "", "error: the server doesn't have a resource type"]}


def given_to(cluster):
    """What the launcher has given to the cluster: a run's Jobs come last, and fail if they are there already."""
    calls = [(words, given) for words, given in cluster.calls() if "--filename=-" in words]
    assert [words[2] for words, _ in calls] == ["apply", "create"]
    kinds = [[document["kind"] for document in yaml.safe_load_all(given)] for _, given in calls]
    assert {*kinds[0]} == {"Service", "NetworkPolicy"} and {*kinds[1]} <= {"Job", "JobSet"}
    return [document for _, given in calls for document in yaml.safe_load_all(given)]


def workload(*conditions, **changes):
    text = submission(**changes).text()
    return json.dumps(
        {
            "kind": "Job",
            "metadata": {"name": "first", "annotations": {documents_lib.SUBMISSION: text}, "labels": {}},
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
    documents = given_to(cluster)
    assert rules_lib.problems(documents) == []
    assert container(documents)["args"] == [
        "--strategy=multi_worker", "--run_dir=/work/runs/first", "--data_dir=/work/runs/data", "--startup_timeout=3600",
        "--model=resnet", "--batch_size=256", "--learning_rate=0.01",
    ]  # fmt: skip
    assert one(documents, "Job")["spec"]["suspend"] is True
    assert one(documents, "Job")["metadata"]["labels"][documents_lib.QUEUE_LABEL] == "team"


def test_a_dry_run_prints_the_objects_and_asks_no_cluster(cluster):
    done = cluster(*SUBMIT, "--backend=jobset", "--dry_run")
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert sorted(d["kind"] for d in documents) == ["JobSet", "NetworkPolicy", "Service"]
    assert "first-worker-0-1.first:2222" in done.stderr
    assert cluster.calls() == []


REFUSALS = {
    "a bad name": (("--name=First_1",), (), "'First_1' is not a DNS label"),
    "a long name": ((f"--name={'n' * 62}",), (), "gives a pod a name of 64 characters; 63 are allowed; use 1 fewer"),
    "a tag": (("--image=lockstep:gpu",), (), "has no digest"),
    "a batch that does not divide": ((), ("--batch_size=100",), "does not divide over 16 replicas; use 96 or 112"),
    "an unknown model": ((), ("--model=nothing",), "--model 'nothing' is not known"),
    "a name of setup": (("--name=deny-all",), (), "--name deny-all is a name that k8s/ uses itself"),
    "a name of an evaluator": (("--name=a-evaluator",), (), "is a name that k8s/ uses itself"),
    "an empty digest": (("--image=lockstep@sha256:",), (), "has no digest"),
    "a flag of the launcher": ((), ("--run_dir=/elsewhere",), "--run_dir /elsewhere: the launcher sets it"),
    "a strategy with one dash": ((), ("-strategy=mirrored",), "--strategy mirrored: the launcher sets it"),
    "a run that cannot resume": ((), ("--resume=never",), "--resume never: the launcher sets it to auto"),
    "a flagfile": ((), ("--flagfile=flags.txt",), "--flagfile=flags.txt is read where the trainer runs"),
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
    assert not any("--filename=-" in words for words, _ in cluster.calls())
    foreign = json.dumps({"metadata": {"labels": {"app": "somebody"}}})
    cluster.answer(NO_JOBSETS | {"get service first": foreign})
    done = cluster(*SUBMIT)
    assert done.returncode == 2 and "has a service of that name, not of a run" in done.stderr
    cluster.answer(NO_JOBSETS)
    done = cluster(*SUBMIT, "--backend=jobset")
    assert done.returncode == 2 and "the cluster has no JobSet" in done.stderr
    cluster.answer(NO_JOBSETS | {"apply": [1, "", 'jobs is forbidden: User "me" cannot create']})
    done = cluster(*SUBMIT)
    assert done.returncode == 2 and "the cluster does not allow it" in done.stderr


def a_pod(index, **status):
    labels = {"batch.kubernetes.io/job-completion-index": str(index), documents_lib.COMPONENT: "trainer"}
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


def test_status_says_why_there_are_no_pods(cluster):
    event = {"type": "Warning", "reason": "FailedCreate", "message": "exceeded quota: lockstep"}
    event["involvedObject"] = {"name": "first"}
    cluster.answer(NO_JOBSETS | {"get jobs first": workload(), "get events": json.dumps({"items": [event]})})
    done = cluster("status", "--name=first")
    assert done.returncode == 0, done.stderr
    assert "no pods yet: FailedCreate: exceeded quota: lockstep" in done.stdout


def test_logs_follow_the_newest_pod_of_each_worker_with_prefixes(cluster):
    pods = [a_pod(0, phase="Failed"), a_pod(0, phase="Running"), a_pod(1, phase="Running"), a_pod(2, phase="Pending")]
    pods[0]["metadata"] |= {"name": "first-0-before", "creationTimestamp": "2026-01-01T00:00:00Z"}
    for late in pods[1:]:
        late["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"
    cluster.answer(
        NO_JOBSETS
        | {
            "get jobs first": workload("Complete"),
            "get pods": json.dumps({"items": pods}),
            "logs first-0-abcde": "step 20\nstep 40\n",
            "logs first-1-abcde": "waits\n",
        }
    )
    done = cluster("logs", "--name=first", "--tail=5")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[trainer 0] step 20", "[trainer 0] step 40", "[trainer 1] waits"]
    followed = [words[2:] for words, _ in cluster.calls() if "logs" in words]
    assert sorted(followed) == [["logs", f"first-{i}-abcde", "--tail=5", "--follow"] for i in range(2)]


def test_delete_takes_the_pods_first_and_leaves_the_run(cluster):
    cluster.answer(NO_JOBSETS | {"delete job": 'job.batch "first" deleted\n'})
    done = cluster("delete", "--name=first")
    assert done.returncode == 0 and "the run stays at /work/runs/first" in done.stderr
    chosen = f"--selector=app.kubernetes.io/name=lockstep,{documents_lib.INSTANCE}=first"
    calls = [words[2:] for words, _ in cluster.calls() if "delete" in words]
    # While workers save they need each other, so the names and the policy go last.
    assert calls[0] == ["delete", "job", chosen, "--wait=true", "--cascade=foreground"]
    assert calls[1][:3] == ["delete", "service,networkpolicy", chosen]
    cluster.answer(NO_JOBSETS)
    done = cluster("delete", "--name=first")
    assert done.returncode == 2 and "nothing of such a run is in namespace lockstep" in done.stderr


def test_resume_submits_what_was_submitted_on_another_size(cluster):
    cluster.answer(NO_JOBSETS | {"get jobs first": workload()})
    done = cluster("resume", "--name=first")
    assert done.returncode == 2 and "has not ended" in done.stderr
    cluster.answer(NO_JOBSETS | {"get jobs first": workload("Failed")})
    done = cluster("resume", "--name=first", "--nodes=4", "--", "--step_timeout=900")
    assert done.returncode == 0, done.stderr
    words = [words for words, _ in cluster.calls()]
    assert ["delete" in one for one in words].index(True) < ["create" in one for one in words].index(True)
    documents = given_to(cluster)
    assert job(documents)["completions"] == 4
    assert container(documents)["image"] == DIGEST
    assert container(documents)["args"][-2:] == ["--model=mlp", "--step_timeout=900"]
    cluster.answer(NO_JOBSETS | {"get jobs first": workload("Failed")})
    done = cluster("resume", "--name=first", "--nodes=3")
    assert done.returncode == 2 and "does not divide" in done.stderr
    assert not any("delete" in words for words, _ in cluster.calls())


def test_what_a_cluster_refuses_of_a_resumed_run_is_kept(cluster, tmp_path, monkeypatch):
    cluster.answer(NO_JOBSETS | {"get jobs first": workload("Failed"), "create": [1, "", "admission webhook denied"]})
    done = cluster("resume", "--name=first", cwd=tmp_path)
    assert done.returncode == 2 and "lies in first.yaml" in done.stderr
    assert job(list(yaml.safe_load_all((tmp_path / "first.yaml").read_text())))["completions"] == 2


def test_an_evaluator_knows_when_its_run_was_submitted(cluster):
    cluster.answer(NO_JOBSETS)
    assert cluster(*SUBMIT, "--evaluator").returncode == 0
    documents = given_to(cluster)
    other = next(t for _, _, t in documents_lib.workloads(documents) if not documents_lib.is_trainer(t))
    (variable,) = other["spec"]["containers"][0]["env"]
    assert variable["name"] == RUN_AFTER and re.fullmatch(r"20..-..-..T..:..:..\+00:00", variable["value"])


def test_the_readme_submits_as_it_says():
    """Each submission of the page on Kubernetes, as a dry run."""
    section = (ROOT / "docs/kubernetes.md").read_text()
    lines = re.findall(r"^python (launch/k8s\.py submit .*?)(?: +#.*)?$", section, re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        words = line.replace("$IMAGE", DIGEST).split(" -- ")
        command = f"{sys.executable} {words[0]} --dry_run" + (f" -- {words[1]}" if words[1:] else "")
        done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr


def test_tensorboard_forwards_loopback_alone(cluster):
    done = cluster("tensorboard", "--port=7007")
    assert done.returncode == 0 and "http://127.0.0.1:7007" in done.stderr
    assert cluster.calls()[-1][0][2:] == ["port-forward", "--address=127.0.0.1", "service/tensorboard", "7007:6006"]


def test_a_submission_survives_its_annotation():
    kept = submission(evaluator=True, queue="team")
    assert Submission.from_text(kept.text()) == kept


def test_names_of_evaluators_and_jobsets_count():
    check_name(submission(name="n" * 61))
    check_name(submission(name="n" * 46, backend="jobset"))
    for changes in ({"name": "n" * 47, "backend": "jobset"}, {"name": "n" * 54, "evaluator": True}):
        with pytest.raises(BadConfiguration, match="63 are allowed"):
            check_name(submission(**changes))
