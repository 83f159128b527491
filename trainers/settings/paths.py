"""Paths that a user has named: on this machine, with `~` opened, and told apart from one another."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.settings.config import FOUND, Config
from trainers.settings.data_cards import DATASETS, split_name
from trainers.settings.exit_codes import BadConfiguration

# Where `--data_dir` lies for a user without a home directory: beside `runs/`.
DATA_WITHOUT_HOME = "tensorflow_datasets"
# In run.json and in manifests: where the files of `--dataset` lie, whatever the path was written like.
DATASET_PATH = "dataset_path"
# Object stores that hold runs.
STORES = ("s3://", "gs://", "az://")


def local(what: str, text: str | os.PathLike) -> Path:
    """The path that a user has written, with `~` opened. `what`: how to name it in a message, a flag for example.

    Raises:
      BadConfiguration: it is the address of a store of objects, or the home directory is not known.
    """
    text = os.fspath(text)
    if "://" in text:
        raise BadConfiguration(f"{what} {text!r} is an address, not a path; name a path that this machine has mounted")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise BadConfiguration(
            f"{what} {text!r}: the home directory is not known; set HOME, or write the path without ~"
        ) from None


def is_address(text: str | os.PathLike) -> bool:
    """Whether a text names a place in an object store that a run can lie in."""
    return os.fspath(text).startswith(STORES)


def place(what: str, text: str) -> str:
    """The path or the address that a user has written, in its one spelling. `what`: as of `local`.

    Raises:
      BadConfiguration: it is the address of something else, or names no folder in a bucket; or as `local`.
    """
    if not is_address(text):
        if "://" in text:
            raise BadConfiguration(
                f"{what} {text!r} is not a path, nor an address {', '.join(STORES)} of an object store; name one"
            )
        return str(local(what, text))
    bucket, *folders = text.partition("://")[2].rstrip("/").split("/")
    if not bucket or not folders or not all(name.strip(".") for name in folders) or set(text) & set("?#*\\ \n"):
        raise BadConfiguration(
            f"{what} {text!r} names no folder in a bucket; write {text.partition('://')[0]}://BUCKET/FOLDER"
        )
    return text.rstrip("/")


def name_of(address: str) -> str:
    """The name of the folder for an address: readable, and its own."""
    words = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in address.replace("://", "-"))
    return f"{words[-60:].strip('-.')}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


def cache_dir(text: str) -> str:
    """Where copies of what lies in object stores are kept on this machine: as named, or the user's folder for such."""
    base = os.environ.get("XDG_CACHE_HOME") or ("~/.cache" if has_home() else ".cache")
    return str(local("--cache_dir", text or os.path.join(base, "lockstep")))


def has_home() -> bool:
    """Whether `~` means something: no user of a container without HOME and without a line in passwd has one."""
    try:
        return bool(Path("~").expanduser())
    except RuntimeError:
        return False


def why_no_directory(path: Path) -> str:
    """Why `path` cannot be made a directory, where mkdir says that a file exists: the reason and the remedy."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            at = "is" if place == path else f"lies under {place},"
            return f"{at} a link to {os.readlink(place)}, which does not exist; make that, or name another directory"
    return "is, or lies under, a file; name a directory"


def location(dataset: str | None) -> str | None:
    """The absolute path of a data set's files, links followed, or their address; None for a set that has none."""
    kind, argument = split_name(dataset or "")
    if not argument or kind not in DATASETS or not DATASETS[kind].argument:
        return None
    if is_address(argument):
        return argument.rstrip("/")
    return os.path.realpath(os.path.expanduser(argument))


def same_dataset(before: Mapping[str, Any], now: str | None) -> bool:
    """Whether a value of `--dataset` means the data of a record, which holds `dataset` and perhaps its location."""
    if before["dataset"] == now:
        return True
    was = before.get(DATASET_PATH) or location(before["dataset"])
    same_kind = split_name(before["dataset"] or "")[0] == split_name(now or "")[0]
    return same_kind and was is not None and was == location(now)


def identity(config: Config) -> dict[str, Any]:
    """What a run goes on with alone: its loop, the fixed flags, and where the files of its data lie."""
    where = location(config.dataset)
    own = {"loop": config.loop, **config.values(config.names("fixed"))}
    return own if where is None else own | {DATASET_PATH: where}


def completed(record: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    """A record of a run's identity with what it lacks for being older than a flag: the default. Empty if it is."""
    if not record:
        return {}
    defaults = {name: getattr(kind, name) for name in kind.names("fixed")}
    return {"loop": Config.loop} | {name: value for name, value in defaults.items() if value is not None} | dict(record)


def differs(before: Mapping[str, Any], name: str, now: Any) -> bool:
    """Whether a part of the identity is not that of a completed record of a run. What that lacks is not known.

    A word for what the run finds itself stands for what it has found.
    """
    if name == DATASET_PATH or name not in before or (name in FOUND and now == FOUND[name]):
        return False
    return not same_dataset(before, now) if name == "dataset" else before[name] != now
