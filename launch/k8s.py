"""Submit a run to a Kubernetes cluster, watch it, let it go on. Needs kubectl, and once `kubectl apply -k k8s/setup`.

    python launch/k8s.py submit --name=first --nodes=2 --gpus_per_node=8 --image=IMAGE@sha256:… -- --model=resnet50
    python launch/k8s.py submit --name=first --nodes=2 --gpus_per_node=8 --image=IMAGE@sha256:… --dry_run -- …
    python launch/k8s.py status --name=first        # pods, restarts, why one is Pending, the last metrics
    python launch/k8s.py logs --name=first          # of all workers, as they come
    python launch/k8s.py resume --name=first        # again, from its checkpoint; --nodes=4 on another size
    python launch/k8s.py delete --name=first        # its objects; the run stays on the claim
    python launch/k8s.py tensorboard                # at 127.0.0.1:6006

What follows `--` are the trainer's flags. Exit code 0: done; 2: a flag is wrong, or kubectl or the cluster is not there
or has refused, in one line.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml

from launch.kube import documents as manifests
from launch.kube.documents import Document, Submission
from trainers.settings.config import DEFAULT_CPU_REPLICAS, check_batch
from trainers.settings.exit_codes import OK, RETRY, BadConfiguration
from trainers.settings.flags import config_from
from trainers.show.tables import table

REQUEST_TIMEOUT = "--request-timeout=30s"
NO_CLUSTER = ("was refused", "no such host", "i/o timeout", "Unable to connect", "current-context", "no route to host")
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
LOOK_SECONDS = 3.0


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
        if any(sign in said for sign in NO_CLUSTER):
            return f"no cluster answers ({line}); set KUBECONFIG or --context, and look with: kubectl cluster-info"
        if "forbidden" in said.lower():
            return f"the cluster does not allow it ({line}); ask for the right, or take another --namespace"
        return f"kubectl {shlex.join(words[:2])} has failed: {line}"

    def objects(self, *words: str) -> list[Document]:
        """The items that a `get` finds."""
        answer = self.call("get", *words, "--output=json", REQUEST_TIMEOUT).stdout
        return json.loads(answer or "{}").get("items", [])

    def find(self, kind: str, name: str) -> Document | None:
        """The object of a kind and a name, if there is one."""
        answer = self.call("get", kind, name, "--ignore-not-found", "--output=json", REQUEST_TIMEOUT).stdout
        return json.loads(answer) if answer.strip() else None

    @functools.cached_property
    def has_jobsets(self) -> bool:
        """Whether the cluster knows JobSet."""
        words = ("get", "jobsets", "--output=name", REQUEST_TIMEOUT)
        done = self.call(*words, fails=True)
        if done.returncode and "the server doesn't have a resource type" not in done.stderr:
            raise BadConfiguration(self.why(words, done.stderr))
        return done.returncode == 0

    def render(self, submission: Submission) -> list[Document]:
        """The documents of a submission, rendered from `k8s/`; asks no cluster."""
        with tempfile.TemporaryDirectory() as folder:
            way = os.path.relpath(ROOT / "k8s", Path(folder).resolve())
            text = yaml.safe_dump(manifests.kustomization(submission, way))
            (Path(folder) / "kustomization.yaml").write_text(text)
            rendered = subprocess.run([*self._base, "kustomize", folder], capture_output=True, text=True, check=False)
        if rendered.returncode:
            raise BadConfiguration(f"kubectl kustomize has failed: {' '.join(rendered.stderr.split())[:400]}")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return manifests.tailored([d for d in yaml.safe_load_all(rendered.stdout) if d], submission, now)


def workload_of(kubectl: Kubectl, name: str) -> Document | None:
    """The Job or JobSet of a run, if it is in the cluster."""
    kinds = ("jobsets", "jobs") if kubectl.has_jobsets else ("jobs",)
    return next(filter(None, (kubectl.find(kind, name) for kind in kinds)), None)


def submission_in(workload: Document) -> Submission | None:
    """What was submitted as this Job or JobSet; None if it is not of this launcher, or not a run's own."""
    text = workload["metadata"].get("annotations", {}).get(manifests.SUBMISSION)
    found = Submission.from_text(text) if text else None
    return found if found and found.name == workload["metadata"]["name"] else None


def existing(kubectl: Kubectl, name: str) -> tuple[Document, Submission]:
    """The Job or JobSet of a run, and what was submitted. Raises BadConfiguration if there is none."""
    workload = workload_of(kubectl, name)
    submission = submission_in(workload) if workload else None
    if submission is None:
        raise BadConfiguration(
            f"--name {name}: no such run is in namespace {kubectl.namespace}; submit it: with a name that was used it "
            f"continues from {manifests.RUNS}/{name}"
        )
    return workload, submission


def selector(name: str) -> str:
    """What finds all objects and pods of a run."""
    return f"--selector=app.kubernetes.io/name={manifests.PLACEHOLDER},{manifests.INSTANCE}={name}"


def refuse_without_jobsets(kubectl: Kubectl, submission: Submission) -> None:
    """Raises BadConfiguration if a JobSet is asked for of a cluster that has none."""
    if submission.backend == "jobset" and not kubectl.has_jobsets:
        raise BadConfiguration("--backend=jobset: the cluster has no JobSet; install its controller, or take job")


def refuse_foreign(kubectl: Kubectl, name: str) -> None:
    """Raises BadConfiguration if another owner's Service or NetworkPolicy bears the name of a run."""
    for kind in ("service", "networkpolicy"):
        found = kubectl.find(kind, name)
        if found is not None and found["metadata"].get("labels", {}).get(manifests.INSTANCE) != name:
            raise BadConfiguration(
                f"--name {name}: namespace {kubectl.namespace} has a {kind} of that name, not of a run; take another"
            )


def check(submission: Submission, allow_tag: bool) -> list[str]:
    """Checks a submission without a cluster. Returns its plan.

    Raises:
      BadConfiguration: a name, a size, an image or a flag of the trainer is wrong.
    """
    for name, value, low in (("nodes", submission.nodes, 1), ("gpus_per_node", submission.gpus, 0)):
        if value < low:
            raise BadConfiguration(f"--{name} {value} is below {low}; pass {low} or more")
    manifests.check_name(submission)
    if not allow_tag and not re.search(r"@sha256:[0-9a-f]{64}$", submission.image):
        raise BadConfiguration(
            f"--image {submission.image} has no digest, so what runs may change; pass IMAGE@sha256:…, or --allow_tag"
        )
    for flag in submission.flags:
        if re.match("--?flagfile", flag):
            raise BadConfiguration(
                f"{flag} is read where the trainer runs, not here; write out the flags that it holds"
            )
    config = config_from(["trainer", *submission.trainer_flags], "")
    own = {"strategy": submission.strategy, "run_dir": submission.run_dir, "mode": "train", "resume": "auto"}
    for name, value in own.items():
        if getattr(config, name) != value:
            raise BadConfiguration(f"--{name} {getattr(config, name)}: the launcher sets it to {value}; leave it out")
    if submission.gpus:
        each = config.replicas or submission.gpus
        if each > submission.gpus:
            raise BadConfiguration(f"--replicas {each} is above --gpus_per_node {submission.gpus}; use fewer")
    else:
        each = (config.replicas or DEFAULT_CPU_REPLICAS) if submission.nodes == 1 else 1
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


def prepare(kubectl: Kubectl, submission: Submission, allow_tag: bool) -> list[Document]:
    """Checks and renders a submission, prints its plan on standard error, and returns its objects."""
    plan = check(submission, allow_tag)
    documents = kubectl.render(submission)
    if found := manifests.problems(documents, without=("images",)):
        raise BadConfiguration(f"what k8s/ renders breaks its rules: {'; '.join(found)}; mend k8s/")
    print("\n".join([*plan, *plan_of_workers(documents)]), file=sys.stderr, flush=True)
    return documents


def as_yaml(documents: Sequence[Document]) -> str:
    """Objects as kubectl takes them."""
    return yaml.safe_dump_all(documents, sort_keys=False)


def apply(kubectl: Kubectl, submission: Submission, documents: Sequence[Document]) -> int:
    """Gives the objects of a run to the cluster; its Jobs last, which fails if another has come before."""
    jobs = [document for document in documents if document["kind"] in ("Job", "JobSet")]
    others = [document for document in documents if document not in jobs]
    print(kubectl.call("apply", "--filename=-", REQUEST_TIMEOUT, given=as_yaml(others)).stdout, end="")
    print(kubectl.call("create", "--filename=-", REQUEST_TIMEOUT, given=as_yaml(jobs)).stdout, end="")
    print(f"see: python launch/k8s.py status --name={submission.name}", file=sys.stderr)
    return OK


def submit(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Submits a new run."""
    if not options.image:
        raise BadConfiguration("submit needs --image, what launch/image.sh has built and you have pushed; name it")
    kubectl, submission = Kubectl(options.context, options.namespace), submission_of(options, flags)
    documents = prepare(kubectl, submission, options.allow_tag)
    if options.dry_run:
        print(as_yaml(documents), end="")
        return OK
    refuse_without_jobsets(kubectl, submission)
    refuse_foreign(kubectl, submission.name)
    if workload_of(kubectl, submission.name) is not None:
        raise BadConfiguration(
            f"--name {submission.name} exists in namespace {submission.namespace}; resume or delete it, or take another"
        )
    return apply(kubectl, submission, documents)


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
    workload, before = existing(kubectl, options.name)
    if not ended(workload):
        raise BadConfiguration(f"--name {options.name} has not ended; delete it first, it saves before it goes")
    asked = {"nodes": options.nodes, "gpus": options.gpus_per_node, "image": options.image, "backend": options.backend}
    changed = {name: value for name, value in asked.items() if value is not None}
    submission = dataclasses.replace(before, **changed, flags=(*before.flags, *flags))
    documents = prepare(
        kubectl, submission, options.allow_tag or (not options.image and "@sha256:" not in before.image)
    )
    if options.dry_run:
        print(as_yaml(documents), end="")
        return OK
    refuse_without_jobsets(kubectl, submission)
    remove(kubectl, options.name)
    try:
        return apply(kubectl, submission, documents)
    except BadConfiguration as error:
        kept = Path(f"{options.name}.yaml")
        kept.write_text(as_yaml(documents))
        raise BadConfiguration(
            f"{error}; what was to be submitted lies in {kept}: kubectl apply --filename={kept}"
        ) from None


def remove(kubectl: Kubectl, name: str) -> str:
    """Deletes what a run is made of: its pods first, which save and agree on it, then what they need for that."""
    workloads = "jobset,job" if kubectl.has_jobsets else "job"
    gone = kubectl.call("delete", workloads, selector(name), "--wait=true", "--cascade=foreground").stdout
    return gone + kubectl.call("delete", "service,networkpolicy", selector(name), REQUEST_TIMEOUT).stdout


def delete(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Deletes a run's objects; what it has written stays."""
    kubectl = Kubectl(options.context, options.namespace)
    gone = remove(kubectl, options.name)
    print(gone, end="")
    if "deleted" not in gone:
        raise BadConfiguration(f"--name {options.name}: nothing of such a run is in namespace {kubectl.namespace}")
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


def who(pod: Document) -> tuple[str, str]:
    """Component and index of a pod."""
    labels = pod["metadata"]["labels"]
    return labels.get(manifests.COMPONENT, ""), labels.get(INDEX_LABEL, "")


def pods_of(kubectl: Kubectl, name: str) -> list[Document]:
    """The pods of a run, oldest first."""
    pods = kubectl.objects("pods", selector(name))
    return sorted(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))


def rows_of_pods(pods: Sequence[Document], events: Sequence[Document]) -> list[list[str]]:
    """A row for each pod: which worker, how it is, how often its index was started again, where it is, and why."""
    rows = []
    for pod in pods:
        status, annotations = pod.get("status", {}), pod["metadata"].get("annotations", {})
        containers = status.get("containerStatuses", [])
        note = why_waiting(pod, events) if status.get("phase") == "Pending" else ""
        note = note or next(filter(None, (ended_with(one) for one in containers)), "")
        kinds = ("job-index-failure-count", "job-index-ignored-failure-count")
        restarts = sum(int(annotations.get(f"batch.kubernetes.io/{kind}", "0")) for kind in kinds)
        rows.append(
            [
                pod["metadata"]["name"],
                " ".join(who(pod)).strip(),
                status.get("phase", "Unknown"),
                str(restarts + sum(one.get("restartCount", 0) for one in containers)),
                pod["spec"].get("nodeName", "–"),
                " ".join(note.split())[:160],
            ]
        )
    return rows


def last_lines(kubectl: Kubectl, pods: Sequence[Document]) -> list[str]:
    """The newest line of training and of evaluation: of the chief, or of the evaluator where there is one."""
    newest: dict[str, str] = {}
    for pod in reversed([pod for pod in pods if who(pod) in (("trainer", "0"), (manifests.EVALUATOR, ""))]):
        log = kubectl.call("logs", pod["metadata"]["name"], "--tail=400", REQUEST_TIMEOUT, fails=True).stdout
        for line in reversed(log.splitlines()):
            if line.startswith("step ") and len(line.split()) > 2:
                newest.setdefault(line.split()[2], line)
        if {"train", "eval"} <= newest.keys():
            break
    return [newest.get(split, f"no line of {split} yet") for split in ("train", "eval")]


def status(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Prints how a run is."""
    kubectl = Kubectl(options.context, options.namespace)
    workload, submission = existing(kubectl, options.name)
    pods = pods_of(kubectl, options.name)
    events = kubectl.objects("events", "--sort-by=.lastTimestamp")
    facts = workload.get("status", {})
    waits = ""
    if workload["spec"].get("suspend"):
        waits = f"waiting in queue {submission.queue or '?'}"
    running = f"{facts.get('active', 0)} active, {facts.get('failed', facts.get('restarts', 0))} failed so far"
    print(f"{workload['kind']} {options.name}: {ended(workload) or waits or running}")
    if pods:
        print(table(["pod", "who", "phase", "restarts", "node", "note"], rows_of_pods(pods, events)))
    else:
        owners = [options.name, f"{options.name}-worker-0"]
        told = [e for e in events if e.get("type") == "Warning" and e["involvedObject"]["name"] in owners]
        print(f"no pods yet{': ' + told[-1]['reason'] + ': ' + told[-1]['message'] if told else ''}")
    print("\n".join(last_lines(kubectl, pods)))
    return OK


def logs(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Follows all workers, a prefix before each line; a pod that comes in the place of another is followed too."""
    kubectl = Kubectl(options.context, options.namespace)
    existing(kubectl, options.name)
    followed: dict[str, threading.Thread] = {}
    children: list[subprocess.Popen] = []
    one_line = threading.Lock()

    def follow(pod: Document) -> None:
        prefix = f"[{' '.join(who(pod)).strip()}] "
        words = ["logs", pod["metadata"]["name"], f"--tail={options.tail}", *(["--follow"] if options.follow else [])]
        with subprocess.Popen(
            kubectl.words(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as child:
            children.append(child)
            for line in child.stdout:
                with one_line:
                    sys.stdout.write(prefix + line)
                    sys.stdout.flush()

    try:
        while True:
            newest = {who(pod): pod for pod in pods_of(kubectl, options.name)}
            for pod in newest.values():
                name = pod["metadata"]["name"]
                if name not in followed and pod.get("status", {}).get("phase") != "Pending":
                    followed[name] = threading.Thread(target=follow, args=(pod,), daemon=True)
                    followed[name].start()
            if not options.follow:
                break
            workload = workload_of(kubectl, options.name)
            if (workload is None or ended(workload)) and not any(t.is_alive() for t in followed.values()):
                break
            time.sleep(LOOK_SECONDS)
        for thread in followed.values():
            thread.join()
        if not followed:
            print("no pod runs yet; see status", file=sys.stderr)
        return OK
    finally:
        for child in children:
            with contextlib.suppress(OSError):
                child.kill()


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
