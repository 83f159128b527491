"""The rules of the configuration, checked before TensorFlow is imported, and the recipe's values filled in."""

import dataclasses
import os
import re
import secrets
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from models.cards import MODELS
from models.names import nearest, unknown
from models.recipes import RECIPES
from trainers.settings import augmentation, optimizer_for, options, paths, tracker, weight_patterns
from trainers.settings.augmentation import mixes
from trainers.settings.config import EPOCHS, EXPORTS, FOUND, Config
from trainers.settings.data_cards import DATASETS, DataCard, data_card, is_own, split_name
from trainers.settings.exit_codes import BadConfiguration

# The longest part of a data set's name in the name of a run's folder: a file's name has 255 bytes at most.
_MOST_CHARACTERS = 60
# A whole number above it fits into no tensor of shapes, and into no name of a checkpoint.
MOST = 2**31 - 1
# What TensorFlow Datasets call a set, with the name of a variant.
_TFDS_NAME = re.compile(r"[A-Za-z]\w*(/[A-Za-z0-9][\w.,=+-]*)?", re.ASCII)


def _check_field(field: dataclasses.Field, value: Any) -> None:
    rules, name = field.metadata, field.name
    if value is None or value in rules.get("words", ()):
        return
    if "words" in rules and isinstance(value, str):
        raise BadConfiguration(f"--{name} {value!r} is no whole number; pass one, or {' or '.join(rules['words'])}")
    if "choices" in rules and value not in rules["choices"]:
        raise BadConfiguration(unknown(f"--{name}", value, rules["choices"]))
    if "low" in rules and not value >= rules["low"]:
        raise BadConfiguration(f"--{name} {value} is below {rules['low']}; pass {rules['low']} or more")
    if isinstance(value, float) and value == float("inf"):
        raise BadConfiguration(f"--{name} {value} is not finite; pass a finite number")
    high = rules.get("high", MOST if isinstance(value, int) else float("inf"))
    if not isinstance(value, str) and not value <= high:
        raise BadConfiguration(f"--{name} {value} is above {high}; pass {high} or less")


def _check_profile(config: Config) -> None:
    if not config.profile:
        return
    start, _, stop = config.profile.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise BadConfiguration(f"--profile {config.profile!r} is not START:STOP with START < STOP; pass e.g. 100:110")
    if int(start) >= (config.train_steps or int(stop)):
        raise BadConfiguration(
            f"--profile {config.profile} begins after --train_steps {config.train_steps}; begin sooner"
        )


def metrics_address(text: str) -> tuple[str, int]:
    """Host and port of `--metrics_port`: `9400`, which is of this machine's loopback, `0.0.0.0:9400`, `[::1]:9400`.

    Raises:
      BadConfiguration: it is neither PORT nor HOST:PORT.
    """
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    in_order = bool(bare) == bool(colon) and (":" not in bare or host == f"[{bare}]")
    if not (in_order and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise BadConfiguration(
            f"--metrics_port {text!r} is not PORT or HOST:PORT with a port from 1 to 65535; pass e.g. 9400, or "
            "0.0.0.0:9400 for other machines"
        )
    return bare or "127.0.0.1", int(port)


def _check_telling(config: Config) -> None:
    """Flags of who is told of the run, which the trainer does alone."""
    if config.metrics_port:
        metrics_address(config.metrics_port)
    for name, does in (("metrics_port", "answers"), ("tracker", "tells")):
        if getattr(config, name) and config.mode == "evaluate":
            raise BadConfiguration(
                f"--{name} {getattr(config, name)} with --mode=evaluate: the trainer {does}; leave it out here"
            )


def short(text: str, most: int = _MOST_CHARACTERS) -> str:
    """A text as part of a file's name: what a path cannot hold is replaced; of one that is too long, the end."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in text)[-most:]


def time_and_chance() -> str:
    """The time, and digits that tell apart what was started within one second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def default_run_dir(config: Config) -> str:
    """`runs/<model or loop>-<dataset>-<time>-<random digits>`."""
    return str(Path("runs") / f"{short(config.title)}-{short(config.dataset)}-{time_and_chance()}")


def _check_dataset(config: Config) -> None:
    """What the name of the data alone tells: whether there can be such a set, and whether it takes an argument."""
    name, flag = config.dataset, f"--dataset {config.dataset!r}"
    kind, argument = split_name(name)
    if is_own(name):
        return
    if kind not in DATASETS:
        if not _TFDS_NAME.fullmatch(kind):
            raise BadConfiguration(
                unknown("--dataset", name, DATASETS) + ", or a set of TensorFlow Datasets such as mnist"
            )
        if ":" in name:
            raise BadConfiguration(
                f"{flag}: only {', '.join(k for k in DATASETS if DATASETS[k].argument)} take what "
                f"follows a colon; write --dataset={kind}"
            )
        return
    form = DATASETS[kind].argument
    if ":" in name and not form:
        raise BadConfiguration(f"{flag}: {kind} takes nothing after its name; write --dataset={kind}")
    if not argument and (":" in name or form.startswith(":")):
        raise BadConfiguration(f"{flag} names no file or folder; write --dataset={kind}{form}")
    if argument:
        paths.place(f"--dataset={kind}:", argument)


def _local_paths(config: Config) -> Config:
    """The configuration with its paths opened; without a home directory the data lie beside `runs/`."""
    data_dir = config.data_dir
    if data_dir == Config.data_dir and not paths.has_home():
        data_dir = paths.DATA_WITHOUT_HOME
    named = {}
    for field in config.fields():
        if (kind := field.metadata.get("path")) and (text := getattr(config, field.name)):
            what, stored = f"--{field.name}", kind == "stored" and "://" in text
            named[field.name] = paths.place(what, text) if stored else os.path.realpath(paths.local(what, text))
    return dataclasses.replace(
        config,
        **named,
        run_dir=paths.place("--run_dir", config.run_dir or default_run_dir(config)),
        cache_dir=paths.cache_dir(config.cache_dir),
        data_dir=paths.place("--data_dir", data_dir),
    )


def resolve(config: Config, begun: Mapping[str, Any] | None = None) -> Config:
    """Checks each value on its own and fills in the recipe.

    `begun`: the flags of the run that `--run_dir` holds, if there is one. A recipe's warm-up depends on the number of
    steps, so a run that goes on to another number keeps the warm-up that it was begun with.

    Raises:
      BadConfiguration: a value breaks its rule; the message names the value, the rule and the remedy.
    """
    for field in config.fields():
        _check_field(field, getattr(config, field.name))
    config = canonical(config)
    filled = _filled(config)
    config = canonical(dataclasses.replace(config, **filled))
    if filled.get("dataset") == "":
        raise BadConfiguration(f"--model {config.model} is of your own, without a recipe for its data; name --dataset")
    _check_profile(config)
    _check_telling(config)
    if config.mode == "evaluate" and config.strategy == "multi_worker":
        raise BadConfiguration("--mode=evaluate runs in one process; use --strategy=mirrored")
    if config.strategy == "multi_worker" and not config.run_dir and not config.dry_run:
        raise BadConfiguration("--strategy=multi_worker needs --run_dir, one folder that all workers share; name it")
    _check_average(config)
    _check_spikes(config)
    config = _with_warmup(config, _is_a_recipes(config, filled), (begun or {}).get("warmup_steps"))
    _check_dataset(config)
    weight_patterns.factors(config.learning_rate_for)
    for name in ("freeze", "init_skip"):
        weight_patterns.check(name, getattr(config, name))
    for name in ("init_skip", "init_optimizer"):
        if getattr(config, name) and not config.init_from:
            raise BadConfiguration(f"--{name} is for --init_from, which is not given; name it, or leave this out")
    card = data_card(config.dataset)
    check_task(config, card.task)
    config.check()
    if config.loss:
        options.check("loss", config.loss, config.task or card.task)
    if card.needs_label != bool(config.label):
        need = "needs --label=COLUMN" if card.needs_label else "takes no --label; leave it out"
        raise BadConfiguration(f"--dataset {config.dataset} {need}")
    _check_images(config, card)
    _check_documents(config, card.documents)
    return _local_paths(config)


def _check_spikes(config: Config) -> None:
    if 0 < config.skip_spikes <= 1:
        raise BadConfiguration(
            f"--skip_spikes {config.skip_spikes:g} would leave out every second update; pass a factor above 1, e.g. 10"
        )


def _check_average(config: Config) -> None:
    if config.ema == 1:
        raise BadConfiguration("--ema 1 would never move; pass a decay below 1, e.g. 0.999")
    if config.ema_warmup and not config.ema:
        raise BadConfiguration("--ema_warmup is for --ema, which is 0; pass a decay, e.g. 0.9999, or leave this out")


def canonical(config: Config) -> Config:
    """The configuration with its choices in their one spelling, so that equal ones are the same run.

    Raises:
      BadConfiguration: an unknown name or option, or a value of the wrong type.
    """
    changes = {}
    for field in config.fields():
        value = getattr(config, field.name)
        if "chosen" in field.metadata and value != field.default:
            changes[field.name] = options.check(field.metadata["chosen"], value)
    if is_own(config.dataset or ""):
        changes["dataset"] = _canonical_dataset(config.dataset)
    changes["optimizer_for"] = optimizer_for.canonical(config.optimizer_for)
    changes["export"] = _canonical_export(config.export)
    changes["tracker"] = tracker.canonical(config.tracker)
    return dataclasses.replace(config, **changes)


def _canonical_export(value: str | bool) -> str:
    """What to export, in one order. `true` and `false` are what older flag files have."""
    text = str(value).strip().lower()
    words = {"true": ["saved_model"], "false": []}.get(text, [word.strip() for word in text.split(",") if word.strip()])
    for word in words:
        if word not in EXPORTS:
            raise BadConfiguration(unknown("--export", word, EXPORTS))
    return ",".join(word for word in EXPORTS if word in words)


def _canonical_dataset(text: str) -> str:
    """As `options.check`; a name that is like one of a kind of data gets a hint."""
    try:
        return options.check("dataset", text)
    except BadConfiguration as error:
        kind, argument = split_name(text)
        for near in nearest(kind, [name for name, card in DATASETS.items() if card.argument]):
            raise BadConfiguration(f"{error}; or did you mean {near}:{argument}?") from error
        raise


def _check_images(config: Config, card: DataCard) -> None:
    words = augmentation.parse(config.augment)
    for name, value in (("augment", config.augment), ("image_size", config.image_size)):
        if value and card.images is False:
            raise BadConfiguration(
                f"--{name} {value} is for images, and --dataset {config.dataset} has none; leave it out"
            )
    if card.masks:
        augmentation.check_masks(config.dataset, words, config.image_size)


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
    """Checks that the loop or its model takes data of a kind; an empty one is known only once the data is read.

    Raises:
      BadConfiguration: it does not; the message names the models that do.
    """
    if task and config.task and task != config.task and "model" in config.left_out:
        raise BadConfiguration(
            f"--dataset {config.dataset!r} has {task} data, the loop {config.loop} takes {config.task}; take another"
        )
    if task and config.task and task != config.task:
        fit = [name for name, model in MODELS.items() if model.task == task]
        remedy = f"choose one of: {', '.join(fit)}" if fit else "bring one that does, --model=module:function"
        raise BadConfiguration(f"--model {config.model} does not take the {task} data of {config.dataset!r}; {remedy}")


def _is_a_recipes(config: Config, filled: Mapping[str, Any]) -> bool:
    """Whether the warm-up in steps is not the user's own. `filled`: what the model's recipe has filled in."""
    named = RECIPES[config.recipe].flags if config.recipe in RECIPES else {}
    return "warmup_steps" in filled or named.get("warmup_steps", -1) == config.warmup_steps


def _with_warmup(config: Config, from_recipe: bool, begun: int | None) -> Config:
    """A recipe's warm-up gives way to that of the run and to a short run; one that the user named is an error."""
    if from_recipe and begun is not None:
        return dataclasses.replace(config, warmup_steps=begun)
    if None in (config.warmup_steps, config.train_steps) or config.warmup_steps <= config.train_steps:
        return config  # what epochs stand for is known, and looked at, once the data are read
    if from_recipe:
        return dataclasses.replace(config, warmup_steps=config.train_steps // 10)
    raise BadConfiguration(
        f"--warmup_steps {config.warmup_steps} is above --train_steps {config.train_steps}; pass fewer"
    )


def _filled(config: Config) -> dict[str, Any]:
    """The recipe's values for flags without one. Steps and epochs stand for each other: either leaves the other out."""
    if config.train_epochs == 0:
        raise BadConfiguration("--train_epochs 0 is no training; pass a number above 0, e.g. 90")
    recipe = {name: value for name, value in config.defaults().items() if getattr(config, name) is None}
    for steps, epochs in EPOCHS.items():
        if getattr(config, epochs) is not None:
            recipe.pop(steps, None)
        elif getattr(config, steps) is not None:
            recipe.pop(epochs, None)
        elif recipe.get(epochs) is not None:
            recipe.pop(steps, None)
    return recipe


def check_given(given: Collection[str]) -> None:
    """Whether flags that stand for each other were given both. `given`: names of flags of a command line.

    Raises:
      BadConfiguration: they were.
    """
    for steps, epochs in EPOCHS.items():
        if {steps, epochs} <= set(given):
            raise BadConfiguration(f"--{steps} and --{epochs} both say how many updates; pass one of them")


def with_epochs(config: Config, examples: int, begun: Mapping[str, Any] | None = None) -> Config:
    """The configuration with the steps that its epochs are, rounded, of a training split of so many examples.

    `begun`: the flags with which the run has begun, whose warm-up a recipe's gives way to.

    Raises:
      BadConfiguration: the profile begins after the training, or the warm-up is longer than it, or it than any.
    """
    changes = {}
    for steps, epochs in EPOCHS.items():
        if (passes := getattr(config, epochs)) is not None:
            changes[steps] = round(passes * examples * config.views / config.batch_size)
    if not changes or (config.mode == "evaluate" and config.train_steps):  # which has those of the run
        return config
    if "train_steps" in changes:
        changes["train_steps"] = max(changes["train_steps"], 1)
        if changes["train_steps"] > MOST:
            raise BadConfiguration(
                f"--train_epochs {config.train_epochs:g} are {changes['train_steps']} steps, above {MOST}; pass fewer"
            )
    config = dataclasses.replace(config, **changes)
    _check_profile(config)
    card = RECIPES[config.recipe].flags if config.recipe in RECIPES else config.defaults()
    name = "warmup_steps" if config.warmup_epochs is None else "warmup_epochs"
    same = name == "warmup_epochs" and (begun or {}).get(name) == config.warmup_epochs
    try:
        return _with_warmup(
            config, getattr(config, name) == card.get(name), begun.get("warmup_steps") if same else None
        )
    except BadConfiguration as error:
        counted = [f"--{epochs} {getattr(config, epochs):g}" for steps, epochs in EPOCHS.items() if steps in changes]
        raise BadConfiguration(f"{error} ({', '.join(counted)} of {examples} examples)") from None


def _groups(config: Config) -> int:
    """Examples that follow each other in the batch and that nothing may divide: views, and pairs that are mixed."""
    return config.views * (2 if mixes(augmentation.parse(config.augment)) else 1)


def finds_parts(config: Config) -> bool:
    """Whether the run is to find `--accumulate` itself."""
    return config.accumulate == FOUND["accumulate"]


def parts_allowed(config: Config, replicas: int) -> list[int]:
    """The numbers of parts that a replica's share of the global batch divides into, from 1 on."""
    most = config.batch_size // replicas // _groups(config)
    return [parts for parts in range(1, most + 1) if most % parts == 0]


def check_batch(config: Config, replicas: int) -> int:
    """Returns each replica's share of the global batch.

    Raises:
      BadConfiguration: the batch does not divide over the replicas and the accumulated parts.
    """
    groups = _groups(config)
    parts = replicas * config.parts * groups
    if config.batch_size % parts == 0:
        return config.batch_size // replicas
    below, above = config.batch_size // parts * parts, -(-config.batch_size // parts) * parts
    nearest = f"{below} or {above}" if below else f"{above}"
    over = f"{replicas} replicas" + (f" × {config.parts} parts" if config.parts > 1 else "")
    over += f" × {config.views} views" if config.views > 1 else ""
    over += " × pairs of mixed examples" if groups > config.views else ""
    raise BadConfiguration(f"--batch_size {config.batch_size} does not divide over {over}; use {nearest}")
