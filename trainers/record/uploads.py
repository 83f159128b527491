"""What of a run's folder goes to the store, and in which order.

What is in the store can be resumed from at any moment, whatever is killed when:

- Metrics and events go first, then checkpoints, the newest before the others. Of each the files, its manifest last:
  without a manifest there is no checkpoint. What is removed loses its manifest first.
- A run.json that says that the run has ended goes last of all.

A store does not append: a file that grows is sent whole. Events are in files of a bounded size, see
`trainers.show.summaries`. Any other large file is sent the more rarely the larger it is, but for metrics before a
checkpoint, which they cover.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainers.record import carriers, copies, reading
from trainers.settings.exit_codes import StoreLost
from trainers.world.stores import Store

# Of a file that grows, over time: one of 4 MiB goes each time.
BYTES_A_SECOND = (4 << 20) / carriers.EVERY_SECONDS
# A larger file is read in pieces.
_MOST_AT_ONCE = 64 << 20
# A folder that is there when a certain file is.
_MARKS = {reading.EXPORT: reading.METADATA}

Signature = tuple[int, int, int]


def _signature(path: Path) -> Signature:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _loose_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of what lies in a run's folder, without run.json, checkpoints, hidden files, the evaluator's."""
    for place, folders, names in os.walk(folder):
        top = Path(place) == folder
        left_out = (reading.CHECKPOINTS, carriers.EVALUATOR) if top else ()
        folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and not (top and name == reading.RUN):
                path = Path(place, name)
                yield path.relative_to(folder).as_posix(), path


class Uploads:
    """What was sent of a folder, and what is to be.

    `fence`: raises unless this process may write to the store; returns whether all is to be written again. `end`: set,
    nothing is written any more. `steps`: the manifests of checkpoints that are whole in the store.
    """

    def __init__(self, store: Store, folder: Path, fence: Callable[[], bool], end: threading.Event):
        self._store, self._folder, self._own, self._end = store, folder, fence, end
        self.steps: dict[int, bytes] = {}
        self._sent: dict[str, Signature] = {}
        # When that was; and of checkpoints that are not whole in the store, what is there already.
        self._at: dict[str, float] = {}
        self._begun: dict[str, Signature] = {}
        self._again = False

    def are_sent(self) -> None:
        """What lies in the folder now came from the store."""
        self._sent = {name: _signature(path) for name, path in _loose_files(self._folder)}

    def find(self) -> None:
        """Finds which checkpoints are in the store, and removes what a killed process had begun to write or remove."""
        for step in copies.manifests(self._store):
            with contextlib.suppress(FileNotFoundError):
                self.steps[step] = self._store.read(copies.manifest_name(step))
        whole = {reading.checkpoint_folder(Path(), step).name for step in self.steps}
        names = self._store.tags(reading.CHECKPOINTS)
        torn = [n for n in names if (place := n.split("/")[1]) not in whole and reading.step_of(place) is not None]
        self._store.remove(torn)

    def bring(self, everything: bool) -> bool:
        """Brings what has changed to the store; `everything`: large files that grow too.

        Returns whether that is all: a checkpoint that comes meanwhile goes before older ones, in the next call.
        """
        self._fence()
        self._again = False  # what is written from here on is not missed
        steps = self._local_steps()  # before the metrics are read: they cover these
        wanted = [step for step in sorted(steps, reverse=True) if self.steps.get(step) != steps[step]]
        ended, run = self._has_ended(), self._folder / reading.RUN
        for name, path in _loose_files(self._folder):
            now = everything or ended or (bool(wanted) and name == reading.METRICS)
            if name.partition("/")[0] not in _MARKS and (now or self._is_due(name)):
                self._send(name, path)
        for folder, mark in _MARKS.items():
            self._send_marked(folder, mark)
        if not ended:
            self._send(reading.RUN, run)
        for step in wanted:
            if step != wanted[0] and set(reading.checkpoint_steps(self._folder)) - steps.keys():
                return False
            self._send_checkpoint(step, steps[step])
        self._remove_checkpoints()
        self._remove_loose()
        if ended:
            self._send(reading.RUN, run)
        return not self._again

    def _fence(self) -> None:
        """Raises unless this process may write. All is forgotten if it is to be written again."""
        if self._own():
            self._again = True
            self._sent.clear()
            self._begun.clear()
            self.steps.clear()

    def _write(self, name: str, content: bytes | Path) -> None:
        if self._end.is_set():
            raise StoreLost(f"{self._store.address} is written to no more")
        self._store.write(name, content)

    def _has_ended(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return bool(reading.read_json(self._folder / reading.RUN).get("ended"))
        return False

    def _local_steps(self) -> dict[int, bytes]:
        """The checkpoints in the folder, with their manifests."""
        steps = {}
        for step in reading.checkpoint_steps(self._folder):
            with contextlib.suppress(OSError):
                steps[step] = (reading.checkpoint_folder(self._folder, step) / reading.MANIFEST).read_bytes()
        return steps

    def _is_due(self, name: str) -> bool:
        """Whether a file may be sent again by now."""
        if name not in self._sent or name not in self._at:
            return True
        return time.monotonic() - self._at[name] >= self._sent[name][0] / BYTES_A_SECOND

    def _send(self, name: str, path: Path) -> None:
        """Writes a file, if it is another than the one that was written last."""
        try:
            signature = _signature(path)
            if self._sent.get(name) == signature:
                return
            content = path if signature[0] > _MOST_AT_ONCE and name != reading.METRICS else path.read_bytes()
            if name == reading.METRICS:
                content = content[: content.rfind(b"\n") + 1]  # a line may be on its way
        except (FileNotFoundError, NotADirectoryError):
            return
        self._write(name, content)
        self._sent[name], self._at[name] = signature, time.monotonic()

    def _send_marked(self, folder: str, mark: str) -> None:
        """Writes a folder that is there when a certain file is: that goes last, and is removed before a change."""
        last = f"{folder}/{mark}"
        inside = {n: p for n, p in _loose_files(self._folder) if n.startswith(f"{folder}/") or n == folder}
        changed = [n for n, p in inside.items() if p.exists() and self._sent.get(n) != _signature(p)]
        if not changed:
            return
        if last in self._sent:
            self._store.remove([last])
            del self._sent[last]
        for name in (*(name for name in inside if name != last), *([last] if last in inside else [])):
            self._send(name, inside[name])

    def _send_checkpoint(self, step: int, manifest: bytes) -> None:
        """Writes a checkpoint, its manifest last. One that was replaced or removed meanwhile waits for the next."""
        place, name = reading.checkpoint_folder(self._folder, step), copies.manifest_name(step)
        if step in self.steps:
            self._store.remove([name])
            del self.steps[step]
        folder = name.rpartition("/")[0]
        with contextlib.suppress(FileNotFoundError):
            for file in json.loads(manifest)["files"]:
                signature = _signature(place / file)
                if self._begun.get(f"{folder}/{file}") != signature:
                    self._write(f"{folder}/{file}", place / file)
                    self._begun[f"{folder}/{file}"] = signature
            if (place / reading.MANIFEST).read_bytes() == manifest:
                self._fence()
                self._write(name, manifest)
                self.steps[step] = manifest
                self._begun = {each: of for each, of in self._begun.items() if not each.startswith(f"{folder}/")}

    def _remove_checkpoints(self) -> None:
        """Removes those that the folder does not have any more, and what was begun of others.

        The folder always has the newest, or has set it aside. What there is, the store says: a request whose answer was
        lost may have been done.
        """
        names, left = self._store.tags(reading.CHECKPOINTS), set(self._local_steps())
        self._fence()
        if self._again:
            return
        there = {reading.step_of(name.split("/")[1]) for name in names} - {None}
        whole = {step for step in there if copies.manifest_name(step) in names}
        self.steps = {step: self.steps.get(step, b"") for step in whole}
        self._begun = {name: of for name, of in self._begun.items() if name in names}
        for step in sorted(there - left):
            damaged = reading.checkpoint_folder(self._folder, step).with_suffix(".damaged").exists()
            if damaged or step < max(whole & left, default=-1):  # a newer one is in the store
                self._remove_checkpoint(step)

    def _remove_checkpoint(self, step: int) -> None:
        """Removes a checkpoint, its manifest first. One that was set aside as damaged is set aside there too."""
        name = copies.manifest_name(step)
        folder = name.rpartition("/")[0]
        names = [name, *(each for each in self._store.tags(folder) if each != name)]
        if reading.checkpoint_folder(self._folder, step).with_suffix(".damaged").exists():
            for each in names:
                self._store.rename(each, f"{folder}.damaged/{each.rpartition('/')[2]}")
        else:
            self._store.remove(names)
        self.steps.pop(step, None)

    def _remove_loose(self) -> None:
        """Removes what was written and is not in the folder any more."""
        gone = [name for name in self._sent if not (self._folder / name).exists()]
        self._fence()  # else everything would be gone
        for name in gone:
            self._store.remove([name])
            self._sent.pop(name, None)
