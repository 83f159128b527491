"""How an example looks to whoever has it, and how it becomes what a data set stores and a model takes."""

import abc
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import tensorflow as tf

Features = dict[str, Any]


class Raw(abc.ABC):
    """Examples as their user has them. Everything is a TensorFlow operation, so that a SavedModel can hold it.

    `kind`: the word by which a description names the class. `classes`: names of the classes of a label, or of pixels;
    empty where a target is no class. `targets`: names of the columns of a target of numbers.
    """

    kind: ClassVar[str]
    classes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @abc.abstractmethod
    def signature(self) -> tuple[Any, ...]:
        """What a batch consists of: nested `tf.TensorSpec`, one for each argument of `features`."""

    @abc.abstractmethod
    def features(self, *batch: Any) -> Features:
        """A batch as the data set stores it, without targets."""

    @abc.abstractmethod
    def inputs(self, features: Features) -> tf.Tensor:
        """Stored features as `Dataset.prepare` gives them to the model."""

    @abc.abstractmethod
    def errors(self, *batch: Any) -> tf.Tensor:
        """Why an example cannot be used, `[batch]` strings; empty where it can."""

    @abc.abstractmethod
    def of_stored(self, features: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """A batch of stored examples as their user has it, or None where that cannot be known."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """A description for JSON, of which `trainers.input.raw.described.raw_of` makes an equal object."""

    def target_of(self, cells: Mapping[str, str]) -> Any:
        """The prepared target of an example from its cells by name; None where they do not tell it.

        Raises:
          ValueError: a cell tells something else.
        """
        return None

    def class_number(self, name: str) -> int:
        """The number of a class.

        Raises:
          ValueError: there is no such class.
        """
        if name not in self.classes:
            raise ValueError(f"{name!r} is not one of the {len(self.classes)} classes")
        return self.classes.index(name)


def keys_of(names: Iterable[str]) -> tuple[str, ...]:
    """Names as a SavedModel takes them for tensors: letters, digits and underscores, and each once."""
    keys: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        plain = plain if plain[:1].isalpha() else f"column_{plain}"
        key, number = plain, 2
        while key in keys:
            key, number = f"{plain}_{number}", number + 1
        keys.append(key)
    return tuple(keys)
