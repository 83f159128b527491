"""The one frozen configuration that travels below the flags. Free of TensorFlow and NumPy."""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from models.cards import MODELS, ModelCard, card_of_own
from models.options import is_object
from models.recipes import RECIPES
from trainers.settings.augmentation import described
from trainers.settings.data_cards import is_own
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.optimizer_for import parse

STRATEGIES = ("one_device", "mirrored", "multi_worker")
MODES = ("train", "evaluate")
EXPORTS = ("saved_model", "keras")
DEFAULT_CPU_REPLICAS = 2
# Above it clocks of the system overflow; 30 years are for ever.
MOST_SECONDS = 1e9
# Flags that a loop leaves out which builds its models, its loss and its optimizers by itself.
SUPERVISED_ALONE = frozenset(
    {"model", "recipe", "label", "document_mask", "loss", "weight_decay", "clip_norm", "accumulate", "optimizer_for"}
    | {"init_from", "init_skip", "init_optimizer", "freeze", "layer_decay", "learning_rate_for"}
    | {"skip_spikes", "recompute"}
)


# Flags that mean nothing without another.
NEEDED = {"recipe": "model", "ema_warmup": "ema"}
# Numbers of updates, and what counts them in passes over the training split.
EPOCHS = {"train_steps": "train_epochs", "warmup_steps": "warmup_epochs"}
# A word in place of a value which the run itself finds before its first step, and goes on with ever after.
FOUND = {"accumulate": "auto"}

# Roles of a flag that is of this start alone: neither of the run, nor of what it is compared by.
_OF_ONE_START = {"repeated": False, "distinct": False, "compared": False}


def flag(default: Any, group: str, text: str, **rules: Any) -> Any:
    """A field that `trainers.settings.flags` makes a flag of.

    Rules of its value: `choices`, `low`, `high`; `path`: it is a path, and is made absolute, or, where this is
    `"stored"`, an address; `chosen`: a kind of `models.options`, of which it is a choice with options; `switch`: it may
    stand without a value, as `true`; `words`: what a number may be besides. Roles, each false or true for a reason:
    `fixed`: it decides the mathematics, so a run_dir that was begun with a value refuses another. `shared`: all workers
    must have the same, besides what is fixed. `repeated`: flags.txt holds it. `distinct`: it makes a run differ from
    another. `compared`: it is shown beside the results of runs.
    """
    roles = {"fixed": False, "shared": False, "repeated": True, "distinct": True, "compared": True}
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **roles, **rules})


class Chosen(NamedTuple):
    """A flag's choice: the flag, the kind of `models.options`, and its text, `NAME,key=value,…`."""

    flag: str
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run. A value of None means "the recipe's" until `resolve` fills it in.

    Epochs that stay None are not used; steps that epochs stand for are None until the data are read.

    These are the flags of supervised training. Another loop has a subclass of its own: further fields made by `flag`,
    and what it overrides below. Fields marked `fixed` decide the mathematics: a run_dir that was begun with one value
    refuses another.
    """

    # What the loop is called in run.json and in the names of run folders. A run goes on with the loop that began it.
    loop: ClassVar[str] = "supervised"
    # Flags that mean nothing to the loop. They keep their defaults, and no command line has them.
    left_out: ClassVar[frozenset[str]] = frozenset()
    # Whether it takes nothing but images with classes, uint8: data of a user's own that are none are refused by name.
    needs_images: ClassVar[bool] = False

    strategy: str = flag("mirrored", "devices", "how replicas are placed", choices=STRATEGIES)
    replicas: int = flag(
        0,
        "devices",
        "replicas on this machine; 0 = every visible GPU or, with no GPU, 2 virtual CPU devices",
        low=0,
        high=1024,
    )
    startup_timeout: float = flag(
        600.0,
        "devices",
        "seconds to wait for all workers of multi_worker; of evaluate, for the next checkpoint",
        low=1,
        high=MOST_SECONDS,
        compared=False,
    )
    step_timeout: float = flag(
        600.0,
        "devices",
        "seconds without a finished call after which the process ends with code 75; 0 = never",
        low=0,
        high=MOST_SECONDS,
        compared=False,
    )
    precision: str = flag(
        "float32", "devices", "arithmetic of the layers", choices=("float32", "bfloat16", "float16"), fixed=True
    )
    jit: str = flag(
        "auto",
        "devices",
        "compile a replica's forward and backward pass with XLA; auto = on a GPU, where the model allows it",
        choices=("auto", "on", "off"),
    )
    model: str = flag(
        "resnet", "model and data", "a name from models/, or module:object of your own", chosen="model", fixed=True
    )
    dataset: str | None = flag(
        None,
        "model and data",
        "an embedded data set, a file or folder of your own, one of TensorFlow Datasets, or module:object of your own",
        fixed=True,
    )
    recipe: str = flag(
        "", "model and data", f"a published recipe, which flags override: {', '.join(RECIPES)}", compared=False
    )
    label: str = flag("", "model and data", "for --dataset=csv:PATH: the column to predict", fixed=True)
    data_dir: str = flag(
        "~/tensorflow_datasets", "model and data", "where prepared data lies", distinct=False, compared=False
    )
    input: str = flag(
        "auto",
        "model and data",
        "resident = the data set on the device, gathered in the compiled loop; stream = read by index; auto = by size",
        choices=("auto", "resident", "stream"),
        fixed=True,
    )
    image_size: int = flag(
        0,
        "model and data",
        "height and width of images; 0 = as they are if all are alike, else 224",
        low=0,
        high=4096,
        fixed=True,
    )
    augment: str = flag(
        "", "model and data", f"how training images are changed, words with commas: {described()}", fixed=True
    )
    document_mask: bool = flag(
        False,
        "model and data",
        "for tokens with a separator: attention and loss do not cross from a document to the next",
        fixed=True,
    )
    batch_size: int = flag(128, "training", "the GLOBAL batch, over all replicas", low=1, fixed=True)
    train_steps: int | None = flag(None, "training", "optimizer updates in the whole run", low=1, shared=True)
    train_epochs: float | None = flag(
        None, "training", "passes over the training split, in place of --train_steps", low=0, shared=True
    )
    loss: str = flag("", "training", "the loss, by name; default: the model's own", chosen="loss", fixed=True)
    optimizer: str | None = flag(None, "training", "the update rule", chosen="optimizer", fixed=True)
    optimizer_for: str = flag(
        "",
        "training",
        "another optimizer for the weights whose path holds a pattern: PATTERN=NAME,key=value; several with ;",
        fixed=True,
    )
    learning_rate: float | None = flag(None, "training", "peak learning rate", low=0, fixed=True)
    schedule: str | None = flag(None, "training", "learning rate after the warm-up", chosen="schedule", fixed=True)
    warmup_steps: int | None = flag(None, "training", "updates of linear warm-up", low=0, fixed=True)
    warmup_epochs: float | None = flag(
        None, "training", "passes of linear warm-up, in place of --warmup_steps", low=0, fixed=True
    )
    weight_decay: float | None = flag(
        None, "training", "decoupled weight decay of matrices and kernels, times the learning rate", low=0, fixed=True
    )
    clip_norm: float | None = flag(
        None, "training", "largest global norm of the summed gradient; 0 = no clipping", low=0, fixed=True
    )
    skip_spikes: float = flag(
        0.0,
        "training",
        "leave out an update whose gradient norm is so many times the median of the last 128; 0 = none",
        low=0,
        fixed=True,
    )
    ema: float | None = flag(
        None, "training", "decay of the weights' average that is evaluated; 0 = none", low=0, high=1, fixed=True
    )
    ema_warmup: bool = flag(
        False, "training", "for --ema: the decay of update t is at most (1 + t) / (10 + t)", fixed=True
    )
    accumulate: int | str | None = flag(
        None,
        "training",
        "parts of each replica's share of the batch, computed one after another; auto = as few as fit in memory",
        words=(FOUND["accumulate"],),
        low=1,
        fixed=True,
    )
    recompute: bool = flag(
        False, "training", "compute blocks again in the backward pass: less memory, more time", shared=True
    )
    batch_norm: str = flag(
        "synchronized",
        "training",
        "statistics of the global batch, exact at every size; or of each replica's share, which is faster and is not",
        choices=("synchronized", "per_replica"),
        fixed=True,
    )
    init_from: str = flag(
        "",
        "training",
        "begin with trained weights: a run directory, or a file .weights.h5, .keras or .safetensors",
        fixed=True,
        path="stored",
    )
    init_skip: str = flag(
        "",
        "training",
        "for --init_from, a regular expression: variables in whose path it is found begin as without it",
        fixed=True,
    )
    init_optimizer: bool = flag(
        False, "training", "for --init_from=RUN_DIR: take what its optimizer knows of each weight too", fixed=True
    )
    freeze: str = flag(
        "", "training", "a regular expression: weights in whose path it is found stay as they begin", fixed=True
    )
    layer_decay: float = flag(
        1.0,
        "training",
        "factor of the learning rate from each block of the model to the one before it; 1 = none",
        low=0.01,
        high=1,
        fixed=True,
    )
    learning_rate_for: str = flag(
        "",
        "training",
        "a factor of the learning rate for the weights whose path holds a pattern: PATTERN=FACTOR; several with ;",
        fixed=True,
    )
    seed: int = flag(0, "training", "initial weights, order of the data, noise", low=0, high=2**31 - 1, fixed=True)
    deterministic: bool = flag(False, "training", "deterministic kernels: two runs are bit-identical", fixed=True)
    eval_every: int = flag(100, "cadences", "steps between evaluations; 0 = at the end only", low=0, shared=True)
    checkpoint_every: int = flag(100, "cadences", "steps between checkpoints; 0 = at the end only", low=0, shared=True)
    log_every: int | None = flag(
        None, "cadences", "steps between lines of metrics; 0 = at the end only", low=0, shared=True
    )
    histogram_every: int = flag(
        0,
        "cadences",
        "steps between histograms of weights and (but for multi_worker) gradients in TensorBoard; 0 = none",
        low=0,
        shared=True,
    )
    pictures_every: int = flag(
        0,
        "cadences",
        "steps between pictures of the evaluation in TensorBoard; 0 = at the end only",
        low=0,
        shared=True,
    )
    steps_per_call: int = flag(
        0,
        "cadences",
        "updates inside one compiled call; 0 = about a second's worth, ending at each cadence",
        low=0,
        shared=True,
    )
    rewind: int = flag(
        0, "cadences", "times to go back to the last checkpoint where the loss is not finite", low=0, shared=True
    )
    keep_checkpoints: int = flag(3, "cadences", "newest checkpoints to keep, beside the best", low=1)
    run_dir: str = flag(
        "",
        "run",
        "everything that the run writes; default runs/<model>-<dataset>-<time>-<random digits>",
        **_OF_ONE_START,
    )
    cache_dir: str = flag("", "run", "where files of object stores are kept", **_OF_ONE_START)
    mode: str = flag(
        "train",
        "run",
        "evaluate = follow --run_dir, and evaluate each checkpoint as it comes",
        choices=MODES,
        **_OF_ONE_START,
    )
    resume: str = flag(
        "auto",
        "run",
        "auto = from the newest whole checkpoint in run_dir; never = refuse a run_dir that holds one",
        choices=("auto", "never"),
        **_OF_ONE_START,
    )
    profile: str = flag("", "run", "START:STOP, steps to profile", shared=True, compared=False)
    metrics_port: str = flag("", "run", "PORT or HOST:PORT at which Prometheus reads of the run", compared=False)
    tracker: str = flag("", "run", "mlflow or wandb, told of the run too", distinct=False, compared=False)
    export: str = flag(
        "",
        "run",
        "what to write at the end for use elsewhere: saved_model, keras, or both with a comma; --export = saved_model",
        compared=False,
        switch=True,
    )
    dry_run: bool = flag(False, "run", "print the plan and stop", **_OF_ONE_START)

    # What a loop may override ------------------------------------------------------------------------------------

    def defaults(self) -> Mapping[str, Any]:
        """Values for flags that neither were given nor are in `--recipe`, and have no default."""
        return dataclasses.asdict(self.card.recipe) | {"dataset": self.card.dataset}

    @property
    def task(self) -> str:
        """The kind of data that is trained on: of `models.cards.LOSSES`; empty where only the data tells."""
        return self.card.task

    @property
    def parts(self) -> int:
        """Pieces that the global batch of an update is cut into, computed one by one; 1 where they are to be found."""
        return 1 if self.accumulate == FOUND["accumulate"] else self.accumulate

    @property
    def views(self) -> int:
        """Places in the global batch, one after another, that hold the same example, each augmented by itself."""
        return 1

    def check(self) -> None:
        """The loop's own rules, once the recipe is filled in.

        Raises:
          BadConfiguration: a value breaks one; the message names the value, the rule and the remedy.
        """

    def check_files(self) -> None:
        """Whether files that flags name are there. Called where the run is to run, before TensorFlow is imported.

        A run that goes on from a checkpoint does not need `--init_from` any more.

        Raises:
          BadConfiguration: one is not.
        """
        path, is_path = Path(self.init_from), self.init_from and "://" not in self.init_from
        if not is_path or self.mode == "evaluate" or any(Path(self.run_dir).glob("checkpoints/step-*")):
            return
        if not path.exists():
            raise BadConfiguration(f"--init_from {path} does not exist; name a run directory or a file of weights")
        if not path.is_dir() and not path.name.endswith((".weights.h5", ".keras", ".safetensors")):
            raise BadConfiguration(
                f"--init_from {path} is no run directory, and no .weights.h5, .keras or .safetensors; name one of these"
            )

    # --------------------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What is trained, in one word: the model or, of another loop, the algorithm."""
        return self.model.partition(",")[0] if self.loop == Config.loop else self.loop

    @property
    def card(self) -> ModelCard:
        """The model's entry in the registry; of one of the user's own, what holds for all of these."""
        name = self.model.partition(",")[0]
        return card_of_own(name) if is_object(name) else MODELS[name]

    @property
    def chosen(self) -> tuple[Chosen, ...]:
        """What flags choose with options, a data set too if it is the user's own."""
        found = [
            Chosen(field.name, field.metadata["chosen"], getattr(self, field.name))
            for field in self.fields()
            if "chosen" in field.metadata and getattr(self, field.name)
        ]
        with contextlib.suppress(BadConfiguration):  # which `resolve` raises
            found += [Chosen("optimizer_for", "optimizer", each.optimizer) for each in parse(self.optimizer_for)]
        if is_own(self.dataset or ""):
            found.append(Chosen("dataset", "dataset", self.dataset))
        return tuple(found)

    @property
    def own_objects(self) -> tuple[str, ...]:
        """The flags that name objects of the user's own, `module:object`: what a run imports and calls."""
        return tuple(dict.fromkeys(one.flag for one in self.chosen if is_object(one.text.partition(",")[0])))

    @property
    def profile_steps(self) -> tuple[int, ...]:
        """The steps at which the profile begins and ends; empty without one."""
        if not self.profile:
            return ()
        start, stop = self.profile.split(":")
        return int(start), int(stop)

    @classmethod
    def fields(cls) -> tuple[dataclasses.Field, ...]:
        """The flags: all fields but those that the loop leaves out, and those that mean nothing without these."""
        left_out = cls.left_out | {name for name, needed in NEEDED.items() if needed in cls.left_out}
        return tuple(field for field in dataclasses.fields(cls) if field.name not in left_out)

    @classmethod
    def names(cls, role: str, holds: bool = True) -> tuple[str, ...]:
        """Names of the flags that have a role, or with `holds=False` of those that do not."""
        return tuple(field.name for field in cls.fields() if field.metadata[role] == holds)

    def values(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """The flags with their values; with `names`, those alone."""
        return {f.name: getattr(self, f.name) for f in self.fields() if names is None or f.name in names}

    def flag_lines(self, names: Collection[str] | None = None) -> list[str]:
        """The configuration as lines of a flagfile: without flags that have no value, or that epochs stand for."""
        counted = [steps for steps, epochs in EPOCHS.items() if getattr(self, epochs) is not None]
        return [
            f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in self.values(names).items()
            if value is not None and name not in counted
        ]


NO_DIFFERENCE = Config.names("distinct", holds=False)
