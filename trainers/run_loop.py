"""Runs a loop of your own: a module that lies in the current directory or on PYTHONPATH.

python trainers/run_loop.py my_pkg.my_loop --strategy=mirrored
python trainers/run_loop.py my_pkg.my_loop --help

The module is a page as docs/own-loops.md shows it: its settings, a block that calls `trainers.run.command.main`, its
loop, and a function `train`.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements()

import runpy
from typing import NoReturn

from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.pages import STARTS_NO_RUN, page_of, source_of
from trainers.world import process


def module_from(argv: list[str]) -> str:
    """The module that a command line names; `argv[0]` is the program.

    Raises:
      BadConfiguration: it names none, or none that Python finds.
      SystemExit: it asks for help; code 0.
    """
    if argv[1:2] in ([], ["--help"], ["-h"]):
        print(__doc__.strip() if __doc__ else "")  # python -OO has no docstrings
        raise SystemExit(0)
    name = argv[1]
    if name.startswith("-"):
        raise BadConfiguration(f"{name!r} stands where the module of a loop belongs; write run_loop.py MODULE {name}")
    if source_of(name) is None:
        page_of(name)  # says what there is
    return page_of(name).module


def run(module: str) -> NoReturn:
    """Runs the module as a script, with the rest of the command line.

    Raises:
      BadConfiguration: it has no block that starts a run.
    """
    sys.argv = [f"{sys.argv[0]} {module}", *sys.argv[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    raise BadConfiguration(STARTS_NO_RUN.format(module=module))


if __name__ == "__main__":
    process.main(module_from, run)
