"""Text as people have it, for language models: strings, or the numbers of tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from trainers.input.raw.form import Features, Raw


@dataclasses.dataclass(frozen=True)
class _Sequences(Raw):
    """Beginnings of at least one token, of which a model sees the last `length`. `pieces`: the bytes of each token."""

    length: int
    pieces: tuple[bytes, ...] = ()

    def inputs(self, features: Features) -> tf.Tensor:
        """int32 `[batch, length]`; behind the end stand zeros, which nothing before them sees."""
        return features["tokens"]

    def facts(self) -> dict[str, Any]:
        """The vocabulary with a character for each byte, as ISO 8859-1 has it."""
        vocabulary = [piece.decode("latin-1") for piece in self.pieces]
        return {"kind": self.kind, "length": self.length, "vocabulary": vocabulary}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "Raw":
        """The way back."""
        return cls(facts["length"], tuple(text.encode("latin-1") for text in facts["vocabulary"]))


@dataclasses.dataclass(frozen=True)
class RawText(_Sequences):
    """Strings `[batch]`: a token is a byte."""

    kind: ClassVar[str] = "text"

    def signature(self) -> tuple[tf.TensorSpec]:
        """Of any length."""
        return (tf.TensorSpec([None], tf.string, name="texts"),)

    def features(self, texts: tf.Tensor) -> Features:
        """`tokens [batch, length]`, `count [batch]`: how many of them are the text's."""
        count = tf.strings.length(texts)
        ends = tf.strings.substr(texts, tf.maximum(count - self.length, 0), tf.fill(tf.shape(texts), self.length))
        tokens = tf.cast(tf.io.decode_raw(ends, tf.uint8, fixed_length=self.length), tf.int32)
        return {"tokens": tf.ensure_shape(tokens, [None, self.length]), "count": tf.minimum(count, self.length)}

    def errors(self, texts: tf.Tensor) -> tf.Tensor:
        """An empty text has no next token."""
        return tf.where(tf.equal(tf.strings.length(texts), 0), "the text is empty", "")

    def of_stored(self, features: Mapping[str, Any]) -> tuple[Any]:
        """All of a window but its last token."""
        windows = np.asarray(features["tokens"])[:, :-1].astype(np.uint8)
        return (np.array([bytes(window) for window in windows], object),)


@dataclasses.dataclass(frozen=True)
class RawTokens(_Sequences):
    """Numbers of tokens, int32 `[batch, time]`; behind the end of a shorter row stands -1. `vocabulary`: how many."""

    kind: ClassVar[str] = "tokens"
    vocabulary: int = 0

    def signature(self) -> tuple[tf.TensorSpec]:
        """Of any length."""
        return (tf.TensorSpec([None, None], tf.int32, name="tokens"),)

    def features(self, tokens: tf.Tensor) -> Features:
        """As those of text."""
        count = tf.reduce_sum(tf.cast(tokens >= 0, tf.int32), axis=1)
        padded = tf.pad(tf.maximum(tokens, 0), [[0, 0], [0, self.length]])
        first = tf.maximum(count - self.length, 0)
        ends = tf.gather(padded, first[:, None] + tf.range(self.length)[None], batch_dims=1)
        return {"tokens": ends, "count": tf.minimum(count, self.length)}

    def errors(self, tokens: tf.Tensor) -> tf.Tensor:
        """No token, or one that is not in the vocabulary."""
        outside = tf.reduce_any(tokens >= self.vocabulary, axis=1)
        inner = tf.reduce_any((tokens[:, :-1] < 0) & (tokens[:, 1:] >= 0), axis=1)
        found = tf.where(inner, "a token is below 0", "")
        found = tf.where(outside, f"a token is not below the vocabulary of {self.vocabulary}", found)
        return tf.where(tf.reduce_any(tokens >= 0, axis=1), found, "there is no token")

    def of_stored(self, features: Mapping[str, Any]) -> tuple[Any]:
        """All of a window but its last token."""
        return (np.asarray(features["tokens"])[:, :-1].astype(np.int32),)

    def facts(self) -> dict[str, Any]:
        """With the number of tokens, of which the pieces need not be known."""
        return super().facts() | {"tokens": self.vocabulary}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "RawTokens":
        """The way back."""
        return dataclasses.replace(super().of_facts(facts), vocabulary=facts["tokens"])
