"""The workers meet before TensorFlow starts a server.

All come to the chief's address over plain TCP: a worker that is missing, comes twice, or was started with another size
or other flags is named at once, where TensorFlow would wait in silence.
"""

import contextlib
import errno
import json
import socket
import time
from collections.abc import Callable, Mapping

from trainers.settings.exit_codes import BadConfiguration, PeerLost
from trainers.world.cluster import KUBERNETES, Cluster

_LOG_SECONDS = 10.0
_RETRY_SECONDS = 0.3
_HELLO_BYTES = 1 << 16


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
            f"worker {index} has a list of {len(theirs['addresses'])} workers, the chief a list of {cluster.size}; "
            "use the same list everywhere"
        )
    if tuple(theirs["addresses"]) != cluster.addresses:
        others = ", ".join(theirs["addresses"])
        return f"worker {index} has other addresses than the chief ({others}); use the same list everywhere"
    if index in present or index == 0:
        return f"two workers have the index {index}; give each worker its own"
    for key, value in mine["identity"].items():
        if theirs["identity"].get(key) != value:
            own = theirs["identity"].get(key)
            return f"worker {index} has --{key}={own}, the chief {value}; use the same flags everywhere"
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
