"""Patterns of weights' paths in flags: regular expressions, and `PATTERN=FACTOR;…`. Free of TensorFlow."""

import math
import re
from typing import NamedTuple

from trainers.settings.exit_codes import BadConfiguration

_FORM = "write PATTERN=FACTOR, e.g. 'logits/.*=10', and several with ; between them"


class Factor(NamedTuple):
    """The weights in whose path `pattern` is found have `factor` times the learning rate."""

    pattern: str
    factor: float


def check(flag: str, pattern: str) -> None:
    """Raises BadConfiguration where a flag's pattern is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise BadConfiguration(
            f"--{flag} {pattern!r} is no regular expression ({error}); write one that is found in the paths of "
            "weights, e.g. 'hidden_1/'"
        ) from None


def factors(text: str) -> list[Factor]:
    """What a value of `--learning_rate_for` says, in its order.

    Raises:
      BadConfiguration: it does not follow the grammar, or a factor is not a number above 0.
    """
    return [_factor(item.strip()) for item in text.split(";") if item.strip()]


def _factor(item: str) -> Factor:
    pattern, equals, number = item.rpartition("=")
    if not equals or not pattern:
        raise BadConfiguration(f"--learning_rate_for {item!r} is no request; {_FORM}")
    check("learning_rate_for", pattern)
    try:
        factor = float(number)
    except ValueError:
        raise BadConfiguration(f"--learning_rate_for {item!r}: {number!r} is no number; {_FORM}") from None
    if not (math.isfinite(factor) and factor > 0):
        raise BadConfiguration(
            f"--learning_rate_for {item!r}: {number} is not a finite number above 0; pass one, or --freeze what "
            "must stay"
        )
    return Factor(pattern, factor)
