"""The images, really built and run: by podman, on a base that debootstrap makes, since no registry is asked.

They are built once for a commit, whichever test comes first. Where the machine cannot, the tests skip and say why.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, metrics
from engine import BASE, INSIDE, commit, images, podman  # noqa: F401 - fixtures

# The first build installs everything, while other tests share the cores; who comes second waits for it.
pytestmark = pytest.mark.timeout(3000)
CALLER = 12345


def inspected(podman, image):
    return json.loads(podman("image", "inspect", image).stdout)[0]


def test_an_image_says_what_it_is(podman, images):
    sizes = {}
    for stage, image in images.items():
        facts = inspected(podman, image)
        sizes[stage] = facts["Size"] / 1e6
        assert facts["User"] == "10001:10001"
        assert facts["Labels"]["org.opencontainers.image.revision"] == commit()
        assert facts["Labels"]["org.opencontainers.image.version"]
    assert inspected(podman, images["cpu"])["Config"]["Entrypoint"] == ["python", "/app/trainers/custom_loop.py"]
    print("\n\n| image | MB |\n|---|---|\n" + "\n".join(f"| `{stage}` | {size:.0f} |" for stage, size in sizes.items()))
    assert sizes["tensorboard"] < sizes["cpu"] / 2


def test_nothing_in_an_image_is_what_built_it(podman, images):
    look = "command -v gcc cc make g++; ls /etc/pip.conf /etc/ssl/pip-ca.crt /build /opt/sbom /app/tests 2>/dev/null"
    for image in images.values():
        found = podman("run", "--rm", "--network", "none", "--entrypoint", "sh", image, "-c", look, check=False)
        assert found.stdout.strip() == ""
    listed = podman(
        "run", "--rm", "--network", "none", "--entrypoint", "python", images["tensorboard"], "-m", "pip", "list"
    )
    assert re.search(r"^tensorboard[-_]plugin[-_]profile ", listed.stdout, re.MULTILINE)
    assert not re.search(r"^(tensorflow|keras) ", listed.stdout, re.MULTILINE)


def test_the_bill_of_materials_names_versions_and_licences_of_the_lock(podman, images):
    text = podman(
        "run", "--rm", "--network", "none", "--entrypoint", "cat", images["cpu"], "/opt/venv/sbom.cdx.json"
    ).stdout
    bill = json.loads(text)
    assert bill["bomFormat"] == "CycloneDX"
    found = {part["name"].lower().replace("_", "-"): part for part in bill["components"]}
    locked = re.findall(
        r"^([a-z0-9._-]+)==([^ \\]+) ?([^\\]*)", (ROOT / "requirements/cpu.txt").read_text(), re.MULTILINE
    )
    plain = [(name, version) for name, version, marker in locked if ";" not in marker]
    assert len(plain) > 40
    for name, version in plain:
        assert found[name.replace("_", "-")]["version"] == version
    licensed = [name for name, part in found.items() if part.get("licenses")]
    assert len(licensed) > 0.8 * len(found)


PACKAGES = """
import importlib.metadata, importlib.util, json
names = ("obstore", "prometheus-client", "mlflow-skinny", "wandb")
print(json.dumps([name for name in names if importlib.util.find_spec({"prometheus-client": "prometheus_client",
    "mlflow-skinny": "mlflow"}.get(name, name)) and importlib.metadata.version(name)]))
"""


def test_one_build_argument_adds_what_a_tracker_needs(podman, images):
    """Buckets and Prometheus every image has; the layers below the packages are those of the image without."""
    name = "localhost/lockstep-extras:cpu"
    podman.call(ROOT / "launch/image.sh", "cpu", "--build-arg", "EXTRAS=mlflow wandb", f"--tag={name}", *podman.build)
    words = ["run", "--rm", "--network", "none", "--entrypoint", "python"]
    every = ["obstore", "prometheus-client"]
    assert json.loads(podman(*words, images["cpu"], "-c", PACKAGES).stdout) == every
    assert json.loads(podman(*words, name, "-c", PACKAGES).stdout) == [*every, "mlflow-skinny", "wandb"]
    bill = json.loads(podman(*words[:-1], "cat", name, "/opt/venv/sbom.cdx.json").stdout)
    assert {"mlflow-skinny", "wandb"} <= {part["name"] for part in bill["components"]}
    flags = ["--model=mlp", "--tracker=wandb,project=x", "--train_steps=20", "--run_dir=/work/run"]
    done = podman(*words[:-2], "--env", "WANDB_MODE=offline", "--tmpfs", "/work:mode=1777", name, *flags)
    assert "complete: step 20" in done.stdout + done.stderr and "--tracker" not in done.stderr
    podman("image", "rm", name)


def test_two_builds_of_a_commit_give_the_same_layer_of_code(podman, images):
    layers = []
    for number in range(2):
        name = f"localhost/lockstep-code:{number}"
        words = ["--no-cache", "--pull=never", "--build-arg", f"BASE_IMAGE={BASE}", "--tag", name]
        podman.call(ROOT / "launch/image.sh", "code", *words)
        layers.append(inspected(podman, name)["RootFS"]["Layers"])
        time.sleep(1.1)
    assert layers[0] == layers[1]


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    os.chown(folder, 10001, 10001)  # as docker.sh makes it for root
    for parent in [folder, *folder.parents]:
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    return folder


def docker(podman, runs, *flags, more="", check=True, **env):
    """launch/docker.sh, without network."""
    return podman.call(
        ROOT / "launch/docker.sh", *flags, check=check, RUNS=str(runs), IMAGE="lockstep:cpu",
        ENGINE_FLAGS=f"--network none {more}", **env,
    )  # fmt: skip


def test_a_container_has_no_privileges_and_a_root_that_cannot_be_written(podman, images, runs):
    (runs.parent / "python").write_text(INSIDE)
    # docker.sh runs an entry point; here it is one that looks around.
    (runs.parent / "python").chmod(0o644)
    mount = f"--entrypoint python --volume {runs.parent / 'python'}:/inside.py:ro"
    script = ROOT / "launch/docker.sh"
    words = script.read_text().replace('--strategy=mirrored "$@"', "/inside.py")
    changed = runs.parent / "docker.sh"
    changed.write_text(words)
    changed.chmod(0o755)
    done = podman.call(changed, RUNS=str(runs), IMAGE="lockstep:cpu", ENGINE_FLAGS=f"--network none {mount}")
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    expected = {"uid": 10001, "gid": 10001, "capabilities": 0, "no_new_privileges": "1"}
    expected |= {"root": False, "app": False, "tmp": True, "shm": True, "shm_mib": 1024, "runs": True}
    assert {name: facts[name] for name in expected} == expected


def test_the_image_trains_to_accuracy_without_network_and_its_files_are_the_callers(podman, images, runs):
    os.chown(runs, CALLER, CALLER)
    words = ["run", "--rm", "--read-only", "--tmpfs", "/tmp:rw,mode=1777", "--cap-drop", "ALL", "--network", "none"]
    words += ["--user", f"{CALLER}:{CALLER}", "--volume", f"{runs}:/work/runs", images["cpu"]]
    done = podman(*words, "--strategy=mirrored", "--model=mlp", "--run_dir=runs/first")
    assert "complete: step 1000" in done.stderr + done.stdout
    facts = json.loads((runs / "first/run.json").read_text())
    assert facts["final"]["eval"]["accuracy"] >= 0.96
    assert facts["commit"] == commit()
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in runs.rglob("*")}
    assert owners == {(CALLER, CALLER)}


def test_sigterm_to_a_container_saves_and_a_second_container_continues(podman, images, runs):
    flags = [
        "--model=mlp",
        "--train_steps=12000",
        "--checkpoint_every=200",
        "--run_dir=runs/stopped",
        "--log_every=500",
    ]
    name = f"lockstep-stopped-{os.getpid()}"
    command = [str(ROOT / "launch/docker.sh"), *flags]
    env = podman.env | {"RUNS": str(runs), "IMAGE": "lockstep:cpu", "ENGINE_FLAGS": f"--network none --name {name}"}
    with open(runs.parent / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=ROOT)
    try:
        deadline = time.monotonic() + 300
        while not any((runs / "stopped/checkpoints").glob("step-*")):
            assert process.poll() is None and time.monotonic() < deadline, (runs.parent / "log").read_text()
            time.sleep(0.05)
        podman("kill", "--signal", "TERM", name)
        assert process.wait(180) == 143, (runs.parent / "log").read_text()
    finally:
        with contextlib.suppress(Exception):
            process.kill()
    assert "the same command continues" in (runs.parent / "log").read_text()
    done = docker(podman, runs, *flags)
    assert "resumed from the checkpoint of step" in done.stdout + done.stderr
    assert metrics(runs / "stopped")[-1]["step"] == 12000


def test_a_bad_flag_is_one_line_and_code_2_from_a_container_too(podman, images, runs):
    done = docker(podman, runs, "--model=nothing", check=False)
    assert done.returncode == 2
    assert "'nothing' is not known" in done.stderr


PACKAGE = {
    "my_pkg/net.py": ("docs/models.md", "def build(spec: tasks.DataSpec, *, width"),
    "my_pkg/data.py": ("docs/data.md", "def load(*, size"),
}


def project(folder):
    """A folder with the package of the docs, and with what is left out of an image."""
    for name, (page, part) in PACKAGE.items():
        code = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(next(block for block in code if part in block))
    for name in ("__pycache__/net.pyc", ".secret", "notes.log", "big.bin", "deep/words.txt"):
        (folder / "my_pkg" / name).parent.mkdir(exist_ok=True)
        (folder / "my_pkg" / name).write_text(name)
    (folder / "my_pkg/.gitignore").write_text("*.log\n")
    (folder / ".dockerignore").write_text("my_pkg/big.bin\n")
    (folder / "my_pkg/net.py").chmod(0o600)
    return folder


OWN = ["--model=my_pkg.net:build,width=16", "--dataset=my_pkg.data:load", "--train_steps=20", "--log_every=0"]


def test_a_package_on_top_of_an_image_is_one_layer_of_what_git_does_not_ignore(podman, images, runs, tmp_path):
    folder, flags = project(tmp_path / "project"), "--pull=never --network host"
    names = [f"localhost/lockstep-own:{number}" for number in range(2)]
    for name in names:
        words = [ROOT / "launch/image.sh", f"--with={folder / 'my_pkg'}", f"--tag={name}", "cpu", "--no-cache"]
        done = podman.call(*words, ENGINE_FLAGS=flags)
        time.sleep(1.1)
    below, one, other = (inspected(podman, name) for name in (images["cpu"], *names))
    assert one["RootFS"]["Layers"][:-1] == below["RootFS"]["Layers"]
    assert one["RootFS"]["Layers"] == other["RootFS"]["Layers"]
    labels = one["Config"]["Labels"]
    assert (
        re.fullmatch("my_pkg@sha256:[0-9a-f]{64}", labels.pop("lockstep.with")) and labels == below["Config"]["Labels"]
    )
    assert f"{names[1]} holds my_pkg@sha256:" in done.stderr
    words = ["run", "--rm", "--network", "none", "--entrypoint", "sh", names[0], "-c", "cd /app/own; find . -type f"]
    assert sorted(podman(*words).stdout.split()) == [f"./my_pkg/{n}" for n in ("data.py", "deep/words.txt", "net.py")]
    done = podman.call(
        ROOT / "launch/docker.sh", *OWN, "--run_dir=runs/own",
        RUNS=str(runs), IMAGE=names[0], ENGINE_FLAGS="--network none",
    )  # fmt: skip
    assert "complete: step 20" in done.stdout + done.stderr
    facts = json.loads((runs / "own/run.json").read_text())
    assert facts["commit"] == commit() and facts["sources"]["model"]["file"] == "/app/own/my_pkg/net.py"


def test_no_image_gets_a_package_that_would_hide_one_of_its_own(podman, images, tmp_path):
    (tmp_path / "absl").mkdir()
    (tmp_path / "absl/flags.py").write_text("")
    words = [ROOT / "launch/image.sh", f"--with={tmp_path / 'absl'}", "cpu"]
    done = podman.call(*words, check=False, ENGINE_FLAGS="--pull=never")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "launch/image.sh: the image has a module absl of its own, which yours would hide; rename yours"
    )


def test_a_container_trains_the_package_of_the_current_directory_and_cannot_write_it(podman, images, runs, tmp_path):
    folder = project(tmp_path / "project")
    (folder / "my_pkg/net.py").chmod(0o644)
    with open(folder / "my_pkg/data.py", "a") as file:
        file.write("\n\nimport os\nprint('can be written:', os.access(os.path.dirname(__file__), os.W_OK))\n")
    env = podman.env | {"RUNS": str(runs), "IMAGE": "lockstep:cpu", "ENGINE_FLAGS": "--network none"}
    command = [ROOT / "launch/docker.sh", *OWN, "--run_dir=runs/own"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "complete: step 20" in done.stdout + done.stderr and "can be written: False" in done.stdout
    assert json.loads((runs / "own/run.json").read_text())["sources"]["model"]["file"] == "/work/my_pkg/net.py"


def test_the_tensorboard_image_shows_a_run(podman, images, runs, run, tmp_path):
    import urllib.request

    from launch.workers import free_ports

    run(name="runs/shown")
    subprocess.run(["chmod", "-R", "a+rX", str(tmp_path)], check=True)
    port, name = free_ports(1)[0], f"lockstep-tensorboard-{os.getpid()}"
    words = [
        "run",
        "--rm",
        "--detach",
        "--name",
        name,
        "--network",
        "host",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--cap-drop",
    ]
    words += ["ALL", "--volume", f"{tmp_path / 'runs'}:/work/runs:ro", images["tensorboard"]]
    podman(*words, "--host=127.0.0.1", f"--port={port}")
    try:
        deadline = time.monotonic() + 240
        while True:
            address = f"http://127.0.0.1:{port}/data/runs"
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
                if "runs/shown/train" in json.loads(answer.read()):
                    break
            assert time.monotonic() < deadline, podman("logs", name, check=False).stderr
            time.sleep(0.5)
    finally:
        podman("rm", "--force", name, check=False)


def test_hadolint_finds_nothing():
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_audit_tells_what_is_known_or_that_it_could_not_ask():
    done = subprocess.run(
        [ROOT / "launch/audit.sh", "tensorboard"], capture_output=True, text=True, timeout=900, check=False
    )
    print(done.stdout[-2000:], done.stderr[-500:])
    assert done.returncode in (0, 1, 75), done.stderr
    if done.returncode == 75:
        assert "not audited: the database of vulnerabilities could not be asked about" in done.stderr
    done = subprocess.run([ROOT / "launch/audit.sh", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "name cpu, gpu or tensorboard" in done.stderr


def test_the_commands_of_the_readme_run_line_by_line(podman, images, tmp_path):
    """Each line of the first commands of the page on containers, as it stands there, in a folder of its own."""
    section = (ROOT / "docs/containers.md").read_text()
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    lines = [line.split("#")[0].strip() for line in block.splitlines() if line.strip()]
    assert len(lines) >= 4
    work = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(work)], check=True)
    for line in lines:
        # What this machine needs to build and to run without a registry and a network of containers.
        extra = {"ENGINE_FLAGS": " ".join(podman.build) if "image.sh" in line else "--network none"}
        done = subprocess.run(
            line, shell=True, env=podman.env | extra, cwd=work, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
