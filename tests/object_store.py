"""A real S3 server in a process of its own, and a proxy before it that fails as networks and servers do."""

import base64
import contextlib
import datetime
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from launch import environment

BUCKET = "bucket"
# What Azure's emulator has; everybody knows its key.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
# What the proxy may do to a request, beside passing it on.
FAULTS = ("drop before", "drop after", "cut request", "cut answer", "delay", "500", "503", "429")


def interpreter():
    """A Python that has the server: that of its own environment, or this one; None if there is none."""
    own = environment.venv("emulators") / "bin/python"
    if own.exists():
        return own
    return sys.executable if importlib.util.find_spec("moto") else None


def skip_where_missing():
    """Skips the tests of a module where a package that they need is not installed."""
    pytest.importorskip("obstore", reason="obstore is not installed: launch/environment.py storage")
    if interpreter() is None:
        pytest.skip("moto is not installed: launch/environment.py emulators", allow_module_level=True)


@contextlib.contextmanager
def _served(command):
    """The port of a server on loopback. `command(port)`: what starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def s3_server(host="127.0.0.1"):
    """The port of an S3 server with an empty bucket. `host`: the address on which it listens, loopback among them."""
    with _served(lambda port: [interpreter(), "-m", "moto.server", "-H", host, "-p", str(port)]) as port:
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")).close()
        yield port


@contextlib.contextmanager
def azure_server():
    """The port of Azure's emulator with an empty container. Skips where it is not on the PATH."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not on the PATH: npm install -g azurite")
    words = [program, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--blobPort"]
    with _served(lambda port: [*words, str(port)]) as port:
        _make_container(port)
        yield port


def _make_container(port):
    """Asks for a container, signed with the shared key. Source: Azure's reference, "Authorize with Shared Key"."""
    date = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": date, "x-ms-version": "2021-12-02"}
    text = "PUT" + "\n" * 12 + "".join(f"{name}:{value}\n" for name, value in headers.items())
    text += f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{BUCKET}\nrestype:container"
    signature = hmac.new(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(signature).decode()}"
    url = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}/{BUCKET}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()


def variables(port):
    """What a process needs to know of a server behind a port, of either kind."""
    own = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
    own |= {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret"}
    own |= {"AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}
    return own | {"AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"}


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a port. `fault(method, path)` names one of `FAULTS`, or returns None.

    `log`: method and path of each request that the server has answered. Listings come in another order than they are.
    `rate`: bytes a second that pass, of all requests together; 0 = as many as come. A negative one: none, for ever. Or
    a function of method and path that tells it. `pause(method, path)`: seconds before a request is passed on.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.fault, self.log, self.down = upstream, lambda method, path: None, [], False
        self.count, self.guard, self.chance = 0, threading.Lock(), random.Random(0)
        self.port = self.server_address[1]
        self.rate, self.wire, self.pause = 0, threading.Lock(), lambda method, path: 0

    def carry(self, content, *request):
        """Waits as long as a wire of this rate takes for some bytes."""
        rate = (lambda: self.rate(*request)) if callable(self.rate) else (lambda: self.rate)
        with self.wire if rate() else contextlib.nullcontext():
            while rate() < 0:
                time.sleep(0.02)
            time.sleep(len(content) / rate() if rate() else 0)

    def handle_error(self, request, client_address):
        """Nothing: connections break here all the time."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _close(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status, headers, body, sent):
        """Sends an answer, or the first `sent` bytes of its body."""
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        head = self.command == "HEAD"
        length = dict((n.lower(), v) for n, v in headers).get("content-length", len(body)) if head else len(body)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        body = body[:sent]
        for start in range(0, len(body), 1 << 16):
            self.server.carry(body[start : start + (1 << 16)], self.command, self.path)
            self.wfile.write(body[start : start + (1 << 16)])

    def _any(self):
        proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy.carry(body, self.command, self.path)
        time.sleep(proxy.pause(self.command, self.path))
        if proxy.down:
            return self._close()
        with proxy.guard:
            proxy.count += 1
            fault = proxy.fault(self.command, self.path)
        if fault == "drop before":
            return self._close()
        if fault in ("500", "503", "429"):
            return self._answer(int(fault), [], b"<Error><Code>SlowDown</Code></Error>", None)
        if fault == "delay":
            time.sleep(0.3)
        upstream = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=30)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders()
        if fault == "cut request":
            upstream.send(body[: len(body) // 2])
            upstream.close()
            return self._close()
        if body:
            upstream.send(body)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if b"<ListBucketResult" in content[:200] or b"<EnumerationResults" in content[:200]:
            content = _shuffled(content, proxy.chance)
        with proxy.guard:
            proxy.log.append((self.command, self.path))
        if fault == "drop after":
            return self._close()
        self._answer(answer.status, answer.getheaders(), content, len(content) // 2 if fault == "cut answer" else None)
        if fault == "cut answer":
            self._close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any  # noqa: N815 - what the library calls


def _shuffled(page, chance):
    """A page of a listing whose entries are in another order."""
    entry = rb"<Contents>.*?</Contents>|<Blob>.*?</Blob>"
    entries = re.findall(entry, page, re.DOTALL)
    mixed = iter(chance.sample(entries, len(entries)))
    return re.sub(entry, lambda match: next(mixed), page, flags=re.DOTALL)


@contextlib.contextmanager
def environment_of(port):
    """Within the block this process, and those that it starts, use the server behind a port."""
    before = {name: os.environ.get(name) for name in variables(port)}
    os.environ.update(variables(port))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# Fixtures -------------------------------------------------------------------------------------------------------------

SERVERS = {"s3": s3_server, "az": azure_server}


def _server(request):
    """The port of a server, and the scheme of its addresses: `s3`, or what a test names, as `every_store` does."""
    kind = getattr(request, "param", "s3")
    with SERVERS[kind]() as port:
        yield port, kind


server = pytest.fixture(_server, scope="module")
# In a module that has this one, each test of stores is tried on all of them.
each_server = pytest.fixture(_server, scope="module", name="server", params=list(SERVERS))
every_store = pytest.mark.parametrize("server", list(SERVERS), indirect=True, scope="module")


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):
    """A proxy before the server, which this process uses. What a user keeps of stores lies in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users cache"))
    with Proxy(server[0]) as proxy, environment_of(proxy.port):
        yield proxy


@pytest.fixture
def address(server, request):
    """An address of the test's own, in which nothing is."""
    return f"{server[1]}://{BUCKET}/tests/{''.join(c if c.isalnum() else '-' for c in request.node.name)}"
