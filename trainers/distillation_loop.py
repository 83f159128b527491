"""Trains a small model to answer as a trained one does: knowledge distillation.

python trainers/custom_loop.py --model=resnet --run_dir=runs/teacher
python trainers/distillation_loop.py --teacher=runs/teacher --model=mlp --strategy=mirrored

Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015, section 2.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from trainers.record import carriers, reading
from trainers.settings.config import Config, flag
from trainers.settings.exit_codes import BadConfiguration


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """The flags of supervised training, for the student, and what is said of the teacher."""

    loop: ClassVar[str] = "distillation"

    teacher: str = flag(
        "", "distillation", "run_dir of a trained model: its best checkpoint is the teacher", fixed=True, path="stored"
    )
    temperature: float = flag(
        4.0, "distillation", "by which logits are divided: above 1 small probabilities count", low=0.01, fixed=True
    )
    teacher_share: float = flag(
        0.9, "distillation", "of the teacher in the loss; the rest is that of the labels", low=0, high=1, fixed=True
    )

    def check(self) -> None:
        """There is a teacher, and examples have classes."""
        if not self.teacher:
            raise BadConfiguration("--teacher is not given; name the run_dir of a trained model")
        if self.task == "regression" or self.document_mask:
            what = "--document_mask" if self.document_mask else f"--model {self.model}"
            raise BadConfiguration(f"{what} has targets without a class each; the teacher's logits do not fit them")

    def check_files(self) -> None:
        """The teacher has a checkpoint."""
        super().check_files()
        if "://" not in self.teacher and not reading.checkpoint_steps(Path(self.teacher)):
            raise BadConfiguration(f"--teacher {self.teacher} holds no run with a checkpoint; train it first")


if __name__ == "__main__":
    from trainers.run.command import main

    main(__file__, __doc__, Settings)

import tensorflow as tf

from trainers.custom_loop import Supervised
from trainers.input.dataset import Dataset
from trainers.run import start, trained
from trainers.run.hooks import Hooks
from trainers.show import graphs
from trainers.world.devices import World


class Distilled(Supervised):
    """Supervised training whose loss listens to a teacher too. Whatever `custom_loop.py` does, this does."""

    def __init__(self, config: Settings, world: World, dataset: Dataset):
        if not dataset.spec.num_classes:  # of a model of the user's own the data alone tell
            raise BadConfiguration(f"--dataset {config.dataset} has targets without a class each; take another")
        super().__init__(config, world, dataset)
        with world.strategy.scope():
            self.teacher = trained.model_of("--teacher", carriers.folder_of(config.teacher), config, dataset, world)
        # Checkpoints hold it, so a run goes on with the teacher that it began with.
        self.models["teacher"] = self.teacher.model

    def losses(self, inputs: Any, targets: Any, outputs: Any) -> tf.Tensor:
        """Of each example, `[batch]`: a mean of the divergence from the teacher and of the loss of the labels.

        Gradients of softened logits shrink with the square of the temperature, by which the divergence is multiplied.
        """
        share, hardness = self.config.teacher_share, 1 / self.config.temperature
        said = self.teacher.model(self.teacher.task.inputs(inputs), training=False)
        softened = tf.nn.softmax(tf.cast(said, tf.float32) * hardness)
        logs = tf.nn.log_softmax(tf.cast(said, tf.float32) * hardness)
        own = tf.nn.log_softmax(tf.cast(outputs, tf.float32) * hardness)
        divergence = tf.reduce_sum(tf.stop_gradient(softened) * (tf.stop_gradient(logs) - own), axis=-1)
        divergence = tf.reduce_mean(tf.reshape(divergence, [tf.shape(divergence)[0], -1]), axis=1)
        labels = super().losses(inputs, targets, outputs)
        return share * divergence / hardness**2 + (1 - share) * labels

    def describe(self) -> dict[str, str]:
        """The student, the teacher and the recipe."""
        rows = super().describe()
        model, config = self.teacher.model, self.config
        teacher = f"{model.name}: {model.count_params():,} parameters, of {config.teacher}"
        softness = f"temperature {config.temperature:g}, {config.teacher_share:.0%} of the loss"
        return {"model": rows.pop("model"), "teacher": f"{teacher}; {softness}", **rows}

    def forward_graphs(self) -> dict[str, tf.Graph]:
        """Those of the student and of the teacher."""
        spec = self.inputs_spec(self.examples_of_part)
        teacher = graphs.forward(self.teacher.model, spec, self.teacher.task.inputs)
        return super().forward_graphs() | {"teacher": teacher}

    def flops_of_step(self, forward: dict[str, tf.Graph]) -> int:
        """The student's, and the teacher's forward pass."""
        passes = 2 if hasattr(self.optimizer, "perturbation") else 1
        teacher = passes * graphs.flops(forward["teacher"]) * self.world.replicas * self.config.accumulate
        return super().flops_of_step(forward) + teacher


def train(config: Settings, hooks: Hooks | None = None) -> start.Summary:
    """Runs or resumes the run that `config` (resolved) describes.

    Raises:
      BadConfiguration, Diverged, PeerLost, Preempted: see `trainers.settings.exit_codes`.
    """
    return start.train(config, Distilled, hooks)
