"""Rules of what a user names: namespaces, queues, images, and paths, which pods have or have not."""

import posixpath
import re
from collections.abc import Iterator, Sequence

from launch.kube.documents import QUEUE_LABEL, Document, flag_of, workloads
from launch.kube.submission import LONGEST_NAME, how_to_bring
from trainers.settings import paths
from trainers.settings.data_cards import DATASETS, split_name

# Where the image begins, and volumes that are empty when a pod begins.
_WORK, _EMPTY = "/work", ("/tmp", "/dev/shm")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
# The name of an image: github.com/distribution/reference.
_WORD = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_WORD}(?:/{_WORD})*")
_REGISTRY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]+)?")
_AFTER_THE_NAME = re.compile(r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$", re.ASCII)

Problems = Iterator[str]


def syntax(documents: Sequence[Document]) -> Problems:
    """Names of namespaces, queues and images: a server that refuses them does so after others were made."""
    for document in documents:
        metadata = document["metadata"]
        namespace, queue = metadata.get("namespace"), metadata.get("labels", {}).get(QUEUE_LABEL)
        if namespace is not None and not (_LABEL.fullmatch(namespace) and len(namespace) <= LONGEST_NAME):
            yield (
                f"the namespace {namespace!r} is not a DNS label; use at most {LONGEST_NAME} lower-case letters, "
                "digits and '-'"
            )
        if queue is not None and not (_SUBDOMAIN.fullmatch(queue) and len(queue) <= LONGEST_NAME):
            yield f"the queue {queue!r} is not a name; use lower-case letters, digits, '-' and '.'"
    for _, _, template in workloads(documents):
        for container in template["spec"]["containers"]:
            yield from _reference(container["image"])


def _reference(image: str) -> Problems:
    name = _AFTER_THE_NAME.sub("", image)
    first, slash, rest = name.partition("/")
    has_registry = bool(slash) and (first == "localhost" or "." in first or ":" in first)
    repository = rest if has_registry else name
    if has_registry and not _REGISTRY.fullmatch(first):
        yield f"the image {image}: {first!r} is not the name of a registry; write host/… or host:port/…"
    if repository != repository.lower():
        written = repository.lower()
        yield f"the image {image}: the repository {repository!r} has letters in upper case; write {written!r}"
    elif not _REPOSITORY.fullmatch(repository):
        yield f"the image {image}: {repository!r} is not a repository; write lower-case words, with '/' between them"


def places(documents: Sequence[Document]) -> Problems:
    """Paths in the trainer's flags are below a volume that pods share with each other and with their successors."""
    for document, _, template in workloads(documents):
        if document["kind"] == "Deployment":
            continue
        mounts = [mount["mountPath"] for mount in template["spec"]["containers"][0].get("volumeMounts", ())]
        kept = [mount for mount in mounts if mount not in _EMPTY]
        kind, argument = split_name(flag_of(template, "dataset"))
        run_dir = flag_of(template, "run_dir")
        store = posixpath.dirname(run_dir) if paths.is_address(run_dir) else ""
        named = {"data_dir": flag_of(template, "data_dir"), f"dataset={kind}:": argument if kind in DATASETS else ""}
        for flag, path in named.items():
            place = posixpath.normpath(posixpath.join(_WORK, path))
            if path and not paths.is_address(path) and not any(f"{place}/".startswith(f"{mount}/") for mount in kept):
                yield (
                    f"--{flag}{'' if flag.endswith(':') else ' '}{path} is a path of this machine, which pods do not "
                    f"have; {how_to_bring(path, store)}"
                )
