"""The workers of a run from here: their names, ports, proxies and clocks. Nothing is sent to them."""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from launch.health.rows import BAD, NOT_HERE, OK, WARNING, Row
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import cluster

# Seconds that a name has to resolve, and an address to answer.
RESOLVE_SECONDS, CONNECT_SECONDS = 5.0, 3.0
MOST_AT_ONCE = 32
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
LIBRARY = ("libc.so.6", "adjtimex")
_TIMEX_BYTES, _STATUS_AT, _UNSYNCHRONIZED, _MAX_ERROR_AT = 208, 40, 0x40, 24


class Workers(NamedTuple):
    """`addresses`: host:port of each. `index`: this process's own, None where nobody says. `source`: who names them."""

    addresses: tuple[str, ...]
    index: int | None
    source: str


def split(address: str) -> tuple[str, int]:
    """Host and port of an address.

    Raises:
      BadConfiguration: it is not of the form host:port.
    """
    host, _, port = address.strip().rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise BadConfiguration(f"--hosts names {address!r}; write host:port, host:port")
    return host.strip("[]"), int(port)


def workers_of(hosts: str, environment: Mapping[str, str]) -> Workers | None:
    """The workers that `--hosts` names, else those of TF_CONFIG, a Kubernetes Indexed Job or Slurm; None without any.

    Raises:
      BadConfiguration: an address or the description of the cluster is wrong.
    """
    if hosts:
        addresses = tuple(address.strip() for address in hosts.split(",") if address.strip())
        for address in addresses:
            split(address)
        return Workers(addresses, None, "--hosts")
    # Every Indexed Job has indices; only one of several workers says how many there are.
    named = any(environment.get(name) for name in ("TF_CONFIG", "NUM_WORKERS", "SLURM_PROCID"))
    if not named:
        return None
    found = cluster.from_environment(environment)
    return Workers(found.addresses, found.index, found.source)


def bounded(call: Callable[[], Any], seconds: float) -> Any:
    """What a call returns or raises; TimeoutError after `seconds`. Its thread stays behind: nothing can end it."""
    done: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return done.result(seconds)
    except concurrent.futures.TimeoutError:
        raise TimeoutError from None


def _resolve(host: str, port: int) -> tuple[Any, str]:
    """The first place that a name stands for, or why there is none."""
    try:
        places = bounded(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), RESOLVE_SECONDS)
    except TimeoutError:
        return None, f"no name server has answered within {RESOLVE_SECONDS:g} s"
    except (OSError, UnicodeError) as error:
        return None, getattr(error, "strerror", None) or str(error)
    return places[0], ""


def _bind(place: Any) -> int:
    """0 if this machine can listen there, else the number of the error. As the trainers do when they meet."""
    family, kind, protocol, _, where = place
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)
            listener.listen(1)
        except OSError as error:
            return error.errno or errno.EIO
    return 0


def _connect(place: Any) -> int:
    """0 if something listens there, else the number of the error; ETIMEDOUT where nothing comes back."""
    family, kind, protocol, _, where = place
    with socket.socket(family, kind, protocol) as own:
        own.settimeout(CONNECT_SECONDS)
        try:
            return own.connect_ex(where)
        except OSError:
            return errno.ETIMEDOUT


def address_row(address: str, own: bool | None) -> Row:
    """One worker's name and port. `own`: whether it is this machine's; None where nobody says."""
    host, port = split(address)
    title = f"worker {address}"
    place, why = _resolve(host, port)
    if place is None:
        remedy = f"write an IP address, or add {host} to /etc/hosts or the name server of every machine"
        return Row(title, BAD, f"{host} does not resolve: {why}", remedy)
    where = place[4][0]
    code = _bind(place)
    if code == 0:
        if own is False:
            return Row(title, OK, f"{where} is this machine too, and the port is free")
        loop = where.startswith("127.") or where == "::1"
        far = "; other machines cannot reach it there" if loop else ""
        return Row(title, OK, f"{where} is this machine, and the port is free{far}")
    if code == errno.EADDRINUSE:
        if own is False:
            return Row(title, OK, f"{where} is this machine too, and something listens there: a worker that runs")
        return Row(
            title,
            BAD,
            f"{where} is this machine, and port {port} is taken",
            f"end what holds it (ss -ltnp sport = :{port}), or name another port",
        )
    if code == errno.EACCES:
        return Row(title, BAD, f"port {port} is for root alone", "name a port above 1023")
    if own:
        return Row(
            title,
            BAD,
            f"{where} is not an address of this machine ({socket.gethostname()})",
            "give this process the index of its own address",
        )
    return _far_row(title, where, port, _connect(place))


def _far_row(title: str, where: str, port: int, code: int) -> Row:
    """A worker on another machine."""
    if code == 0:
        return Row(title, OK, f"{where} answers, and something listens there: a worker that waits, or another program")
    if code == errno.ECONNREFUSED:
        return Row(title, OK, f"{where} answers, and the port is free")
    if code in (errno.EAGAIN, errno.ETIMEDOUT):
        text = f"{where}:{port} has not answered within {CONNECT_SECONDS:g} s"
        return Row(title, BAD, text, f"is the machine up? open port {port} in its firewall and in the network's rules")
    return Row(
        title,
        BAD,
        f"{where}:{port}: {errno.errorcode.get(code, code)}",
        "is there a route to it? ip route get " + where,
    )


def proxy_row(workers: Workers, environment: Mapping[str, str]) -> Row:
    """Whether gRPC would send the workers' traffic to an HTTP proxy."""
    proxy = next((name for name in PROXIES if environment.get(name)), None)
    if proxy is None:
        return Row("proxy", OK, "none")
    excepted = [
        name.strip().lstrip(".")
        for key in ("no_grpc_proxy", "no_proxy")
        for name in environment.get(key, "").split(",")
    ]
    hosts = [split(address)[0] for address in workers.addresses]
    through = [host for host in dict.fromkeys(hosts) if not any(name and host.endswith(name) for name in excepted)]
    if not through:
        return Row("proxy", OK, f"{proxy} is set, and no_proxy excepts the workers")
    text = f"{proxy} is set, and no_proxy does not name {', '.join(through[:3])}"
    return Row("proxy", OK, f"{text}; the trainers add it themselves, other programs do not")


def clock_row(workers: Workers | None) -> Row:
    """Whether the kernel counts this machine's clock as synchronized. The clocks of others are not measured."""
    title = "clock"
    try:
        library = ctypes.CDLL(LIBRARY[0], use_errno=True)
        block = ctypes.create_string_buffer(_TIMEX_BYTES)
        state = getattr(library, LIBRARY[1])(block)
    except (OSError, AttributeError):
        return Row(title, NOT_HERE, "not measured: this C library does not tell")
    if state < 0 or ctypes.sizeof(ctypes.c_long) != 8:
        return Row(title, NOT_HERE, "not measured: the kernel does not tell")
    status = ctypes.c_int.from_buffer(block, _STATUS_AT).value
    error = ctypes.c_long.from_buffer(block, _MAX_ERROR_AT).value / 1e6
    others = "; those of other machines are not measured: date +%s.%N on each" if workers else ""
    if status & _UNSYNCHRONIZED:
        text = f"the kernel does not count it as synchronized{others}"
        if workers:
            return Row(title, WARNING, text, "run chrony or systemd-timesyncd on every machine; chronyc tracking")
        return Row(title, OK, f"{text}; one machine needs no more")
    return Row(title, OK, f"synchronized, to {error * 1e3:.0f} ms at worst{others}")


def machines(hosts: str, environment: Mapping[str, str]) -> int:
    """Over how many machines a run goes, as far as somebody says."""
    try:
        workers = workers_of(hosts, environment)
    except BadConfiguration:
        return 1
    hosts = {split(address)[0] for address in workers.addresses} if workers else set()
    loops = {host for host in hosts if host in ("localhost", "::1") or host.startswith("127.")}
    return max(len(hosts - loops) + bool(loops), 1)


def network_rows(hosts: str, environment: Mapping[str, str]) -> list[Row]:
    """Rows of all workers, the proxy and the clock."""
    try:
        workers = workers_of(hosts, environment)
    except BadConfiguration as error:
        return [Row("workers", BAD, str(error), "see docs/several-machines.md"), clock_row(None)]
    if workers is None:
        text = "none is named: --hosts=a:2222,b:2222, TF_CONFIG, a Kubernetes Indexed Job or srun names them"
        return [Row("workers", NOT_HERE, text), clock_row(None)]
    owns = [None if workers.index is None else i == workers.index for i in range(len(workers.addresses))]
    with concurrent.futures.ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        found = list(pool.map(address_row, workers.addresses, owns))
    return [*found, proxy_row(workers, environment), clock_row(workers)]
