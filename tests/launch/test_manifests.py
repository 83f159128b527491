"""The manifests of k8s/, rendered by kubectl and checked without a cluster."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import ROOT
from rendering import (  # noqa: F401 - fixtures
    OVERLAYS,
    data_jobs,
    first,
    good,
    needs_kustomize,
    pod,
    render,
    rendered,
    submissions,
)

from launch.kube import rules
from launch.kube.documents import clusters, is_trainer, workloads
from launch.kube.rules import matches

pytestmark = needs_kustomize

VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35")
COMPONENTS = ("download", "evaluator", "jobset", "kueue", "metrics", "rdma", "store")


def documents_of(*groups):
    return [document for named in groups for documents in named.values() for document in documents]


def test_every_folder_renders_and_nothing_is_empty(rendered, submissions):
    assert OVERLAYS == ["data", "jobset", "multi-node", "single-node", "smoke", "smoke-setup", "store-setup"]
    assert sorted(path.name for path in (ROOT / "k8s/components").iterdir()) == list(COMPONENTS)
    kinds = {name: sorted(d["kind"] for d in group) for name, group in rendered.items()}
    run = ["Job", "NetworkPolicy", "Service"]
    assert kinds["single-node"] == kinds["multi-node"] == kinds["smoke"] == run
    assert kinds["data"] == ["Job"]
    assert kinds["jobset"] == ["JobSet", "NetworkPolicy", "Service"]
    assert set(kinds["setup"]) == set(kinds["smoke-setup"]) >= {"Namespace", "ResourceQuota", "PersistentVolumeClaim"}
    for text, group in submissions.items():
        changes = json.loads(text)
        expected = [("JobSet" if changes["backend"] == "jobset" else "Job"), "NetworkPolicy", "Service"]
        expected += ["PodMonitor", "NetworkPolicy"] * changes.get("metrics", False)
        assert sorted(d["kind"] for d in group) == sorted(expected + ["Job"] * changes["evaluator"])


def test_strict_schemas_of_five_versions_hold(rendered, submissions, data_jobs, tmp_path):
    """Of a JobSet its child Job is checked, by the schema of a Job."""
    documents = []
    for document in documents_of(rendered, submissions, data_jobs):
        if document["kind"] == "PodMonitor":
            continue  # of the Prometheus operator; see test_metrics.py
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


def test_jobsets_keep_their_schema(rendered, submissions, data_jobs, tmp_path):
    """schemas/jobset.json has JobSet's own fields of version 0.10; the Job within is checked by Kubernetes' schema."""
    good = [document for document in documents_of(rendered, submissions, data_jobs) if document["kind"] == "JobSet"]
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


def test_checkov_finds_nothing_beyond_what_k8s_excuses_with_a_reason(rendered, submissions, data_jobs, tmp_path):
    for name, group in rendered.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(group))
    for i, group in enumerate((*submissions.values(), *data_jobs.values())):
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


def test_a_run_in_a_store_needs_no_claim(rendered, submissions):
    """No document names one; each pod knows where the run lies, and finds credentials where the cluster has them."""
    assert "PersistentVolumeClaim" not in {document["kind"] for document in rendered["store-setup"]}
    stored = {name: documents for name, documents in submissions.items() if "run_store" in name}
    assert len(stored) == 6
    for documents in (*stored.values(), rendered["store-setup"]):
        assert "persistentVolumeClaim" not in json.dumps(documents)
        assert rules.problems(documents, without=("images",)) == []
    for documents in stored.values():
        for _, _, template in workloads(documents):
            words = template["spec"]["containers"][0]["args"]
            assert "--run_dir=s3://bucket/runs/first" in words and "--cache_dir=/work/runs/cache" in words
            assert not is_trainer(template) or "--data_dir=s3://bucket/runs/data" in words
            assert template["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "store", "optional": True}}]


def test_pods_of_runs_reach_the_store_and_nothing_else(rendered):
    policies = {d["metadata"]["name"]: d["spec"] for d in rendered["store-setup"] if d["kind"] == "NetworkPolicy"}
    assert set(policies) == {"deny-all", "names", "store"}
    ports = [(port["protocol"], port["port"]) for rule in policies["store"]["egress"] for port in rule["ports"]]
    assert ports == [("TCP", 443), ("TCP", 80)]
    assert policies["store"]["egress"][1]["to"] == [{"ipBlock": {"cidr": "169.254.169.254/32"}}]


def test_a_job_for_data_has_what_its_data_need_and_nothing_else(data_jobs):
    """A claim or credentials of a store; a way out for what is downloaded alone, and for no other pod."""
    for (dataset, store), documents in data_jobs.items():
        assert rules.problems(documents) == []
        (template,) = [template for _, _, template in workloads(documents)]
        container, volumes = template["spec"]["containers"][0], template["spec"]["volumes"]
        assert "resources" in container and "nvidia.com/gpu" not in json.dumps(documents)
        assert ("persistentVolumeClaim" in volumes[0]) == (not store) and ("envFrom" in container) == bool(store)
        assert f"--data_dir={store or '/work/runs'}/data" in container["args"]
        policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
        assert len(policies) == (dataset == "cifar10")
        for policy in policies:
            assert policy["spec"]["policyTypes"] == ["Egress"]
            assert matches(policy["spec"]["podSelector"]["matchLabels"], template)
            assert not matches(policy["spec"]["podSelector"]["matchLabels"], pod(render()))


def test_a_claim_beside_a_store_is_found():
    documents = render(run_store="s3://bucket/runs")
    pod(documents)["spec"]["volumes"][0] = {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}
    assert any("lies in an object store, and the pod has the claims" in each for each in rules.problems(documents))


def test_the_jobset_has_the_pod_of_the_job(rendered):
    assert pod(rendered["jobset"]) == pod(rendered["multi-node"])
    assert pod(render(backend="jobset", rdma=True)) == pod(render(backend="job", rdma=True))


def test_each_worker_finds_the_host_names_of_all(good):
    names = {"job": "first-{}.first:2222", "jobset": "first-worker-0-{}.first:2222"}
    for backend in names:
        documents = good[backend]
        found = clusters(documents)
        assert [one.index for one in found] == [0, 1]
        assert {one.addresses for one in found} == {tuple(names[backend].format(i) for i in range(2))}


def test_two_runs_share_no_selector(good):
    others = render(name="second")
    for document in good["job"]:
        if document["kind"] == "Service":
            assert not matches(document["spec"]["selector"], pod(others))
        if document["kind"] == "NetworkPolicy":
            assert not matches(document["spec"]["podSelector"]["matchLabels"], pod(others))
    assert {d["metadata"]["name"] for d in good["job"]} == {"first"}


def test_an_evaluator_is_told_of_code_of_the_users_own():
    documents = render(evaluator=True, flags=("--model=mlp", "--optimizer=keras.optimizers:Lion,beta_1=0.90"))
    other = next(t for _, _, t in workloads(documents) if not is_trainer(t))
    assert other["spec"]["containers"][0]["args"][3:] == ["--optimizer=keras.optimizers:Lion,beta_1=0.9"]


def test_an_evaluator_is_no_worker():
    documents = render(evaluator=True, gpus=0)
    other = next(t for _, _, t in workloads(documents) if not is_trainer(t))
    assert not matches(first(documents, "Service")["spec"]["selector"], other)
    words = other["spec"]["containers"][0]["args"]
    assert words[:2] == ["--mode=evaluate", "--run_dir=/work/runs/first"]
    assert not any(word.startswith(("--model", "--optimizer")) for word in words)
    assert other["spec"]["containers"][0]["resources"]["limits"] == {"memory": "2Gi"}
