"""The script of a loop by the name that a user gives it: its flags and its command line, without importing it."""

import ast
import os
import sys
import types
from pathlib import Path
from typing import NamedTuple

from models import sources
from models.names import nearest
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration

TRAINERS = Path(__file__).resolve().parents[1]
SUPERVISED = "custom_loop"
_ENDING = "_loop"
STARTS_NO_RUN = (
    "the module {module} starts no run; let it call trainers.run.command.main under "
    'if __name__ == "__main__":, see docs/own-loops.md'
)


class Page(NamedTuple):
    """A loop's script: what the user called it, its module, its file, and the command that starts it, without flags."""

    trainer: str
    module: str
    path: Path
    command: tuple[str, ...]

    @property
    def settings(self) -> type[Config]:
        """The class of its configuration: `Settings`, or that of supervised training if it has none of its own.

        A page defines it above the block that calls `trainers.run.command.main`, and imports TensorFlow below; what
        stands above is run here.

        Raises:
          BadConfiguration: the page cannot be read, or what stands above the block fails.
        """
        if self.module == f"trainers.{SUPERVISED}":
            return Config
        # Under a name of its own: the page itself may be imported later.
        module = types.ModuleType(f"settings of {self.module}")
        sys.modules[module.__name__], module.__file__ = module, str(self.path)
        try:
            tree = ast.parse(self.path.read_text(encoding="utf-8"))
            blocks = [index for index, node in enumerate(tree.body) if _is_main(node)]
            if blocks:
                exec(compile(ast.Module(tree.body[: blocks[-1]], []), str(self.path), "exec"), module.__dict__)
        except BadConfiguration:
            raise
        except (Exception, SystemExit) as error:
            raise BadConfiguration(f"{self.path} cannot be read: {type(error).__name__}: {error}; mend it") from error
        if not blocks:
            raise BadConfiguration(STARTS_NO_RUN.format(module=self.module))
        return module.__dict__.get("Settings", Config)

    @property
    def environment(self) -> dict[str, str]:
        """What a process that runs the page needs in its environment: this project, for a page that lies elsewhere."""
        if self.path.parent == TRAINERS:
            return {}
        more = os.environ.get("PYTHONPATH", "")
        return {"PYTHONPATH": f"{TRAINERS.parent}{os.pathsep}{more}" if more else str(TRAINERS.parent)}


def _is_main(node: ast.stmt) -> bool:
    """Whether a statement is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def shipped() -> list[str]:
    """The loops of this project, by name."""
    return sorted(path.stem for path in TRAINERS.glob(f"*{_ENDING}.py") if path.stem != "run_loop")


def page_of(trainer: str) -> Page:
    """The page that a user means: `adversarial_loop`, a path that ends with `.py`, or a module `my_pkg.my_loop`.

    Raises:
      BadConfiguration: there is no such file or module.
    """
    if trainer.endswith(".py"):
        path = Path(trainer).expanduser().resolve()
        if not path.is_file():
            raise BadConfiguration(
                f"the loop {trainer!r} is not a file; name one of: {', '.join(shipped())}, or a module"
            )
        module = f"trainers.{path.stem}" if path.parent == TRAINERS else path.stem
        return Page(str(path), module, path, (str(path),))
    name = trainer.removeprefix("trainers.")
    if name in shipped():
        path = TRAINERS / f"{name}.py"
        return Page(name, f"trainers.{name}", path, (str(path),))
    path = source_of(trainer)
    if path is None:
        near = nearest(name, shipped())
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadConfiguration(
            f"the loop {trainer!r} is neither one of this project nor a module that Python finds{hint}; choose one of: "
            f"{', '.join(shipped())}, or name a module in the current directory or on PYTHONPATH"
        )
    return Page(trainer, trainer, path, (str(TRAINERS / "run_loop.py"), trainer))


def source_of(module: str) -> Path | None:
    """The file of a module that lies in the current directory or on Python's path; None if there is none."""
    sources.extend_path()
    try:
        path = sources.locate(module)
    except sources.NotFound:
        return None
    return path if path and path.suffix == ".py" else None
