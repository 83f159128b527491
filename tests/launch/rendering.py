"""Rendered manifests for the tests of k8s/ and its launcher, and what is in them."""

import itertools
import json
import re
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

from launch.kube.data_jobs import DataJob
from launch.kube.documents import is_trainer, workloads
from launch.kube.kubectl import Kubectl
from launch.kube.submission import Submission

STORE = "s3://bucket/runs"
DIGEST = "lockstep@sha256:" + "0" * 64
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())


def has_kustomize() -> bool:
    if shutil.which("kubectl") is None:
        return False
    said = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Kustomize Version: v(\d+)", said)
    return bool(found) and int(found[1]) >= 5


needs_kustomize = pytest.mark.skipif(not has_kustomize(), reason="no kubectl with kustomize 5 is on the PATH")


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
    return Kubectl("", "lockstep").render(submission(**changes))


@pytest.fixture(scope="module")
def submissions():
    """Rendered submissions of every size, backend and component."""
    found = {}
    for backend in ("job", "jobset"):
        changes = {"nodes": 2, "gpus": 8, "backend": backend, "queue": "", "rdma": False, "evaluator": True}
        found[json.dumps(changes | {"metrics": True})] = render(**changes, metrics=True)
    for nodes, gpus in ((1, 0), (2, 0), (1, 8), (3, 4)):
        for backend, queue, rdma, evaluator in itertools.product(("job", "jobset"), ("", "team"), *[(False, True)] * 2):
            changes = {"nodes": nodes, "gpus": gpus, "backend": backend, "queue": queue}
            changes |= {"rdma": rdma, "evaluator": evaluator}
            # A corner of the combinations is as good as all of them, and rendering takes its time.
            if gpus == 8 or (queue == "" and not rdma):
                found[json.dumps(changes)] = render(**changes)
    for nodes, gpus in ((2, 0), (1, 8), (3, 4)):
        for backend in ("job", "jobset"):
            changes = {"nodes": nodes, "gpus": gpus, "backend": backend, "evaluator": True, "run_store": STORE}
            found[json.dumps(changes)] = render(**changes)
    return found


@pytest.fixture(scope="module")
def data_jobs():
    """Rendered Jobs for data, by what is prepared (nothing: files of the user's machine come) and the store."""
    found = {}
    for dataset, store in itertools.product(("digits", "cifar10", ""), ("", STORE)):
        if dataset or not store:
            asked = DataJob(dataset, "" if dataset else "photos", DIGEST, "lockstep", store)
            found[dataset, store] = Kubectl("", "lockstep").render_data(asked)
    return found


def pod(documents):
    return next(template for _, _, template in workloads(documents) if is_trainer(template))


def job(documents):
    return next(spec for _, spec, template in workloads(documents) if is_trainer(template))


def first(documents, kind):
    return next(document for document in documents if document["kind"] == kind)


def container(documents):
    return pod(documents)["spec"]["containers"][0]


def failure_rules(documents):
    return job(documents)["podFailurePolicy"]["rules"]


def variable(documents, name):
    return next(entry for entry in container(documents)["env"] if entry["name"] == name)


@pytest.fixture(scope="module")
def good(rendered):
    return {backend: render(backend=backend) for backend in ("job", "jobset")} | {"setup": rendered["setup"]}
