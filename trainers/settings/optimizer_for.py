"""The grammar of `--optimizer_for`: which weights have an optimizer of their own. Free of TensorFlow."""

import math
import re
from typing import NamedTuple

from trainers.settings import options
from trainers.settings.exit_codes import BadConfiguration

# PATTERN=NAME,key=value,… – the shortest pattern for which the rest is a name with options.
_REQUEST = re.compile(r"(?P<pattern>.+?)=(?P<name>[A-Za-z_][\w.:]*)(?P<options>(,\w+=[^,]*)*)")
_FORM = "write PATTERN=NAME,key=value, e.g. 'wide/.*=sgd,learning_rate=0.1', and several with ; between them"
# Flags that an optimizer may have another value of.
_FLAGS = ("learning_rate", "weight_decay")


class Request(NamedTuple):
    """The weights whose path holds `pattern` are trained by `optimizer`, as `--optimizer` has it. None: as the flag."""

    pattern: str
    optimizer: str
    learning_rate: float | None = None
    weight_decay: float | None = None

    @property
    def text(self) -> str:
        """The one spelling of equal requests: what `parse` reads as this one."""
        numbers = [f"{key}={value!r}" for key in _FLAGS if (value := getattr(self, key)) is not None]
        return ",".join([f"{self.pattern}={self.optimizer}", *numbers])


def canonical(text: str) -> str:
    """A value of `--optimizer_for` in the one spelling of equal ones. The order of requests stays: the first counts.

    Raises:
      BadConfiguration: as `parse`.
    """
    return ";".join(request.text for request in parse(text))


def parse(text: str) -> list[Request]:
    """The requests of a value of `--optimizer_for`, in their order.

    Raises:
      BadConfiguration: it does not follow the grammar.
    """
    return [_request(item.strip()) for item in text.split(";") if item.strip()]


def _request(item: str) -> Request:
    found, what = _REQUEST.fullmatch(item), f"--optimizer_for {item!r}"
    if not found:
        raise BadConfiguration(f"{what} is no request; {_FORM}")
    try:
        re.compile(found["pattern"])
    except re.error as error:
        raise BadConfiguration(f"{what}: {found['pattern']!r} is no regular expression ({error}); {_FORM}") from None
    numbers, rest = {}, []
    for option in filter(None, found["options"].split(",")):
        key, _, value = option.partition("=")
        if key not in _FLAGS:
            rest.append(option)
            continue
        numbers[key] = _number(what, key, value)
    try:
        optimizer = options.check("optimizer", ",".join([found["name"], *rest]))
    except BadConfiguration as error:
        raise BadConfiguration(f"{what}: {str(error).removeprefix('--optimizer ')}") from error
    return Request(found["pattern"], optimizer, **numbers)


def _number(what: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise BadConfiguration(f"{what}: {key}={value} is not a number of 0 or more; pass one")
    return number
