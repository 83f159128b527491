"""The grammar of `--tracker`: `NAME,key=value,…`. Free of TensorFlow."""

from typing import NamedTuple

from models.names import unknown
from trainers.settings.exit_codes import BadConfiguration

# What each tracker may be told. Addresses and credentials are in its own environment variables, never here.
OPTIONS = {"mlflow": ("experiment", "name"), "wandb": ("project", "name")}


class Tracker(NamedTuple):
    """A tracker by its name, and what it is told: `experiment` or `project`, where the run goes, and its `name`."""

    name: str
    options: dict[str, str]

    @property
    def text(self) -> str:
        """The one spelling of equal ones."""
        return ",".join([self.name, *(f"{key}={self.options[key]}" for key in sorted(self.options))])


def parse(text: str) -> Tracker | None:
    """A value of `--tracker`; None for an empty one.

    Raises:
      BadConfiguration: an unknown name or option; the message is one line.
    """
    if not text.strip():
        return None
    name, *words = (word.strip() for word in text.split(","))
    if name not in OPTIONS:
        raise BadConfiguration(unknown("--tracker", name, OPTIONS))
    options: dict[str, str] = {}
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not (equals and value and key in OPTIONS[name]) or key in options:
            known = " and ".join(f"{key}=…" for key in OPTIONS[name])
            raise BadConfiguration(f"--tracker {text!r}: {word!r} is no option; {name} takes {known}, each once")
        options[key] = value
    return Tracker(name, options)


def canonical(text: str) -> str:
    """A value of `--tracker` in the one spelling of equal ones. Raises BadConfiguration."""
    found = parse(text)
    return found.text if found else ""
