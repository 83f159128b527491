"""Command lines of the scripts that use what was trained: which model it is."""

import argparse
from typing import NoReturn

from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration


class Parser(argparse.ArgumentParser):
    """Its errors are one line. It has the arguments that name a model."""

    def __init__(self, description: str):
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=kind, allow_abbrev=False)
        self.add_argument(
            "model_path",
            metavar="RUN_DIR_OR_EXPORT",
            help="a run directory, or the folder export/ of one; a path, or an address s3://, gs://, az://",
        )
        self.add_argument("--checkpoint", default="best", help="of a run: best, last, or a step (default: best)")
        self.add_argument("--data_dir", help="where prepared data lie (default: that of the run)")
        self.add_argument("--model", default="", help="the model again, if it is module:object of your own")

    def error(self, message: str) -> NoReturn:
        """Raises BadConfiguration."""
        raise BadConfiguration(f"{message}; see --help")

    def read(self, words: list[str]) -> argparse.Namespace:
        """The arguments, with paths as such; `model_path` is a text, which may be an address.

        Raises:
          BadConfiguration: one is malformed, or another path is an address.
          SystemExit: `--help` was given.
        """
        options = self.parse_args(words)
        options.model_path = paths.place("RUN_DIR_OR_EXPORT", options.model_path)
        options.data_dir = paths.local("--data_dir", options.data_dir) if options.data_dir else None
        return options
