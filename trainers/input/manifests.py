"""What is brought to where pods or other machines find it: a file or a folder, and the SHA-256 of all it holds.

Free of TensorFlow: a launcher reads this on a user's machine.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files

# The folder for data below that of runs, on a claim or in a bucket.
FOLDER = "data"
# Beside a file of packed tokens.
BESIDE = (".json", ".tokenizer.json")
# Made of the data where they are read, and kept beside them.
MADE_HERE = ".index.npz"
_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Size in bytes and SHA-256 of each file, by its name with `/`, relative to what holds it."""

    files: Mapping[str, tuple[int, str]]

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(size for size, _ in self.files.values())

    @property
    def digest(self) -> str:
        """The SHA-256 of the whole."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def text(self) -> str:
        """As JSON, the same for the same files."""
        return files.to_json({name: list(entry) for name, entry in sorted(self.files.items())})

    @classmethod
    def from_text(cls, text: str | bytes) -> "Manifest":
        """What `text` gave. Raises ValueError if it is something else."""
        try:
            return cls({name: (int(size), str(digest)) for name, (size, digest) in json.loads(text).items()})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"not a manifest: {error}") from None

    def difference(self, other: "Manifest") -> str:
        """The first file in which what is there (`self`) differs from another manifest; empty if it is the same."""
        for name in sorted({*self.files, *other.files}):
            if name not in other.files:
                return f"{name} is there alone"
            if name not in self.files:
                return f"{name} is missing there"
            if self.files[name] != other.files[name]:
                return f"{name} differs"
        return ""

    def summary(self) -> str:
        """How much it is, in words."""
        return f"{len(self.files)} file{'s' if len(self.files) != 1 else ''}, {self.num_bytes / 2**20:.1f} MiB"


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or a folder of this machine. `root`: what names are relative to. `stamps`: size and time of each file."""

    name: str
    root: Path
    is_folder: bool
    manifest: Manifest
    stamps: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Raises BadConfiguration if a file is no longer what its SHA-256 was taken of."""
        for name, stamp in self.stamps.items():
            if stamp_of(self.root / name) != stamp:
                raise BadConfiguration(f"{self.root / name} has changed while it was read; repeat it when it does not")


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of a file; zeros if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns


def names_in(folder: Path) -> Iterator[str]:
    """Files at any depth, links followed, in order. Not what is hidden, nor what readers make of the data."""
    for path in files.walk(folder):
        if not path.name.startswith(".") and not path.name.endswith(MADE_HERE) and path.is_file():
            yield path.relative_to(folder).as_posix()


def source_of(what: str, text: str | os.PathLike) -> Source:
    """The file or the folder at a path, read once. A file comes with those that describe it (`BESIDE`).

    `what`: how to name it in a message, a flag for example.

    Raises:
      BadConfiguration: there is nothing, or it cannot be read.
    """
    path = Path(os.path.abspath(paths.local(what, text)))
    if not path.exists():
        raise BadConfiguration(f"{what} {text} does not exist; name a file or a folder of this machine")
    if path.is_dir():
        return _read(what, path.name, path, list(names_in(path)), is_folder=True)
    beside = [path.name + suffix for suffix in BESIDE if path.with_name(path.name + suffix).is_file()]
    return _read(what, path.name, path.parent, [*beside, path.name], is_folder=False)


def _read(what: str, name: str, root: Path, names: list[str], is_folder: bool) -> Source:
    if not names:
        raise BadConfiguration(f"{what} {root} holds no files but hidden ones; name a folder with data")
    if name.startswith("."):
        raise BadConfiguration(f"{what} {root / name} is hidden, and readers leave out what is; rename it")
    try:
        stamps = {each: stamp_of(root / each) for each in names}
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            digests = list(pool.map(files.digest, (root / each for each in names)))
    except OSError as error:
        raise BadConfiguration(f"{what} {error.filename or root} cannot be read: {error.strerror}; allow it") from None
    entries = {each: (stamps[each][0], digest) for each, digest in zip(names, digests, strict=True)}
    source = Source(name, root, is_folder, Manifest(entries), stamps)
    source.check_unchanged()
    return source
