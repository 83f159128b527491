"""The one frozen configuration that travels below the flags. Free of TensorFlow and NumPy."""

import dataclasses
from collections.abc import Collection
from typing import Any

from models.cards import MODELS, OPTIMIZERS, SCHEDULES, ModelCard
from trainers.settings.augmentation import described

STRATEGIES = ("one_device", "mirrored", "multi_worker")
MODES = ("train", "evaluate")
DEFAULT_CPU_REPLICAS = 2
# Above it clocks of the system overflow; 30 years are for ever.
MOST_SECONDS = 1e9


def _flag(default: Any, group: str, text: str, **rules: Any) -> Any:
    """A field that `trainers.settings.flags` makes a flag of.

    Rules of its value: `choices`, `low`, `high`. Roles, each false or true for a reason: `fixed`: it decides the
    mathematics, so a run_dir that was begun with a value refuses another. `shared`: all workers must have the same,
    besides what is fixed. `repeated`: flags.txt holds it. `distinct`: it makes a run differ from another. `compared`:
    it is shown beside the results of runs.
    """
    roles = {"fixed": False, "shared": False, "repeated": True, "distinct": True, "compared": True}
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **roles, **rules})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run. A value of None means "the model's own recipe" until `resolve` fills it in.

    Fields marked `fixed` decide the mathematics: a run_dir that was begun with one value refuses another.
    """

    strategy: str = _flag("mirrored", "devices", "how replicas are placed", choices=STRATEGIES)
    replicas: int = _flag(
        0,
        "devices",
        "replicas on this machine; 0 = every visible GPU or, with no GPU, 2 virtual CPU devices",
        low=0,
        high=1024,
    )
    startup_timeout: float = _flag(
        600.0,
        "devices",
        "seconds to wait for all workers of multi_worker; of evaluate, for the next checkpoint",
        low=1,
        high=MOST_SECONDS,
        compared=False,
    )
    step_timeout: float = _flag(
        600.0,
        "devices",
        "seconds without a finished call after which the process ends with code 75; 0 = never",
        low=0,
        high=MOST_SECONDS,
        compared=False,
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
        None,
        "model and data",
        "an embedded data set, a file or folder of your own, or one of TensorFlow Datasets",
        fixed=True,
    )
    label: str = _flag("", "model and data", "for --dataset=csv:PATH: the column to predict", fixed=True)
    data_dir: str = _flag(
        "~/tensorflow_datasets", "model and data", "where prepared data lies", distinct=False, compared=False
    )
    input: str = _flag(
        "auto",
        "model and data",
        "resident = the data set on the device, gathered in the compiled loop; stream = read by index; auto = by size",
        choices=("auto", "resident", "stream"),
        fixed=True,
    )
    image_size: int = _flag(
        0,
        "model and data",
        "height and width of images; 0 = as they are if all are alike, else 224",
        low=0,
        high=4096,
        fixed=True,
    )
    augment: str = _flag(
        "", "model and data", f"how training images are changed, words with commas: {described()}", fixed=True
    )
    document_mask: bool = _flag(
        False,
        "model and data",
        "for tokens with a separator: attention and loss do not cross from a document to the next",
        fixed=True,
    )
    batch_size: int = _flag(128, "training", "the GLOBAL batch, over all replicas", low=1, fixed=True)
    train_steps: int | None = _flag(None, "training", "optimizer updates in the whole run", low=1, shared=True)
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
    eval_every: int = _flag(100, "cadences", "steps between evaluations; 0 = at the end only", low=0, shared=True)
    checkpoint_every: int = _flag(100, "cadences", "steps between checkpoints; 0 = at the end only", low=0, shared=True)
    log_every: int | None = _flag(
        None, "cadences", "steps between lines of metrics; 0 = at the end only", low=0, shared=True
    )
    histogram_every: int = _flag(
        0,
        "cadences",
        "steps between histograms of weights and (but for multi_worker) gradients in TensorBoard; 0 = none",
        low=0,
        shared=True,
    )
    pictures_every: int = _flag(
        0,
        "cadences",
        "steps between pictures of the evaluation in TensorBoard; 0 = at the end only",
        low=0,
        shared=True,
    )
    steps_per_call: int = _flag(
        0,
        "cadences",
        "updates inside one compiled call; 0 = about a second's worth, ending at each cadence",
        low=0,
        shared=True,
    )
    keep_checkpoints: int = _flag(3, "cadences", "newest checkpoints to keep, beside the best", low=1)
    run_dir: str = _flag(
        "",
        "run",
        "everything that the run writes; default runs/<model>-<dataset>-<time>-<random digits>",
        repeated=False,
        distinct=False,
        compared=False,
    )
    mode: str = _flag(
        "train",
        "run",
        "evaluate = follow --run_dir, and evaluate each checkpoint as it comes",
        choices=MODES,
        repeated=False,
        distinct=False,
        compared=False,
    )
    resume: str = _flag(
        "auto",
        "run",
        "auto = from the newest whole checkpoint in run_dir; never = refuse a run_dir that holds one",
        choices=("auto", "never"),
        repeated=False,
        distinct=False,
        compared=False,
    )
    profile: str = _flag("", "run", "START:STOP, steps to profile", shared=True, compared=False)
    export: bool = _flag(False, "run", "write a SavedModel at the end", compared=False)
    dry_run: bool = _flag(False, "run", "print the plan and stop", repeated=False, distinct=False, compared=False)

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


def with_role(role: str, holds: bool = True) -> tuple[str, ...]:
    """Names of the flags that have a role, or with `holds=False` of those that do not."""
    return tuple(field.name for field in dataclasses.fields(Config) if field.metadata[role] == holds)


FIXED = with_role("fixed")
# What a run had of a flag that was not there yet when it began.
BEFORE_IT_WAS_THERE = {name: getattr(Config, name) for name in FIXED if getattr(Config, name) is not None}
SHARED = with_role("shared")
REPEATED = with_role("repeated")
COMPARED = with_role("compared")
NO_DIFFERENCE = with_role("distinct", holds=False)
