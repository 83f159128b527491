"""`--recipe=NAME`: the values that a published recipe has for flags which were not given. Free of TensorFlow."""

import dataclasses
from collections.abc import Collection
from typing import Any, TypeVar

from models.names import unknown
from models.recipes import RECIPES
from trainers.settings.config import EPOCHS, Config
from trainers.settings.exit_codes import BadConfiguration

C = TypeVar("C", bound=Config)
# Of each flag that counts updates, in steps or in epochs, the one that counts them in the other.
OTHER = EPOCHS | {epochs: steps for steps, epochs in EPOCHS.items()}


def values_of(config: Config, given: Collection[str]) -> dict[str, Any]:
    """The recipe's values for flags that the loop has and that were not given, in steps or in epochs.

    Raises:
      BadConfiguration: there is no such recipe, or it needs data that only a user can name.
    """
    if not config.recipe:
        return {}
    if config.recipe not in RECIPES:
        raise BadConfiguration(unknown("--recipe", config.recipe, RECIPES))
    card, names = RECIPES[config.recipe], {field.name for field in config.fields()}
    if "dataset" not in (*card.flags, *given) and config.mode != "evaluate":
        raise BadConfiguration(f"--recipe {config.recipe} is for data of your own; name --dataset={card.data}")
    return {
        name: value
        for name, value in card.flags.items()
        if name in names and name not in given and OTHER.get(name) not in given
    }


def applied(config: C, given: Collection[str]) -> C:
    """The configuration of a command line with its recipe. `given`: names of the flags that the user has given.

    Raises:
      BadConfiguration: as `values_of`.
    """
    values = values_of(config, given)
    return dataclasses.replace(config, **values) if values else config


def described(config: Config) -> str:
    """A recipe in one line: its flags as the run has them, and what they would be where that is another value."""
    parts = []
    for name, value in RECIPES[config.recipe].flags.items():
        now, other = getattr(config, name), OTHER.get(name, "")
        if now is None or (name in EPOCHS and getattr(config, other) is not None):
            parts.append(f"{other} {getattr(config, other)} (not {name} {value})")
        else:
            parts.append(f"{name} {now}" + ("" if now == value else f" (not {value})"))
    return f"{config.recipe}: {'; '.join(parts)}"
