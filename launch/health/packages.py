"""Python, and the packages of the environment against the locks. Reads files alone; nothing need be installed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from launch.health.rows import BAD, NOT_HERE, OK, WARNING, Row

ROOT = Path(__file__).resolve().parents[2]
NOT_INSTALLED = "not installed: launch/local.sh"
# Packages that a row names before it only counts them.
MOST_NAMED = 8


class Environment(NamedTuple):
    """An environment that trains: its interpreter, the folders of its packages, and the locks that it was made from.

    `stamp`: lock name → digest, as launch/environment.py has left it; empty for an environment that others have made.
    """

    python: Path
    folders: tuple[str, ...]
    stamp: dict[str, str]

    def versions(self) -> dict[str, str]:
        """Version of each package, by its normalized name."""
        found: dict[str, str] = {}
        for each in metadata.distributions(path=list(self.folders)):
            name = each.metadata["Name"]
            if name:
                found.setdefault(normalized(name), each.version)
        return found


def normalized(name: str) -> str:
    """A package's name as locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def environment(root: Path = ROOT) -> Environment | None:
    """The interpreter that runs this if it has TensorFlow, else that of the checkout's `.venv`; None without either."""
    place = root / ".venv"
    own = Path(sys.prefix).resolve() == place.resolve()
    if not own and importlib.util.find_spec("tensorflow") is not None:
        return Environment(Path(sys.executable), tuple(sys.path), {})
    python = place / "bin/python"
    if not python.exists():
        return None
    folders = [*place.glob("lib/python3*/site-packages"), *place.glob("lib64/python3*/site-packages")]
    try:
        stamp = json.loads((place / "lockstep.json").read_text())
    except (OSError, ValueError):
        stamp = {}
    return Environment(python, tuple(dict.fromkeys(str(folder.resolve()) for folder in folders)), stamp)


def python_row(root: Path = ROOT, version: Sequence[int] = sys.version_info) -> Row:
    """The interpreter that runs this against what pyproject.toml asks for."""
    text = f"{'.'.join(map(str, version[:3]))}, {sys.executable}"
    found = re.search(r'^requires-python = ">=(\d+)\.(\d+)"', (root / "pyproject.toml").read_text(), re.MULTILINE)
    if not found:
        return Row(
            "Python", WARNING, f"{text}; pyproject.toml does not say what it requires", "git checkout pyproject.toml"
        )
    least = tuple(int(part) for part in found.groups())
    asked = f"pyproject.toml asks for {least[0]}.{least[1]} or newer"
    if tuple(version[:2]) < least:
        return Row("Python", BAD, f"{text}; {asked}", f"PYTHON=python{least[0]}.{least[1]} launch/local.sh")
    return Row("Python", OK, f"{text}; {asked}")


def _applies(marker: str, version: tuple[int, int]) -> bool:
    """Whether a lock's line is for this machine; a marker of another form than the locks have counts as no."""
    clauses = [clause.strip() for clause in marker.split(" and ")] if marker else []
    for clause in clauses:
        found = re.fullmatch(r"(\w+) (==|!=|<|>=) '([^']*)'", clause)
        if not found:
            return False
        name, sign, value = found.groups()
        if name == "python_full_version":
            wanted = tuple(int(part) for part in value.split(".")[:2])
            holds = version < wanted if sign == "<" else version >= wanted
        else:
            here = {"sys_platform": sys.platform, "os_name": "posix"}.get(
                name, platform.python_implementation().lower()
            )
            holds = (here == value.lower()) == (sign == "==")
        if not holds:
            return False
    return True


def locked(path: Path, version: tuple[int, int]) -> dict[str, str]:
    """Version of each package that a lock holds for this machine and a version of Python."""
    pattern = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)\s*(?:;\s*(.*?))?\s*\\?$", re.MULTILINE)
    rows = pattern.findall(path.read_text())
    return {normalized(name): number for name, number, marker in rows if _applies(marker, version)}


def _python_of(env: Environment) -> tuple[int, int]:
    """Version of Python of an environment, by the name of its folder of packages."""
    for folder in env.folders:
        found = re.search(r"python(\d+)\.(\d+)", folder)
        if found:
            return int(found.group(1)), int(found.group(2))
    return sys.version_info[:2]


def locks_of(env: Environment, gpus: int, root: Path = ROOT) -> list[str]:
    """Names of the locks that an environment should hold: those of its stamp, else by the GPUs of the machine."""
    names = [name for name in env.stamp if (root / f"requirements/{name}.txt").exists()]
    return names or ["gpu" if gpus else "cpu"]


def _named(rows: Sequence[str]) -> str:
    more = len(rows) - MOST_NAMED
    return ", ".join(rows[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def lock_rows(env: Environment | None, gpus: int, root: Path = ROOT) -> list[Row]:
    """A row for each lock: packages whose version differs or that are missing, and a lock that has changed since."""
    if env is None:
        return [Row("packages", NOT_HERE, NOT_INSTALLED)]
    remedy = (
        f"rm -r {root / '.venv'} && launch/local.sh"
        if env.stamp
        else "pip install --require-hashes -r requirements/{}.txt"
    )
    here, version, rows = env.versions(), _python_of(env), []
    for name in locks_of(env, gpus, root):
        path, title = root / f"requirements/{name}.txt", f"packages: {name}.txt"
        wanted = locked(path, version)
        wrong = [
            f"{each} {here[each]} instead of {number}"
            for each, number in wanted.items()
            if here.get(each, number) != number
        ]
        wrong += [f"{each} {number} is missing" for each, number in wanted.items() if each not in here]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if wrong:
            rows.append(Row(title, BAD, f"{env.python}: {_named(wrong)}", remedy.format(name)))
        elif env.stamp and env.stamp.get(name) != digest:
            rows.append(
                Row(title, WARNING, "the lock has changed since it was installed", "launch/local.sh installs it")
            )
        else:
            rows.append(Row(title, OK, f"{len(wanted)} packages of {env.python} have the versions of the lock"))
    return rows


def cuda_of_lock(root: Path = ROOT) -> str:
    """Version of CUDA that requirements/gpu.txt installs, as `12.9`; empty if it holds none."""
    text = (root / "requirements/gpu.txt").read_text()
    found = re.search(r"^nvidia-cuda-runtime(?:-cu\d+)?==(\d+\.\d+)", text, re.MULTILINE)
    return found.group(1) if found else ""
