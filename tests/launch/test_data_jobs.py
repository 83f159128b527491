"""`launch/k8s.py data` against a kubectl whose pods are processes of this machine: what they would run, really runs.

The claim is a folder, which the pods' command lines name in place of /work/runs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from rendering import DIGEST, needs_kustomize

from launch.kube.data_jobs import DATA

pytestmark = needs_kustomize

FAKE = '''#!{python}
import json, os, pathlib, shutil, subprocess, sys, time
words = sys.argv[1:]
if "kustomize" in words:
    os.execv({kubectl!r}, ["kubectl", *words])
import yaml
root, folder = {root!r}, pathlib.Path({folder!r})
claim, state = folder / "claim", folder / "state.json"
words = words[words.index("--namespace") + 2 :]
(folder / "calls").open("a").write(json.dumps(words) + "\\n")

def local(command):
    """A command of the pod as one of this machine."""
    command = [w.replace("/work/runs", str(claim)).replace("/app/", root + "/") for w in command]
    return [sys.executable if w == "python" else w for w in command]

def env():
    return os.environ | {{"TMPDIR": str(folder / "tmp")}}

job = json.loads(state.read_text()) if state.exists() else None
if job:
    code = folder / "code"
    how = "Complete" if code.exists() and code.read_text().strip() == "0" else "Failed"
    job["status"] = {{"conditions": [{{"type": how, "status": "True"}}]}} if code.exists() else {{"active": 1}}
if words[0] == "create":
    (document,) = [d for d in yaml.safe_load_all(sys.stdin) if d]
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    (folder / "tmp").mkdir()
    container = document["spec"]["template"]["spec"]["containers"][0]
    state.write_text(json.dumps(document))
    script = '"$@" >log 2>&1; echo $? >code.new; mv code.new code'
    subprocess.Popen(["bash", "-c", script, "pod", *local(container["command"] + container["args"])], cwd=folder,
                     env=env(), start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL)
elif words[0] == "apply":
    (folder / "applied").write_text(sys.stdin.read())
elif words[0] == "delete":
    if words[1].endswith("job") and job:
        state.unlink(), (folder / "code").unlink(missing_ok=True)
        print("job.batch deleted")
elif words[:2] == ["get", "jobsets"]:
    sys.exit("error: the server doesn't have a resource type")
elif words[:2] == ["get", "jobs"]:
    print(json.dumps(job) if job and job["metadata"]["name"] == words[2] else "")
elif words[:2] == ["get", "pods"]:
    labels = {{"app.kubernetes.io/component": "data"}}
    phase = "Running" if "active" in job["status"] else "Succeeded"
    pod = {{"metadata": {{"name": "pod", "labels": labels}}, "spec": {{}}, "status": {{"phase": phase}}}}
    print(json.dumps({{"items": [pod]}}))
elif words[:2] == ["get", "events"]:
    print(json.dumps({{"items": []}}))
elif words[0] == "logs":
    while not (folder / "code").exists():
        time.sleep(0.05)
    print((folder / "log").read_text(), end="")
elif words[0] == "exec":
    cut = folder / "cut"
    if cut.exists():  # so many bytes come through, then the connection is gone
        head = int(cut.read_text())
        cut.unlink()
        child = subprocess.Popen(local(words[words.index("--") + 1 :]), stdin=subprocess.PIPE, env=env())
        child.stdin.write(sys.stdin.buffer.readline()), child.stdin.flush()
        while head and (piece := sys.stdin.buffer.read(min(head, 4096))):
            child.stdin.write(piece)
            head -= len(piece)
        child.stdin.close()
        child.wait()
        sys.exit("error: unexpected EOF")
    command = local(words[words.index("--") + 1 :])
    os.execvpe(command[0], command, env())
'''


class Machine:
    """A user's machine with such a kubectl."""

    def __init__(self, folder):
        self.folder, self.claim = folder, folder / "claim"
        self.claim.mkdir()
        text = FAKE.format(python=sys.executable, kubectl=shutil.which("kubectl"), root=str(ROOT), folder=str(folder))
        (folder / "kubectl").write_text(text)
        (folder / "kubectl").chmod(0o755)

    def __call__(self, *words, check=None):
        """Runs `launch/k8s.py data`; `check`: its exit code, if one is expected."""
        env = os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}"}
        command = [sys.executable, ROOT / "launch/k8s.py", "data", f"--image={DIGEST}", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=300)
        assert check is None or done.returncode == check, done.stderr
        return done

    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def photos(tmp_path):
    """A folder of this machine with files of several sizes, an empty one and a hidden one."""
    folder = tmp_path / "photos"
    for i, size in enumerate((0, 1, 70_000, 3_000_000)):
        place = folder / f"train/{'ab'[i % 2]}/{i} ü.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(os.urandom(size))
    (folder / ".hidden").write_text("x")
    return folder


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def visible(folder):
    return {name: text for name, text in content(folder).items() if not name.startswith(".")}


def test_a_folder_comes_onto_the_claim_whole_and_leaves_no_objects(machine, photos):
    done = machine(f"--from={photos}", check=0)
    assert content(machine.claim / "data/photos") == visible(photos)
    assert "data/photos is there" in done.stderr and not (machine.folder / "state.json").exists()
    assert not [p.name for p in (machine.claim / "data").iterdir() if p.is_dir() and p.name != "photos"]
    done = machine(f"--from={photos}", check=0)
    assert "there already, the same" in done.stderr


def test_a_connection_that_is_cut_is_made_again_from_where_it_was(machine, photos):
    (machine.folder / "cut").write_text("1500000")
    done = machine(f"--from={photos}", check=0)
    assert "it is made again" in done.stderr
    assert content(machine.claim / "data/photos") == visible(photos)
    assert sum(words[0] == "exec" for words in machine.calls()) == 2


def test_what_lies_half_on_the_claim_is_not_trusted(machine, photos):
    """A command that was killed has left a part of a file, a file that is damaged, and one of other data."""
    staging = machine.claim / "data/.incoming-photos"
    names = sorted(visible(photos), key=lambda name: (photos / name).stat().st_size)
    for name in names[1:]:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
    (staging / names[1]).write_bytes(b"!" * (photos / names[1]).stat().st_size)
    part = staging / names[3]
    part.with_name(f".{part.name}").write_bytes((photos / names[3]).read_bytes()[:1000])
    wrong = staging / names[2]
    wrong.with_name(f".{wrong.name}").write_bytes(b"?" * 500)
    (staging / "other.png").write_bytes(b"x")
    done = machine(f"--from={photos}", check=0)
    assert "did not come as it was sent" in done.stderr  # the part of other bytes; it came anew
    assert content(machine.claim / "data/photos") == visible(photos)


@pytest.mark.parametrize("change", ["content", "more", "less"])
def test_other_data_on_the_claim_are_not_overwritten(machine, photos, change):
    machine(f"--from={photos}", check=0)
    place = machine.claim / "data/photos/train/a/2 ü.png"
    if change == "less":
        place.unlink()
    else:
        (place if change == "content" else place.with_name("new.png")).write_bytes(b"other")
    before = content(machine.claim / "data/photos")
    done = machine(f"--from={photos}", check=2)
    (line,) = [line for line in done.stderr.splitlines() if "holds other data (train/a/" in line]
    assert line.startswith(str(ROOT / "launch/k8s.py")) and "bring this under another name, or remove" in line
    assert content(machine.claim / "data/photos") == before


def test_a_file_comes_with_what_describes_it(machine, tmp_path):
    (tmp_path / "tokens.bin").write_bytes(b"\0\1" * 5000)
    (tmp_path / "tokens.bin.json").write_text("{}")
    (tmp_path / "tokens.txt").write_text("not asked for")
    machine(f"--from={tmp_path / 'tokens.bin'}", check=0)
    assert {p.name for p in (machine.claim / "data").iterdir() if not p.name.startswith(".")} == {
        "tokens.bin", "tokens.bin.json",
    }  # fmt: skip
    # Killed between two renames: what describes it is there alone.
    (machine.claim / "data/tokens.bin").unlink()
    machine(f"--from={tmp_path / 'tokens.bin'}", check=0)
    assert (machine.claim / "data/tokens.bin").read_bytes() == b"\0\1" * 5000
    (tmp_path / "tokens.bin").write_bytes(b"other")
    assert "holds other data (tokens.bin differs)" in machine(f"--from={tmp_path / 'tokens.bin'}", check=2).stderr


def test_a_name_that_is_taken_by_another_kind_is_refused(machine, photos):
    (machine.claim / "data").mkdir()
    (machine.claim / "data/photos").write_text("a file")
    assert "data/photos is a file; bring this under" in machine(f"--from={photos}", check=2).stderr


def test_a_command_that_is_killed_is_repeated_and_joins_its_job(machine, photos):
    """The pod still waits; the second command sends through it."""
    env = os.environ | {"PATH": f"{machine.folder}:{os.environ['PATH']}"}
    (photos / "train/a/large.png").write_bytes(os.urandom(60_000_000))
    command = [sys.executable, ROOT / "launch/k8s.py", "data", f"--image={DIGEST}", f"--from={photos}"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as first:
        for line in first.stderr:
            if " of " in line and "MiB" in line and "sending" not in line and "source" not in line:
                break
        os.killpg(first.pid, signal.SIGKILL)
    staging = machine.claim / "data/.incoming-photos"
    assert any(staging.rglob("*.png"))
    time.sleep(0.2)
    done = machine(f"--from={photos}", check=0)
    assert "data-photos runs already" in done.stderr
    assert content(machine.claim / "data/photos") == visible(photos)
    other = machine.folder / "elsewhere/photos"
    shutil.copytree(photos, other)
    (machine.folder / "state.json").write_text(
        json.dumps({"metadata": {"name": "data-photos", "annotations": {DATA: "{}"}}, "spec": {}})
    )
    assert "brings other data now; wait for its end" in machine(f"--from={other}", check=2).stderr


def test_a_data_set_is_prepared_on_the_claim_by_a_job(machine):
    done = machine("--dataset=diabetes", check=0)
    assert (machine.claim / "data/diabetes/1.0.0/dataset_info.json").exists()
    assert "[data] diabetes is prepared in" in done.stdout and "data/diabetes is there" in done.stderr
    assert not (machine.folder / "applied").exists()  # no policy: nothing is downloaded


def test_a_data_set_that_cannot_be_prepared_ends_the_command_and_its_job_stays_to_be_looked_at(machine):
    done = machine("--dataset=no_such_set", check=2)
    assert "'no_such_set' is not known" in done.stdout and "data-no-such-set has not brought the data" in done.stderr
    assert (machine.folder / "state.json").exists() and "ipBlock" in (machine.folder / "applied").read_text()


REFUSALS = {
    "neither": ((), "data needs --from=PATH or --dataset=NAME; name one of them"),
    "both": (("--from=docs", "--dataset=digits"), "data needs --from=PATH or --dataset=NAME; name one of them"),
    "a file as a data set": (("--dataset=csv:/x/y.csv",), "it is read where it lies; bring it: --from=/x/y.csv"),
    "what comes with the image": (("--dataset=digit_masks",), "it comes with the image; submit the run"),
    "a function": (("--dataset=my_pkg.data:load",), "--dataset my_pkg.data:load is not prepared"),
    "nothing": (("--from=/no/such/place",), "--from /no/such/place does not exist"),
    "an address": (("--from=s3://bucket/x",), "is an address, not a path"),
    "a path for a store": (("--from=docs", "--run_store=/work/runs"), "--run_store /work/runs is a path"),
    "a tag": (("--dataset=digits", "--image=lockstep:cpu"), "has no digest"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_data_refuses(machine, name):
    words, message = REFUSALS[name]
    done = machine(*words, "--dry_run", check=2)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_dry_run_asks_no_cluster_and_tells_what_reaches_out(machine, photos):
    done = machine("--dataset=cifar10", "--dry_run", check=0)
    assert "network    ports 80 and 443 anywhere, while it runs: cifar10 is downloaded" in done.stderr
    assert "source" in machine(f"--from={photos}", "--dry_run", check=0).stderr
    machine(f"--from={photos}", "--run_store=s3://bucket/runs", "--dry_run", check=0)
    assert not (machine.folder / "calls").exists()
