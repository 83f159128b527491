"""The pods of a run: how each is and why, the last metrics in their logs, and the logs as they come."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch.kube.documents import COMPONENT, EVALUATOR, INDEX_LABEL, Document
from launch.kube.kubectl import REQUEST_TIMEOUT, Kubectl, ended, selector, workload_of
from trainers.settings.exit_codes import RETRY
from trainers.show.progress import parse_line

FAILURE_COUNTS = ("job-index-failure-count", "job-index-ignored-failure-count")
HEAD = ("pod", "who", "phase", "restarts", "node", "note")
LOOK_SECONDS = 3.0
LOG_LINES = 400
LONGEST_NOTE = 160
SPLITS = ("train", "eval")
# In a pod: the image holds the trainers alone.
READ = ("timeout", "20", "python", "/app/trainers/record/standing.py")


def pods_of(kubectl: Kubectl, name: str) -> list[Document]:
    """The pods of a run, oldest first."""
    pods = kubectl.objects("pods", selector(name))
    return sorted(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))


def who(pod: Document) -> tuple[str, str]:
    """Component and index of a pod."""
    labels = pod["metadata"]["labels"]
    return labels.get(COMPONENT, ""), labels.get(INDEX_LABEL, "")


def warnings(events: Sequence[Document], names: Sequence[str]) -> list[str]:
    """The warnings about objects of these names, oldest first."""
    return [
        f"{event['reason']}: {event['message']}"
        for event in events
        if event.get("type") == "Warning" and event["involvedObject"]["name"] in names
    ]


def why_waiting(pod: Document, events: Sequence[Document]) -> str:
    """Why a pod does not run: what its scheduler or its container says, or the last warning about it."""
    status = pod.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("message") or condition.get("reason", "")
    for container in status.get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting and waiting.get("reason") != "ContainerCreating":
            return f"{waiting.get('reason', '')}: {waiting.get('message', '')}".rstrip(": ")
    return next(reversed(warnings(events, [pod["metadata"]["name"]])), "")


def ended_with(container: Mapping[str, Any]) -> str:
    """What the exit code of a container means."""
    for state in (container.get("state", {}), container.get("lastState", {})):
        if "terminated" in state:
            code = state["terminated"]["exitCode"]
            return f"code {code} ({RETRY.get(code, state['terminated'].get('reason', 'a crash; see its log'))})"
    return ""


def rows_of(pods: Sequence[Document], events: Sequence[Document]) -> list[list[str]]:
    """A row (`HEAD`) for each pod: which worker, how it is, how often its index was started again, where, and why."""
    rows = []
    for pod in pods:
        status, annotations = pod.get("status", {}), pod["metadata"].get("annotations", {})
        containers = status.get("containerStatuses", [])
        note = why_waiting(pod, events) if status.get("phase") == "Pending" else ""
        note = note or next(filter(None, map(ended_with, containers)), "")
        restarts = sum(int(annotations.get(f"batch.kubernetes.io/{kind}", "0")) for kind in FAILURE_COUNTS)
        rows.append(
            [
                pod["metadata"]["name"],
                " ".join(who(pod)).strip(),
                status.get("phase", "Unknown"),
                str(restarts + sum(container.get("restartCount", 0) for container in containers)),
                pod["spec"].get("nodeName", "–"),
                " ".join(note.split())[:LONGEST_NOTE],
            ]
        )
    return rows


def last_metrics(kubectl: Kubectl, pods: Sequence[Document]) -> list[str]:
    """The newest line of training and of evaluation: of the chief, or of the evaluator where there is one.

    They are read from the logs: a command in a pod that has ended is not possible, and the claim is the pods' alone.
    """
    newest: dict[str, str] = {}
    for pod in reversed([pod for pod in pods if who(pod) in (("trainer", "0"), (EVALUATOR, ""))]):
        log = kubectl.run("logs", pod["metadata"]["name"], f"--tail={LOG_LINES}", REQUEST_TIMEOUT).stdout
        for line in reversed(log.splitlines()):
            if parsed := parse_line(line):
                newest.setdefault(parsed.split, line)
        if newest.keys() >= set(SPLITS):
            break
    return [newest.get(split, f"no line of {split} yet") for split in SPLITS]


def standing(kubectl: Kubectl, pods: Sequence[Document], run_dir: str) -> list[str]:
    """How a run stands by its files, as `launch/status.py` says it: the chief's pod reads them, while it runs.

    From a pod that has ended, or where nobody may start a command in one, the last metrics.
    """
    chiefs = [pod for pod in pods if who(pod) == ("trainer", "0") and pod.get("status", {}).get("phase") == "Running"]
    for pod in reversed(chiefs):
        done = kubectl.run("exec", pod["metadata"]["name"], REQUEST_TIMEOUT, "--", *READ, run_dir)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.rstrip().splitlines()
    return last_metrics(kubectl, pods)


class Follower:
    """Prints the logs of all workers as they come, each line after a prefix. A context, which ends all it started."""

    def __init__(self, kubectl: Kubectl, tail: int, follow: bool):
        self.kubectl = kubectl
        self.options = [f"--tail={tail}", *(["--follow"] if follow else [])]
        self._threads: dict[str, threading.Thread] = {}
        self._children: list[subprocess.Popen] = []
        self._guard = threading.Lock()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *exception: object) -> None:
        for child in self._children:
            with contextlib.suppress(OSError):
                child.kill()

    def take_up(self, pods: Sequence[Document]) -> None:
        """Begins with those pods that run or have run, of each index the newest alone."""
        for pod in {who(pod): pod for pod in pods}.values():
            name = pod["metadata"]["name"]
            if name not in self._threads and pod.get("status", {}).get("phase") != "Pending":
                self._threads[name] = threading.Thread(target=self._copy, args=(pod,), daemon=True)
                self._threads[name].start()

    def _copy(self, pod: Document) -> None:
        prefix = f"[{' '.join(who(pod)).strip()}] "
        words = self.kubectl.words("logs", pod["metadata"]["name"], *self.options)
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as child:
            self._children.append(child)
            for line in child.stdout:
                with self._guard:
                    sys.stdout.write(prefix + line)
                    sys.stdout.flush()

    @property
    def is_busy(self) -> bool:
        """Whether a log still comes."""
        return any(thread.is_alive() for thread in self._threads.values())

    def wait(self) -> bool:
        """Waits for all logs to end. Returns whether there was any."""
        for thread in self._threads.values():
            thread.join()
        return bool(self._threads)


def print_logs(kubectl: Kubectl, name: str, tail: int, follow: bool) -> bool:
    """Prints the logs of a run's pods; if `follow`, also of those that come later, until the run has ended.

    Returns whether a pod has a log.
    """
    with Follower(kubectl, tail, follow) as follower:
        follower.take_up(pods_of(kubectl, name))
        while follow:
            workload = workload_of(kubectl, name)
            if (workload is None or ended(workload)) and not follower.is_busy:
                break
            time.sleep(LOOK_SECONDS)
            follower.take_up(pods_of(kubectl, name))
        return follower.wait()
