"""The registry of models: each name, where its `build` lies, and the recipe that trains it well.

Free of TensorFlow, so that flags are checked before it is imported. A model joins by one entry here.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained unless flags say otherwise. Rates are per update of the global batch."""

    train_steps: int
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0
    accumulate: int = 1
    log_every: int = 20


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is known of a model before it is built.

    `build`: `module:function` of `(spec: models.tasks.DataSpec) -> (keras.Model, models.tasks.Task)`. `task`: the kind
    of data that it takes. `dataset`: what it trains on unless a flag says otherwise. `quality`: the eval metric and the
    value that the recipe reaches there, at least (at most for an error).
    """

    build: str
    summary: str
    task: str
    dataset: str
    recipe: Recipe
    quality: tuple[str, float]

    def builder(self) -> Callable[..., Any]:
        """The function that `build` names. Imports TensorFlow."""
        module, function = self.build.split(":")
        return getattr(importlib.import_module(module), function)


# Names that flags take; what they stand for lies in `models.losses` and `models.optimizers`.
LOSSES: dict[str, tuple[str, ...]] = {
    "classification": ("cross_entropy", "smoothed", "focal"),
    "regression": ("squared", "huber", "pseudo_huber", "log_cosh"),
    "language": ("cross_entropy",),
}
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "sam")
SCHEDULES = ("constant", "linear", "cosine", "one_cycle", "inverse_sqrt")

MODELS: dict[str, ModelCard] = {
    "mlp": ModelCard(
        build="models.mlp:build",
        summary="multi-layer perceptron: two hidden layers with dropout",
        task="classification",
        dataset="digits",
        # A step takes 0.2 ms: lines at every 20th would cost a tenth of the time, and nobody can read so fast.
        recipe=Recipe(train_steps=1000, learning_rate=2e-3, warmup_steps=50, weight_decay=1e-2, log_every=100),
        quality=("accuracy", 0.96),
    ),
    "resnet": ModelCard(
        build="models.resnet:build",
        summary="residual network for small images: three stages",
        task="classification",
        dataset="digits",
        recipe=Recipe(train_steps=400, learning_rate=3e-3, warmup_steps=50, weight_decay=1e-2, clip_norm=1.0),
        quality=("accuracy", 0.97),
    ),
    "resnet18": ModelCard(
        build="models.resnet:build_18",
        summary="ResNet-18; 11,689,512 parameters at ImageNet's size",
        task="classification",
        dataset="digits",
        recipe=Recipe(train_steps=120, learning_rate=1e-3, warmup_steps=20, weight_decay=1e-2, clip_norm=1.0),
        quality=("accuracy", 0.97),
    ),
    "resnet50": ModelCard(
        build="models.resnet:build_50",
        summary="ResNet-50 (v1.5); 25,557,032 parameters at ImageNet's size",
        task="classification",
        dataset="digits",
        recipe=Recipe(train_steps=80, learning_rate=1e-3, warmup_steps=20, weight_decay=1e-2, clip_norm=1.0),
        quality=("accuracy", 0.96),
    ),
    "vit": ModelCard(
        build="models.transformers:build_vit",
        summary="vision transformer: patches, a class token, four attention blocks",
        task="classification",
        dataset="digits",
        recipe=Recipe(train_steps=1200, learning_rate=2e-3, warmup_steps=100, weight_decay=5e-2, clip_norm=1.0),
        quality=("accuracy", 0.96),
    ),
    "transformer": ModelCard(
        build="models.transformers:build_language_model",
        summary="decoder-only language model: three causal attention blocks",
        task="language",
        dataset="text",
        recipe=Recipe(train_steps=600, learning_rate=3e-3, warmup_steps=60, weight_decay=1e-2, clip_norm=1.0),
        quality=("bits_per_token", 2.3),
    ),
    "residual_regressor": ModelCard(
        build="models.regressors:build_residual",
        summary="a residual block of dense layers used several times",
        task="regression",
        dataset="diabetes",
        recipe=Recipe(train_steps=200, learning_rate=1e-3, warmup_steps=20, weight_decay=1e-1),
        quality=("r2", 0.40),
    ),
    "wide_deep": ModelCard(
        build="models.regressors:build_wide_deep",
        summary="wide & deep: two inputs, a gate, an auxiliary output",
        task="regression",
        dataset="diabetes",
        recipe=Recipe(train_steps=400, optimizer="sam", learning_rate=3e-2, warmup_steps=20, weight_decay=1e-1),
        quality=("r2", 0.40),
    ),
    "reconstructing_regressor": ModelCard(
        build="models.regressors:build_reconstructing",
        summary="hidden layers that must give the inputs back as well",
        task="regression",
        dataset="diabetes",
        recipe=Recipe(train_steps=200, learning_rate=3e-3, warmup_steps=20, weight_decay=1e-1),
        quality=("r2", 0.40),
    ),
}
