"""`launch/k8s.py data`: data to where runs find them, by a Job or, files of this machine into a bucket, at once."""

import time
from collections.abc import Sequence

from launch.kube import kubectl as cluster
from launch.kube import pods
from launch.kube.data_jobs import DATA, DataJob, check, checked, is_data
from launch.kube.documents import Document
from launch.kube.kubectl import Kubectl, as_yaml, ended, workload_of
from launch.kube.sending import running_pod, send
from trainers.input import uploads
from trainers.input.manifests import Source
from trainers.settings.exit_codes import OK, BadConfiguration
from trainers.world import process

_LOOK_SECONDS = 1.0


def to_store(job: DataJob, source: Source, dry_run: bool) -> int:
    """A file or a folder of this machine into a bucket, with the credentials of this machine; no cluster is asked."""
    address = f"{job.data_dir}/{source.name}"
    process.say(f"data       {address}: {source.manifest.summary()} of {source.root}")
    if not dry_run:
        is_new = uploads.upload(job.data_dir, source, process.say)
        process.say(f"{address} is {'there' if is_new else 'there already, the same'}")
    return OK


def by_job(kubectl: Kubectl, job: DataJob, source: Source | None, allow_tag: bool, dry_run: bool) -> int:
    """Prepares a data set, or takes what this machine sends, in a pod. Follows it to its end, and leaves no objects.

    Raises:
      BadConfiguration: something is wrong with what was asked for, the cluster refuses, or the Job has failed.
    """
    plan, documents = check(job, allow_tag), kubectl.render_data(job)
    checked(documents)
    process.say("\n".join([*plan, *([f"source     {source.root}: {source.manifest.summary()}"] if source else [])]))
    if dry_run:
        print(as_yaml(documents), end="")
        return OK
    _start(kubectl, job, documents)
    place = f"{job.data_dir}/{source.name if source else job.dataset}"
    if source:
        is_new = send(kubectl, job, source)
    else:
        running_pod(kubectl, job.name)
        pods.print_logs(kubectl, job.name, tail=-1, follow=True)
    how = _end(kubectl, job.name)
    if not how.startswith("Complete"):
        raise BadConfiguration(f"{job.name} has not brought the data: {how}; see: launch/k8s.py logs --name={job.name}")
    cluster.remove(kubectl, job.name)
    process.say(f"{place} is {'there already, the same' if source and not is_new else 'there'}")
    return OK


def _start(kubectl: Kubectl, job: DataJob, documents: Sequence[Document]) -> None:
    """Gives a Job to the cluster. One that brings the same already is joined, one that has ended is replaced."""
    before = workload_of(kubectl, job.name)
    if before is not None and not is_data(before):
        raise BadConfiguration(
            f"a run in namespace {job.namespace} has the name {job.name}; delete it, or wait for its end"
        )
    if before is not None and not ended(before):
        if before["metadata"]["annotations"][DATA] != job.text():
            raise BadConfiguration(
                f"{job.name} brings other data now; wait for its end, or: launch/k8s.py delete --name={job.name}"
            )
        process.say(f"{job.name} runs already")
        return
    cluster.refuse_foreign(kubectl, job.name)
    if before is not None:
        cluster.remove(kubectl, job.name)
    print(cluster.apply(kubectl, documents), end="")


def _end(kubectl: Kubectl, name: str) -> str:
    """How a Job has ended, when it has."""
    while True:
        workload = workload_of(kubectl, name)
        if workload is None:
            return "it was deleted"
        if how := ended(workload):
            return how
        time.sleep(_LOOK_SECONDS)
