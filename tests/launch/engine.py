"""Podman as the tests use it: within this machine's limits, on a base that debootstrap makes: no registry is asked."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAMS = ("podman", "runc", "debootstrap")
BASE = "localhost/lockstep-base:bookworm"
SETTINGS = """
[engine]
runtime = "limited"
cgroup_manager = "cgroupfs"
events_logger = "file"
[engine.runtimes]
limited = ["{runtime}"]
"""  # no systemd here
RUNTIME = """#!{python}
import json, os, resource, sys
for flag, file in (("--bundle", "/config.json"), ("--process", "")):
    if flag not in sys.argv:
        continue
    path = sys.argv[sys.argv.index(flag) + 1] + file
    config = json.load(open(path))
    for limit in config.get("process", config).get("rlimits") or ():
        most = resource.getrlimit(getattr(resource, limit["type"]))[1]
        if most != resource.RLIM_INFINITY:
            limit["soft"], limit["hard"] = min(limit["soft"], most), min(limit["hard"], most)
    json.dump(config, open(path, "w"))
os.execv("{runc}", ["runc", *sys.argv[1:]])
"""  # podman asks for more open files than a machine may allow, and of pods whatever its settings say
# What a container is and may do, told from within.
INSIDE = """
import json, os, shutil
status = dict(line.split(":\\t", 1) for line in open("/proc/1/status").read().splitlines() if ":\\t" in line)
def writes(path):
    try:
        open(path, "w").close()
        return True
    except OSError:
        return False
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "no_new_privileges": status["NoNewPrivs"].strip(), "first": open("/proc/1/cmdline").read().split("\\0")[1],
    "root": writes("/written"), "app": writes("/app/written"), "tmp": writes("/tmp/written"),
    "shm": writes("/dev/shm/written"), "shm_mib": shutil.disk_usage("/dev/shm").total >> 20,
    "runs": writes("/work/runs/written"),
    "token": os.path.exists("/var/run/secrets/kubernetes.io"),
}))
"""


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def podman(tmp_path_factory):
    """`podman(word, …)` runs podman and returns what it has done."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent or os.geteuid():
        pytest.skip(
            f"images cannot be built here: {', '.join(absent) + ' is missing' if absent else 'this is not root'}"
        )
    if not (ROOT / ".git").exists():
        pytest.skip("images are built from a commit, and this is no checkout")
    folder = tmp_path_factory.mktemp("podman")
    (folder / "runtime").write_text(RUNTIME.format(python=sys.executable, runc=shutil.which("runc")))
    (folder / "runtime").chmod(0o755)
    (folder / "containers.conf").write_text(SETTINGS.format(runtime=folder / "runtime"))
    env = os.environ | {"CONTAINERS_CONF": str(folder / "containers.conf"), "ENGINE": shutil.which("podman")}

    def call(*words, check=True, timeout=900, **more):
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            env=env | more,
            cwd=ROOT,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def run(*words, **keywords):
        return call("podman", *words, **keywords)

    run.call, run.env, run.folder = call, env, folder
    probe = call("podman", "info", check=False)
    if probe.returncode:
        pytest.skip(f"podman does not run here: {probe.stderr.strip()[-300:]}")
    return run


def secrets(folder: Path) -> list[str]:
    """This machine's certificates, as the optional secrets of the build."""
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    if not certificates:
        return []
    (folder / "pip.conf").write_text("[global]\ncert = /etc/ssl/pip-ca.crt\ntimeout = 180\n")
    return ["--secret", f"id=pip.conf,src={folder / 'pip.conf'}", "--secret", f"id=ca.crt,src={certificates}"]


@pytest.fixture(scope="module")
def images(podman):
    """The stages `cpu` and `tensorboard` of this commit, built if they are not there: their names."""
    with open(Path(tempfile.gettempdir()) / "lockstep-images.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if podman("image", "exists", BASE, check=False).returncode:
            podman.call(ROOT / "launch/base_image.sh")
        podman.build = ["--pull=never", "--network", "host", "--build-arg", f"BASE_IMAGE={BASE}"]
        podman.build += secrets(podman.folder)
        for stage in ("cpu", "tensorboard"):
            asked = podman("image", "inspect", f"lockstep:{stage}", "--format", "{{json .Labels}}", check=False)
            if asked.returncode == 0 and json.loads(asked.stdout).get("org.opencontainers.image.revision") == commit():
                continue
            podman.call(ROOT / "launch/image.sh", stage, *podman.build, timeout=2700)
    return {stage: f"lockstep:{stage}" for stage in ("cpu", "tensorboard")}
