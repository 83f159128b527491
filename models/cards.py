"""The one registry: every model, loss, optimizer and schedule by the name that a flag takes.

An entry is `module:object`, imported only when `load` is called: this module is free of TensorFlow, so flags can be
checked before TensorFlow is imported. To add a loss, an optimizer, a schedule or a model, write it in its module and
give it one entry here.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any


def load(entry: str) -> Any:
    """The object that `module:object` names. Imports the module, and TensorFlow with it."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


# By kind of data; the first is the default. An object is called without arguments and returns a `keras.losses.Loss`
# whose `call(targets, outputs)` is one value for each example, `[batch]`.
LOSSES: dict[str, dict[str, str]] = {
    "classification": {
        "cross_entropy": "models.losses:CrossEntropy",
        "smoothed": "models.losses:smoothed_cross_entropy",
        "focal": "models.losses:Focal",
    },
    "regression": {
        "squared": "models.losses:SquaredError",
        "huber": "models.losses:Huber",
        "pseudo_huber": "models.losses:PseudoHuber",
        "log_cosh": "models.losses:LogCosh",
    },
    "language": {"cross_entropy": "models.losses:TokenCrossEntropy"},
    "segmentation": {"cross_entropy": "models.losses:PixelCrossEntropy"},
}

# Called with `(learning_rate, weight_decay=...)`, where a weight decay of None means none.
OPTIMIZERS: dict[str, str] = {
    "sgd": "keras.optimizers:SGD",
    "momentum": "models.optimizers:Momentum",
    "adam": "models.optimizers:adam",
    "adamw": "models.optimizers:adamw",
    "sam": "models.optimizers:SAM",
    "lamb": "models.further_optimizers:Lamb",
    "lars": "models.further_optimizers:LARS",
    "lion": "models.optimizers:lion",
    "muon": "models.further_optimizers:muon",
    "schedule_free": "models.further_optimizers:ScheduleFreeAdamW",
}

# Subclasses of `models.optimizers.Schedule`: called with `(peak, warmup_steps, total_steps)`.
SCHEDULES: dict[str, str] = {
    "constant": "models.optimizers:Constant",
    "linear": "models.optimizers:Linear",
    "cosine": "models.optimizers:Cosine",
    "one_cycle": "models.optimizers:OneCycle",
    "stepwise": "models.optimizers:Stepwise",
    "warmup_stable_decay": "models.optimizers:WarmupStableDecay",
    "cyclic": "models.optimizers:Cyclic",
    "inverse_sqrt": "models.optimizers:InverseSquareRoot",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained unless flags say otherwise. The learning rate is per update of the global batch."""

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
    value that the recipe reaches there, at least (at most for an error). `mean`, `deviation`: of the red, green and
    blue of images, in [0, 1]; the model is given differences from the mean, in deviations. The default gives [-1, 1].
    `documents`: whether it can keep the documents of a window apart. `images`: whether an example must have the axes of
    an image.
    """

    build: str
    summary: str
    task: str
    dataset: str
    recipe: Recipe
    quality: tuple[str, float]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)
    documents: bool = False
    images: bool = False

    def builder(self) -> Callable[..., Any]:
        """The function that `build` names. Imports TensorFlow."""
        return load(self.build)


def card_of_own(entry: str) -> ModelCard:
    """What holds for every model that is not in the registry: it takes the data that `--dataset` names.

    Whether the data fit, and whether documents can be kept apart, its builder decides.
    """
    return ModelCard(entry, "", "", "", Recipe(train_steps=1000), ("loss", float("inf")), documents=True)


MODELS: dict[str, ModelCard] = {
    "mlp": ModelCard(
        build="models.mlp:build",
        summary="multi-layer perceptron: two hidden layers with dropout",
        task="classification",
        dataset="digits",
        # A step takes 0.2 ms: a line at every 20th would cost a tenth of the time, and nobody reads that fast.
        recipe=Recipe(train_steps=1000, learning_rate=2e-3, warmup_steps=50, weight_decay=1e-2, log_every=100),
        quality=("accuracy", 0.96),
    ),
    "resnet": ModelCard(
        build="models.resnet:build",
        summary="residual network for small images: three stages",
        task="classification",
        dataset="digits",
        images=True,
        recipe=Recipe(train_steps=400, learning_rate=3e-3, warmup_steps=50, weight_decay=1e-2, clip_norm=1.0),
        quality=("accuracy", 0.97),
    ),
    "resnet18": ModelCard(
        build="models.resnet:build_18",
        summary="ResNet-18; 11,689,512 parameters at ImageNet's size",
        task="classification",
        dataset="digits",
        images=True,
        recipe=Recipe(train_steps=120, learning_rate=1e-3, warmup_steps=20, weight_decay=1e-2, clip_norm=1.0),
        quality=("accuracy", 0.97),
    ),
    "resnet50": ModelCard(
        build="models.resnet:build_50",
        summary="ResNet-50 (v1.5); 25,557,032 parameters at ImageNet's size",
        task="classification",
        dataset="digits",
        images=True,
        recipe=Recipe(train_steps=80, learning_rate=1e-3, warmup_steps=20, weight_decay=1e-2, clip_norm=1.0),
        quality=("accuracy", 0.96),
    ),
    "vit": ModelCard(
        build="models.transformers:build_vit",
        summary="vision transformer: patches, a class token, four attention blocks",
        task="classification",
        dataset="digits",
        images=True,
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
        documents=True,
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
        summary="hidden layers that must also reconstruct the inputs",
        task="regression",
        dataset="diabetes",
        recipe=Recipe(train_steps=200, learning_rate=3e-3, warmup_steps=20, weight_decay=1e-1),
        quality=("r2", 0.40),
    ),
    "unet": ModelCard(
        build="models.unet:build",
        summary="U-Net: a label for each pixel, from three resolutions with skips",
        task="segmentation",
        dataset="digit_masks",
        recipe=Recipe(train_steps=200, learning_rate=3e-3, warmup_steps=20, weight_decay=1e-2, clip_norm=1.0),
        quality=("mean_iou", 0.88),
    ),
}
