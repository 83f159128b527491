"""Answers for data, by a run or its export: classes by name, numbers in their own units, the next tokens, masks.

python trainers/predict.py runs/first --input=images:photos --output=predictions.csv
python trainers/predict.py runs/prices --input=csv:new.csv --output=predictions.jsonl
python trainers/predict.py runs/first --input=eval --output=predictions.csv
python trainers/predict.py runs/books --input=documents --output=perplexity.csv

Each row of the input gets its line, in order; one that cannot be used gets the reason. The same command goes on where
it was left. Where the input has labels, the metrics of the evaluation are printed. Exit code 0: every row is answered;
3: some cannot be used; 2: the model, the input or the output is unusable.
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

import argparse
from collections.abc import Sequence

from trainers.settings import paths
from trainers.settings.arguments import Parser
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import process, quiet

_FORMATS = (".csv", ".jsonl")
OWN_SPLIT, _SETS = ("eval", "documents"), "tfds"
_FILES = ("csv", "images", "text")


def settings_from(argv: Sequence[str]) -> argparse.Namespace:
    """The command line (`argv[0]` is the program).

    Raises:
      BadConfiguration: a path is an address, or the output is neither .csv nor .jsonl.
      SystemExit: `--help` was given.
    """
    parser = Parser(__doc__)
    parser.add_argument(
        "--input",
        required=True,
        help="csv:PATH, images:DIR, text:PATH (a line is a text), tfds:NAME/SPLIT, or of the run's evaluation split: "
        "eval, or documents (the perplexity of each)",
    )
    parser.add_argument("--output", required=True, help="a file .csv or .jsonl")
    parser.add_argument(
        "--strategy", default="mirrored", choices=("one_device", "mirrored"), help="of a run (default: mirrored)"
    )
    parser.add_argument(
        "--replicas", type=int, default=0, help="of a run; 0 = every GPU, or 2 virtual CPU devices (default: 0)"
    )
    options = parser.read(argv[1:])
    options.output = paths.local("--output", options.output)
    if options.output.suffix not in _FORMATS:
        raise BadConfiguration(f"--output {options.output} is neither .csv nor .jsonl; name such a file")
    _check_input(options.input)
    if options.replicas < 0:
        raise BadConfiguration(f"--replicas {options.replicas} is below 0; pass 0 or more")
    return options


def _check_input(text: str) -> None:
    """Raises BadConfiguration if it is none, or a file that is not there."""
    kind, _, argument = text.partition(":")
    if text in OWN_SPLIT or (kind == _SETS and argument.rpartition("/")[0]):
        return
    if kind == _SETS:
        raise BadConfiguration(f"--input {text!r} names no split; write tfds:NAME/SPLIT")
    if kind not in _FILES or not argument:
        raise BadConfiguration(
            f"--input {text!r} is not known; write eval, documents, csv:PATH, images:DIR, text:PATH or tfds:NAME/SPLIT"
        )
    if "://" in argument:
        paths.place(f"--input={kind}:", argument)
        return  # who reads it finds out
    path = paths.local(f"--input={kind}:", argument)
    try:
        is_there = path.exists() if kind == "images" else path.is_file()
    except OSError as error:
        raise BadConfiguration(f"--input {text} cannot be read: {error.strerror}; name another") from None
    if not is_there:
        raise BadConfiguration(f"--input {text}: {path} is not there; name another")


def main(options: argparse.Namespace) -> int:
    """Answers, and returns the exit code. Imports TensorFlow."""
    quiet.import_tensorflow()
    from absl import logging

    from trainers.use import predictions

    logging.set_verbosity(logging.WARNING)
    return predictions.predict(options)


if __name__ == "__main__":
    process.main(settings_from, main)
