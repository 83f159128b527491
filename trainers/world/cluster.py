"""Who the workers are: found in the environment, checked, and met before TensorFlow starts a server.

The order is TF_CONFIG as given, a Kubernetes Indexed Job, Slurm. `meet` then gathers all workers at the chief's address
over plain TCP: a worker that is missing, comes twice, or was started with another size or other flags is named at once,
where TensorFlow would wait in silence.
"""

import contextlib
import dataclasses
import errno
import json
import re
import socket
import time
from collections.abc import Callable, Mapping

from trainers.settings.exit_codes import BadConfiguration, PeerLost

DEFAULT_PORT = 2222
KUBERNETES = "Kubernetes Indexed Job"
_LOG_SECONDS = 10.0
_RETRY_SECONDS = 0.3
_HELLO_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Cluster:
    """This worker's index and the addresses (`host:port`) of all, the chief's first. `source`: where that was found."""

    index: int
    addresses: tuple[str, ...]
    source: str

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self.addresses)

    def tf_config(self) -> str:
        """The value of TF_CONFIG that TensorFlow reads."""
        task = {"type": "worker", "index": self.index}
        return json.dumps({"cluster": {"worker": list(self.addresses)}, "task": task})


def _whole_number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit():
        raise BadConfiguration(f"{name} is {text!r}; it must be a whole number; set it as the cluster's manager would")
    return int(text)


def _from_tf_config(text: str) -> Cluster:
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        addresses = [*cluster.get("chief", []), *cluster.get("worker", [])]
        index = int(task["index"]) + (len(cluster.get("chief", [])) if task["type"] == "worker" else 0)
        known = task["type"] in ("chief", "worker") and all(isinstance(a, str) for a in addresses)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadConfiguration(
            "TF_CONFIG is not of the form {cluster: {worker: [host:port, …]}, task: {type, index}}: "
            f"{error!r}; mend it"
        ) from None
    if not known:
        raise BadConfiguration(f"TF_CONFIG names the task {task}; its type must be worker or chief")
    return Cluster(index, tuple(addresses), "TF_CONFIG")


def _from_kubernetes(environment: Mapping[str, str]) -> Cluster:
    index, size = (_whole_number(environment, name) for name in ("JOB_COMPLETION_INDEX", "NUM_WORKERS"))
    job, domain = environment.get("JOB_NAME", ""), environment.get("WORKER_DOMAIN", "")
    if not job or not domain:
        raise BadConfiguration(
            f"JOB_NAME is {job!r} and WORKER_DOMAIN {domain!r}; an Indexed Job needs both; set them in the pod template"
        )
    addresses = tuple(f"{job}-{i}.{domain}:{DEFAULT_PORT}" for i in range(size))
    return Cluster(index, addresses, KUBERNETES)


def expand_hosts(text: str) -> list[str]:
    """Slurm's list of hosts, opened: `a[1-2,05],b` → a1, a2, a05, b."""
    hosts = []
    for item in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)?", text):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\]([^\[]*)", item)
        if not match:
            hosts.append(item)
            continue
        before, ranges, after = match.groups()
        for part in ranges.split(","):
            low, _, high = part.partition("-")
            for number in range(int(low), int(high or low) + 1):
                hosts.append(f"{before}{number:0{len(low)}d}{after}")
    return hosts


def _from_slurm(environment: Mapping[str, str]) -> Cluster:
    index, size = (_whole_number(environment, name) for name in ("SLURM_PROCID", "SLURM_NTASKS"))
    hosts = expand_hosts(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    if not hosts or size % len(hosts):
        raise BadConfiguration(
            f"SLURM_NTASKS {size} does not divide over the {len(hosts)} nodes; set --ntasks-per-node"
        )
    # Jobs that share a node must not share ports; several tasks on a node neither.
    base = 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 10000
    per_host = size // len(hosts)
    addresses = tuple(f"{host}:{base + i}" for host in hosts for i in range(per_host))
    return Cluster(index, addresses, "Slurm")


def resolve(environment: Mapping[str, str]) -> Cluster:
    """The cluster that the environment describes, checked for what can be checked alone.

    Raises:
      BadConfiguration: nothing describes one, or an index, an address or a size is wrong.
    """
    if environment.get("TF_CONFIG"):
        cluster = _from_tf_config(environment["TF_CONFIG"])
    elif "JOB_COMPLETION_INDEX" in environment:
        cluster = _from_kubernetes(environment)
    elif "SLURM_PROCID" in environment:
        cluster = _from_slurm(environment)
    else:
        raise BadConfiguration(
            "--strategy=multi_worker finds no cluster: set TF_CONFIG, or run in a Kubernetes Indexed Job "
            "(JOB_COMPLETION_INDEX, NUM_WORKERS, JOB_NAME, WORKER_DOMAIN) or under srun; on one machine, use "
            "launch/workers.py"
        )
    _check(cluster)
    return cluster


def _check(cluster: Cluster) -> None:
    if not cluster.addresses:
        raise BadConfiguration(f"{cluster.source} names no worker; name each worker's host:port")
    for address in cluster.addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise BadConfiguration(f"{cluster.source} names the address {address!r}; write host:port")
    repeated = sorted({a for a in cluster.addresses if cluster.addresses.count(a) > 1})
    if repeated:
        raise BadConfiguration(f"{cluster.source} names {repeated[0]} more than once; give each worker its own address")
    if not 0 <= cluster.index < cluster.size:
        raise BadConfiguration(
            f"{cluster.source} gives this worker the index {cluster.index}, but names {cluster.size} workers; "
            f"use 0 to {cluster.size - 1}"
        )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class _Wait:
    """A wait with a bound and a line of log every ten seconds."""

    def __init__(self, cluster: Cluster, seconds: float, log: Callable[[str], None]):
        self.cluster, self.seconds, self.log = cluster, seconds, log
        self.began = self.logged = time.monotonic()

    def tick(self, what: str) -> None:
        """Sleeps a moment; logs now and then; raises PeerLost at the end of the time."""
        now = time.monotonic()
        if now - self.began > self.seconds:
            raise PeerLost(
                f"worker {self.cluster.index} waited {self.seconds:g} s for {what}; --startup_timeout is over"
            )
        if now - self.logged > _LOG_SECONDS:
            self.logged = now
            self.log(
                f"worker {self.cluster.index} of {self.cluster.size} waits for {what} "
                f"({now - self.began:.0f} of {self.seconds:g} s)"
            )
        time.sleep(_RETRY_SECONDS)


def _own_socket(cluster: Cluster, wait: _Wait) -> socket.socket:
    """A socket bound to this worker's own address, which must be one of this machine's and free."""
    host, port = _split(cluster.addresses[cluster.index])
    while True:
        try:
            return _listen(host, port, cluster.size + 8)
        except socket.gaierror:
            wait.tick(f"its own name {host} to resolve")
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and cluster.source == KUBERNETES:
                # A pod that replaces another: the name may be that of the other one for as long as it is cached.
                wait.tick(f"its own name {host} to be the address of this pod")
                continue
            raise _not_own(cluster, host, port, error) from None


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens. Every worker does: two that only bind could share a port."""
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def _not_own(cluster: Cluster, host: str, port: int, error: OSError) -> BadConfiguration:
    """Why this worker cannot have its address."""
    if error.errno == errno.EADDRNOTAVAIL:
        return BadConfiguration(
            f"worker {cluster.index}'s address {host}:{port} is not of this machine ({socket.gethostname()}); "
            "give this process the index of its own address"
        )
    return BadConfiguration(
        f"worker {cluster.index}'s address {host}:{port} is taken ({error.strerror}): another process, or a second "
        "worker with this index; give each worker an index and a port of its own"
    )


def meet(cluster: Cluster, identity: Mapping[str, str], timeout: float, log: Callable[[str], None]) -> None:
    """Returns when every worker is there, with the same cluster and the same `identity` (flags, say).

    The chief listens at its address, the others come to it. A restarted worker whose old peers still run waits until
    they have ended.

    Raises:
      PeerLost: someone did not come within `timeout` seconds; it is named.
      BadConfiguration: indices, sizes, addresses or identities disagree, or the own address is not this machine's.
    """
    wait = _Wait(cluster, timeout, log)
    log(f"worker {cluster.index} of {cluster.size} ({cluster.source}): {', '.join(cluster.addresses)}")
    listener = _own_socket(cluster, wait)
    with contextlib.closing(listener):
        hello = {"index": cluster.index, "addresses": cluster.addresses, "identity": dict(identity)}
        if cluster.index == 0:
            _gather(cluster, listener, hello, wait)
        else:
            _report(cluster, hello, wait)


def _complaint(cluster: Cluster, mine: dict, theirs: dict, present: Mapping[int, object]) -> str:
    """What is wrong with a worker that came to the chief, or nothing."""
    index = theirs["index"]
    if len(theirs["addresses"]) != cluster.size:
        return (
            f"worker {index} was told of {len(theirs['addresses'])} workers, the chief of {cluster.size}; make them one"
        )
    if tuple(theirs["addresses"]) != cluster.addresses:
        return f"worker {index} was told of other addresses ({', '.join(theirs['addresses'])}); make them one"
    if index in present or index == 0:
        return f"two workers have the index {index}; give each worker its own"
    for key, value in mine["identity"].items():
        if theirs["identity"].get(key) != value:
            return f"worker {index} has --{key}={theirs['identity'].get(key)}, the chief {value}; make them one"
    return ""


def _read_line(connection: socket.socket) -> dict:
    """One JSON object that ends a line; ValueError for anything else."""
    received = b""
    while not received.endswith(b"\n"):
        piece = connection.recv(_HELLO_BYTES)
        if not piece or len(received) > _HELLO_BYTES:
            raise ValueError("no line of JSON")
        received += piece
    answer = json.loads(received)
    if not isinstance(answer, dict):
        raise ValueError("no JSON object")
    return answer


def _gather(cluster: Cluster, listener: socket.socket, hello: dict, wait: _Wait) -> None:
    present: dict[int, socket.socket] = {}
    listener.settimeout(_RETRY_SECONDS)
    complaint = ""
    try:
        while len(present) < cluster.size - 1 and not complaint:
            missing = [f"{i} ({cluster.addresses[i]})" for i in range(1, cluster.size) if i not in present]
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                wait.tick(f"worker {', '.join(missing)}")
                present = {i: c for i, c in present.items() if _alive(c)}
                continue
            connection.settimeout(5)
            try:
                theirs = _read_line(connection)
                if cluster.source == KUBERNETES and theirs["index"] in present:
                    # Indices are unique there: the pod that came before was lost, with a node that could not say so.
                    present.pop(theirs["index"]).close()
                complaint = _complaint(cluster, hello, theirs, present)
                present[theirs["index"]] = connection
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # not one of ours
        for connection in present.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"complaint": complaint}).encode() + b"\n")
    finally:
        for connection in present.values():
            connection.close()
    if complaint:
        raise BadConfiguration(complaint)


def _alive(connection: socket.socket) -> bool:
    """Whether the worker behind a connection has not gone away while it waited."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(5)


def _report(cluster: Cluster, hello: dict, wait: _Wait) -> None:
    chief = _split(cluster.addresses[0])
    message = json.dumps(hello).encode() + b"\n"
    while True:
        try:
            with socket.create_connection(chief, timeout=5) as connection:
                connection.sendall(message)
                answer = _answer(connection, cluster, wait)
                break
        except socket.gaierror:
            wait.tick(f"the chief's name {chief[0]} to resolve")
        except (OSError, ValueError):
            wait.tick(f"the chief at {cluster.addresses[0]}")
    if answer.get("complaint"):
        raise BadConfiguration(answer["complaint"])


def _answer(connection: socket.socket, cluster: Cluster, wait: _Wait) -> dict:
    """The chief's answer, which comes when all are there."""
    connection.settimeout(_RETRY_SECONDS)
    while True:
        try:
            return _read_line(connection)
        except TimeoutError:
            wait.tick("the other workers, who have not all come to the chief")
