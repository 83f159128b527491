"""Runs in object stores: the folder of this machine in which such a run is worked on, and who carries it.

Nothing but this room knows of stores. A run at `s3://bucket/runs/first` works in a folder under `--cache_dir`, as any
run does; a `Mirror` brings what its owner writes there to the store, a `Copy` brings a reader what is in the store.
`reading` and `Checkpoints` ask here whether a folder is one of these; for all others the answer is no, and costs the
look-up of a name.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from trainers.settings import paths
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files

# Folders under `--cache_dir`.
WORKING, COPIES = "runs", "copies"
# Of an owner's folder checkpoints go to the store at once, everything else when so much time has passed.
EVERY_SECONDS = 30.0
# Seconds for which a script that reads tries again.
_READERS_PATIENCE = 60.0
# The folder of `--mode=evaluate` in a run: another process owns it.
EVALUATOR = "evaluator"


class Carrier(Protocol):
    """What stands between a folder and a store."""

    address: str

    def refresh(self, at_once: bool = False) -> None:
        """Brings the folder up to date, but for what checkpoints hold."""

    def bring(self, step: int, feed: Callable[[str], None]) -> None:
        """Brings the files of a checkpoint, if they are not here. `feed`: called with what is waited for.

        Raises StoreLost: nothing has moved for the carrier's time-out.
        """

    def check(self) -> None:
        """Raises StoreLost if what is written here will not be brought to the store any more."""

    def settle(self, feed: Callable[[str], None]) -> None:
        """Returns when all that is written here is in the store. Raises StoreLost if it cannot be."""


_OPEN: dict[str, Carrier] = {}


def register(folder: Path, carrier: Carrier) -> None:
    """From now on the folder is one that is carried."""
    _OPEN[os.path.abspath(folder)] = carrier


def forget(folder: Path) -> None:
    """From now on the folder is like any other."""
    _OPEN.pop(os.path.abspath(folder), None)


def of(folder: str | os.PathLike) -> Carrier | None:
    """Who carries a folder, if anybody does."""
    return _OPEN.get(os.path.abspath(folder)) if _OPEN else None


def refresh(folder: Path, at_once: bool = False) -> None:
    """Brings a copy of a run up to date; does nothing for a folder that is none."""
    if carrier := of(folder):
        carrier.refresh(at_once)


def bring(folder: Path, step: int, feed: Callable[[str], None] = lambda what: None) -> None:
    """Brings a checkpoint's files into a copy of a run; does nothing for a folder that is none.

    `feed`: called with what is waited for, as long as it is.

    Raises:
      FileNotFoundError: it went while it was read.
      StoreLost: nothing of it came for too long.
    """
    if carrier := of(folder):
        carrier.bring(step, feed)


def check(folder: Path) -> None:
    """Raises StoreLost if what is written to an owner's folder will not be brought to the store any more."""
    if carrier := of(folder):
        carrier.check()


def settle(folder: Path, feed: Callable[[str], None]) -> None:
    """Returns when all that was written to an owner's folder is in the store; at once for any other.

    `feed`: called with what is waited for, as long as it is.

    Raises:
      StoreLost: it cannot be brought there.
    """
    if carrier := of(folder):
        carrier.settle(feed)


def shown(folder: str | os.PathLike) -> str:
    """A run's folder as the user has named it."""
    carrier = of(folder)
    return carrier.address if carrier else str(folder)


def facts(address: str, patience: float = _READERS_PATIENCE) -> dict[str, Any]:
    """The run.json of an address; empty if there is none.

    Raises:
      BadConfiguration, StoreLost: the store refuses, or cannot be reached; or it is no JSON.
    """
    from trainers.world.stores import Store

    try:
        return json.loads(Store(address, patience).read("run.json"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadConfiguration(f"{address}/run.json cannot be read: {error}; name another --run_dir") from None


def folder_beside(place: str) -> Path:
    """Where what is not kept in the store lies on this machine, logs of processes for example; a path is itself."""
    return Path(paths.cache_dir("")) / "logs" / paths.name_of(place) if paths.is_address(place) else Path(place)


def write_text(place: str, text: str) -> None:
    """Writes a text file, to a path or an address. Raises as the store does, or OSError."""
    if not paths.is_address(place):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        return files.write_text(Path(place), text)
    from trainers.world.stores import Store

    folder, _, name = place.rpartition("/")
    return Store(folder, _READERS_PATIENCE).write(name, text.encode())


def identity(folder: Path) -> str:
    """What tells a run's folder apart from others, whoever reads it from where."""
    carrier = of(folder)
    return carrier.address if carrier else str(folder.resolve())


def working(cache_dir: Path, address: str) -> Path:
    """The folder in which the owner of an address works."""
    return cache_dir / WORKING / paths.name_of(address)


@contextlib.contextmanager
def readable(place: str | os.PathLike) -> Iterator[Path]:
    """Within the block a run or an export at an address lies in a folder, for reading. A path is that folder itself.

    Raises:
      BadConfiguration, StoreLost: the store refuses, or cannot be reached.
    """
    if not paths.is_address(place):
        yield Path(place)
        return
    from trainers.record.copies import Copy

    with Copy(os.fspath(place), Path(paths.cache_dir("")) / COPIES, _READERS_PATIENCE) as copy:
        if not (copy.folder / "run.json").exists():
            copy.bring_export()
        yield copy.folder


class _Sources:
    """Copies of runs that a run takes weights from, each made when it is asked for first."""

    def __init__(self, parent: Path, patience: float):
        self.parent, self.patience, self.stack = parent, patience, contextlib.ExitStack()
        self.folders: dict[str, Path] = {}

    def folder_of(self, address: str) -> Path:
        from trainers.record.copies import Copy

        if address not in self.folders:
            self.folders[address] = self.stack.enter_context(Copy(address, self.parent, self.patience)).folder
        return self.folders[address]


_SOURCES: list[_Sources] = []


@contextlib.contextmanager
def sources(config: Config) -> Iterator[None]:
    """Within the block `folder_of` knows the folders of addresses that flags name."""
    opened = _Sources(Path(config.cache_dir) / COPIES, config.step_timeout or 600.0)
    _SOURCES.append(opened)
    try:
        with opened.stack:
            yield
    finally:
        _SOURCES.remove(opened)


def folder_of(place: str) -> Path:
    """The folder in which a run lies that a flag names by its path or its address, for reading.

    Raises:
      BadConfiguration, StoreLost: the store refuses, or cannot be reached.
    """
    return _SOURCES[-1].folder_of(place) if paths.is_address(place) else Path(place)


@contextlib.contextmanager
def carried(config: Config, chief: bool) -> Iterator[Config]:
    """Within the block a run in an object store lies in a folder: yields the configuration with that as `run_dir`.

    A trainer's chief owns the address: it takes its lock, and what it writes is brought there until the block ends.
    Others read. Of a run in a folder nothing is done.

    Raises:
      BadConfiguration: the address is in use by another run, or the store refuses.
      StoreLost: the store cannot be reached.
    """
    if not paths.is_address(config.run_dir) or config.dry_run:
        yield config
        return
    from trainers.record.copies import Copy
    from trainers.record.mirror import Mirror

    address, cache = config.run_dir, Path(config.cache_dir)
    patience = config.step_timeout or 600.0
    with contextlib.ExitStack() as stack:
        if config.mode == "train" and chief:
            folder = stack.enter_context(Mirror(address, working(cache, address), patience)).folder
        else:
            folder = stack.enter_context(Copy(address, cache / COPIES, patience)).folder
        if config.mode == "evaluate":
            own = f"{address}/{EVALUATOR}"
            mirror = stack.enter_context(Mirror(own, working(cache, own), patience))
            (folder / EVALUATOR).symlink_to(mirror.folder, target_is_directory=True)
            register(folder / EVALUATOR, mirror)
            stack.callback(forget, folder / EVALUATOR)
        yield dataclasses.replace(config, run_dir=str(folder))
