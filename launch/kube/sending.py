"""Sends a file or a folder of this machine onto the claim, through the pod that waits for it; see `receiving.py`."""

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import IO

from launch.kube import pods
from launch.kube.data_jobs import DataJob
from launch.kube.kubectl import Kubectl, ended, workload_of
from trainers.input.manifests import Source
from trainers.settings.exit_codes import BAD_CONFIGURATION, BadConfiguration
from trainers.world import process

_PIECE_BYTES = 1 << 20
# Connections that are cut are made again, each time from where it was.
_TRIES, _PAUSE_SECONDS, _LOOK_SECONDS = 6, 2.0, 1.0


def running_pod(kubectl: Kubectl, name: str) -> str:
    """The name of a Job's pod, when it runs; empty if the Job has ended. Says why it waits, when the reason changes.

    Raises:
      BadConfiguration: the Job was deleted.
    """
    told = ""
    while True:
        workload = workload_of(kubectl, name)
        if workload is None:
            raise BadConfiguration(f"{name} was deleted; start this again, it goes on where it was")
        if ended(workload):
            return ""
        members = pods.pods_of(kubectl, name)
        for pod in reversed(members):
            if pod.get("status", {}).get("phase") == "Running":
                return pod["metadata"]["name"]
        waiting = [pod for pod in members if pod.get("status", {}).get("phase") == "Pending"]
        why = pods.why_waiting(waiting[-1], kubectl.objects("events", "--sort-by=.lastTimestamp")) if waiting else ""
        if why and why != told:
            told = why
            process.say(f"{name} waits: {' '.join(why.split())[: pods.LONGEST_NOTE]}")
        time.sleep(_LOOK_SECONDS)


def send(kubectl: Kubectl, job: DataJob, source: Source) -> bool:
    """Sends all that is not there yet. Returns False if the same data were there already.

    Raises:
      BadConfiguration: other data are there, the source changes, or the connection is cut again and again.
    """
    code, why = 0, ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        pod = running_pod(kubectl, job.name)
        if not pod:
            raise BadConfiguration(f"{job.name} has ended; its log says why: launch/k8s.py logs --name={job.name}")
        words = ("exec", "--stdin", pod, "--", *job.command, f"--data_dir={job.data_dir}", "--take")
        process.say(f"sending {source.name} to {pod}: {source.manifest.summary()}")
        before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a connection that is cut does not end the launcher
        try:
            code, answers, why = _call(kubectl.words(*words), source)
        finally:
            signal.signal(signal.SIGPIPE, before)
        if "same" in answers or answers.get("whole") == source.manifest.digest:
            return "same" not in answers
        source.check_unchanged()
        if code == BAD_CONFIGURATION:
            raise BadConfiguration(why)
        if "forbidden" in why.lower():
            raise BadConfiguration(
                f"the cluster does not allow commands in pods ({why}); ask for the right `pods/exec`"
            )
        process.say(f"the connection to {pod} has ended ({why or f'code {code}'}); it is made again")
    raise BadConfiguration(
        f"the connection to {job.name} has ended {_TRIES} times ({why or code}); repeat this, it goes on where it was"
    )


def _call(command: list[str], source: Source) -> tuple[int, dict, str]:
    """Talks with the receiver: its exit code, all its answers together, and the last line of its errors."""
    answers: dict = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(map(bytes.decode, child.stderr)), daemon=True)
        reader.start()
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended; the code and the last line say why
            offer = {"name": source.name, "is_folder": source.is_folder, "files": source.manifest.files}
            child.stdin.write(json.dumps(offer).encode() + b"\n")
            child.stdin.flush()
            answers |= json.loads(child.stdout.readline() or b"{}")
            if "have" in answers:
                _send_files(child.stdin, source, answers["have"])
                answers |= json.loads(child.stdout.readline() or b"{}")
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        code = child.wait()
        reader.join()
    line = next((line.strip() for line in reversed(errors) if line.strip() and "terminated with" not in line), "")
    return code, answers, line.partition("receiving.py: ")[2] or line


def _send_files(stream: IO[bytes], source: Source, have: Mapping[str, int]) -> None:
    """Sends each file that is not there, from the byte on up to which it is."""
    missing = {
        name: have.get(name, 0) for name, (size, _) in source.manifest.files.items() if have.get(name, -1) < size
    }
    done, told = 0, 0
    total = sum(source.manifest.files[name][0] - start for name, start in missing.items())
    for name, start in missing.items():
        stream.write(json.dumps({"name": name, "start": start}).encode() + b"\n")
        left = source.manifest.files[name][0] - start
        with open(source.root / name, "rb") as file:
            file.seek(start)
            while left and (piece := file.read(min(left, _PIECE_BYTES))):
                stream.write(piece)
                left, done = left - len(piece), done + len(piece)
                if 10 * done // max(total, 1) > told:
                    told = 10 * done // max(total, 1)
                    process.say(f"{done / 2**20:.1f} of {total / 2**20:.1f} MiB")
        if left:
            source.check_unchanged()
    stream.write(b"\n")
    stream.flush()
