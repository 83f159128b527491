"""Transformers, subclassed: a classifier of images and a decoder-only language model."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models import layers, tasks
from models.blocks import AttentionBlock

register = keras.saving.register_keras_serializable("lockstep")


@register
class VisionTransformer(keras.Model):
    """Patches of an image as tokens, a learned class token and positions, attention blocks, logits.

    `x: [batch, height, width, channels]`, both sizes multiples of `patch` → logits `[batch, num_classes]`, float32.
    Source: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021.
    """

    def __init__(
        self,
        num_classes: int,
        patch: int = 2,
        features: int = 64,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
        stochastic_depth: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_classes, self.patch, self.features = num_classes, patch, features
        self.depth, self.heads, self.dropout, self.stochastic_depth = depth, heads, dropout, stochastic_depth
        self.embed = keras.layers.Conv2D(features, patch, patch, name="embed")
        self.drop = layers.Dropout(dropout, name="drop")
        self.blocks = [
            AttentionBlock(heads, dropout=dropout, stochastic_depth=rate, name=f"block_{i}")
            for i, rate in enumerate(layers.rates_by_depth(stochastic_depth, depth), 1)
        ]
        self.norm = layers.LayerNormalization(name="norm")
        self.head = layers.Dense(num_classes, name="logits", dtype="float32")

    def build(self, input_shape: Any) -> None:
        height, width = input_shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(f"images of {height}×{width} do not divide into patches of {self.patch}; choose a divisor")
        self.grid = (height // self.patch, width // self.patch)
        tokens = self.grid[0] * self.grid[1] + 1
        small = keras.initializers.RandomNormal(stddev=0.02)
        self.class_token = self.add_weight(shape=(1, 1, self.features), initializer="zeros", name="class_token")
        self.positions = self.add_weight(shape=(1, tokens, self.features), initializer=small, name="positions")
        self.embed.build(input_shape)
        shape = (input_shape[0], tokens, self.features)
        for part in (self.drop, *self.blocks, self.norm):
            part.build(shape)
        self.head.build((input_shape[0], self.features))
        self.built = True

    def resized(self, weight: Any, value: np.ndarray) -> np.ndarray | None:
        """Positions of a square grid of other size, interpolated (bicubic); the class token's stays. Else None."""
        side = math.isqrt(max(value.shape[1] - 1, 0)) if value.ndim == 3 else 0
        if weight is not self.positions or not side or value.shape != (1, side**2 + 1, self.features):
            return None
        grid = tf.reshape(tf.cast(value[:, 1:], tf.float32), [1, side, side, self.features])
        grid = tf.image.resize(grid, self.grid, "bicubic", antialias=True).numpy()
        return np.concatenate([value[:, :1], grid.reshape(1, -1, self.features)], axis=1)

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = self.embed(x)
        x = tf.reshape(x, [tf.shape(x)[0], x.shape[1] * x.shape[2], self.features])
        first = tf.tile(tf.convert_to_tensor(self.class_token), [tf.shape(x)[0], 1, 1])
        x = self.drop(tf.concat([first, x], axis=1) + self.positions, training=training)
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(self.norm(x)[:, 0])

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "num_classes": self.num_classes,
            "patch": self.patch,
            "features": self.features,
            "depth": self.depth,
            "heads": self.heads,
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth,
        }


@register
class LanguageModel(keras.Model):
    """A decoder-only transformer: the next token at every position, from those up to it.

    `tokens: [batch, time]` integers, `time` at most `length` → logits `[batch, time, vocabulary]`, float32. The output
    shares the embedding's weights. With a `separator`, the token that ends a document, a position sees its own document
    alone. Source: Radford et al., "Language models are unsupervised multitask learners", 2019.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        features: int = 96,
        depth: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
        separator: int | None = None,
        stochastic_depth: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.separator = separator
        self.vocabulary, self.length, self.features = vocabulary, length, features
        self.depth, self.heads, self.dropout, self.stochastic_depth = depth, heads, dropout, stochastic_depth
        self.drop = layers.Dropout(dropout, name="drop")
        self.blocks = [
            AttentionBlock(heads, dropout=dropout, causal=True, stochastic_depth=rate, name=f"block_{i}")
            for i, rate in enumerate(layers.rates_by_depth(stochastic_depth, depth), 1)
        ]
        self.norm = layers.LayerNormalization(name="norm")

    def build(self, input_shape: Any) -> None:
        small = keras.initializers.RandomNormal(stddev=0.02)
        self.embedding = self.add_weight(shape=(self.vocabulary, self.features), initializer=small, name="embedding")
        self.positions = self.add_weight(shape=(self.length, self.features), initializer=small, name="positions")
        shape = (input_shape[0], input_shape[1], self.features)
        for part in (self.drop, *self.blocks, self.norm):
            part.build(shape)
        self.built = True

    def resized(self, weight: Any, value: np.ndarray) -> np.ndarray | None:
        """The first of more positions than there are here. Else None: nothing is known of later ones."""
        fits = value.ndim == 2 and value.shape[1] == self.features and value.shape[0] > self.length
        return value[: self.length] if weight is self.positions and fits else None

    def call(self, tokens: tf.Tensor, training: bool = False) -> tf.Tensor:
        table = tf.convert_to_tensor(self.embedding)
        positions = tf.convert_to_tensor(self.positions)[: tf.shape(tokens)[1]]
        # As a matrix product, the gradient is dense: an all-reduce of sparse slices would depend on the replicas.
        x = tf.one_hot(tf.cast(tokens, tf.int32), self.vocabulary, dtype=table.dtype) @ table + positions
        x = self.drop(x, training=training)
        documents = None
        if self.separator is not None:
            # A separator belongs to the document that it ends.
            documents = tf.cumsum(tf.cast(tf.equal(tokens, self.separator), tf.int32), axis=1, exclusive=True)
        for block in self.blocks:
            x = block(x, documents, training=training)
        return tf.cast(tf.matmul(self.norm(x), table, transpose_b=True), tf.float32)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "vocabulary": self.vocabulary,
            "length": self.length,
            "features": self.features,
            "depth": self.depth,
            "heads": self.heads,
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth,
            "separator": self.separator,
        }


def build_vit(
    spec: tasks.DataSpec,
    *,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    dropout: float = 0.1,
    patch: int = 0,
    stochastic_depth: float = 0.0,
) -> tuple[keras.Model, tasks.Task]:
    """A small vision transformer. `patch`: its pixels; 0 = 2 for small images, 16 for large ones."""
    _check(width, depth, heads)
    layers.check_sizes(0, patch=patch)
    patch = patch or (2 if min(spec.input_shape[:2]) < 64 else 16)
    model = VisionTransformer(spec.num_classes, patch, width, depth, heads, dropout, stochastic_depth, name="vit")
    return model, tasks.classification(spec)


def build_language_model(
    spec: tasks.DataSpec,
    *,
    width: int = 96,
    depth: int = 3,
    heads: int = 4,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
) -> tuple[keras.Model, tasks.Task]:
    """A small language model for sequences of the data set's length."""
    _check(width, depth, heads)
    separator = spec.separator if spec.document_mask else None
    length = spec.input_shape[0]
    sizes = (spec.num_classes, length, width, depth, heads, dropout)
    return LanguageModel(*sizes, separator, stochastic_depth, name="transformer"), tasks.language(spec)


def _check(width: int, depth: int, heads: int) -> None:
    layers.check_sizes(width=width, depth=depth, heads=heads)
    if width % heads:
        raise ValueError(f"width {width} does not divide over {heads} heads; choose a multiple of {heads}")
