"""From a command line to a run: what a loop's script calls. Free of TensorFlow until the flags are checked."""

import errno
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainers.settings.exit_codes import BadConfiguration
from trainers.world import process, quiet


def config_from(argv: Sequence[str], summary: str, kind: "type[Config] | None" = None) -> "Config":  # noqa: F821
    """The resolved configuration of a command line; of `--mode=evaluate` with the values of the run that it follows.

    `kind`: the class of the loop's configuration; None for that of supervised training.

    Raises:
      BadConfiguration: a flag is unknown, malformed or breaks a rule.
      PeerLost: there is no run to follow.
      SystemExit: `--help` was given and its page has been printed; code 0.
    """
    from trainers.record import prometheus, trackers
    from trainers.record.reading import begun_with, config_of_run
    from trainers.settings import flags, paths, rules
    from trainers.settings.config import Config

    config, given = flags.read(argv, summary, kind or Config)
    if config.mode == "evaluate":
        config = config_of_run(rules.canonical(config), given)
    config = rules.resolve(config, begun_with(config))
    if not paths.is_address(config.run_dir):  # else they are looked at when what is there is known
        config.check_files()
    prometheus.check(config.metrics_port)
    trackers.check(config.tracker)
    if config.data_dir == paths.DATA_WITHOUT_HOME and "data_dir" not in given:
        process.say(f"no home directory is known: --data_dir is {Path(config.data_dir).absolute()}")
    return config


def module_of(page: str) -> str:
    """The name by which a loop's script is imported that runs as `__main__`. `page`: its `__file__`."""
    path, spec = Path(page).resolve(), getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin and Path(spec.origin).resolve() == path:
        return spec.name  # python -m, or trainers/run_loop.py; not a profiler that runs the script
    return f"trainers.{path.stem}" if path.parent == Path(__file__).resolve().parents[1] else path.stem


def main(page: str, summary: str | None, kind: "type[Config] | None" = None) -> NoReturn:  # noqa: F821
    """Runs the script of a loop: checks the flags, then imports it as a module and calls its `train(config)`.

    `page`: the script's `__file__`. `summary`: the first lines of its `--help`. `kind`: the class of its configuration,
    None for that of supervised training. The script calls this before it imports TensorFlow, which takes seconds.
    """
    process.check_requirements()
    module = module_of(page)

    def work(config: "Config") -> None:  # noqa: F821
        began = time.monotonic()
        quiet.import_tensorflow()
        from absl import logging

        train = importlib.import_module(module).train
        process.import_seconds = time.monotonic() - began
        logging.set_verbosity(logging.WARNING)
        try:
            train(config)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            reason = f"the disk of --run_dir {config.run_dir} is full; free space and start again"
            raise BadConfiguration(reason) from error

    process.main(lambda argv: config_from(argv, summary or "", kind), work)  # python -OO has no docstrings
