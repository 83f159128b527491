"""Submit a run to a Kubernetes cluster, watch it, let it go on. Needs kubectl, and once `kubectl apply -k k8s/setup`.

    python launch/k8s.py submit --name=first --nodes=2 --gpus_per_node=8 --image=IMAGE@sha256:… -- --model=resnet50
    python launch/k8s.py submit --name=first --nodes=2 --gpus_per_node=8 --image=IMAGE@sha256:… --dry_run -- …
    python launch/k8s.py status --name=first        # pods, why one is Pending, how the run stands
    python launch/k8s.py logs --name=first          # of all workers, as they come
    python launch/k8s.py resume --name=first        # again, from its checkpoint; --nodes=4 on another size
    python launch/k8s.py delete --name=first        # its objects; the run stays on the claim
    python launch/k8s.py tensorboard                # at 127.0.0.1:6006
    python launch/k8s.py data --dataset=cifar10 --image=IMAGE@sha256:…   # prepares it, for all runs
    python launch/k8s.py data --from=photos --image=IMAGE@sha256:…       # brings files of this machine there

What follows `--` are the trainer's flags. Exit code 0: done; 2: a flag is wrong, or kubectl or the cluster is not there
or has refused, in one line.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements("absl", "yaml", "tqdm")

import argparse
import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launch.kube import bringing, pods, rules
from launch.kube import kubectl as cluster
from launch.kube.data_jobs import DataJob, is_data
from launch.kube.documents import QUEUE_LABEL, SUBMISSION, Document, clusters
from launch.kube.kubectl import Kubectl, as_yaml, ended, existing, known, workload_of
from launch.kube.submission import PLACEHOLDER, RUNS, Submission, check, has_digest, store_of
from trainers.input.manifests import source_of
from trainers.input.preparing import check_name
from trainers.settings.exit_codes import OK, BadConfiguration
from trainers.settings.pages import SUPERVISED, shipped
from trainers.show.tables import table
from trainers.world import files, process


def prepare(kubectl: Kubectl, submission: Submission, allow_tag: bool) -> list[Document]:
    """Checks and renders a submission, prints its plan on standard error, and returns its objects."""
    plan = check(submission, allow_tag)
    documents = kubectl.render(submission)
    if problems := rules.problems(documents, without=("images",)):
        what = "; ".join(dict.fromkeys(problems))
        raise BadConfiguration(f"{what}; change the flag or, where none says so, k8s/")
    for worker in clusters(documents):
        if worker.size > 1:
            address = worker.addresses[worker.index]
            plan.append(f"worker {worker.index:<3} {address}  TF_CONFIG={worker.tf_config()}")
    process.say("\n".join(plan))
    return documents


def apply(kubectl: Kubectl, submission: Submission, documents: Sequence[Document]) -> int:
    """Gives the objects of a run to the cluster."""
    print(cluster.apply(kubectl, documents), end="")
    process.say(f"see: python launch/k8s.py status --name={submission.name}")
    return OK


def data(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Prepares a data set, or brings files of this machine, to where runs find them: the claim or a bucket."""
    if bool(options.dataset) == bool(options.source):
        raise BadConfiguration("data needs --from=PATH or --dataset=NAME; name one of them")
    if options.dataset:
        check_name(options.dataset)
    store = store_of(options.run_store)
    source = source_of("--from", options.source) if options.source else None
    name = source.name if source else ""
    job = DataJob(options.dataset, name, options.image or "", options.namespace, store)
    if source and store:
        return bringing.to_store(job, source, options.dry_run)
    kubectl = Kubectl(options.context, options.namespace)
    return bringing.by_job(kubectl, job, source, options.allow_tag, options.dry_run)


def submit(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Submits a new run."""
    if not options.image:
        raise BadConfiguration("submit needs --image, what launch/image.sh has built and you have pushed; name it")
    kubectl, submission = Kubectl(options.context, options.namespace), Submission.from_options(options, flags)
    documents = prepare(kubectl, submission, options.allow_tag)
    if options.dry_run:
        print(as_yaml(documents), end="")
        return OK
    cluster.refuse_without_jobsets(kubectl, submission)
    cluster.refuse_foreign(kubectl, submission.name)
    if workload_of(kubectl, submission.name) is not None:
        raise BadConfiguration(
            f"--name {submission.name} exists in namespace {submission.namespace}; resume or delete it, or take another"
        )
    return apply(kubectl, submission, documents)


def resume(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Starts a run that has ended again; it continues from its checkpoint, on any size."""
    kubectl = Kubectl(options.context, options.namespace)
    workload, before = existing(kubectl, options.name)
    if not ended(workload):
        raise BadConfiguration(f"--name {options.name} has not ended; delete it first, it saves before it goes")
    asked = {"nodes": options.nodes, "gpus": options.gpus_per_node, "image": options.image, "backend": options.backend}
    changed = {name: value for name, value in asked.items() if value is not None}
    submission = dataclasses.replace(before, **changed, flags=(*before.flags, *flags))
    allow_tag = options.allow_tag or (not options.image and not has_digest(before.image))
    documents = prepare(kubectl, submission, allow_tag)
    if options.dry_run:
        print(as_yaml(documents), end="")
        return OK
    cluster.refuse_without_jobsets(kubectl, submission)
    cluster.remove(kubectl, options.name)
    try:
        return apply(kubectl, submission, documents)
    except BadConfiguration as error:
        kept = Path(f"{options.name}.yaml")
        files.write_text(kept, as_yaml(documents))
        raise BadConfiguration(
            f"{error}; what was to be submitted lies in {kept}: kubectl apply --filename={kept}"
        ) from None


def delete(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Deletes a run's objects; what it has written stays."""
    kubectl = Kubectl(options.context, options.namespace)
    workload = workload_of(kubectl, options.name)
    brings_data = workload is not None and is_data(workload)
    deleted = cluster.remove(kubectl, options.name)
    print(deleted, end="")
    if "deleted" not in deleted:
        raise BadConfiguration(f"--name {options.name}: nothing of such a run is in namespace {kubectl.namespace}")
    if not brings_data:
        process.say(f"the run stays at {RUNS}/{options.name}, or in its store; submitted again it continues")
    return OK


def status(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Prints how a run is."""
    kubectl, name = Kubectl(options.context, options.namespace), options.name
    workload = known(kubectl, name)
    members = pods.pods_of(kubectl, name)
    events = kubectl.objects("events", "--sort-by=.lastTimestamp")
    facts = workload.get("status", {})
    queue = workload["metadata"].get("labels", {}).get(QUEUE_LABEL, "?")
    waits = f"waiting in queue {queue}" if workload["spec"].get("suspend") else ""
    running = f"{facts.get('active', 0)} active, {facts.get('failed', facts.get('restarts', 0))} failed so far"
    print(f"{workload['kind']} {name}: {ended(workload) or waits or running}")
    if members:
        print(table(pods.HEAD, pods.rows_of(members, events)))
    else:
        warnings = pods.warnings(events, [name, f"{name}-worker-0"])
        print(f"no pods yet{f': {warnings[-1]}' if warnings else ''}")
    if not is_data(workload):
        submission = Submission.from_text(workload["metadata"]["annotations"][SUBMISSION])
        print("\n".join(pods.standing(kubectl, members, submission.folder_in_pod)))
    return OK


def logs(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Follows all workers, a prefix before each line; a pod that comes in the place of another is followed too."""
    kubectl = Kubectl(options.context, options.namespace)
    known(kubectl, options.name)
    if not pods.print_logs(kubectl, options.name, options.tail, options.follow):
        process.say("no pod runs yet; see status")
    return OK


def tensorboard(options: argparse.Namespace, flags: Sequence[str]) -> NoReturn:
    """Forwards a port of this machine's loopback to the cluster's TensorBoard."""
    kubectl = Kubectl(options.context, options.namespace)
    kubectl.call("get", "service", "tensorboard", "--output=name")
    process.say(f"TensorBoard: http://127.0.0.1:{options.port}  (Ctrl-C ends it)")
    words = kubectl.words("port-forward", "--address=127.0.0.1", "service/tensorboard", f"{options.port}:6006")
    sys.stdout.flush()
    # As that program, so that signals and the exit code are its own.
    os.execv(words[0], words)


COMMANDS = {
    "submit": submit,
    "status": status,
    "logs": logs,
    "delete": delete,
    "resume": resume,
    "tensorboard": tensorboard,
    "data": data,
}


def command_line() -> argparse.ArgumentParser:
    """The flags of each command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action in COMMANDS.items():
        command = commands.add_parser(name, help=(action.__doc__ or "").splitlines()[0], allow_abbrev=False)
        add = command.add_argument
        add("--context", default="", help="kubectl's context (default: the current one)")
        add("--namespace", default=PLACEHOLDER, help="default: lockstep, of k8s/setup")
        if name == "tensorboard":
            add("--port", type=int, default=6006, help="of this machine's loopback (default: 6006)")
            continue
        if name == "data":
            add("--from", dest="source", default="", help="a file or a folder of this machine")
            add("--dataset", default="", help="prepared by its name: cifar10, imagenet2012, …")
        else:
            add("--name", required=True, help="the run's")
        if name == "logs":
            add("--tail", type=int, default=100, help="lines of each worker to begin with (default: 100)")
            add("--follow", action=argparse.BooleanOptionalAction, default=True)
        if name in ("submit", "resume"):
            add("--nodes", type=int, help="pods, each on a node of its own (default: 1)")
            add("--gpus_per_node", type=int, help="0 = CPUs, for kind or minikube (default: 1)")
            add("--backend", choices=("job", "jobset"), help="who starts pods again (default: job)")
        if name in ("submit", "resume", "data"):
            add("--image", help="IMAGE@sha256:…, of the stage gpu (or cpu)")
            add("--allow_tag", action="store_true", help="take an image without a digest")
            add("--dry_run", action="store_true", help="print the objects and the plan, ask no cluster")
        if name in ("submit", "data"):
            add("--run_store", default="", help="where runs lie: s3://BUCKET/FOLDER, gs://, az:// (default: the claim)")
        if name == "submit":
            add("--trainer", default=SUPERVISED, help=f"the loop: {', '.join(shipped())}, or a module in the image")
            add("--queue", default="", help="a LocalQueue of Kueue")
            add("--rdma", action="store_true", help="an RDMA device for each pod")
            add("--evaluator", action="store_true", help="a second Job that evaluates each checkpoint")
            add("--metrics", action="store_true", help="a PodMonitor: Prometheus reads of the run")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Does a command. Returns the exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    flags: list[str] = []
    if "--" in arguments:
        cut = list(arguments).index("--")
        arguments, flags = arguments[:cut], list(arguments[cut + 1 :])
    options = command_line().parse_args(list(arguments))
    if flags and options.command not in ("submit", "resume"):
        command_line().error(f"{options.command} takes no flags of the trainer")
    try:
        return COMMANDS[options.command](options, flags)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(process.run(lambda: main(sys.argv[1:])))
