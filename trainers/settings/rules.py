"""The rules of the configuration, checked before TensorFlow is imported, and the recipe's values filled in."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from models.cards import LOSSES, MODELS
from trainers.settings import augmentation
from trainers.settings.augmentation import mixes
from trainers.settings.config import Config
from trainers.settings.data_cards import data_card
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.names import unknown


def _check_field(field: dataclasses.Field, value: Any) -> None:
    rules, name = field.metadata, field.name
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise BadConfiguration(unknown(f"--{name}", value, rules["choices"]))
    if "low" in rules and not value >= rules["low"]:
        raise BadConfiguration(f"--{name} {value} is below {rules['low']}; pass {rules['low']} or more")
    if "high" in rules and not value <= rules["high"]:
        raise BadConfiguration(f"--{name} {value} is above {rules['high']}; pass {rules['high']} or less")
    if isinstance(value, float) and value == float("inf"):
        raise BadConfiguration(f"--{name} {value} is not finite; pass a finite number")


def _check_profile(config: Config) -> None:
    if not config.profile:
        return
    start, _, stop = config.profile.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise BadConfiguration(f"--profile {config.profile!r} is not START:STOP with START < STOP; pass e.g. 100:110")
    if int(start) >= (config.train_steps or int(stop)):
        raise BadConfiguration(
            f"--profile {config.profile} begins after --train_steps {config.train_steps}; begin sooner"
        )


def default_run_dir(config: Config) -> str:
    """`runs/<model>-<dataset>-<time>`, with what a path cannot hold replaced."""
    dataset = "".join(c if c.isalnum() or c in "-_." else "_" for c in config.dataset)
    return str(Path("runs") / f"{config.model}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}")


def resolve(config: Config) -> Config:
    """Checks each value on its own and fills in the recipe.

    Raises:
      BadConfiguration: a value breaks its rule; the message names the value, the rule and the remedy.
    """
    for field in dataclasses.fields(Config):
        _check_field(field, getattr(config, field.name))
    if config.model not in MODELS:
        raise BadConfiguration(unknown("--model", config.model, MODELS))
    recipe = dataclasses.asdict(config.card.recipe) | {"dataset": config.card.dataset}
    filled = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **filled)
    _check_profile(config)
    if config.mode == "evaluate" and config.strategy == "multi_worker":
        raise BadConfiguration("--mode=evaluate runs in one process; use --strategy=mirrored")
    if config.ema == 1:
        raise BadConfiguration("--ema 1 would never move; pass a decay below 1, e.g. 0.999")
    if config.warmup_steps > config.train_steps:
        config = _shorter_warmup(config, "warmup_steps" in filled)
    card = data_card(config.dataset)
    check_task(config, card.task)
    if config.loss and config.loss not in LOSSES[config.card.task]:
        raise BadConfiguration(unknown("--loss", config.loss, LOSSES[config.card.task]))
    if card.needs_label != bool(config.label):
        need = "needs --label=COLUMN" if card.needs_label else "takes no --label; leave it out"
        raise BadConfiguration(f"--dataset {config.dataset} {need}")
    _check_images(config, card.images)
    _check_documents(config, card.documents)
    if not config.run_dir:
        config = dataclasses.replace(config, run_dir=default_run_dir(config))
    return dataclasses.replace(
        config,
        run_dir=str(Path(config.run_dir).expanduser()),
        data_dir=str(Path(config.data_dir).expanduser()),
    )


def _check_images(config: Config, images: bool) -> None:
    augmentation.parse(config.augment)
    for name, value in (("augment", config.augment), ("image_size", config.image_size)):
        if value and not images:
            raise BadConfiguration(
                f"--{name} {value} is for images, and --dataset {config.dataset} has none; leave it out"
            )


def _check_documents(config: Config, documents: bool) -> None:
    if config.document_mask and not documents:
        raise BadConfiguration(
            f"--document_mask is for tokens:PATH with a separator, and --dataset {config.dataset} has none; leave it "
            "out"
        )
    if config.document_mask and not config.card.documents:
        fit = ", ".join(name for name, model in MODELS.items() if model.documents)
        raise BadConfiguration(f"--model {config.model} has no --document_mask; leave it out, or choose one of: {fit}")


def check_task(config: Config, task: str) -> None:
    """Checks that the model takes data of a kind; an empty one is known only once the data is read.

    Raises:
      BadConfiguration: it does not; the message names the models that do.
    """
    if task and task != config.card.task:
        fit = [name for name, model in MODELS.items() if model.task == task]
        raise BadConfiguration(
            f"--model {config.model} does not take the {task} data of {config.dataset!r}; "
            f"choose one of: {', '.join(fit)}"
        )


def _shorter_warmup(config: Config, from_recipe: bool) -> Config:
    """A recipe's warm-up gives way to a short run; one that the user named is an error."""
    if from_recipe:
        return dataclasses.replace(config, warmup_steps=config.train_steps // 10)
    raise BadConfiguration(
        f"--warmup_steps {config.warmup_steps} is above --train_steps {config.train_steps}; pass fewer"
    )


def check_batch(config: Config, replicas: int) -> int:
    """Returns each replica's share of the global batch.

    Raises:
      BadConfiguration: the batch does not divide over the replicas and the accumulated parts.
    """
    parts = replicas * config.accumulate
    if mixes(augmentation.parse(config.augment)):
        parts *= 2  # neighbours are mixed, and no pair is divided
    if config.batch_size % parts == 0:
        return config.batch_size // replicas
    below, above = config.batch_size // parts * parts, -(-config.batch_size // parts) * parts
    nearest = f"{below} or {above}" if below else f"{above}"
    over = f"{replicas} replicas" + (f" × {config.accumulate} accumulated parts" if config.accumulate > 1 else "")
    over += " × pairs of mixed examples" if parts > replicas * config.accumulate else ""
    raise BadConfiguration(f"--batch_size {config.batch_size} does not divide over {over}; use {nearest}")
