"""In a pod: takes data that a user's machine sends, onto the claim. Started by `launch/k8s.py data --from=PATH`.

    python trainers/input/receiving.py --data_dir=/work/runs/data           # waits until they are there
    python trainers/input/receiving.py --data_dir=/work/runs/data --take    # beside it: takes them from standard input

Sent are a line of JSON (`name`, `is_folder`, `files`: size and SHA-256 by name) and, after an answer that says how many
bytes of each file are here (`have`), for each other file a line (`name`, `start`) and its bytes from there on. They are
gathered in a hidden folder, compared with their SHA-256 as they lie there, and renamed when all are right. Free of
TensorFlow.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie two above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time

import argparse
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from trainers.input.manifests import BESIDE, Manifest, names_in
from trainers.settings.exit_codes import OK, BadConfiguration, StoreLost
from trainers.world import files, locks, process

_REMEDY = "bring this under another name, or remove what is there"
PIECE_BYTES = 1 << 20
# How long a pod waits for somebody who sends.
_IDLE_SECONDS, _LOOK_SECONDS = 1800.0, 0.5


class Receiver:
    """Takes one file or folder into `data_dir`. `touch`: called as bytes come.

    Methods raise:
      BadConfiguration: other data are there, or another command brings them.
      StoreLost: the sender has gone, or what came is damaged; what is right is kept.
    """

    def __init__(self, data_dir: Path, source: BinaryIO, answer: Callable[[str], None], touch: Callable[[], None]):
        self.data_dir, self._source, self._answer, self._touch = data_dir, source, answer, touch

    def take(self) -> None:
        """All of it: asks what is to come, takes it, and puts it into its place."""
        offer = json.loads(self._line())
        self.name, self.is_folder = offer["name"], offer["is_folder"]
        manifest = Manifest.from_text(json.dumps(offer["files"]))
        for name in (self.name, *manifest.files):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise BadConfiguration(f"{name} lies outside of {self.data_dir}; name a file or a folder below it")
        self.staging = self.data_dir / f".incoming-{self.name}"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with open(self.data_dir / f".incoming-{self.name}.lock", "w") as turn:
            try:
                locks.hold(turn, wait=False)
            except BlockingIOError:
                raise BadConfiguration(f"{self.name} is being brought by another command; wait for its end") from None
            if self._is_there(manifest):
                self._answer(files.to_json({"same": True}))
                return
            self._answer(files.to_json({"have": self._kept(manifest)}))
            while (line := self._line()) != b"\n":
                self._take_file(json.loads(line), manifest)
            self._put_in_place(manifest)
            self._answer(files.to_json({"whole": manifest.digest}))

    def _line(self) -> bytes:
        line = self._source.readline()
        if not line.endswith(b"\n"):
            raise StoreLost("who sends the data has gone; start it again, it goes on where it was")
        return line

    def _is_there(self, manifest: Manifest) -> bool:
        """Whether the same data are in their place."""
        place = self.data_dir / self.name
        if place.exists() and place.is_dir() != self.is_folder:
            raise BadConfiguration(f"{place} is a {'file' if self.is_folder else 'folder'}; {_REMEDY}")
        root = place if self.is_folder else self.data_dir
        beside = (self.name, *(self.name + suffix for suffix in BESIDE))
        if not place.exists() and self.is_folder:
            return False
        names = list(names_in(place)) if self.is_folder else [name for name in beside if self._exists(name)]
        if not names and not self.is_folder:
            return False
        there = Manifest({name: self._entry(root / name) for name in names})
        between_renames = not self.is_folder and there.files.items() < manifest.files.items()
        if (why := there.difference(manifest)) and not between_renames:
            raise BadConfiguration(f"{place} holds other data ({why}); {_REMEDY}")
        return not why

    def _exists(self, name: str) -> bool:
        return (self.data_dir / name).exists()

    def _entry(self, path: Path) -> tuple[int, str]:
        self._touch()
        return path.stat().st_size, files.digest(path)

    def _kept(self, manifest: Manifest) -> dict[str, int]:
        """How many bytes of which file have come before. What is not of these data is removed."""
        have = {}
        self.staging.mkdir(exist_ok=True)
        for path in sorted(path for path in self.staging.rglob("*") if path.is_file()):
            is_part = path.name.startswith(".")
            whole = path.with_name(path.name[1:]) if is_part else path
            name = whole.relative_to(self.staging).as_posix()
            size, digest = manifest.files.get(name, (-1, ""))
            if is_part and not whole.exists() and path.stat().st_size < size:
                have[name] = path.stat().st_size
            elif not is_part and self._entry(path) == (size, digest):
                have[name] = size
            else:
                path.unlink()
        return have

    def _take_file(self, head: dict, manifest: Manifest) -> None:
        """A file, or the rest of one, checked as it lies here."""
        name, start = head["name"], head["start"]
        size, digest = manifest.files[name]
        path = self.staging / name
        part = path.with_name(f".{path.name}")  # what is brought has no hidden names
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            file.truncate(start)
            left = size - start
            while left:
                piece = self._source.read(min(left, PIECE_BYTES))
                if not piece:
                    raise StoreLost("who sends the data has gone; start it again, it goes on where it was")
                file.write(piece)
                left -= len(piece)
                self._touch()
            file.flush()
            os.fsync(file.fileno())
        if self._entry(part) != (size, digest):
            part.unlink()
            raise StoreLost(f"{name} did not come as it was sent; start it again, the other files are kept")
        os.replace(part, path)

    def _put_in_place(self, manifest: Manifest) -> None:
        missing = [name for name in manifest.files if not (self.staging / name).is_file()]
        missing = [name for name in missing if self.is_folder or not self._exists(name)]
        if missing:
            raise StoreLost(f"{missing[0]} did not come; start it again, the other files are kept")
        if self.is_folder:
            os.replace(self.staging, self.data_dir / self.name)
        else:
            # What describes a file comes before it.
            for name in sorted(manifest.files, key=len, reverse=True):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.staging / name, self.data_dir / name)
            shutil.rmtree(self.staging)
        files.sync(self.data_dir)


def wait(sign: Path, end: Path) -> int:
    """Returns when `end` is there. Raises BadConfiguration if `sign` is not touched for half an hour."""
    sign.touch()
    while not end.exists():
        if time.time() - sign.stat().st_mtime > _IDLE_SECONDS:
            raise BadConfiguration(
                f"nobody has sent anything for {_IDLE_SECONDS / 60:.0f} minutes; repeat: launch/k8s.py data --from=…"
            )
        time.sleep(_LOOK_SECONDS)
    return OK


def settings_from(argv: Sequence[str]) -> argparse.Namespace:
    """The command line (`argv[0]` is the program)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", required=True, type=Path, help="the folder for data on the claim")
    parser.add_argument("--take", action="store_true", help="take data from standard input")
    return parser.parse_args(argv[1:])


def main(options: argparse.Namespace) -> int:
    """Waits, or takes what comes."""
    folder = Path(tempfile.gettempdir())
    sign, end = folder / "lockstep-data-comes", folder / "lockstep-data-is-there"
    if not options.take:
        return wait(sign, end)
    try:
        Receiver(options.data_dir, sys.stdin.buffer, process.show, sign.touch).take()
    except PermissionError as error:
        raise BadConfiguration(
            f"{error.filename} cannot be written; make the claim writable for the group {os.getgid()}"
        ) from None
    end.touch()
    return OK


if __name__ == "__main__":
    process.main(settings_from, main)
