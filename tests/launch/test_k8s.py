"""The launcher against a kubectl that answers from a file and records the calls; kustomize is the real one."""

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
from rendering import DIGEST, container, first, job, needs_kustomize, submission

from launch.kube.data_jobs import DATA
from launch.kube.documents import COMPONENT, INSTANCE, QUEUE_LABEL, SUBMISSION, is_trainer, workloads
from launch.kube.rules import problems
from launch.kube.submission import RUNS, Submission, check_name
from trainers.record import carriers
from trainers.record.reading import RUN_AFTER
from trainers.settings.exit_codes import BadConfiguration

pytestmark = needs_kustomize

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
            "metadata": {"name": "first", "annotations": {SUBMISSION: text}, "labels": {}},
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
    assert problems(documents) == []
    assert container(documents)["args"] == [
        "--strategy=multi_worker", "--run_dir=/work/runs/first", "--data_dir=/work/runs/data", "--startup_timeout=3600",
        "--model=resnet", "--batch_size=256", "--learning_rate=0.01",
    ]  # fmt: skip
    assert first(documents, "Job")["spec"]["suspend"] is True
    assert first(documents, "Job")["metadata"]["labels"][QUEUE_LABEL] == "team"


def test_another_loop_is_what_the_container_runs(cluster):
    cluster.answer(NO_JOBSETS)
    teacher = "--teacher=/work/runs/teacher"
    done = cluster(*SUBMIT, "--trainer=distillation_loop", "--evaluator", "--", "--model=mlp", teacher)
    assert done.returncode == 0, done.stderr
    assert "loop       distillation_loop on digits" in done.stderr
    documents = given_to(cluster)
    assert problems(documents) == []
    for _, _, template in workloads(documents):
        assert template["spec"]["containers"][0]["command"] == ["python", "/app/trainers/distillation_loop.py"]
    assert teacher in container(documents)["args"]
    assert Submission(name="a", nodes=1, gpus=0, image="i").command == []


def test_a_plan_says_which_data_must_be_brought_before(cluster):
    flags = ("--", "--model=resnet18", "--dataset=cifar10", "--batch_size=256")
    done = cluster(*SUBMIT, "--dry_run", *flags)
    line = "data       cifar10 must be in /work/runs/data, once for all runs: launch/k8s.py data --dataset=cifar10"
    line += " --image=…"
    assert done.returncode == 0 and line in done.stderr.splitlines()
    done = cluster(*SUBMIT, "--run_store=s3://b/runs", "--dry_run", *flags)
    assert line.replace("/work/runs", "s3://b/runs") + " --run_store=s3://b/runs" in done.stderr.splitlines()
    done = cluster(*SUBMIT, "--dry_run", *flags, "--data_dir=s3://elsewhere/data")
    assert "must be in" not in done.stderr
    assert "must be in" not in cluster(*SUBMIT, "--dry_run").stderr


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
    "an unknown loop": (("--trainer=distilation_loop",), (), "did you mean distillation_loop?"),
    "a flag that another loop has": ((), ("--teacher=/work/runs/a",), "Unknown command line flag 'teacher'"),
    "a teacher that is here": (
        ("--trainer=distillation_loop",),
        ("--teacher=/tmp/teacher",),
        "--teacher /tmp/teacher is a path of this machine, which pods do not have",
    ),
    "an unknown model": ((), ("--model=nothing",), "--model 'nothing' is not known"),
    "a name of setup": (("--name=deny-all",), (), "--name deny-all is a name that k8s/ uses itself"),
    "a name of an evaluator": (("--name=a-evaluator",), (), "is a name that k8s/ uses itself"),
    "an empty digest": (("--image=lockstep@sha256:",), (), "has no digest"),
    "a flag of the launcher": ((), ("--run_dir=/elsewhere",), "--run_dir /elsewhere: the launcher sets it"),
    "a strategy with one dash": ((), ("-strategy=mirrored",), "--strategy mirrored: the launcher sets it"),
    "a run that cannot resume": ((), ("--resume=never",), "--resume never: the launcher sets it to auto"),
    "a flagfile": ((), ("--flagfile=flags.txt",), "--flagfile=flags.txt is read where the trainer runs"),
    "no node": (("--nodes=0",), (), "--nodes 0 is below 1"),
    "an image in upper case": (
        (f"--image=reg.io/Team/{DIGEST}",),
        (),
        "'Team/lockstep' has letters in upper case; write",
    ),
    "an image with a space": ((f"--image=a b/{DIGEST}",), (), "'a b/lockstep' is not a repository"),
    "a bad namespace": (("--namespace=My_NS",), (), "the namespace 'My_NS' is not a DNS label"),
    "a bad queue": (("--queue=My_Queue",), (), "the queue 'My_Queue' is not a name"),
    "a table of this machine": (
        (),
        ("--model=mlp", "--label=y", "--dataset=csv:/home/me/x.csv"),
        "--dataset=csv:/home/me/x.csv is a path of this machine, which pods do not have; bring it: "
        "launch/k8s.py data --from=/home/me/x.csv, and name it /work/runs/data/x.csv",
    ),
    "a table of this machine in two words": (
        (),
        ("--model=mlp", "--label=y", "--dataset", "csv:rows.csv"),
        "--dataset=csv:rows.csv is a path of this machine",
    ),
    "images at home": ((), ("--dataset=images:~/photos",), "--dataset=images:~/photos is a path of this machine"),
    "images above the claim": ((), ("--dataset=images:/work/runs/../x",), "is a path of this machine"),
    "a data_dir of this machine": ((), ("--data_dir=/tmp/data",), "--data_dir /tmp/data is a path of this machine"),
    "a data_dir at an address": ((), ("--data_dir=hdfs://b/data",), "is not a path, nor an address"),
    "a run_store that is a path": (("--run_store=/work/runs",), (), "--run_store /work/runs is a path; write s3://"),
    "a run_store without a folder": (("--run_store=s3://b",), (), "--run_store 's3://b' names no folder in a bucket"),
    "data on a claim beside a run_store": (
        ("--run_store=s3://b/runs",),
        ("--model=transformer", "--dataset=text:/work/runs/book.txt"),
        "--dataset text:/work/runs/book.txt is a path, which pods without a claim do not have; "
        "bring it: launch/k8s.py data --from=/work/runs/book.txt --run_store=s3://b/runs, and name it "
        "s3://b/runs/data/book.txt",
    ),
    "a path beside a run_store": (
        ("--run_store=s3://b/runs",),
        ("--init_from=/work/runs/first",),
        "--init_from /work/runs/first is a path, which pods without a claim do not have; leave it out",
    ),
    "a package that is not here": (
        (),
        ("--model=my_pkg.net:build", "--dataset=digits"),
        "there is no module my_pkg in the current directory, on PYTHONPATH or among what is installed; submit reads it "
        "here, too: run it in the folder that holds your package, or set PYTHONPATH to that folder",
    ),
    "a loop by its path": (
        (f"--trainer={ROOT / 'launch/doctor.py'}",),
        (),
        "doctor.py is a path of this machine, which pods do not have; name a module that the image holds",
    ),
    "more replicas than GPUs": ((), ("--replicas=9",), "--replicas 9 is above --gpus_per_node 8"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_submit_refuses(cluster, name):
    words, flags, said = REFUSALS[name]
    done = cluster(*SUBMIT, *words, "--dry_run", "--", *flags)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("from_here", [True, False])
def test_submit_takes_a_package_that_is_here_or_on_the_path_and_says_what_the_image_must_hold(
    cluster, tmp_path, monkeypatch, from_here
):
    folder = tmp_path / "project"
    (folder / "my_pkg").mkdir(parents=True)
    (folder / "my_pkg/net.py").write_text("def build(spec, *, width: int = 8):\n    raise NotImplementedError\n")
    (folder / "my_pkg/my_loop.py").write_text('if __name__ == "__main__":\n    raise NotImplementedError\n')
    if not from_here:
        monkeypatch.setenv("PYTHONPATH", str(folder))
    flags = ("--model=my_pkg.net:build,width=16", "--dataset=digits", "--optimizer=keras.optimizers:Lion")
    words = (*SUBMIT, "--trainer=my_pkg.my_loop", "--dry_run", "--", *flags)
    done = cluster(*words, cwd=folder if from_here else tmp_path)
    assert done.returncode == 0, done.stderr
    packages = [line for line in done.stderr.splitlines() if line.startswith("package")]
    assert packages == ["package    my_pkg must be in the image: launch/image.sh --with=my_pkg"]
    assert "loop       my_pkg.my_loop on digits, 1000 steps" in done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert container(documents)["command"] == ["python", "/app/trainers/run_loop.py", "my_pkg.my_loop"]
    assert "--model=my_pkg.net:build,width=16" in container(documents)["args"]


@pytest.mark.parametrize("path", ["/work/runs/data/x.csv", "runs/data/x.csv"])
def test_submit_takes_a_table_on_the_claim(cluster, path):
    flags = ("--model=mlp", "--label=y", f"--dataset=csv:{path}")
    image = f"--image=localhost:5000/team/lock_step.x/{DIGEST}"
    done = cluster(*SUBMIT, "--evaluator", image, "--queue=team.a", "--dry_run", "--", *flags)
    assert done.returncode == 0, done.stderr


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
    labels = {"batch.kubernetes.io/job-completion-index": str(index), COMPONENT: "trainer"}
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


def test_status_has_the_chiefs_pod_read_how_the_run_stands(cluster):
    pods = [a_pod(0, phase="Running"), a_pod(1, phase="Running")]
    cluster.answer(
        NO_JOBSETS
        | {
            "get jobs first": workload(),
            "get pods": json.dumps({"items": pods}),
            "exec first-0-abcde": "/work/runs/first\n  step      120/400, 3 min left\n",
            "logs first-0-abcde": "step 40/100  train  loss 0.5\n",
        }
    )
    done = cluster("status", "--name=first")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("/work/runs/first\n  step      120/400, 3 min left\n")
    command = next(words for words, _ in cluster.calls() if "exec" in words)
    command = command[command.index("--") + 1 :]
    assert command[-1] == "/work/runs/first"
    # The same command here, where /app is this repository.
    told = subprocess.run(
        [sys.executable if word == "python" else word.replace("/app", str(ROOT)) for word in command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 2 and "/work/runs/first holds no run.json" in told.stderr


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
    chosen = f"--selector=app.kubernetes.io/name=lockstep,{INSTANCE}=first"
    calls = [words[2:] for words, _ in cluster.calls() if "delete" in words]
    # While workers save they need each other, so the names and the policy go last.
    assert calls[0] == ["delete", "job", chosen, "--wait=true", "--cascade=foreground"]
    assert calls[1][:3] == ["delete", "podmonitors", chosen]
    assert calls[2][:3] == ["delete", "service,networkpolicy", chosen]
    cluster.answer(NO_JOBSETS)
    done = cluster("delete", "--name=first")
    assert done.returncode == 2 and "nothing of such a run is in namespace lockstep" in done.stderr


def test_a_job_for_data_is_looked_at_and_deleted_as_a_run_is(cluster):
    """It is none: nothing tells how it stands or that it stays, and it does not resume."""
    name, labels = "data-photos", {COMPONENT: "data"}
    job = {"kind": "Job", "metadata": {"name": name, "annotations": {DATA: "{}"}, "labels": {}}, "spec": {}}
    job["status"] = {"conditions": [{"type": "Failed", "status": "True", "message": "BackoffLimitExceeded"}]}
    ended = {"restartCount": 0, "state": {"terminated": {"exitCode": 2, "reason": "Error"}}}
    one = {"metadata": {"name": f"{name}-abcde", "labels": labels}, "spec": {"nodeName": "n0"}}
    one["status"] = {"phase": "Failed", "containerStatuses": [ended]}
    answers = {f"get jobs {name}": json.dumps(job), "get pods": json.dumps({"items": [one]})}
    cluster.answer(NO_JOBSETS | answers | {"logs": "photos could not be taken\n", "delete job": "job deleted\n"})
    done = cluster("status", f"--name={name}")
    assert done.returncode == 0, done.stderr
    assert "Job data-photos: Failed: BackoffLimitExceeded" in done.stdout and "code 2 (never" in done.stdout
    assert "no line of train yet" not in done.stdout
    done = cluster("logs", f"--name={name}", "--no-follow")
    assert done.stdout == "[data] photos could not be taken\n"
    done = cluster("resume", f"--name={name}")
    assert done.returncode == 2 and "no such run is in namespace" in done.stderr
    done = cluster("delete", f"--name={name}")
    assert done.returncode == 0 and "the run stays" not in done.stderr


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
    other = next(t for _, _, t in workloads(documents) if not is_trainer(t))
    (variable,) = other["spec"]["containers"][0]["env"]
    assert variable["name"] == RUN_AFTER and re.fullmatch(r"20..-..-..T..:..:..\+00:00", variable["value"])


def test_the_readme_submits_as_it_says():
    """Each submission of the page on Kubernetes, and each command for data, as a dry run."""
    section = (ROOT / "docs/kubernetes.md").read_text()
    lines = re.findall(r"^python (launch/k8s\.py (?:submit|data) .*?)(?: +#.*)?$", section, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        words = line.replace("$IMAGE", DIGEST).replace("--from=photos", "--from=docs").split(" -- ")
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


def test_the_standing_of_a_run_is_read_where_its_files_lie_in_the_pod():
    """On the claim that is its folder; of a run in a store, the one in which its chief works."""
    assert submission(name="first").folder_in_pod == submission(name="first").run_dir == f"{RUNS}/first"
    stored = submission(name="first", run_store="s3://bucket/runs")
    assert stored.run_dir == "s3://bucket/runs/first"
    (cache,) = (line.partition("=")[2] for line in stored.trainer_flags if line.startswith("--cache_dir="))
    assert stored.folder_in_pod == str(carriers.working(Path(cache), stored.run_dir))
