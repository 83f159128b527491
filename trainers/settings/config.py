"""The one frozen configuration that travels below the flags, its rules, and the recipe's values filled in.

Free of TensorFlow: a wrong value is answered before it is imported.
"""

import dataclasses
import difflib
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from models.cards import LOSSES, MODELS, OPTIMIZERS, SCHEDULES, ModelCard
from trainers.settings.data_cards import data_card
from trainers.settings.exit_codes import BadConfiguration

STRATEGIES = ("one_device", "mirrored", "multi_worker")
MODES = ("train", "evaluate")
DEFAULT_CPU_REPLICAS = 2


def _flag(default: Any, group: str, text: str, **rules: Any) -> Any:
    """A field that `trainers.settings.flags` makes a flag of. Rules: `choices`, `low`, `high`, and `fixed` in a run_dir."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **rules})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run. A value of None means "the model's own recipe" until `resolve` fills it in.

    Fields marked `fixed` decide the mathematics: a run_dir that was begun with one value refuses another.
    """

    strategy: str = _flag("mirrored", "devices", "how replicas are placed", choices=STRATEGIES)
    replicas: int = _flag(
        0, "devices", "replicas on this machine; 0 = every visible GPU or, with no GPU, 2 virtual CPU devices", low=0
    )
    startup_timeout: float = _flag(
        600.0, "devices", "seconds to wait for all workers of multi_worker; of evaluate, for the next checkpoint", low=1
    )
    step_timeout: float = _flag(
        600.0, "devices", "seconds without a finished call after which the process ends with code 75; 0 = never", low=0
    )
    precision: str = _flag(
        "float32", "devices", "arithmetic of the layers", choices=("float32", "bfloat16", "float16"), fixed=True
    )
    jit: str = _flag(
        "auto",
        "devices",
        "compile a replica's forward and backward pass with XLA; auto = on a GPU, where the model allows it",
        choices=("auto", "on", "off"),
    )
    model: str = _flag("resnet", "model and data", "a name from models/", fixed=True)
    dataset: str | None = _flag(
        None, "model and data", "an embedded data set, or one of TensorFlow Datasets", fixed=True
    )
    label: str = _flag("", "model and data", "for --dataset=csv:PATH: the column to predict", fixed=True)
    data_dir: str = _flag("~/tensorflow_datasets", "model and data", "where prepared data lies")
    input: str = _flag(
        "auto",
        "model and data",
        "resident = the data set on the device, gathered in the compiled loop; stream = tf.data; auto = by size",
        choices=("auto", "resident", "stream"),
        fixed=True,
    )
    batch_size: int = _flag(128, "training", "the GLOBAL batch, over all replicas", low=1, fixed=True)
    train_steps: int | None = _flag(None, "training", "optimizer updates in the whole run", low=1)
    loss: str = _flag("", "training", "the loss, by name; default: the model's own", fixed=True)
    optimizer: str | None = _flag(None, "training", "the update rule", choices=OPTIMIZERS, fixed=True)
    learning_rate: float | None = _flag(None, "training", "peak learning rate", low=0, fixed=True)
    schedule: str | None = _flag(None, "training", "learning rate after the warm-up", choices=SCHEDULES, fixed=True)
    warmup_steps: int | None = _flag(None, "training", "updates of linear warm-up", low=0, fixed=True)
    weight_decay: float | None = _flag(
        None, "training", "decoupled weight decay of matrices and kernels, times the learning rate", low=0, fixed=True
    )
    clip_norm: float | None = _flag(
        None, "training", "largest global norm of the summed gradient; 0 = no clipping", low=0, fixed=True
    )
    ema: float | None = _flag(
        None,
        "training",
        "decay of a moving average of the weights, used to evaluate; 0 = none",
        low=0,
        high=1,
        fixed=True,
    )
    accumulate: int | None = _flag(
        None,
        "training",
        "parts that each replica's share of the batch is computed in, one after another",
        low=1,
        fixed=True,
    )
    batch_norm: str = _flag(
        "synchronized",
        "training",
        "statistics of the global batch, exact at every size; or of each replica's share, which is faster and is not",
        choices=("synchronized", "per_replica"),
        fixed=True,
    )
    seed: int = _flag(0, "training", "initial weights, order of the data, noise", low=0, high=2**31 - 1, fixed=True)
    deterministic: bool = _flag(False, "training", "deterministic kernels: two runs are bit-identical", fixed=True)
    eval_every: int = _flag(100, "cadences", "steps between evaluations; 0 = at the end only", low=0)
    checkpoint_every: int = _flag(100, "cadences", "steps between checkpoints; 0 = at the end only", low=0)
    log_every: int | None = _flag(None, "cadences", "steps between lines of metrics; 0 = at the end only", low=0)
    histogram_every: int = _flag(
        0,
        "cadences",
        "steps between histograms of weights and (but for multi_worker) gradients in TensorBoard; 0 = none",
        low=0,
    )
    pictures_every: int = _flag(
        0, "cadences", "steps between pictures of the evaluation in TensorBoard; 0 = at the end only", low=0
    )
    steps_per_call: int = _flag(
        0, "cadences", "updates inside one compiled call; 0 = about a second's worth, ending at each cadence", low=0
    )
    keep_checkpoints: int = _flag(3, "cadences", "newest checkpoints to keep, beside the best", low=1)
    run_dir: str = _flag("", "run", "everything that the run writes; default runs/<model>-<dataset>-<time>")
    mode: str = _flag(
        "train", "run", "evaluate = follow --run_dir, and evaluate each checkpoint as it comes", choices=MODES
    )
    resume: str = _flag(
        "auto",
        "run",
        "auto = from the newest whole checkpoint in run_dir; never = refuse a run_dir that holds one",
        choices=("auto", "never"),
    )
    profile: str = _flag("", "run", "START:STOP, steps to profile")
    export: bool = _flag(False, "run", "write a SavedModel at the end")
    dry_run: bool = _flag(False, "run", "print the plan and stop")

    @property
    def card(self) -> ModelCard:
        """The model's entry in the registry."""
        return MODELS[self.model]

    @property
    def profile_steps(self) -> tuple[int, ...]:
        """The steps at which the profile begins and ends; empty without one."""
        if not self.profile:
            return ()
        start, stop = self.profile.split(":")
        return int(start), int(stop)

    def flag_lines(self, names: Collection[str] | None = None) -> list[str]:
        """The configuration as lines of a flagfile."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if names is not None and field.name not in names:
                continue
            lines.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
        return lines


# What all workers of a run must have in common: besides the mathematics, when they meet.
SHARED_FLAGS = (
    *("train_steps", "log_every", "eval_every", "checkpoint_every", "histogram_every", "pictures_every"),
    *("steps_per_call", "profile"),
)
FIXED = tuple(f.name for f in dataclasses.fields(Config) if f.metadata.get("fixed"))


def unknown(kind: str, name: str, choices: Collection[str]) -> str:
    """The line for a name that is in no registry: nearest names first, then all of them."""
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{kind} {name!r} is not known{hint}; choose one of: {', '.join(sorted(choices))}"


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
    if not config.run_dir:
        config = dataclasses.replace(config, run_dir=default_run_dir(config))
    return dataclasses.replace(
        config,
        run_dir=str(Path(config.run_dir).expanduser()),
        data_dir=str(Path(config.data_dir).expanduser()),
    )


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
    if config.batch_size % parts == 0:
        return config.batch_size // replicas
    below, above = config.batch_size // parts * parts, -(-config.batch_size // parts) * parts
    nearest = f"{below} or {above}" if below else f"{above}"
    over = f"{replicas} replicas" + (f" × {config.accumulate} accumulated parts" if config.accumulate > 1 else "")
    raise BadConfiguration(f"--batch_size {config.batch_size} does not divide over {over}; use {nearest}")
