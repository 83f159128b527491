"""Container engines and kubectl: whether they are here, whether they work, and what they may do."""

from __future__ import annotations

import concurrent.futures
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from launch.health.rows import NOT_HERE, OK, WARNING, Row
from trainers.world.programs import ask, one_line

CDI_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
REQUEST_TIMEOUT = "--request-timeout=5s"
# What launch/k8s.py asks of a cluster, in the words of `kubectl auth can-i`, and the namespace that it takes.
RIGHTS = (
    ("create", "jobs.batch"),
    ("create", "services"),
    ("create", "networkpolicies.networking.k8s.io"),
    ("get", "jobs.batch"),
    ("get", "pods"),
    ("get", "pods", "--subresource=log"),
    ("delete", "jobs.batch"),
)
NAMESPACE = "lockstep"
# What k8s/setup asks of it besides, once.
SETUP = (("create", "namespaces"), ("create", "persistentvolumeclaims"))


def _cdi(folders: tuple[Path, ...]) -> bool:
    """Whether a file tells engines how to hand NVIDIA's GPUs to a container."""
    return any("nvidia" in path.name for folder in folders for path in folder.glob("*.[yj]*"))


def engine_row(engine: str, gpus: int, cdi: tuple[Path, ...] = CDI_FOLDERS) -> Row:
    """Docker or podman. `gpus`: how many the machine has; only then is NVIDIA's toolkit asked for."""
    program = shutil.which(engine)
    if program is None:
        return Row(engine, NOT_HERE, "not installed; launch/docker.sh and launch/image.sh need it or its like")
    asked = "{{json .}}" if engine == "docker" else "json"
    answer = ask([program, "info", "--format", asked])
    try:
        facts = json.loads(answer.output)
    except ValueError:
        facts = {}
    complaints = facts.get("ServerErrors") or []
    version = facts.get("ServerVersion") or facts.get("version", {}).get("Version", "")
    if answer.code != 0 or complaints or not version:
        said = one_line(" ".join(complaints) or answer.error or answer.output) or "it does not tell its version"
        remedy = "systemctl start docker, and join the group docker" if engine == "docker" else "podman info shows more"
        return Row(engine, WARNING, f"it does not work: {said}", remedy)
    if not gpus:
        return Row(engine, OK, f"{version}, works")
    if shutil.which("nvidia-ctk") and ("nvidia" in facts.get("Runtimes", {}) or _cdi(cdi)):
        return Row(engine, OK, f"{version}, works; NVIDIA's toolkit is set up")
    how = "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
    how = how if engine == "docker" else "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    here = "is installed, and not set up for it" if shutil.which("nvidia-ctk") else "is not installed"
    return Row(
        engine, WARNING, f"{version}, works; NVIDIA's toolkit {here}", f"install nvidia-container-toolkit, then {how}"
    )


def _may(program: str, words: Sequence[str], namespace: str) -> tuple[str, bool | None, str]:
    """A right in words, whether the account has it, and what kubectl said instead where it did not tell."""
    answer = ask([program, "auth", "can-i", *words, f"--namespace={namespace}", REQUEST_TIMEOUT])
    first = answer.output.split()[:1]
    verb, kind = words[0], words[1].partition(".")[0]
    right = f"{verb} {'logs of ' if len(words) > 2 else ''}{kind}"
    return right, {("yes",): True, ("no",): False}.get(tuple(first)), answer.said


def kubectl_rows(namespace: str = NAMESPACE) -> list[Row]:
    """kubectl, the cluster that it reaches, and what the account may do in a namespace."""
    program = shutil.which("kubectl")
    if program is None:
        return [Row("kubectl", NOT_HERE, "not installed; launch/k8s.py needs it, 1.31 or newer")]
    answer = ask([program, "version", "--output=json", REQUEST_TIMEOUT])
    try:
        versions = json.loads(answer.output)
    except ValueError:
        versions = {}
    client = versions.get("clientVersion", {}).get("gitVersion", "")
    if not client:
        return [Row("kubectl", WARNING, f"it does not work: {answer.said}", "install kubectl 1.31 or newer")]
    found = [Row("kubectl", OK, client)]
    number = re.match(r"v(\d+)\.(\d+)", client)
    if number and (int(number.group(1)), int(number.group(2))) < (1, 31):
        found = [Row("kubectl", WARNING, client, "install 1.31 or newer")]
    server = versions.get("serverVersion", {}).get("gitVersion", "")
    if not server:
        said = one_line(answer.error) or "no answer"
        remedy = "set KUBECONFIG, kubectl config use-context; look with kubectl cluster-info"
        return [*found, Row("cluster", WARNING, f"none answers: {said}", remedy)]
    found.append(Row("cluster", OK, server))
    wanted = [*RIGHTS, *SETUP]
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
        told = list(pool.map(lambda right: _may(program, right, namespace), wanted))
    return [*found, *_right_rows(told[: len(RIGHTS)], told[len(RIGHTS) :], namespace)]


def _right_rows(run: list, setup: list, namespace: str) -> list[Row]:
    """What the account may do: to submit runs, and to set a namespace up."""
    found = []
    for title, told, severity, remedy in (
        ("rights to run", run, WARNING, f"ask the cluster's administrator for them in namespace {namespace}"),
        ("rights to set up", setup, OK, "an administrator applies k8s/setup once"),
    ):
        silent = [f"{right}: {said}" for right, may, said in told if may is None]
        denied = [right for right, may, _ in told if may is False]
        if silent:
            found.append(
                Row(title, WARNING, one_line(f"the cluster does not tell: {silent[0]}"), "kubectl auth can-i --list")
            )
        elif denied:
            found.append(Row(title, severity, f"not allowed in namespace {namespace}: {', '.join(denied)}", remedy))
        else:
            found.append(Row(title, OK, f"in namespace {namespace}: {', '.join(right for right, _, _ in told)}"))
    return found


def engine_rows(gpus: int) -> list[Row]:
    """All of them, asked at once."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        engines = [pool.submit(engine_row, engine, gpus) for engine in ("docker", "podman")]
        cluster = pool.submit(kubectl_rows)
        return [*(each.result() for each in engines), *cluster.result()]
