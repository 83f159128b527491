"""Transformers, subclassed: a classifier of images and a decoder-only language model."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models import layers, tasks
from models.blocks import AttentionBlock

register = keras.saving.register_keras_serializable("lockstep")


_KINDS = {
    "pool": ("token", "mean"),
    "embedding": ("learned", "sincos"),
    "head": ("linear", "tanh"),
    "positions": ("learned", "rotary"),
}
# What attention knows of the tokens so far, by name: see `LanguageModel.cache_specs`.
Cache = dict[str, tf.Tensor]


def _check_words(features: int, **words: str) -> None:
    for name, word in words.items():
        if word not in _KINDS[name]:
            raise ValueError(f"{name} {word} is none of: {', '.join(_KINDS[name])}; choose one")
    if words.get("embedding") == "sincos" and (features % 4 or features < 8):
        raise ValueError(f"width {features} is no multiple of 4 from 8 on, which embedding=sincos needs; choose one")


def sines_and_cosines(grid: tuple[int, int], features: int, extra: int = 0) -> np.ndarray:
    """Fixed positions of a grid of patches, `[1, extra + height · width, features]`, float32; 0 for what is `extra`.

    A quarter of the features each: sine and cosine of the column, sine and cosine of the row, at wavelengths from 2π
    to 20,000π. Source: Chen et al., "An empirical study of training self-supervised vision transformers", ICCV 2021.
    """
    rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1, 1).astype(np.float64)
    quarter = features // 4
    rates = 10_000.0 ** -(np.arange(quarter) / (quarter - 1))
    parts = [wave(place * rates) for place in (columns, rows) for wave in (np.sin, np.cos)]
    values = np.concatenate([np.zeros((extra, features)), np.concatenate(parts, axis=1)])
    return values[None].astype(np.float32)


@register
class VisionTransformer(keras.Model):
    """Patches of an image as tokens, a learned class token and positions, attention blocks, logits.

    `x: [batch, height, width, channels]`, both sizes multiples of `patch` → logits `[batch, num_classes]`, float32.
    `pool`: `token`, of a class token, or `mean`, of all others, without one. `embedding`: positions, `learned` or
    `sincos`, fixed. `head`: `linear`, or `tanh` with a hidden layer and logits that begin at 0.
    Sources: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; the latter of each: Beyer et al., "Better
    plain ViT baselines for ImageNet-1k", 2022.
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
        pool: str = "token",
        embedding: str = "learned",
        head: str = "linear",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        _check_words(features, pool=pool, embedding=embedding, head=head)
        self.pool, self.embedding, self.head_kind = pool, embedding, head
        self.num_classes, self.patch, self.features = num_classes, patch, features
        self.depth, self.heads, self.dropout, self.stochastic_depth = depth, heads, dropout, stochastic_depth
        self.embed = keras.layers.Conv2D(features, patch, patch, name="embed")
        self.drop = layers.Dropout(dropout, name="drop")
        self.blocks = [
            AttentionBlock(heads, dropout=dropout, stochastic_depth=rate, name=f"block_{i}")
            for i, rate in enumerate(layers.rates_by_depth(stochastic_depth, depth), 1)
        ]
        self.norm = layers.LayerNormalization(name="norm")
        self.hidden = layers.Dense(features, "tanh", name="hidden") if head == "tanh" else None
        first = "zeros" if head == "tanh" else "glorot_uniform"
        self.head = layers.Dense(num_classes, None, first, name="logits", dtype="float32")

    def build(self, input_shape: Any) -> None:
        height, width = input_shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(f"images of {height}×{width} do not divide into patches of {self.patch}; choose a divisor")
        self.grid = (height // self.patch, width // self.patch)
        tokens = self.grid[0] * self.grid[1] + self.extra
        small = keras.initializers.RandomNormal(stddev=0.02)
        if self.extra:
            self.class_token = self.add_weight(shape=(1, 1, self.features), initializer="zeros", name="class_token")
        if self.embedding == "learned":
            self.positions = self.add_weight(shape=(1, tokens, self.features), initializer=small, name="positions")
        else:
            self.positions = sines_and_cosines(self.grid, self.features, self.extra)
        self.embed.build(input_shape)
        shape = (input_shape[0], tokens, self.features)
        for part in (self.drop, *self.blocks, self.norm):
            part.build(shape)
        if self.hidden is not None:
            self.hidden.build((input_shape[0], self.features))
        self.head.build((input_shape[0], self.features))
        self.built = True

    @property
    def extra(self) -> int:
        """Tokens before those of the patches."""
        return int(self.pool == "token")

    def resized(self, weight: Any, value: np.ndarray) -> np.ndarray | None:
        """Positions of a square grid of other size, interpolated (bicubic); the class token's stays. Else None."""
        extra = self.extra
        side = math.isqrt(max(value.shape[1] - extra, 0)) if value.ndim == 3 else 0
        if weight is not self.positions or not side or value.shape != (1, side**2 + extra, self.features):
            return None
        grid = tf.reshape(tf.cast(value[:, extra:], tf.float32), [1, side, side, self.features])
        grid = tf.image.resize(grid, self.grid, "bicubic", antialias=True).numpy()
        return np.concatenate([value[:, :extra], grid.reshape(1, -1, self.features)], axis=1)

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = self.embed(x)
        x = tf.reshape(x, [tf.shape(x)[0], x.shape[1] * x.shape[2], self.features])
        if self.extra:
            x = tf.concat([tf.tile(tf.convert_to_tensor(self.class_token), [tf.shape(x)[0], 1, 1]), x], axis=1)
        x = self.drop(x + tf.cast(self.positions, x.dtype), training=training)
        for block in self.blocks:
            x = block(x, training=training)
        x = self.norm(x)
        x = x[:, 0] if self.extra else tf.reduce_mean(x, axis=1)
        return self.head(x if self.hidden is None else self.hidden(x))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "num_classes": self.num_classes,
            "patch": self.patch,
            "features": self.features,
            "depth": self.depth,
            "heads": self.heads,
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth,
            "pool": self.pool,
            "embedding": self.embedding,
            "head": self.head_kind,
        }


@register
class LanguageModel(keras.Model):
    """A decoder-only transformer: the next token at every position, from those up to it.

    `tokens: [batch, time]` integers, `time` at most `length` → logits `[batch, time, vocabulary]`, float32. With a
    `separator`, the token that ends a document, a position sees its own document alone. `bias`: whether dense layers
    and normalizations have one; `scaled`: what is added to the shortcut begins smaller by `√(2 · depth)`. `positions`:
    `learned`, a vector for each, or `rotary`, in attention. `tied`: whether the output shares the embedding's weights.
    Source: Radford et al., "Language models are unsupervised multitask learners", 2019.

    With a `cache` (`cache_specs`) the tokens follow those that it holds, at most `length` in all, and what is returned
    is the logits of the token after them, `[batch, vocabulary]`, and the cache that holds them too.
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
        bias: bool = True,
        scaled: bool = False,
        positions: str = "learned",
        tied: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        _check_words(features, positions=positions)
        self.separator, self.bias, self.scaled = separator, bias, scaled
        self.position_kind, self.tied = positions, tied
        self.vocabulary, self.length, self.features = vocabulary, length, features
        self.depth, self.heads, self.dropout, self.stochastic_depth = depth, heads, dropout, stochastic_depth
        self.drop = layers.Dropout(dropout, name="drop")
        self.blocks = [
            AttentionBlock(
                heads,
                dropout=dropout,
                causal=True,
                stochastic_depth=rate,
                bias=bias,
                residual_scale=(2 * depth) ** -0.5 if scaled else 1.0,
                rotary=positions == "rotary",
                name=f"block_{i}",
            )
            for i, rate in enumerate(layers.rates_by_depth(stochastic_depth, depth), 1)
        ]
        self.norm = layers.LayerNormalization(center=bias, name="norm")
        small = keras.initializers.RandomNormal(stddev=0.02)
        self.head = None if tied else layers.Dense(vocabulary, None, small, use_bias=False, name="logits")

    def build(self, input_shape: Any) -> None:
        small = keras.initializers.RandomNormal(stddev=0.02)
        self.embedding = self.add_weight(shape=(self.vocabulary, self.features), initializer=small, name="embedding")
        self.positions = None
        if self.position_kind == "learned":
            self.positions = self.add_weight(shape=(self.length, self.features), initializer=small, name="positions")
        shape = (input_shape[0], input_shape[1], self.features)
        for part in (self.drop, *self.blocks, self.norm, *([] if self.tied else [self.head])):
            part.build(shape)
        self.built = True

    def resized(self, weight: Any, value: np.ndarray) -> np.ndarray | None:
        """The first of more positions than there are here. Else None: nothing is known of later ones."""
        fits = value.ndim == 2 and value.shape[1] == self.features and value.shape[0] > self.length
        return value[: self.length] if weight is self.positions and fits else None

    def cache_specs(self) -> dict[str, tf.TensorSpec]:
        """What a cache consists of: each with the batch and the number of tokens so far, `past`, left open.

        `seen [batch, past]`: the tokens, int32. `keys_1`, `values_1`, … `[batch, heads, past, features / heads]`: those
        of each block. The cache of no tokens has a `past` of 0.
        """
        shape = [None, self.heads, None, self.features // self.heads]
        names = [f"{kind}_{i}" for i in range(1, self.depth + 1) for kind in ("keys", "values")]
        specs = {name: tf.TensorSpec(shape, self.compute_dtype, name) for name in names}
        return {"seen": tf.TensorSpec([None, None], tf.int32, "seen")} | specs

    def call(
        self, tokens: tf.Tensor, training: bool = False, cache: Cache | None = None
    ) -> tf.Tensor | tuple[tf.Tensor, Cache]:
        table = tf.convert_to_tensor(self.embedding)
        tokens = tf.cast(tokens, tf.int32)
        if cache is None:
            first, seen = 0, tokens
            # As a matrix product, the gradient is dense: an all-reduce of sparse slices would depend on the replicas.
            x = tf.one_hot(tokens, self.vocabulary, dtype=table.dtype) @ table
        else:
            first, seen = tf.shape(cache["seen"])[1], tf.concat([cache["seen"], tokens], axis=1)
            x = tf.gather(table, tokens)
        if self.positions is not None:
            x += tf.convert_to_tensor(self.positions)[first : first + tf.shape(tokens)[1]]
        x = self.drop(x, training=training)
        documents = None
        if self.separator is not None:
            # A separator belongs to the document that it ends.
            documents = tf.cumsum(tf.cast(tf.equal(seen, self.separator), tf.int32), axis=1, exclusive=True)
        if cache is None:
            for block in self.blocks:
                x = block(x, documents, training=training)
            return self._logits(x, table)
        now = {"seen": seen}
        for i, block in enumerate(self.blocks, 1):
            past = cache[f"keys_{i}"], cache[f"values_{i}"]
            x, (now[f"keys_{i}"], now[f"values_{i}"]) = block(x, documents, past, training=training)
        return self._logits(x[:, -1:], table)[:, 0], now

    def _logits(self, x: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        x = self.norm(x)
        return tf.cast(tf.matmul(x, table, transpose_b=True) if self.tied else self.head(x), tf.float32)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "vocabulary": self.vocabulary,
            "length": self.length,
            "features": self.features,
            "depth": self.depth,
            "heads": self.heads,
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth,
            "bias": self.bias,
            "scaled": self.scaled,
            "separator": self.separator,
            "positions": self.position_kind,
            "tied": self.tied,
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
    pool: str = "token",
    embedding: str = "learned",
    head: str = "linear",
) -> tuple[keras.Model, tasks.Task]:
    """A vision transformer. `patch`: its pixels; 0 = 2 for small images, 16 for large ones."""
    _check(width, depth, heads)
    layers.check_sizes(0, patch=patch)
    patch = patch or (2 if min(spec.input_shape[:2]) < 64 else 16)
    kinds = (pool, embedding, head)
    model = VisionTransformer(
        spec.num_classes, patch, width, depth, heads, dropout, stochastic_depth, *kinds, name="vit"
    )
    return model, tasks.classification(spec)


def build_language_model(
    spec: tasks.DataSpec,
    *,
    width: int = 96,
    depth: int = 3,
    heads: int = 4,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    bias: bool = True,
    scaled: bool = False,
    positions: str = "learned",
    tied: bool = True,
) -> tuple[keras.Model, tasks.Task]:
    """A language model for sequences of the data set's length: `LanguageModel`."""
    _check(width, depth, heads)
    if positions == "rotary" and width // heads % 2:
        raise ValueError(
            f"width {width} over {heads} heads is {width // heads} each, and positions=rotary needs an even number; "
            f"choose a multiple of {2 * heads}"
        )
    separator = spec.separator if spec.document_mask else None
    length = spec.input_shape[0]
    sizes = (spec.num_classes, length, width, depth, heads, dropout)
    kinds = (bias, scaled, positions, tied)
    model = LanguageModel(*sizes, separator, stochastic_depth, *kinds, name="transformer")
    return model, tasks.language(spec)


def _check(width: int, depth: int, heads: int) -> None:
    layers.check_sizes(width=width, depth=depth, heads=heads)
    if width % heads:
        raise ValueError(f"width {width} does not divide over {heads} heads; choose a multiple of {heads}")
