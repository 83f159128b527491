"""The pods of the smoke overlay, really run: podman plays each as Kubernetes would start it, and they train together.

What a cluster does beside the pod is done here: one pod for each index, the names of the headless Service, the group of
the claim's files, a new pod after a preemption.
"""

import copy
import json
import os
import shutil
import subprocess
import time

import pytest
import yaml
from conftest import metrics
from engine import INSIDE, images, podman  # noqa: F401 - fixtures

from launch.kube.documents import COMPONENT, size, workloads
from launch.kube.kubectl import Kubectl
from launch.kube.submission import Submission

pytestmark = [
    pytest.mark.timeout(3000),
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl is on the PATH"),
]
FLAGS = ("--model=mlp", "--checkpoint_every=100", "--log_every=100", "--eval_every=500", "--startup_timeout=120")


class Cluster:
    """One run's network and claim, and what the Job's controller and the kubelet do."""

    def __init__(self, podman, folder, submission):
        self.podman, self.folder, self.submission = podman, folder, submission
        self.folders = set()
        self.documents = Kubectl("", "lockstep").render(submission)
        self.claim = self.network = f"{submission.name}-runs"
        subnet = f"10.{os.getpid() % 200 + 20}.{len(submission.name) % 200}"
        done = podman("network", "create", "--subnet", f"{subnet}.0/24", self.network, check=False)
        if done.returncode:
            pytest.skip(f"podman makes no network here: {done.stderr.strip()[-300:]}")
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
        service = next(d for d in self.documents if d["kind"] == "Service")["metadata"]["name"]
        for document, spec, template in workloads(self.documents):
            if template["metadata"]["labels"][COMPONENT] != component:
                continue
            job = document["metadata"]["name"]
            for index in range(spec.get("completions", 1)):
                pod = copy.deepcopy(template)
                name = f"{job}-{index}"
                labels = pod["metadata"]["labels"]
                labels |= {"batch.kubernetes.io/job-name": job, "batch.kubernetes.io/job-completion-index": str(index)}
                pod["metadata"]["name"] = pod["spec"]["hostname"] = name
                pod["spec"]["containers"][0].setdefault("env", []).append(
                    {"name": "JOB_COMPLETION_INDEX", "value": str(index)}
                )
                pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = self.claim
                # Podman names the volume of an emptyDir as the pod does, and would share it between pods.
                for entry in (*pod["spec"]["volumes"], *pod["spec"]["containers"][0]["volumeMounts"]):
                    entry["name"] = f"{name}-{entry['name']}"
                pod["spec"]["hostAliases"] = [
                    {"ip": ip, "hostnames": [f"{job}-{i}.{service}"]} for i, ip in enumerate(self.addresses)
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
        while not any((self.run_dir / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline, self.podman("logs", containers[0], check=False)
            time.sleep(0.05)

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

    def make(name, **changes):
        values = {"nodes": 1, "gpus": 0, "image": f"localhost/{images['cpu']}", "flags": FLAGS}
        submission = Submission(name=f"{name}{os.getpid()}", **(values | changes))
        made.append(Cluster(podman, tmp_path, submission))
        return made[-1]

    yield make
    for one in made:
        one.close()


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


def test_a_bad_flag_ends_a_pod_with_the_code_that_fails_the_job(podman, cluster):
    one = cluster("wrong", flags=("--model=nothing",))
    (code,), (log,) = one.codes(one.start())
    assert code == 2 and "'nothing' is not known" in log
