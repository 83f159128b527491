"""The pods of the smoke overlay, really run: podman plays each as Kubernetes would start it, and they train together.

What a cluster does beside the pod is done here: one pod for each index, the names of the headless Service, the group of
the claim's files, a new pod after a preemption.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import object_store
import pytest
import yaml
from conftest import ROOT, metrics, weights
from engine import INSIDE, images, podman  # noqa: F401 - fixtures

from launch.kube import sending
from launch.kube.data_jobs import DataJob
from launch.kube.documents import COMPONENT, size, workloads
from launch.kube.kubectl import Kubectl
from launch.kube.submission import Submission
from trainers.input.manifests import source_of
from trainers.world.stores import Store

pytestmark = [
    pytest.mark.timeout(3000),
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl is on the PATH"),
]
FLAGS = ("--model=mlp", "--checkpoint_every=100", "--log_every=100", "--eval_every=500", "--startup_timeout=120")


class Cluster:
    """One run's network and claim, and what the Job's controller and the kubelet do.

    `secret(gateway)`: what the Secret `store` holds, given this machine's address as the pods see it.
    """

    def __init__(self, podman, folder, submission, secret=lambda gateway: {}):
        self.podman, self.folder, self.submission = podman, folder, submission
        self.folders = set()
        self.documents = Kubectl("", "lockstep").render(submission)
        self.claim = self.network = f"{submission.name}-runs"
        subnet = f"10.{os.getpid() % 200 + 20}.{len(submission.name) % 200}"
        done = podman("network", "create", "--subnet", f"{subnet}.0/24", self.network, check=False)
        if done.returncode:
            pytest.skip(f"podman makes no network here: {done.stderr.strip()[-300:]}")
        self.secret = secret(f"{subnet}.1")
        self.addresses = [f"{subnet}.{10 + i}" for i in range(submission.nodes + 1)]
        podman("volume", "create", self.claim)
        mount = podman("volume", "inspect", self.claim, "--format", "{{.Mountpoint}}").stdout.strip()
        self.runs = type(folder)(mount)
        _, _, template = next(workloads(self.documents))
        os.chown(self.runs, -1, template["spec"]["securityContext"]["fsGroup"])
        self.runs.chmod(0o2775)

    @property
    def run_dir(self):
        """Where the run lies, seen from here."""
        return self.runs / self.submission.name

    def pods(self, component):
        """`[(name, pod)]`: what the controller makes of a template, one pod for each index."""
        services = [d["metadata"]["name"] for d in self.documents if d["kind"] == "Service"]
        for document, spec, template in workloads(self.documents):
            if template["metadata"]["labels"][COMPONENT] != component:
                continue
            job = document["metadata"]["name"]
            for index in range(spec.get("completions", 1)):
                pod = copy.deepcopy(template)
                # A Job for data has the name of what it brings; this machine may run another at the same time.
                name = f"{self.submission.name}-{job}-{index}" if component == "data" else f"{job}-{index}"
                labels = pod["metadata"]["labels"]
                labels |= {"batch.kubernetes.io/job-name": job, "batch.kubernetes.io/job-completion-index": str(index)}
                pod["metadata"]["name"] = pod["spec"]["hostname"] = name
                container = pod["spec"]["containers"][0]
                variables = self.secret if container.pop("envFrom", None) else {}
                container.setdefault("env", []).extend(
                    {"name": key, "value": value}
                    for key, value in {"JOB_COMPLETION_INDEX": str(index), **variables}.items()
                )
                for volume in pod["spec"]["volumes"]:
                    if "persistentVolumeClaim" in volume:
                        volume["persistentVolumeClaim"]["claimName"] = self.claim
                # Podman names the volume of an emptyDir as the pod does, and would share it between pods.
                for entry in (*pod["spec"]["volumes"], *pod["spec"]["containers"][0]["volumeMounts"]):
                    entry["name"] = f"{name}-{entry['name']}"
                pod["spec"]["hostAliases"] = [
                    {"ip": ip, "hostnames": [f"{job}-{i}.{service}" for service in services]}
                    for i, ip in enumerate(self.addresses)
                ]
                yield name, {"apiVersion": "v1", "kind": "Pod", **pod}

    def start(self, component="trainer"):
        """Starts the pods, new ones in the place of those that have ended. Returns their containers."""
        containers = []
        for index, (name, pod) in enumerate(self.pods(component)):
            path = self.folder / f"{name}.yaml"
            if path.exists():
                self.podman("kube", "down", path)
            path.write_text(yaml.safe_dump(pod))
            folders = self._make_empty_folders(pod)
            address = self.addresses[index if component == "trainer" else -1]
            network = f"{self.network}:ip={address}"
            self.podman("kube", "play", "--network", network, path)
            for folder in folders:
                os.chmod(folder, 0o777)  # podman has given it the mode of the image's
            containers.append(f"{name}-{pod['spec']['containers'][0]['name']}")
        return containers

    def _make_empty_folders(self, pod):
        """The pod's emptyDirs as a kubelet makes them, in memory if they are to be. Returns where they lie."""
        places = []
        for volume in pod["spec"]["volumes"]:
            kind, name = volume.get("emptyDir"), volume["name"]
            if kind is None:
                continue
            self._remove_folder(name)
            self.podman("volume", "create", name)
            mount = self.podman("volume", "inspect", name, "--format", "{{.Mountpoint}}").stdout.strip()
            if kind.get("medium") == "Memory":
                options = f"size={int(size(kind['sizeLimit']))}"
                subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=True)
            places.append(mount)
            self.folders.add(name)
        return places

    def _remove_folder(self, name):
        mount = self.podman("volume", "inspect", name, "--format", "{{.Mountpoint}}", check=False).stdout.strip()
        if mount:
            subprocess.run(["umount", mount], capture_output=True, check=False)
            self.podman("volume", "rm", "--force", name, check=False)

    def codes(self, containers, timeout=600):
        """The exit codes of containers, when all have ended, and their logs."""
        codes = [int(self.podman("wait", name, timeout=timeout).stdout) for name in containers]
        logs = [self.podman("logs", name, check=False) for name in containers]
        return codes, [log.stdout + log.stderr for log in logs]

    def wait_for_checkpoint(self, containers):
        """Returns when the run has one."""
        deadline = time.monotonic() + 300
        while not self.has_checkpoint():
            assert time.monotonic() < deadline, self.podman("logs", containers[0], check=False)
            time.sleep(0.05)

    def has_checkpoint(self):
        """Whether the run has a checkpoint."""
        return any((self.run_dir / "checkpoints").glob("step-*"))

    def close(self):
        """Leaves nothing."""
        for path in self.folder.glob("*.yaml"):
            self.podman("kube", "down", path, check=False)
        for name in (*self.folders, self.claim):
            self._remove_folder(name)
        self.podman("network", "rm", "--force", self.network, check=False)


@pytest.fixture
def cluster(podman, images, tmp_path):
    made = []

    def make(name, kind=Cluster, more=(), **changes):
        values = {"nodes": 1, "gpus": 0, "image": f"localhost/{images['cpu']}", "flags": FLAGS}
        submission = Submission(name=f"{name}{os.getpid()}", **(values | changes))
        made.append(kind(podman, tmp_path, submission, *more))
        return made[-1]

    yield make
    for one in made:
        one.close()


class StoredCluster(Cluster):
    """One whose runs lie in a bucket, and that has no claim."""

    def prepare(self, dataset):
        """Runs the pod that prepares a data set, and returns its exit code and log."""
        job = DataJob(dataset, "", self.submission.image, "lockstep", self.submission.run_store)
        self.documents += Kubectl("", "lockstep").render_data(job)
        (code,), (log,) = self.codes(self.start("data"))
        return code, log

    def has_checkpoint(self):
        """Whether the bucket has one that is whole."""
        names = Store(self.submission.run_dir).tags("checkpoints")
        return any(name.endswith("/manifest.json") for name in names)


def download(address, folder):
    """A folder with all that lies at an address."""
    store = Store(address)
    for name in store.tags():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(store.read(name))
    return folder


def test_one_pod_trains_as_it_is_told_to_and_goes_on_after_a_preemption(podman, cluster):
    one = cluster("alone", flags=(*FLAGS, "--train_steps=8000", "--eval_every=0"), evaluator=True)
    containers = one.start()
    facts = json.loads(podman("exec", containers[0], "python", "-c", INSIDE).stdout)
    assert facts == {
        "uid": 10001, "gid": 10001, "capabilities": 0, "no_new_privileges": "1",
        "first": "/app/trainers/custom_loop.py", "root": False, "app": False,
        "tmp": True, "shm": True, "shm_mib": 256, "runs": True, "token": False,
    }  # fmt: skip
    one.wait_for_checkpoint(containers)
    podman("kill", "--signal", "TERM", containers[0])
    (code,), (log,) = one.codes(containers)
    assert code == 143, log
    (code,), (log,) = one.codes(one.start())
    assert code == 0, log
    assert "resumed from the checkpoint of step" in log
    assert metrics(one.run_dir)[-1]["step"] == 8000
    # The evaluator's pod, which has no work left to wait for.
    (code,), (log,) = one.codes(one.start("evaluator"))
    assert code == 0, log
    found = metrics(one.run_dir / "evaluator")
    assert found[-1]["step"] == 8000 and found[-1]["accuracy"] >= 0.96


def test_two_pods_train_together_are_preempted_and_resume(podman, cluster):
    two = cluster("together", nodes=2, flags=(*FLAGS, "--train_steps=5000"))
    containers = two.start()
    two.wait_for_checkpoint(containers)
    # A node is drained: the kubelet tells one pod; the workers agree, and both end with the code that is free.
    podman("kill", "--signal", "TERM", containers[1])
    codes, logs = two.codes(containers)
    assert codes == [143, 143], logs
    codes, logs = two.codes(two.start())
    assert codes == [0, 0], logs
    name = two.submission.name
    assert f"worker 1 of 2 (Kubernetes Indexed Job): {name}-0.{name}:2222, {name}-1.{name}:2222" in logs[1]
    assert "resumed from the checkpoint of step" in logs[0]
    facts = json.loads((two.run_dir / "run.json").read_text())
    assert facts["replicas"] == 2 and facts["attempts"] == 2 and facts["final"]["eval"]["accuracy"] >= 0.96


def test_two_pods_without_a_claim_train_in_a_bucket_are_preempted_and_end_with_the_bits_of_a_local_run(
    podman, cluster, data_dir, tmp_path
):
    """Their data were prepared into the bucket before, by a Job of its own."""
    object_store.skip_where_missing()
    exact = ("--model=mlp", "--train_steps=1500", "--checkpoint_every=100", "--log_every=100", "--eval_every=500")
    exact += ("--deterministic", "--seed=3")
    run_store = f"s3://{object_store.BUCKET}/runs"
    # Pods reach this machine by an address that is there once the first of them is.
    with object_store.s3_server("0.0.0.0") as port, object_store.environment_of(port):

        def secret(gateway):
            return object_store.variables(port) | {"AWS_ENDPOINT_URL": f"http://{gateway}:{port}"}

        flags = (*exact, "--startup_timeout=120")
        two = cluster("stored", StoredCluster, (secret,), nodes=2, flags=flags, run_store=run_store)
        assert not any("persistentVolumeClaim" in str(document) for document in two.documents)
        code, log = two.prepare("digits")
        assert code == 0 and f"digits is prepared at {run_store}/data/digits/1.0.0" in log, log
        containers = two.start()
        two.wait_for_checkpoint(containers)
        podman("kill", "--signal", "TERM", containers[1])
        codes, logs = two.codes(containers)
        assert codes == [143, 143], logs
        codes, logs = two.codes(two.start())
        assert codes == [0, 0], logs
        assert "resumed from the checkpoint of step" in logs[0]
        stored = download(two.submission.run_dir, tmp_path / "stored")
        assert set(Store(f"{run_store}/data/digits/1.0.0").tags()) > {"dataset_info.json", ".manifest.json"}
    facts = json.loads((stored / "run.json").read_text())
    assert facts["replicas"] == 2 and facts["attempts"] == 2 and facts["flags"]["data_dir"] == f"{run_store}/data"
    local = tmp_path / "local"
    command = [sys.executable, ROOT / "launch/workers.py", "--workers=2", "--", *exact]
    command += [f"--run_dir={local}", f"--data_dir={data_dir}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = weights(stored, 1500), weights(local, 1500)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_of_this_machine_comes_onto_the_claim_through_its_pod(podman, cluster, tmp_path, monkeypatch):
    """As `launch/k8s.py data --from=…` sends it; `podman exec` stands in for `kubectl exec`."""
    photos = tmp_path / "photos"
    for i in range(3):
        (photos / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        (photos / f"class-{i % 2}/{i}.png").write_bytes(os.urandom(2_000_000 * i))
    one = cluster("brought")
    job, source = DataJob(source="photos", image=one.submission.image), source_of("--from", photos)
    one.documents += Kubectl("", "lockstep").render_data(job)
    containers = one.start("data")

    class Exec:
        """What `send` needs of kubectl."""

        def words(self, *words):
            return ["podman", "exec", "--interactive", *containers, *words[words.index("--") + 1 :]]

    monkeypatch.setenv("CONTAINERS_CONF", podman.env["CONTAINERS_CONF"])
    monkeypatch.setattr(sending, "running_pod", lambda kubectl, name: containers[0])
    assert sending.send(Exec(), job, source)
    (code,), (log,) = one.codes(containers)
    assert code == 0, log
    assert source_of("--from", one.runs / "data/photos").manifest == source.manifest
    assert (one.runs / "data/photos").stat().st_gid == 10001
    containers[:] = one.start("data")
    assert not sending.send(Exec(), job, source)
    assert one.codes(containers)[0] == [0]


def test_a_bad_flag_ends_a_pod_with_the_code_that_fails_the_job(podman, cluster):
    one = cluster("wrong", flags=("--model=nothing",))
    (code,), (log,) = one.codes(one.start())
    assert code == 2 and "'nothing' is not known" in log
