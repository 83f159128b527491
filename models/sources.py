"""Modules and what they define, found by path and read with `ast`: nothing is imported, no package is executed."""

import ast
import dataclasses
import functools
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class NotFound(ValueError):  # noqa: N818 - its message is a clause
    """There is no such module, or it does not define the name; the message is a clause that says so."""


class AtRunTime(Exception):  # noqa: N818 - not an error
    """The source does not tell: the object is made when the module runs, or is not written in Python."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A module's source, parsed. `name`: dotted; `is_package`: its file is an `__init__.py`."""

    name: str
    path: Path
    tree: ast.Module
    is_package: bool

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that `from … import` names."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*base, *([node.module] if node.module else [])])


def search_path() -> list[str]:
    """Where modules are looked for: as Python does, and in the current directory last, so that it hides nothing."""
    try:
        return [*sys.path, os.getcwd()]
    except FileNotFoundError:  # somebody has removed it
        return [*sys.path]


def extend_path() -> None:
    """Lets `import` find what `search_path` does, in this process."""
    sys.path.extend(place for place in search_path() if place not in sys.path and "" not in sys.path)


def _places_of(top: str) -> tuple[Path | None, list[str]]:
    """The source of a top-level module, and the folders of its submodules. Executes nothing."""
    importlib.invalidate_caches()
    spec = importlib.machinery.PathFinder.find_spec(top, search_path())
    if spec is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
    if spec is None:
        raise NotFound(f"there is no module {top} in the current directory, on PYTHONPATH or among what is installed")
    source = Path(spec.origin) if spec.has_location and spec.origin else None
    return source, list(spec.submodule_search_locations or ())


def locate(name: str) -> Path | None:
    """The file of a module, found by path without importing its packages; None for a package without a file.

    Raises:
      NotFound: there is no such module.
    """
    top, *rest = name.split(".")
    if not all(part.isidentifier() for part in (top, *rest)):
        raise NotFound(f"{name!r} is not the name of a module")
    path, places = _places_of(top)
    before = top
    for part in rest:
        folders = [Path(place) / part for place in places]
        files = [file for folder in folders for file in (folder / "__init__.py", folder.with_suffix(".py"))]
        path = next((file for file in files if file.is_file()), None)
        places = [str(folder) for folder in folders if folder.is_dir()] if path is None else [str(path.parent)]
        if path is not None and path.name != "__init__.py":
            places = []
        if path is None and not places:
            if any(folder.parent.glob(f"{part}.*.so") for folder in folders if folder.parent.is_dir()):
                compiled = [so for folder in folders for so in folder.parent.glob(f"{part}.*.so")]
                if compiled:
                    return compiled[0]
            raise NotFound(f"there is no module {part} in {before}")
        before = f"{before}.{part}"
    return path


@functools.lru_cache(maxsize=64)
def _tree(path: Path, mtime_ns: int, size: int) -> ast.Module:
    """A file as it is at that time and size: a start asks for the same few modules many times."""
    return ast.parse(path.read_bytes())


def parsed(name: str) -> Module:
    """The source of a module.

    Raises:
      NotFound: there is no such module. AtRunTime: it is not written in Python, or is broken.
    """
    path = locate(name)
    if path is None or path.suffix != ".py":
        raise AtRunTime(name)
    try:
        state = path.stat()
        tree = _tree(path, state.st_mtime_ns, state.st_size)
    except (SyntaxError, ValueError, OSError) as error:
        raise AtRunTime(name) from error  # the import shows where
    return Module(name, path, tree, path.name == "__init__.py")


def statements(body: list[ast.stmt], sure: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """All statements that run when a module is imported, and whether each certainly does."""
    for node in body:
        yield node, sure
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            inner = [*node.body, *getattr(node, "orelse", ()), *getattr(node, "finalbody", ())]
            inner += [one for handler in getattr(node, "handlers", ()) for one in handler.body]
            yield from statements(inner, False)


def _bound(node: ast.stmt) -> Iterator[tuple[str, Any]]:
    """The names that a statement binds, each with what tells its value."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name, node
    elif isinstance(node, ast.ImportFrom):
        yield from ((alias.asname or alias.name, (node, alias)) for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from ((alias.asname or alias.name.split(".")[0], (node, alias)) for alias in node.names)
    elif isinstance(node, ast.Assign):
        yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
        yield node.target.id, node.value


def defined(module: Module) -> list[str]:
    """The public functions and classes that a module defines, in its order; of a package also what it re-exports."""
    kinds = (ast.FunctionDef, ast.ClassDef, *((ast.ImportFrom,) if module.is_package else ()))
    names = [name for node, _ in statements(module.tree.body) if isinstance(node, kinds) for name, _ in _bound(node)]
    return [name for name in dict.fromkeys(names) if not name.startswith(("_", "*"))]


def binding(module: Module, name: str) -> Any:
    """What tells the value of a name of a module; None if nothing does.

    Raises:
      AtRunTime: it depends on a condition.
    """
    found = [(value, sure) for node, sure in statements(module.tree.body) for n, value in _bound(node) if n == name]
    if len(found) > 1 and not all(sure for _, sure in found):
        raise AtRunTime(name)
    return found[-1][0] if found else None


def _of_other(module: str, name: str) -> tuple[Module, Any]:
    """As `find`, for what a module takes from another: there nothing is the user's mistake."""
    try:
        return find(parsed(module), name)
    except NotFound as error:
        raise AtRunTime(name) from error


def find(module: Module, name: str) -> tuple[Module, Any]:
    """The function or class `name` of a module, as its `ast` node, and the module that defines it.

    Raises:
      NotFound: the module does not define the name. AtRunTime: its source does not tell.
    """
    value = binding(module, name)
    if isinstance(value, (ast.FunctionDef, ast.ClassDef)):
        return module, value
    if isinstance(value, tuple) and isinstance(value[0], ast.ImportFrom):
        return _of_other(module.absolute(value[0]), value[1].name)
    if isinstance(value, ast.Name) and value.id != name:
        return find(module, value.id)
    if value is not None:
        raise AtRunTime(name)
    stars = [
        node
        for node, _ in statements(module.tree.body)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    for star in stars:
        try:
            return find(parsed(module.absolute(star)), name)
        except NotFound:
            continue
    if binding(module, "__getattr__") is not None:
        raise AtRunTime(name)
    raise NotFound(f"{module.name} ({module.path}) does not define {name}")


def attribute(module: Module, expression: ast.expr) -> tuple[Module, Any]:
    """What a base class is written as: `Name` or `package.module.Name`."""
    if isinstance(expression, ast.Name):
        return find(module, expression.id)
    path = []
    while isinstance(expression, ast.Attribute):
        path.insert(0, expression.attr)
        expression = expression.value
    value = binding(module, expression.id) if isinstance(expression, ast.Name) else None
    if not isinstance(value, tuple) or not path:
        raise AtRunTime(ast.dump(expression))
    node, alias = value
    if isinstance(node, ast.ImportFrom):
        first = f"{module.absolute(node)}.{alias.name}"
    else:
        first = alias.name if alias.asname else alias.name.split(".")[0]
    return _of_other(".".join([first, *path[:-1]]), path[-1])
