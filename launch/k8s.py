"""Submit a run to a Kubernetes cluster, watch it, let it go on. Needs kubectl, and once `kubectl apply -k k8s/setup`.

    python launch/k8s.py submit --name=first --nodes=2 --gpus_per_node=8 --image=IMAGE@sha256:… -- --model=resnet50
    python launch/k8s.py submit --name=first --nodes=2 --gpus_per_node=8 --image=IMAGE@sha256:… --dry_run -- …
    python launch/k8s.py status --name=first        # pods, restarts, why one is Pending, the last metrics
    python launch/k8s.py logs --name=first          # of all workers, as they come
    python launch/k8s.py resume --name=first        # again, from its checkpoint; --nodes=4 on another size
    python launch/k8s.py delete --name=first        # its objects; the run stays on the claim
    python launch/k8s.py tensorboard                # at 127.0.0.1:6006

What follows `--` are the trainer's flags. Exit code 0: done; 1: kubectl has failed; 2: a flag is wrong, or there is no
kubectl or no cluster, in one line.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml

from launch import manifests
from launch.manifests import Document, Submission
from trainers.config import check_batch
from trainers.exit_codes import OK, RETRY, BadConfiguration
from trainers.figures import table
from trainers.flags import config_from

FAILED = 1
# Objects that a run is made of, most general first; JobSet only where its controller is installed.
KINDS = ("job", "service", "networkpolicy")
OWN_FLAGS = ("--strategy", "--run_dir", "--mode")
CPU_REPLICAS = 2


class Kubectl:
    """kubectl, with a context and a namespace."""

    def __init__(self, context: str, namespace: str):
        program = shutil.which("kubectl")
        if program is None:
            raise BadConfiguration("kubectl is not on the PATH; install it, 1.31 or newer")
        self.namespace = namespace
        self._base = [program, *(["--context", context] if context else [])]

    def words(self, *words: str) -> list[str]:
        """The command line of a call in the namespace."""
        return [*self._base, "--namespace", self.namespace, *words]

    def call(self, *words: str, given: str | None = None, fails: bool = False) -> subprocess.CompletedProcess:
        """Runs kubectl. Unless it may fail: raises BadConfiguration with what it said."""
        done = subprocess.run(self.words(*words), input=given, capture_output=True, text=True, check=False)
        if done.returncode and not fails:
            raise BadConfiguration(self.why(words, done.stderr))
        return done

    def why(self, words: Sequence[str], said: str) -> str:
        """One line for a call that has failed."""
        line = " ".join(said.split())[:400]
        if any(sign in said for sign in ("refused", "no such host", "connection", "timeout", "current-context")):
            return f"no cluster answers ({line}); set KUBECONFIG or --context, and look with: kubectl cluster-info"
        if "forbidden" in said.lower():
            return f"the cluster does not allow it ({line}); ask for the right, or take another --namespace"
        return f"kubectl {shlex.join(words[:2])} has failed: {line}"

    def objects(self, *words: str) -> list[Document]:
        """The items that a `get` finds."""
        return json.loads(self.call("get", *words, "--output=json").stdout or "{}").get("items", [])

    def has_jobsets(self) -> bool:
        """Whether the cluster knows JobSet."""
        return self.call("get", "jobsets", "--output=name", fails=True).returncode == 0

    def render(self, submission: Submission) -> list[Document]:
        """The documents of a submission, rendered from `k8s/`; asks no cluster."""
        with tempfile.TemporaryDirectory() as folder:
            way = os.path.relpath(ROOT / "k8s", Path(folder).resolve())
            text = yaml.safe_dump(manifests.kustomization(submission, way))
            (Path(folder) / "kustomization.yaml").write_text(text)
            rendered = subprocess.run([*self._base, "kustomize", folder], capture_output=True, text=True, check=False)
        if rendered.returncode:
            raise BadConfiguration(f"kubectl kustomize has failed: {' '.join(rendered.stderr.split())[:400]}")
        return manifests.tailored([d for d in yaml.safe_load_all(rendered.stdout) if d], submission)


def workload_of(kubectl: Kubectl, name: str) -> Document | None:
    """The Job or JobSet of a run, if it is in the cluster."""
    kinds = ("jobsets", "jobs") if kubectl.has_jobsets() else ("jobs",)
    for kind in kinds:
        answer = kubectl.call("get", kind, name, "--ignore-not-found", "--output=json").stdout
        if answer.strip():
            return json.loads(answer)
    return None


def existing(kubectl: Kubectl, name: str) -> Document:
    """The same. Raises BadConfiguration if there is none, or if it is not of this launcher."""
    found = workload_of(kubectl, name)
    if found is None or manifests.SUBMISSION not in found["metadata"].get("annotations", {}):
        raise BadConfiguration(
            f"--name {name}: no such run is in namespace {kubectl.namespace}; submit it: with a name that was used it "
            f"continues from {manifests.RUNS}/{name}"
        )
    return found


def check(submission: Submission, allow_tag: bool) -> list[str]:
    """Checks a submission without a cluster. Returns its plan.

    Raises:
      BadConfiguration: a name, a size, an image or a flag of the trainer is wrong.
    """
    for name, value, low in (("nodes", submission.nodes, 1), ("gpus_per_node", submission.gpus, 0)):
        if value < low:
            raise BadConfiguration(f"--{name} {value} is below {low}; pass {low} or more")
    manifests.check_name(submission)
    if not allow_tag and "@sha256:" not in submission.image:
        raise BadConfiguration(
            f"--image {submission.image} has no digest, so what runs may change; pass IMAGE@sha256:…, or --allow_tag"
        )
    for flag in submission.flags:
        if flag.split("=")[0].replace("--no", "--", 1) in OWN_FLAGS or flag.split("=")[0] in OWN_FLAGS:
            raise BadConfiguration(
                f"{flag} is set by the launcher ({' '.join(submission.trainer_flags[:2])}); leave it out"
            )
    config = config_from(["trainer", *submission.trainer_flags], "")
    if submission.gpus:
        each = config.replicas or submission.gpus
        if each > submission.gpus:
            raise BadConfiguration(f"--replicas {each} is above --gpus_per_node {submission.gpus}; use fewer")
    else:
        each = (config.replicas or CPU_REPLICAS) if submission.nodes == 1 else 1
    replicas = submission.nodes * each
    share = check_batch(config, replicas)
    kind = "JobSet" if submission.backend == "jobset" else "Indexed Job"
    of_a_node = (
        f"{submission.gpus} GPU{'s' if submission.gpus > 1 else ''}" if submission.gpus else f"{each} CPU devices"
    )
    return [
        f"run        {submission.name} in namespace {submission.namespace}: {kind}"
        + (f", queue {submission.queue}" if submission.queue else "")
        + (", with an evaluator" if submission.evaluator else ""),
        f"nodes      {submission.nodes} × {of_a_node} = {replicas} replicas, --strategy={submission.strategy}",
        f"batch      {config.batch_size} examples = {replicas} × {share}",
        f"model      {config.model} on {config.dataset}, {config.train_steps} steps",
        f"run_dir    {submission.run_dir} on the claim runs",
    ]


def plan_of_workers(documents: Sequence[Document]) -> list[str]:
    """Who is who: each worker's address and what its TF_CONFIG will be."""
    lines = []
    for one in manifests.clusters(documents):
        if one.size > 1:
            lines.append(f"worker {one.index:<3} {one.addresses[one.index]}  TF_CONFIG={one.tf_config()}")
    return lines


def submission_of(options: argparse.Namespace, flags: Sequence[str]) -> Submission:
    """What the command line asks for."""
    return Submission(
        name=options.name,
        nodes=1 if options.nodes is None else options.nodes,
        gpus=1 if options.gpus_per_node is None else options.gpus_per_node,
        image=options.image or "",
        flags=tuple(flags),
        backend=options.backend or "job",
        queue=options.queue or "",
        rdma=options.rdma,
        evaluator=options.evaluator,
        namespace=options.namespace,
    )


def prepare(kubectl: Kubectl, submission: Submission, allow_tag: bool) -> str:
    """Checks and renders a submission, prints its plan on standard error, and returns its objects as YAML."""
    plan = check(submission, allow_tag)
    documents = kubectl.render(submission)
    if found := manifests.problems(documents, without=("images",)):
        raise BadConfiguration(f"what k8s/ renders breaks its rules: {'; '.join(found)}; mend k8s/")
    print("\n".join([*plan, *plan_of_workers(documents)]), file=sys.stderr, flush=True)
    return yaml.safe_dump_all(documents, sort_keys=False)


def apply(kubectl: Kubectl, submission: Submission, text: str) -> int:
    """Gives the objects of a run to the cluster."""
    print(kubectl.call("apply", "--filename=-", given=text).stdout, end="")
    print(f"see: python launch/k8s.py status --name={submission.name}", file=sys.stderr)
    return OK


def submit(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Submits a new run."""
    if not options.image:
        raise BadConfiguration("submit needs --image, what launch/image.sh has built and you have pushed; name it")
    kubectl, submission = Kubectl(options.context, options.namespace), submission_of(options, flags)
    text = prepare(kubectl, submission, options.allow_tag)
    if options.dry_run:
        print(text, end="")
        return OK
    if workload_of(kubectl, submission.name) is not None:
        raise BadConfiguration(
            f"--name {submission.name} exists in namespace {submission.namespace}; resume or delete it, or take another"
        )
    return apply(kubectl, submission, text)


def ended(workload: Document) -> str:
    """How a Job or JobSet has ended, or nothing while it has not."""
    for condition in workload.get("status", {}).get("conditions", ()):
        if condition["type"] in ("Complete", "Completed", "Failed") and condition["status"] == "True":
            said = condition.get("message") or condition.get("reason") or ""
            return f"{condition['type']}: {said}".rstrip(": ")
    return ""


def resume(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Starts a run that has ended again; it continues from its checkpoint, on any size."""
    kubectl = Kubectl(options.context, options.namespace)
    workload = existing(kubectl, options.name)
    if not ended(workload):
        raise BadConfiguration(f"--name {options.name} has not ended; delete it first, it saves before it goes")
    before = Submission.from_text(workload["metadata"]["annotations"][manifests.SUBMISSION])
    asked = {"nodes": options.nodes, "gpus": options.gpus_per_node, "image": options.image, "backend": options.backend}
    changed = {name: value for name, value in asked.items() if value is not None}
    submission = dataclasses.replace(before, **changed, flags=(*before.flags, *flags))
    text = prepare(kubectl, submission, options.allow_tag or (not options.image and "@sha256:" not in before.image))
    if options.dry_run:
        print(text, end="")
        return OK
    remove(kubectl, options.name)
    return apply(kubectl, submission, text)


def remove(kubectl: Kubectl, name: str) -> str:
    """Deletes what a run is made of, and waits until its pods have saved and gone."""
    kinds = (*(("jobset",) if kubectl.has_jobsets() else ()), *KINDS)
    selector = f"--selector={manifests.INSTANCE}={name}"
    return kubectl.call("delete", ",".join(kinds), selector, "--wait=true", "--cascade=foreground").stdout


def delete(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Deletes a run's objects; what it has written stays."""
    kubectl = Kubectl(options.context, options.namespace)
    existing(kubectl, options.name)
    print(remove(kubectl, options.name), end="")
    print(f"the run stays at {manifests.RUNS}/{options.name}; submitted again it continues", file=sys.stderr)
    return OK


def why_waiting(pod: Document, events: Sequence[Document]) -> str:
    """Why a pod does not run: its scheduler's words, its container's, or the last warning about it."""
    status = pod.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("message") or condition.get("reason", "")
    for container in status.get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting and waiting.get("reason") != "ContainerCreating":
            return f"{waiting.get('reason', '')}: {waiting.get('message', '')}".rstrip(": ")
    warnings = [
        e for e in events if e.get("type") == "Warning" and e["involvedObject"]["name"] == pod["metadata"]["name"]
    ]
    return f"{warnings[-1]['reason']}: {warnings[-1]['message']}" if warnings else ""


def ended_with(container: Mapping[str, Any]) -> str:
    """What the exit code of a container means."""
    for state in (container.get("state", {}), container.get("lastState", {})):
        if "terminated" in state:
            code = state["terminated"]["exitCode"]
            return f"code {code} ({RETRY.get(code, state['terminated'].get('reason', 'a crash; see its log'))})"
    return ""


def rows_of_pods(pods: Sequence[Document], events: Sequence[Document]) -> list[list[str]]:
    """A row for each pod: which worker, how it is, what restarts it has had, where it is, and why."""
    rows = []
    for pod in pods:
        labels, status = pod["metadata"]["labels"], pod.get("status", {})
        containers = status.get("containerStatuses", [])
        index = labels.get("batch.kubernetes.io/job-completion-index", "")
        note = why_waiting(pod, events) if status.get("phase") == "Pending" else ""
        note = note or next(filter(None, (ended_with(one) for one in containers)), "")
        restarts = sum(one.get("restartCount", 0) for one in containers)
        failed = pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-index-failure-count", "0")
        rows.append(
            [
                pod["metadata"]["name"],
                f"{labels.get(manifests.COMPONENT, '')} {index}".strip(),
                status.get("phase", "Unknown"),
                str(restarts + int(failed)),
                pod["spec"].get("nodeName", "–"),
                " ".join(note.split())[:160],
            ]
        )
    return rows


def status(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Prints how a run is."""
    kubectl = Kubectl(options.context, options.namespace)
    workload = existing(kubectl, options.name)
    pods = kubectl.objects("pods", f"--selector={manifests.INSTANCE}={options.name}")
    pods.sort(key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))
    events = kubectl.objects("events", "--field-selector=involvedObject.kind=Pod", "--sort-by=.lastTimestamp")
    facts = workload.get("status", {})
    waits = ""
    if workload["spec"].get("suspend"):
        waits = f"waiting in queue {workload['metadata']['labels'].get(manifests.QUEUE_LABEL, '?')}"
    running = f"{facts.get('active', len(pods))} active, {facts.get('failed', facts.get('restarts', 0))} failed so far"
    print(f"{workload['kind']} {options.name}: {ended(workload) or waits or running}")
    if pods:
        print(table(["pod", "who", "phase", "restarts", "node", "note"], rows_of_pods(pods, events)))
    else:
        print("no pods yet")
    chief = [p for p in pods if p["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index") == "0"]
    log = kubectl.call("logs", chief[-1]["metadata"]["name"], "--tail=400", fails=True).stdout if chief else ""
    lines = [line for line in log.splitlines() if line.startswith("step ")]
    for split in ("train", "eval"):
        print("\n".join([line for line in lines if line.split()[2:3] == [split]][-1:]) or f"no line of {split} yet")
    return OK


def logs(options: argparse.Namespace, flags: Sequence[str]) -> NoReturn:
    """Follows all workers, a prefix before each line."""
    kubectl = Kubectl(options.context, options.namespace)
    found = existing(kubectl, options.name)
    nodes = Submission.from_text(found["metadata"]["annotations"][manifests.SUBMISSION]).nodes
    words = ["logs", f"--selector={manifests.INSTANCE}={options.name}", "--prefix", "--ignore-errors"]
    words += [
        f"--max-log-requests={2 * nodes + 2}",
        f"--tail={options.tail}",
        *(["--follow"] if options.follow else []),
    ]
    replace_by(kubectl.words(*words))


def tensorboard(options: argparse.Namespace, flags: Sequence[str]) -> NoReturn:
    """Forwards a port of this machine's loopback to the cluster's TensorBoard."""
    kubectl = Kubectl(options.context, options.namespace)
    kubectl.call("get", "service", "tensorboard", "--output=name")
    print(f"TensorBoard: http://127.0.0.1:{options.port}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
    replace_by(kubectl.words("port-forward", "--address=127.0.0.1", "service/tensorboard", f"{options.port}:6006"))


def replace_by(command: Sequence[str]) -> NoReturn:
    """Goes on as another program, so that signals and the exit code are its own."""
    sys.stdout.flush()
    os.execv(command[0], command)


COMMANDS = {
    "submit": submit,
    "status": status,
    "logs": logs,
    "delete": delete,
    "resume": resume,
    "tensorboard": tensorboard,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = made.add_subparsers(dest="command", required=True)
    for name, action in COMMANDS.items():
        one = commands.add_parser(name, help=(action.__doc__ or "").splitlines()[0], allow_abbrev=False)
        one.add_argument("--context", default="", help="kubectl's context (default: the current one)")
        one.add_argument("--namespace", default=manifests.PLACEHOLDER, help="default: lockstep, of k8s/setup")
        if name == "tensorboard":
            one.add_argument("--port", type=int, default=6006, help="of this machine's loopback (default: 6006)")
            continue
        one.add_argument("--name", required=True, help="the run's")
        if name == "logs":
            one.add_argument("--tail", type=int, default=100, help="lines of each worker to begin with (default: 100)")
            one.add_argument("--follow", action=argparse.BooleanOptionalAction, default=True)
        if name in ("submit", "resume"):
            one.add_argument("--nodes", type=int, help="pods, each on a node of its own (default: 1)")
            one.add_argument("--gpus_per_node", type=int, help="0 = CPUs, for kind or minikube (default: 1)")
            one.add_argument("--image", help="IMAGE@sha256:…, of the stage gpu (or cpu)")
            one.add_argument("--allow_tag", action="store_true", help="take an image without a digest")
            one.add_argument("--backend", choices=("job", "jobset"), help="who starts pods again (default: job)")
            one.add_argument("--dry_run", action="store_true", help="print the objects and the plan, ask no cluster")
        if name == "submit":
            one.add_argument("--queue", default="", help="a LocalQueue of Kueue")
            one.add_argument("--rdma", action="store_true", help="an RDMA device for each pod")
            one.add_argument("--evaluator", action="store_true", help="a second Job that evaluates each checkpoint")
    return made


def main(arguments: Sequence[str]) -> int:
    """Does one command. Returns the exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    flags: list[str] = []
    if "--" in arguments:
        cut = list(arguments).index("--")
        arguments, flags = arguments[:cut], list(arguments[cut + 1 :])
    options = parser().parse_args(list(arguments))
    if flags and options.command not in ("submit", "resume"):
        parser().error(f"{options.command} takes no flags of the trainer")
    try:
        return COMMANDS[options.command](options, flags)
    except BadConfiguration as error:
        print(f"launch/k8s.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
