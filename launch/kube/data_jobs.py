"""Data for runs: what a user asks to be brought, and the Job that does it.

A plain Job always: it has one pod, and a JobSet is for pods that start again together.
"""

import dataclasses
import json
import re
from collections.abc import Sequence

from launch.kube import rules
from launch.kube.documents import Document, composed, named, workloads
from launch.kube.submission import LONGEST_NAME, PLACEHOLDER, RUNS, has_digest
from trainers.input.manifests import FOLDER
from trainers.settings.data_cards import is_downloaded
from trainers.settings.exit_codes import BadConfiguration

DATA = "lockstep/data"
_PREFIX, _SCRIPTS = "data-", "/app/trainers/input"
# What Kubernetes adds to the name of a pod.
_SUFFIX = len("-abcde")


@dataclasses.dataclass(frozen=True)
class DataJob:
    """What is brought. `dataset`: its name, to be prepared; else `source`: the name of what a user's machine sends.

    `run_store`: the address under which runs lie; empty: the claim.
    """

    dataset: str = ""
    source: str = ""
    image: str = ""
    namespace: str = PLACEHOLDER
    run_store: str = ""

    @property
    def name(self) -> str:
        """The name of the Job."""
        slug = re.sub(r"[^a-z0-9]+", "-", (self.dataset or self.source).lower()).strip("-") or "of-a-user"
        return (_PREFIX + slug)[: LONGEST_NAME - _SUFFIX].rstrip("-")

    @property
    def data_dir(self) -> str:
        """The folder or the address in which it will lie."""
        return f"{self.run_store or RUNS}/{FOLDER}"

    @property
    def is_downloaded(self) -> bool:
        """Whether the pod reaches out for what the user has named."""
        return bool(self.dataset) and is_downloaded(self.dataset)

    @property
    def command(self) -> list[str]:
        """What the container runs before its flags."""
        return ["python", f"{_SCRIPTS}/{'preparing' if self.dataset else 'receiving'}.py"]

    @property
    def arguments(self) -> list[str]:
        """Its flags."""
        words = [f"--dataset={self.dataset}"] if self.dataset else []
        words.append(f"--data_dir={self.data_dir}")
        return words + ([f"--cache_dir={RUNS}/cache"] if self.run_store else [])

    def text(self) -> str:
        """As JSON, for an annotation: what tells two Jobs apart."""
        return json.dumps({"dataset": self.dataset, "source": self.source, "data_dir": self.data_dir}, sort_keys=True)


def kustomization(job: DataJob, folder: str) -> Document:
    """The kustomization that a Job renders; `folder`: the path to `k8s/`."""
    return composed(folder, "data", {"store": bool(job.run_store), "download": job.is_downloaded})


def tailored(documents: Sequence[Document], job: DataJob) -> list[Document]:
    """Rendered documents as those of a Job: its name, image and flags."""
    documents = named(documents, job.name, job.namespace)
    for document, _, template in workloads(documents):
        document["metadata"].setdefault("annotations", {})[DATA] = job.text()
        container = template["spec"]["containers"][0]
        container |= {"image": job.image, "command": job.command, "args": job.arguments}
    return documents


def is_data(document: Document) -> bool:
    """Whether a Job in a cluster brings data."""
    return DATA in document["metadata"].get("annotations", {})


def check(job: DataJob, allow_tag: bool) -> list[str]:
    """Checks a Job without a cluster. Returns its plan.

    Raises:
      BadConfiguration: the image is wrong.
    """
    if not job.image:
        raise BadConfiguration("data needs --image, what launch/image.sh has built and you have pushed; name it")
    if not allow_tag and not has_digest(job.image):
        raise BadConfiguration(
            f"--image {job.image} has no digest, so what runs may change; pass IMAGE@sha256:…, or --allow_tag"
        )
    where = f"{job.data_dir}{'' if job.run_store else ' on the claim runs'}"
    what = f"prepares {job.dataset}" if job.dataset else f"takes {job.source}"
    plan = [f"job        {job.name} in namespace {job.namespace}: {what}", f"data       {where}"]
    if job.is_downloaded:
        plan.append(f"network    ports 80 and 443 anywhere, while it runs: {job.dataset} is downloaded")
    return plan


def checked(documents: Sequence[Document]) -> None:
    """Raises BadConfiguration if the documents of a Job break a rule."""
    if problems := rules.problems(documents, without=("images",)):
        what = "; ".join(dict.fromkeys(problems))
        raise BadConfiguration(f"{what}; change the flag or, where none says so, k8s/")
