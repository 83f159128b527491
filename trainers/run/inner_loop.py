"""The seam: what a trainer script hands to the outer loop.

The inner loop is what one update of the global batch computes, compiled; a script in `trainers/` holds it on one page.
The outer loop (`trainers.run`) restores, calls, reports, evaluates, saves and ends, and knows no more of a run than
what is here. Whoever writes another algorithm writes another `InnerLoop`; checkpoints, exact resume, TensorBoard,
several workers and `launch/prove.py` come with the outer loop.
"""

import abc
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import tensorflow as tf

from models.sums import Sums
from trainers.input.dataset import Dataset
from trainers.input.source import Batches as Source
from trainers.settings.config import Config
from trainers.show.summaries import Summaries
from trainers.world.devices import World


class Update(NamedTuple):
    """What one update of the global batch returns, outside of the replicas.

    `sums`: `[loop.sums.width]`, float32, over the whole global batch. `norms`: a scalar for each of `loop.norm_names`.
    `finite`: whether the run can go on; at the first update that is not, it ends with code 65. `gradients`: those that
    were applied, one for each of `loop.weights` or none, for histograms.
    """

    sums: tf.Tensor
    norms: tuple[tf.Tensor, ...]
    finite: tf.Tensor
    gradients: Sequence[Any] = ()


class InnerLoop(abc.ABC):
    """Models, optimizers and the update that trains them. Built inside the strategy's scope, once for a run.

    With `--accumulate=auto` its number is found after that: `config.parts` is final when `make_update` is called last.
    """

    # Names in metrics.jsonl and TensorBoard of what `rates` and `Update.norms` hold.
    rate_names: ClassVar[tuple[str, ...]] = ("learning_rate",)
    norm_names: ClassVar[tuple[str, ...]] = ("gradient_norm",)

    # Attributes or properties of a loop. The running sums of a training step: the loss, the number of examples and the
    # metrics' statistics; the names of the values of an evaluation; the one of these by which the best checkpoint is
    # kept, with `max` or `min`.
    sums: Sums
    eval_names: tuple[str, ...]
    best: tuple[str, str]

    def __init__(self, config: Config, world: World, dataset: Dataset):
        self.config, self.world, self.dataset = config, world, dataset
        self.traces = 0
        # Facts for run.json of what the run has found itself, see `trainers.run.parts`.
        self.found: dict[str, Any] = {}

    # What a run is made of --------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def variables(self) -> dict[str, Any]:
        """Every variable of all models, optimizers and the loop itself, by a unique name: what a checkpoint holds."""

    @property
    @abc.abstractmethod
    def weights(self) -> Sequence[Any]:
        """The Keras variables that are trained, of all models: their norms and histograms are reported."""

    def begin(self) -> Mapping[str, Any]:
        """Called where no checkpoint is restored, before the first step: may set values. Returns facts for run.json."""
        return {}

    # What is compiled -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def make_update(self, source: Source) -> Callable[[Any, Any, tf.Tensor], Update]:
        """The function `(feed, order, step) -> Update` of one update, called inside the compiled loop.

        It stands outside of the replicas, and calls `trainers.run.replicas.on_replicas` for what each replica does.
        `step`: that of data and noise. It is the update's number, but in a run that has gone back (`--rewind`).
        """

    @abc.abstractmethod
    def rates(self, step: tf.Tensor) -> Sequence[tf.Tensor]:
        """A scalar for each of `rate_names`, as update number `step` (int64, from 0) has it."""

    @abc.abstractmethod
    def make_evaluation(self, source: Source) -> tf.types.experimental.PolymorphicFunction:
        """The compiled evaluation `() -> [len(eval_names)]`, float64: one pass over the eval split."""

    def check_traced(self) -> None:  # noqa: B027 - a loop need not check
        """Called once the step is traced. Raises BadConfiguration where what was traced would train nothing."""

    def gradients_of(self, features: Any, step: tf.Tensor, first: tf.Tensor) -> Sequence[tf.Tensor]:
        """In a replica: all gradients over a part of a batch, as `Source.part` gives it, before any reduction.

        `launch/prove.py` computes them eagerly, in a graph and under XLA. NotImplementedError: it has none.
        """
        raise NotImplementedError

    def suspects(self) -> Iterable[Any]:
        """Layers whose result depends on the number of replicas, each with a sentence as its `str`."""
        return ()

    @property
    def metric_variables(self) -> Mapping[str, Any]:
        """Variables of metrics that models hold, by name: no step may change them, since nothing sums or saves them."""
        return {}

    # What people see --------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def num_parameters(self) -> int:
        """Elements of all variables of all models."""

    @abc.abstractmethod
    def describe(self) -> dict[str, str]:
        """Rows of the plan that a run prints first: the models, and how they are trained."""

    @abc.abstractmethod
    def forward_graphs(self) -> dict[str, tf.Graph]:
        """The forward pass of each model over a replica's part of the batch, by name; the first is shown first."""

    @property
    @abc.abstractmethod
    def layer_names(self) -> set[str]:
        """Names of all models and of the layers in them, by which graphs are made readable."""

    def flops_of_step(self, forward: Mapping[str, tf.Graph]) -> int:
        """Floating-point operations of the models in one update of the global batch; 0 where they are not known."""
        return 0

    def show(self, summaries: Summaries, step: int) -> None:  # noqa: B027 - a loop need not draw
        """Draws what the models do, for TensorBoard's Images and Text."""

    # What happens around it -------------------------------------------------------------------------------------

    def evaluated(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the weights are those that are evaluated and exported: a moving average, for instance."""
        return contextlib.nullcontext()

    def final_facts(self) -> dict[str, Any]:
        """What run.json says of the loop at the end."""
        return {}

    @abc.abstractmethod
    def export(self, path: Path) -> None:
        """Writes what is used afterwards, a SavedModel for instance, to a path that is not there.

        To a folder the outer loop adds `metadata.json`.
        """

    def export_facts(self) -> Mapping[str, Any]:
        """What the metadata says of the loop beside the run: how inputs look, and what the outputs mean."""
        return {}
