"""Rows of a table as people have them: a cell for each column, by its name."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from trainers.input.raw.form import Features, Raw, keys_of

# Beyond it a number is infinite in float32, in which models compute.
LARGEST_NUMBER = float(np.finfo(np.float32).max)
# Python's own `float` takes more, which is no number in a table: 1_0, and digits of other scripts.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
WITH_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def number_of(cell: str, decimal_comma: bool) -> float | None:
    """The number that a cell holds; None if it is none, or is written in another way than those of the table."""
    if decimal_comma:
        cell = "" if "." in cell else cell.replace(",", ".")
    return float(cell) if NUMBER.fullmatch(cell) else None


def class_name(value: float) -> str:
    """The name of a class whose label is a whole number: all of its digits. Another number is the name of none."""
    return str(int(value)) if float(value).is_integer() else str(float(value))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The columns of a table. `words`: by name, those of a column of words; none for numbers.

    `classes`: the values of a label that is a class. `targets`: names of the columns to predict.
    """

    columns: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]
    classes: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def widths(self) -> list[int]:
        """Features that each column becomes."""
        return [len(self.words.get(name, (None,))) for name in self.columns]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Mean and deviation of columns, float64. `apart`: those that are held standardized, which float32 needs."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    apart: tuple[bool, ...]

    def held(self, values: Any) -> tf.Tensor:
        """Numbers as a data set stores them, float32: float64 `[…, columns]`."""
        exact = (values - np.array(self.mean)) / np.array(self.deviation)
        return tf.cast(tf.where(np.array(self.apart), exact, values), tf.float32)

    def prepared(self, held: tf.Tensor) -> tf.Tensor:
        """Stored numbers in deviations from the mean, float32."""
        apart = np.array(self.apart)
        mean = np.where(apart, 0, np.array(self.mean)).astype(np.float32)
        return (held - mean) / np.where(apart, 1, np.array(self.deviation)).astype(np.float32)

    def own(self, prepared: Any) -> Any:
        """Prepared numbers in their own units, float64."""
        return tf.cast(prepared, tf.float64) * np.array(self.deviation) + np.array(self.mean)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {"mean": list(self.mean), "deviation": list(self.deviation), "held_standardized": list(self.apart)}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "Scale":
        """The way back."""
        return cls(tuple(facts["mean"]), tuple(facts["deviation"]), tuple(facts["held_standardized"]))


@dataclasses.dataclass(frozen=True)
class RawRows(Raw):
    """Columns by name, `[batch]` each: numbers float64, words as strings. The target's scale is None for classes."""

    kind: ClassVar[str] = "rows"
    layout: Layout
    scale: Scale
    target_scale: Scale | None = None
    target_shape: tuple[int, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the label."""
        return self.layout.classes

    @property
    def targets(self) -> tuple[str, ...]:
        """Columns of numbers to predict."""
        return () if self.layout.classes else self.layout.targets

    @property
    def keys(self) -> dict[str, str]:
        """Column → the name of its tensor."""
        return dict(zip(self.layout.columns, keys_of(self.layout.columns), strict=True))

    def signature(self) -> tuple[dict[str, tf.TensorSpec]]:
        """By the tensors' names."""
        words = self.layout.words
        return (
            {
                key: tf.TensorSpec([None], tf.string if name in words else tf.float64, name=key)
                for name, key in self.keys.items()
            },
        )

    def features(self, columns: Mapping[str, tf.Tensor]) -> Features:
        """`features`: `[batch, features]`; a word is 1 in its own place and 0 in those of the others."""
        parts = []
        for name, key in self.keys.items():
            if name in self.layout.words:
                same = tf.equal(tf.strings.strip(columns[key])[:, None], tf.constant(self.layout.words[name])[None])
                parts.append(tf.cast(same, tf.float64))
            else:
                parts.append(columns[key][:, None])
        return {"features": self.scale.held(tf.concat(parts, axis=1))}

    def inputs(self, features: Features) -> tf.Tensor:
        """In deviations from the mean of the training split."""
        return self.scale.prepared(features["features"])

    def errors(self, columns: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """The first column of which a row has no usable value."""
        found = tf.zeros_like(next(iter(columns.values())), tf.string)
        for name, key in reversed(self.keys.items()):
            values, quoted = columns[key], repr(name)
            if name in self.layout.words:
                values = tf.strings.strip(values)
                bad = ~tf.reduce_any(tf.equal(values[:, None], tf.constant(self.layout.words[name])[None]), axis=1)
                new = tf.strings.join([f"column {quoted} holds '", values, "', a word that training has not seen"])
                text = tf.where(tf.equal(values, ""), f"column {quoted} is empty", new)
            else:
                bad = ~(tf.abs(values) <= LARGEST_NUMBER)  # nor is a number what is not one
                text = tf.fill(tf.shape(values), f"column {quoted} holds no finite number")
            found = tf.where(bad, text, found)
        return found

    def of_stored(self, features: Mapping[str, Any]) -> tuple[dict[str, np.ndarray]]:
        """The columns again; one that is held standardized to rounding."""
        held = np.asarray(features["features"], np.float64)
        values = np.where(np.array(self.scale.apart), held * self.scale.deviation + self.scale.mean, held)
        columns, at = {}, 0
        for (name, key), width in zip(self.keys.items(), self.layout.widths, strict=True):
            part = values[:, at : at + width]
            words = self.layout.words.get(name)
            columns[key] = np.array(words, object)[np.argmax(part, axis=1)] if words else part[:, 0]
            at += width
        return (columns,)

    def target_of(self, cells: Mapping[str, str], decimal_comma: bool = False) -> Any:
        """The class's number, or the numbers in deviations, `target_shape`."""
        if any(name not in cells for name in self.layout.targets):
            return None
        texts = [cells[name] for name in self.layout.targets]
        numbers = [number_of(text, decimal_comma) for text in texts]
        if self.classes:
            plain = texts[0] if texts[0] in self.classes or numbers[0] is None else class_name(numbers[0])
            return self.class_number(plain)
        for name, text, number in zip(self.layout.targets, texts, numbers, strict=True):
            if number is None or not math.isfinite(number):
                raise ValueError(f"column {name!r} holds {text!r}, which is not a finite number")
        prepared = self.target_scale.prepared(self.target_scale.held(np.array(numbers)))
        return np.reshape(np.asarray(prepared), self.target_shape)

    def facts(self) -> dict[str, Any]:
        """Each column with its words or, of numbers, nothing; scales by feature."""
        words = self.layout.words
        columns = [
            {"name": name, "tensor": key} | ({"words": list(words[name])} if name in words else {})
            for name, key in self.keys.items()
        ]
        return {
            "kind": self.kind,
            "columns": columns,
            "classes": list(self.classes),
            "targets": list(self.layout.targets),
            "target_shape": list(self.target_shape),
            "features": self.scale.facts(),
            "target": self.target_scale.facts() if self.target_scale else None,
        }

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "RawRows":
        """The way back."""
        columns = facts["columns"]
        words = {each["name"]: tuple(each["words"]) for each in columns if "words" in each}
        names = tuple(each["name"] for each in columns)
        layout = Layout(names, words, tuple(facts["classes"]), tuple(facts["targets"]))
        target = Scale.of_facts(facts["target"]) if facts["target"] else None
        return cls(layout, Scale.of_facts(facts["features"]), target, tuple(facts["target_shape"]))
