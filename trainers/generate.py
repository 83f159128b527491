"""How a trained language model goes on from a prompt, by a run or its export.

python trainers/generate.py runs/book --prompt='It was '
python trainers/generate.py runs/book --prompt='It was ' --temperature=0.8 --top_k=40 --seed=1 --tokens=500
python trainers/generate.py runs/gpt2/export --prompt='464 2068 7586'

The continuation is printed on standard output as it is drawn, how fast that was on standard error. Where the data are
tokens, the prompt is their numbers. The same seed gives the same tokens. Exit code 2: the model or the prompt is
unusable.
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

from models.sampling import Sampling
from trainers.settings.arguments import Parser
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import process, quiet


def settings_from(argv: Sequence[str]) -> tuple[argparse.Namespace, Sampling]:
    """The command line (`argv[0]` is the program), and how tokens are drawn.

    Raises:
      BadConfiguration: a value cannot be.
      SystemExit: `--help` was given.
    """
    parser = Parser(__doc__)
    parser.add_argument("--prompt", required=True, help="a text; of tokens, their numbers with blanks between them")
    parser.add_argument("--tokens", type=int, default=256, help="how many to draw at most (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 = the most likely always (default: 1)")
    parser.add_argument("--top_k", type=int, default=0, help="draw among the k most likely; 0 = all (default: 0)")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw among the fewest of this probability in all (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the chance (default: 0)")
    parser.set_defaults(strategy="one_device", replicas=0)
    options = parser.read(list(argv[1:]))
    if options.tokens < 1:
        raise BadConfiguration(f"--tokens {options.tokens} is below 1; pass 1 or more")
    if not options.prompt:
        raise BadConfiguration("--prompt is empty; pass at least one token")
    try:
        return options, Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    except ValueError as error:
        raise BadConfiguration(f"--{error}") from None


def main(settings: tuple[argparse.Namespace, Sampling]) -> int:
    """Generates, and returns the exit code. Imports TensorFlow."""
    quiet.import_tensorflow()
    from absl import logging

    from trainers.use import generating

    logging.set_verbosity(logging.WARNING)
    return generating.generate(*settings)


if __name__ == "__main__":
    process.main(settings_from, main)
