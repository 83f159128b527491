"""The registry of models: each name, where its `build` lies, and the recipe that trains it well.

Free of TensorFlow, so that flags are checked before it is imported. A model joins by one entry here.
"""

import dataclasses


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


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is known of a model before it is built.

    `module` holds `build(spec: models.tasks.DataSpec) -> (keras.Model, models.tasks.Task)`; `tasks` are the kinds
    of data that it takes; `quality` is what the recipe reaches on `digits` or the data set named there.
    """

    module: str
    summary: str
    tasks: tuple[str, ...]
    recipe: Recipe
    quality: str


MODELS: dict[str, ModelCard] = {
    "mlp": ModelCard(
        module="models.mlp",
        summary="multi-layer perceptron: flatten, two hidden layers with dropout, logits",
        tasks=("classification",),
        recipe=Recipe(train_steps=1000, learning_rate=2e-3, warmup_steps=50, weight_decay=1e-2),
        quality="≥ 96 % test accuracy on digits",
    ),
    "resnet": ModelCard(
        module="models.resnet",
        summary="residual network for small images: three stages, batch statistics over all replicas",
        tasks=("classification",),
        recipe=Recipe(train_steps=400, learning_rate=3e-3, warmup_steps=50, weight_decay=1e-2, clip_norm=1.0),
        quality="≥ 97 % test accuracy on digits",
    ),
}
