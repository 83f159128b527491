"""Objects in a store, `s3://bucket/key`, `gs://bucket/key`, `az://container/key`: the one place that uses `obstore`.

Credentials and endpoints come from the environment or the platform's identity (`AWS_ENDPOINT_URL`, …). Every request is
bounded, and is tried again while that may help: the server answers 429 or 5xx, a connection is refused, cut or silent.
"""

import contextlib
import datetime
import io
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trainers.settings.exit_codes import BadConfiguration, StoreLost
from trainers.world import files

T = TypeVar("T")
# What tells two contents of an object apart: a tag, a number or both. Google's store asks for the number.
Version = dict[str, str]
# One request; larger objects are read and written in pieces. No store takes smaller ones.
REQUEST_SECONDS = 60
PIECE_BYTES = 5 << 20
_MOST_PIECES = 9000
# Pieces that are on their way at once, at most: what a network brings in so many seconds. One sees that something moves
# when a piece has come.
_MOST_AT_ONCE, _SECONDS_AT_ONCE = 4, 2.0
# Of an answer, what is taken from it at once.
_BYTES_AT_ONCE = 1 << 16
# Between tries, growing from the first to the last.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
# The server that gives out a machine's identity, where there is one; asked where the environment has no credentials.
_IDENTITIES = "169.254.169.254"
_NO_CREDENTIALS = "the environment has no credentials, and the platform gives none"
_REMEDY = "run `python3 launch/environment.py storage` once"


def _library() -> Any:
    """The package.

    Raises:
      BadConfiguration: it is not installed.
    """
    try:
        import obstore.store
    except ImportError:
        raise BadConfiguration(
            f"addresses of object stores need the package obstore, which is not installed for {sys.executable}; "
            f"{_REMEDY}"
        ) from None
    return obstore


def _first_line(error: BaseException) -> str:
    """What went wrong, without the server's page and the library's internals."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r": Error performing (\w+) (\S+?)(\?\S*)? in \S+( - |: )", r": \1 \2: ", text)[:300]


def _version(facts: Mapping[str, Any]) -> Version:
    return {name: facts[name] for name in ("e_tag", "version") if facts.get(name)}


class Store:
    """What lies under an address. Names are relative to it, with `/`.

    `patience`: seconds for which a request that fails is tried again, from the last byte on that has moved; `stop`:
    set, nothing is tried again. `moved`: called, from any thread, when bytes have moved that had not before, and when
    an object was written or removed.

    Methods raise:
      StoreLost: the store cannot be reached, or answers with errors, for longer than that.
      BadConfiguration: it refuses: there is no such bucket, no right, no credentials.
    """

    def __init__(
        self,
        address: str,
        patience: float = 60.0,
        stop: threading.Event | None = None,
        moved: Callable[[], None] = lambda: None,
    ):
        self._obstore, self.address, self.patience, self._moved = _library(), address, patience, moved
        self._stop = stop or threading.Event()
        # Of objects that are being written: how far any try has come.
        self._reached: dict[str, int] = {}
        # Pieces at once; it follows from how fast the last large object went.
        self._at_once = 1
        plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
        options: dict[str, Any] = {"timeout": f"{REQUEST_SECONDS}s", "connect_timeout": "10s"}
        # The library's own tries are few: those here can be ended, and say what they wait for.
        retry = {"max_retries": 1, "retry_timeout": datetime.timedelta(seconds=REQUEST_SECONDS)}
        try:
            self._store = self._obstore.store.from_url(
                address, client_options=options | ({"allow_http": True} if plain else {}), retry_config=retry
            )
        except Exception as error:
            raise BadConfiguration(
                f"{address} cannot be opened: {_first_line(error)}; set the credentials and the endpoint of the store "
                "in the environment"
            ) from None

    # Requests ----------------------------------------------------------------------------------------------------

    def _tried(self, what: str, request: Callable[[], T], since: Callable[[], float] = lambda: 0.0) -> T:
        """What a request returns, tried again while that may help. FileNotFoundError and conflicts go through.

        `since`: when something has moved last.
        """
        errors, began, pause = self._obstore.exceptions, time.monotonic(), _FIRST_PAUSE
        refusals = (errors.PermissionDeniedError, errors.UnauthenticatedError, errors.InvalidPathError)
        refusals += (errors.NotSupportedError, errors.UnknownConfigurationKeyError)
        while True:
            try:
                return request()
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                    raise BadConfiguration(
                        f"{self.address}: there is no such bucket; make it, or name another"
                    ) from None
                raise
            except (errors.AlreadyExistsError, errors.PreconditionError):
                raise
            except refusals as error:
                raise BadConfiguration(
                    f"{self.address} refuses to {what}: {_first_line(error)}; check the credentials and their rights"
                ) from None
            except (errors.BaseError, OSError, _Short) as error:
                waited = time.monotonic() - max(began, since())
                if waited + pause > self.patience or self._stop.is_set():
                    reason = _NO_CREDENTIALS if _IDENTITIES in str(error) else _first_line(error)
                    raise StoreLost(
                        f"{self.address} could not {what} within {waited:.0f} s: {reason}; start again when the store "
                        "can be reached, the run continues"
                    ) from None
            self._stop.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def read_versioned(self, name: str) -> tuple[bytes, Version]:
        """An object and its version. Raises FileNotFoundError if there is none."""

        def get() -> tuple[bytes, Version]:
            result = self._obstore.get(self._store, name)
            data = bytes(result.bytes())
            if len(data) != result.meta["size"]:
                raise _Short(f"{name} has ended after {len(data)} of {result.meta['size']} bytes")
            return data, _version(result.meta)

        return self._tried(f"read {name}", get)

    def read(self, name: str) -> bytes:
        """An object. Raises FileNotFoundError if there is none."""
        return self.read_versioned(name)[0]

    def fetch(self, name: str, path: Path) -> None:
        """Brings an object, of any size, into a file, which is whole or not there. Raises FileNotFoundError."""
        meta = self._tried(f"read {name}", lambda: self._obstore.head(self._store, name))
        with files.aside(path) as place, open(place, "wb") as file:
            for start in range(0, meta["size"], PIECE_BYTES):
                length = min(PIECE_BYTES, meta["size"] - start)
                file.write(self.piece(name, start, length, meta["e_tag"]))
            file.flush()

    def piece(self, name: str, start: int, length: int, tag: str | None = None) -> bytes:
        """So many bytes of an object from a place on. Raises FileNotFoundError, also if its version has another tag."""
        data = bytearray()

        def more() -> None:
            """Adds what comes. What is cut off is asked for from there on."""
            options = {"range": (start + len(data), start + length)} | ({"if_match": tag} if tag else {})
            before = len(data)
            try:
                for chunk in self._obstore.get(self._store, name, options=options).stream(_BYTES_AT_ONCE):
                    data.extend(memoryview(chunk))
                    self._moved()
            except self._obstore.exceptions.PreconditionError:
                raise FileNotFoundError(f"{name} was replaced while it was read") from None
            except (self._obstore.exceptions.BaseError, OSError):
                if len(data) == before:
                    raise
            if len(data) == before or len(data) > length:
                raise _Short(f"{name} has ended after {start + len(data)} bytes")

        while len(data) < length:
            self._tried(f"read {name}", more)
        return bytes(data)

    def write(self, name: str, content: bytes | Path) -> None:
        """Writes an object, which is whole or not there; `content`: bytes, or a file that does not change."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        length = max(PIECE_BYTES, -(-size // _MOST_PIECES))
        last = time.monotonic()

        def pieces() -> Iterator[bytes]:
            """The library takes the next when one of those before is there."""
            nonlocal last
            with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
                while piece := file.read(length):
                    if file.tell() > self._reached.get(name, 0):
                        self._reached[name], last = file.tell(), time.monotonic()
                        self._moved()
                    yield piece

        def put() -> Any:
            if size <= length:
                small = content if isinstance(content, bytes) else content.read_bytes()
                return self._obstore.put(self._store, name, small, use_multipart=False)
            now, self._at_once, began = self._at_once, 1, time.monotonic()
            self._obstore.put(self._store, name, pieces(), chunk_size=length, max_concurrency=now)
            rate = size / (time.monotonic() - began)
            self._at_once = min(max(int(_SECONDS_AT_ONCE * rate / length), 1), _MOST_AT_ONCE)

        self._tried(f"write {name}", put, lambda: last)
        self._reached.pop(name, None)
        self._moved()

    def create(self, name: str, content: bytes) -> Version | None:
        """Writes an object that is not there yet. Returns its version, or None if there is one."""
        return self._conditional(name, content, "create")

    def replace(self, name: str, content: bytes, version: Version) -> Version | None:
        """Writes an object in place of a version. Returns the new version, or None if there is another."""
        return self._conditional(name, content, version)

    def _conditional(self, name: str, content: bytes, mode: Any) -> Version | None:
        errors = self._obstore.exceptions
        put = lambda: self._obstore.put(self._store, name, content, mode=mode, use_multipart=False)  # noqa: E731
        try:
            return _version(self._tried(f"write {name}", put))
        except (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError):
            # Perhaps by a try of ours whose answer was lost.
            with contextlib.suppress(FileNotFoundError):
                there, version = self.read_versioned(name)
                return version if there == content else None
            return None

    def entries(self, under: str = "") -> dict[str, tuple[str, int]]:
        """Names of all objects, or of those in a folder, in their order, with tags and sizes in bytes."""

        def found() -> Iterator[tuple[str, tuple[str, int]]]:
            for page in self._obstore.list(self._store, under or None):
                self._moved()
                yield from ((meta["path"], (meta["e_tag"] or "", meta["size"])) for meta in page)

        return dict(sorted(self._tried("list what is there", lambda: list(found()))))

    def entry(self, name: str) -> tuple[str, int] | None:
        """Tag and size in bytes of an object, or None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            meta = self._tried(f"look at {name}", lambda: self._obstore.head(self._store, name))
            return meta["e_tag"] or "", meta["size"]
        return None

    def tags(self, under: str = "") -> dict[str, str]:
        """As `entries`, with tags alone."""
        return {name: tag for name, (tag, _) in self.entries(under).items()}

    def remove(self, names: Collection[str]) -> None:
        """Removes objects, one after another in this order. One that is not there is no error."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._tried(f"remove {name}", lambda name=name: self._obstore.delete(self._store, name))
                self._moved()

    def rename(self, name: str, new: str) -> None:
        """Gives an object another name. One that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(f"rename {name}", lambda: self._obstore.copy(self._store, name, new))
            self.remove([name])


class _Short(Exception):  # noqa: N818 - never seen by a caller
    """An answer has ended before its end."""
