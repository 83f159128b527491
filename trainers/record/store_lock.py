"""The lock of a run in an object store: an object that one process makes, and keeps alive by writing it anew.

A dead owner is one whose object has not changed for `DEAD_AFTER` seconds by the clock of who waits, so that clocks of
machines may differ. One that was killed on the same machine is known at once.
"""

import contextlib
import datetime
import json
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from absl import logging

from trainers.settings.exit_codes import BadConfiguration, StoreLost
from trainers.world.stores import Store, Version

NAME = ".lock"
BEAT_SECONDS = 10.0
DEAD_AFTER = 60.0


def _place_of(path: Path) -> str:
    """What tells a file apart from all files of all machines that run now."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{path.stat().st_dev}:{path.stat().st_ino}"
    return secrets.token_hex(8)


class StoreLock:
    """The lock of the address of a store. `held`: a local file that this process has locked, as any owner here has."""

    def __init__(self, store: Store, held: Path | None):
        self._store, self._place = store, _place_of(held) if held else secrets.token_hex(8)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._own = {"token": secrets.token_hex(8), "host": platform.node(), "pid": os.getpid(), "since": now}
        self._own |= {"place": self._place, "beat": 0}
        self._version, self._beaten = Version(), 0.0
        self._guard, self._end = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self.lost, self.was_removed = "", threading.Event()

    def _content(self) -> bytes:
        return json.dumps(self._own).encode()

    def _read(self) -> tuple[dict[str, Any], Version] | None:
        try:
            content, version = self._store.read_versioned(NAME)
        except FileNotFoundError:
            return None
        try:
            owner = json.loads(content)
        except ValueError:
            owner = {}
        return (owner if isinstance(owner, dict) else {}), version

    def take(self) -> None:
        """Takes the lock, and begins to keep it alive.

        Raises:
          BadConfiguration: another process holds it, and lives.
          StoreLost: the store cannot be reached.
        """
        while True:
            version = self._store.create(NAME, self._content())
            if version is None and (there := self._read()):
                version = self._after(*there)
            if version:
                break
        self._version, self._beaten = version, time.monotonic()
        self._thread = threading.Thread(target=self._work, name="store lock", daemon=True)
        self._thread.start()

    def _after(self, owner: dict[str, Any], version: Version) -> Version | None:
        """Takes the lock from a dead owner. Returns its version, or None if it is another's by now, or nobody's."""
        who = f"process {owner.get('pid')} of {owner.get('host')}, which began at {owner.get('since')}"
        if owner.get("place") == self._place:
            reason = "is gone"
        else:
            logging.warning("%s is locked by %s; waiting %g s for a sign of life", self._store.address, who, DEAD_AFTER)
            began, reason = time.monotonic(), f"has given no sign of life for {DEAD_AFTER:g} s"
            while time.monotonic() - began < DEAD_AFTER:
                time.sleep(min(BEAT_SECONDS, DEAD_AFTER) / 4)
                there = self._read()
                if there is None:
                    return None
                if there[1] != version:
                    raise BadConfiguration(
                        f"--run_dir {self._store.address} is in use by another run, {who}; wait for it, end it, or "
                        "name another address"
                    )
        taken = self._store.replace(NAME, self._content(), version)
        if taken:
            logging.warning("%s was locked by %s, and %s; taken over", self._store.address, who, reason)
        return taken

    def _work(self) -> None:
        while not self._end.wait(BEAT_SECONDS / 4):
            if time.monotonic() - self._beaten > BEAT_SECONDS:
                with contextlib.suppress(StoreLost, BadConfiguration):  # an outage, which only delays
                    self.beat()

    def beat(self) -> None:
        """Writes the lock anew. Raises as the store does."""
        with self._guard:
            if self.lost or self._end.is_set():
                return
            self._own["beat"] += 1
            version = self._store.replace(NAME, self._content(), self._version)
            if version is None:
                version = self._regained()
            if version:
                self._version, self._beaten = version, time.monotonic()

    def _regained(self) -> Version | None:
        """The version of the lock after it was not what this process has left; None and `lost` if it is another's."""
        there = self._read()
        if there is None:
            self.was_removed.set()
            return self._store.create(NAME, self._content())
        owner, version = there
        if owner.get("token") == self._own["token"]:
            return version
        self.lost = f"process {owner.get('pid')} of {owner.get('host')} has taken over {self._store.address}"
        return None

    def check(self) -> None:
        """Raises StoreLost if another has taken the lock. Asks the store only if it was not asked for long."""
        if not self.lost and time.monotonic() - self._beaten > 2 * BEAT_SECONDS:
            self.beat()
        if self.lost:
            raise StoreLost(f"{self.lost}, since no sign of life came from here; this run ends, the other goes on")

    def give_back(self) -> None:
        """Removes the lock, unless it is another's. An owner that cannot is taken for dead in time."""
        self._end.set()
        with self._guard, contextlib.suppress(StoreLost, BadConfiguration):
            there = None if self.lost else self._read()
            if there and there[0].get("token") == self._own["token"]:
                self._store.remove([NAME])
