"""Trains a subclassed Keras 3 model in a loop of our own, compiled with tf.function under tf.distribute.

python trainers/custom_loop.py --strategy=mirrored
python trainers/custom_loop.py --strategy=mirrored --model=mlp --train_steps=500 --run_dir=runs/first
python trainers/custom_loop.py --flagfile=runs/first/flags.txt --run_dir=runs/again
python trainers/custom_loop.py --mode=evaluate --run_dir=runs/first
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above. Flags are checked before
    # TensorFlow is imported, which takes seconds; then `train` below is called.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.run.command import main

    main(__file__, __doc__)

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from models import randomness, tasks
from models.sums import Sums
from models.tasks import Task
from trainers.input.dataset import Dataset
from trainers.run import examples, freezing, initial, start, weight_groups
from trainers.run.hooks import Hooks
from trainers.run.inner_loop import Source, Update
from trainers.run.left_out import LeftOut
from trainers.run.models_loop import ModelsLoop, filled
from trainers.run.replicas import assign, first_local, on_replicas, summed
from trainers.settings import options
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.show import graphs
from trainers.show.summaries import Summaries
from trainers.use import exports
from trainers.world.devices import World


class Supervised(ModelsLoop):
    """A model, its task, an optimizer, and one update of the global batch. This is the page to change for research."""

    def __init__(self, config: Config, world: World, dataset: Dataset):
        super().__init__(config, world, dataset)
        with self.building():
            self.model, self.task = self.build_model()
            # One call on zeros: `build(shape)` leaves a subclassed model without variables.
            with options.blamed("model", config.model):
                self.model(self.example_inputs(), training=False)
            freezing.freeze(self.model, config.freeze)
            self.groups = weight_groups.groups_of(config, self.model)
            self.optimizer, self.schedules = self.groups[-1].optimizer, weight_groups.schedules_of(self.groups)
            self.average = weight_groups.average_of(config, self.model.trainable_variables, self.groups)
            self.left_out = LeftOut(config, world)
        self.vectors = weight_groups.vectors_of(self.groups, self.model.trainable_variables)  # for gradients
        self.loss_scale = self.left_out.loss_scale
        self.norm_names = ("gradient_norm", *self.left_out.norm_names)
        self.rate_names, self.models = tuple(self.schedules), {"model": self.model}
        self.optimizers = {group.name: group.optimizer for group in self.groups}
        self.averages = {"ema": self.average} if self.average else {}
        self.others = self.left_out.variables
        self.inputs = {"model": self.inputs_spec}
        self.ungraded: list[str] | None = None
        self.initial: dict[str, Any] = {}

    def build_model(self) -> tuple[keras.Model, Task]:
        """The model, which has no variables yet, and what it is trained for."""
        spec = dataclasses.replace(self.dataset.spec, loss=self.config.loss)
        return tasks.model_of(self.config.model, spec)

    def begin(self) -> Mapping[str, Any]:
        """Takes the weights that `--init_from` names; the moving average begins from them."""
        if self.config.init_from:
            self.initial = initial.begin(self.config, self.world, self.model, self.optimizers, self.variables)
            for average in self.averages.values():
                average.begin_anew()
        return {"initial": self.initial} if self.initial else {}

    @property
    def sums(self) -> Sums:
        """The loss and the metrics of training."""
        return Sums(self.task.metrics)

    # One update of the global batch -----------------------------------------------------------------------------

    def losses(self, inputs: Any, targets: Any, outputs: Any) -> tf.Tensor:
        """The loss of each example, `[batch]`, float32: the task's. `inputs`: as the data set prepares them."""
        return self.task.losses(targets, outputs)

    def compared(self, targets: Any, outputs: Any, first: tf.Tensor) -> tuple[Any, Any]:
        """Targets and outputs as loss and metrics take them, of a part from position `first` on: here as they are."""
        return targets, outputs

    def gradients_of_part(self, features: Any, step: tf.Tensor, first: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Forward and backward pass over a part of the global batch, from its example `first` on: gradients, sums.

        The loss is divided by the *global* batch, so the gradients of all parts and replicas add up to that of the
        batch. A penalty (`model.losses`) is one for each part, so it is divided by their number.
        """
        config, model = self.config, self.model
        parts = self.world.replicas * config.accumulate
        with tf.name_scope("input"):
            inputs, targets = self.dataset.prepare(features)
        with freezing.tape_of(self.weights) as tape, randomness.at(config.seed, step, first):
            outputs = model(self.task.inputs(inputs), training=True)
            with tf.name_scope("loss"):
                targets, outputs = self.compared(targets, outputs, first)
                losses = self.losses(inputs, targets, outputs)
                penalty = tf.add_n(model.losses) / parts if model.losses else tf.constant(0.0)
                loss = tf.reduce_sum(losses) / config.batch_size + tf.cast(penalty, tf.float32)
                scaled = loss * self.loss_scale.factor if self.loss_scale else loss
        weights = self.weights
        with tf.name_scope("gradients"):
            found = tape.gradient(scaled, weights)
            self.ungraded = [w.path for w, g in zip(weights, found, strict=True) if g is None]
            gradients = filled(found, weights)
            if self.loss_scale:
                gradients = [gradient / self.loss_scale.factor for gradient in gradients]
        with tf.name_scope("metrics"):
            sums = self.sums.of_examples(targets, outputs, losses)
            of_penalty = tf.one_hot(0, self.sums.width) * penalty * config.batch_size
            return gradients, sums + of_penalty if model.losses else sums

    def vectors_of_part(self, *part: Any) -> tuple[list[tf.Tensor], tf.Tensor]:
        """`gradients_of_part`, the gradients as a few vectors."""
        gradients, sums = self.gradients_of_part(*part)
        with tf.name_scope("gradients"):
            return self.vectors.pack(gradients), sums

    def replica_gradients(
        self, compute: Callable, source: Source, feed: Any, order: Any, step: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """In a replica: its share's gradients, summed over all replicas, then clipped. Also the sums and the norm.

        `compute`: `vectors_of_part`, compiled or not; gradients are vectors here, of which `self.vectors` knows what is
        where. Clipping follows the sum: clipped before it, the result would depend on the number of replicas.
        """
        config, gradients, sums = self.config, None, None
        for part in range(config.accumulate):
            # One part after the other: together they would need the memory that accumulation saves.
            with tf.control_dependencies([] if part == 0 else [*gradients, sums]):
                with tf.name_scope("input"):
                    features, _, first = source.part(feed, order, step, part)
                more, more_sums = compute(features, step, first)
            gradients = more if part == 0 else [a + b for a, b in zip(gradients, more, strict=True)]
            sums = more_sums if part == 0 else sums + more_sums
        with tf.name_scope("all_reduce"):
            *gradients, sums = summed([*gradients, sums])
        with tf.name_scope("clip"):
            norm = tf.linalg.global_norm(gradients)
            if config.clip_norm:
                factor = tf.minimum(1.0, config.clip_norm / tf.maximum(norm, 1e-30))
                gradients = [gradient * factor for gradient in gradients]
        return gradients, sums, norm

    def replica_displace(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """In a replica: moves the weights to where a second gradient is taken. Returns the weights that they were."""
        weights, gradients = [tf.identity(v) for v in self.weights], self.vectors.unpack(gradients)
        perturbation = self.optimizer.perturbation(gradients, tf.linalg.global_norm(gradients))
        assign(self.weights, [w + e for w, e in zip(weights, perturbation, strict=True)])
        return weights

    def replica_update(self, gradients: list[tf.Tensor]) -> None:
        """In a replica: applies gradients that are the same on all replicas."""
        weight_groups.apply_vectors(self.groups, gradients)
        if self.average:
            with tf.name_scope("ema"):
                self.average.update()

    def first_gradients(self, gradients: Sequence[Any]) -> list[tf.Tensor]:
        """Outside of replicas: the gradient of each weight, on this process's first device, for histograms."""
        return self.vectors.unpack([first_local(self.world.strategy, vector) for vector in gradients])

    def make_update(self, source: Source) -> Callable[[Any, Any, tf.Tensor], Update]:
        """One update: gradients of the global batch, a second time where the optimizer asks for it, then the step."""
        strategy, compute = self.world.strategy, self.compiled(self.vectors_of_part)
        gradients_of_batch = on_replicas(strategy, lambda *batch: self.replica_gradients(compute, source, *batch))
        displace = on_replicas(strategy, self.replica_displace)
        put_back = on_replicas(strategy, lambda values: assign(self.weights, values))
        apply = on_replicas(strategy, self.replica_update)

        def update(feed: Any, order: Any, step: tf.Tensor) -> Update:
            gradients, sums, norms = gradients_of_batch(feed, order, step)
            if hasattr(self.optimizer, "perturbation"):
                weights = displace(gradients)
                gradients, _, _ = gradients_of_batch(feed, order, step)
                put_back(weights)
            norm, sums = first_local(strategy, norms), first_local(strategy, sums)
            made, finite = self.left_out.decide(norm, sums[0])
            if made:
                apply(gradients)
            applied = self.first_gradients(gradients) if self.config.histogram_every else ()
            return Update(sums, (norm, *self.left_out.counts()), finite, applied)

        return update

    def check_traced(self) -> None:
        """Refuses a model of which nothing is trained, and names weights that are not.

        Raises:
          BadConfiguration: no weight gets a gradient.
        """
        super().check_traced()
        names, count = self.ungraded or [], len(self.weights)
        if len(names) == count:
            what = f"none of the {count} weights of the model gets a gradient" if count else "the model has no weight"
            raise BadConfiguration(
                f"--model {self.config.model}: {what}, so nothing would be trained; let the loss depend on the weights "
                "through operations with a gradient, not argmax, round or a cast to whole numbers"
            )
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            logging.warning("the loss does not depend on %s: no gradient trains it", shown)

    def rates(self, step: tf.Tensor) -> Sequence[tf.Tensor]:
        """The learning rate, and those of the groups of `--optimizer_for`; without factors.

        Optimizers count the updates that were made.
        """
        made = step - tf.cast(self.left_out.count(), step.dtype)
        return tuple(schedule(made) for schedule in self.schedules.values())

    def gradients_of(self, features: Any, step: tf.Tensor, first: tf.Tensor) -> Sequence[tf.Tensor]:
        """Those of `gradients_of_part`."""
        return self.gradients_of_part(features, step, first)[0]

    # Evaluation -------------------------------------------------------------------------------------------------

    @property
    def eval_sums(self) -> Sums:
        """The metrics of training and those that are for evaluation alone."""
        return Sums(dict(self.task.metrics) | dict(self.task.eval_metrics))

    @property
    def eval_names(self) -> tuple[str, ...]:
        """The loss and the metrics of an evaluation."""
        return self.eval_sums.names

    @property
    def best(self) -> tuple[str, str]:
        """What the task says."""
        return self.task.best_metric, self.task.best_mode

    def make_evaluation(self, source: Source) -> tf.types.experimental.PolymorphicFunction:
        """One pass over the eval split. The loss is the task's alone, without penalties.

        Examples that fill up the last batch have weight 0.
        """
        sums_of = self.eval_sums

        def sums_of_part(features: Any, weights: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
            inputs, targets = self.dataset.prepare(features)
            outputs = self.model(self.task.inputs(inputs), training=False)
            return sums_of.of_examples(targets, outputs, self.task.loss(targets, outputs), weights)

        return self.evaluation_of(source, sums_of.width, sums_of_part, sums_of.values)

    # What people see, and use -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """The model and its recipe."""
        config, training = self.config, super().describe()["training"]
        return {
            "model": f"{config.model}: {self.model.count_params():,} parameters, {config.precision}",
            "training": "; ".join([training, *weight_groups.words(config)]),
            **initial.rows(self.initial),
        }

    def example_inputs(self) -> Any:
        """One example of zeros, as the model takes it."""
        return self.task.inputs(self.dataset.zeros())

    def inputs_spec(self, batch: int | None = None) -> tf.TensorSpec:
        """The shape of a batch of the data set's prepared inputs."""
        spec = self.dataset.spec
        return tf.TensorSpec([batch, *spec.input_shape], spec.input_dtype, name="inputs")

    def forward_graphs(self) -> dict[str, tf.Graph]:
        """The forward pass over a replica's part of the batch."""
        return {"forward": graphs.forward(self.model, self.inputs_spec(self.examples_of_part), self.task.inputs)}

    def example(self, model: str) -> Any:
        """As `example_inputs`."""
        return self.example_inputs()

    def flops_of_step(self, forward: dict[str, tf.Graph]) -> int:
        """The backward pass costs twice the forward pass. Source: Kaplan et al., "Scaling laws", 2020, section 2.1."""
        passes = 2 if hasattr(self.optimizer, "perturbation") else 1
        return 3 * passes * graphs.flops(forward["forward"]) * self.world.replicas * self.config.accumulate

    def show(self, summaries: Summaries, step: int) -> None:
        """What the model does in the evaluation, as its task shows it."""
        examples.show(summaries, step, self.model, self.task, self.dataset, self.examples_of_part)

    def final_facts(self) -> dict[str, Any]:
        """How many updates were left out."""
        return self.left_out.facts()

    def export(self, path: Path) -> None:
        """Writes the model as `--export` names, see `trainers.use.exports`: what answers in the user's own terms."""
        model, task = tasks.model_of(self.config.model, self.dataset.spec)
        model(self.example_inputs(), training=False)
        with self.evaluated():
            for copy, weight in zip(model.variables, self.model.variables, strict=True):
                copy.assign(weight.numpy())
        exports.write(path, self.config.export, model, task, self.dataset)

    def export_facts(self) -> Mapping[str, Any]:
        """How examples look and what answers are."""
        return exports.facts(self.task, self.dataset)


def train(config: Config, hooks: Hooks | None = None) -> start.Summary:
    """Runs or resumes the run that `config` (resolved) describes.

    Raises:
      BadConfiguration, Diverged, PeerLost, Preempted: see `trainers.settings.exit_codes`.
    """
    return start.train(config, Supervised, hooks)
