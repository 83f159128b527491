"""Trains an encoder of images without labels: two changed views of an image must find each other among all views.

python trainers/contrastive_loop.py --strategy=mirrored
python trainers/contrastive_loop.py --dataset=cifar10 --model=resnet18 --batch_size=1024 --train_steps=20000

--batch_size counts views, two of each image. The evaluation is a linear probe: least squares on what the encoder gives.

Source: Chen et al., "A simple framework for contrastive learning of visual representations" (SimCLR), ICML 2020.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from trainers.settings import augmentation
from trainers.settings.config import Config, flag
from trainers.settings.data_cards import data_card
from trainers.settings.exit_codes import BadConfiguration


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """The flags of contrastive training."""

    loop: ClassVar[str] = "contrastive"
    # Negatives are the whole batch: parts of it, computed one after another, would not see each other.
    left_out: ClassVar[frozenset[str]] = frozenset({"loss", "accumulate", "label", "document_mask"})

    augment: str | None = flag(
        None, "model and data", f"how views are made, words with commas: {augmentation.described()}", fixed=True
    )
    batch_size: int = flag(256, "training", "views in the GLOBAL batch, two of each image", low=4, fixed=True)
    features: int = flag(128, "contrastive", "width of what the encoder gives: its last layer", low=1, fixed=True)
    projection: int = flag(64, "contrastive", "width in which views are compared", low=1, fixed=True)
    temperature: float = flag(0.2, "contrastive", "by which cosines are divided", low=1e-3, high=1e3, fixed=True)

    views: ClassVar[int] = 2
    needs_images: ClassVar[bool] = True

    def defaults(self) -> Mapping[str, Any]:
        """The model's, for twice as many steps. Words of `--augment` fit photographs, or digits."""
        recipe = dict(super().defaults())
        dataset = self.dataset or recipe["dataset"]
        if data_card(dataset).images is False:
            raise BadConfiguration(f"--dataset {dataset} has no images, of which views are made; take one that has")
        recipe["augment"] = "crop,erase=0.5" if dataset == "digits" else "inception,flip,randaugment"
        return recipe | {"train_steps": 2 * recipe["train_steps"], "accumulate": 1}

    def check(self) -> None:
        """Views must differ, and hold one image each."""
        words = augmentation.parse(self.augment)
        if mixed := [word for word in words if word in augmentation.MIXING]:
            raise BadConfiguration(
                f"--augment {mixed[0]} blends an image with its neighbour, here itself; leave it out"
            )
        if not words:
            raise BadConfiguration("--augment is empty, and both views of an image would be the same; name a word")


if __name__ == "__main__":
    from trainers.run.command import main

    main(__file__, __doc__, Settings)

import keras
import numpy as np
import tensorflow as tf

from models import linear_probe, tasks
from models.contrastive import Contrastive, among_all
from models.losses import CrossEntropy
from models.metrics import Accuracy
from models.tasks import Task
from trainers.custom_loop import Supervised
from trainers.input.batches import batches
from trainers.run import examples, start
from trainers.run.hooks import Hooks
from trainers.run.inner_loop import Source
from trainers.run.replicas import gathered
from trainers.show import drawings
from trainers.show.summaries import Summaries
from trainers.use import exports

# Examples of the training split that the probe is fitted to, at most; and its penalty, in mean variances of a feature.
MOST_FITTED, RIDGE = 50_000, 1e-3


class Views(Supervised):
    """The supervised page with another model, another loss and another evaluation: labels are for the probe alone."""

    eval_names = ("probe_accuracy", "probe_squared_error")
    best = ("probe_accuracy", "max")

    def build_model(self) -> tuple[keras.Model, Task]:
        """The encoder with its projection head; the task is to find the other view of an image among all views."""
        if self.config.jit == "on" and self.world.replicas > 1:
            raise BadConfiguration("--jit=on cannot compile a loss over several replicas; use --jit=auto or 1 replica")
        encoder, inputs = self.build_encoder()
        model = Contrastive(encoder, self.config.features, self.config.projection)
        return model, Task(CrossEntropy().call, {"pair_accuracy": Accuracy("pair_accuracy")}, inputs=inputs)

    def build_encoder(self) -> tuple[keras.Model, Any]:
        """The model that the flag names, with features in place of classes; and what turns images into its inputs."""
        spec = self.dataset.spec
        if spec.target_shape or not spec.num_classes:
            raise BadConfiguration(
                f"--dataset {self.config.dataset} has targets without a class each, which the probe needs; take another"
            )
        spec = dataclasses.replace(spec, num_classes=self.config.features)
        encoder, task = tasks.model_of(self.config.model, spec)
        return encoder, task.inputs

    def compared(self, targets: Any, outputs: tf.Tensor, first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Algorithm 1 of the paper: each view of this replica against the views of all replicas; no labels.

        Each replica sums the losses of its own views, over the number of all. A view's gradient comes from the losses
        of all replicas, and `gathered` sums it over them.
        """
        return among_all(outputs, gathered(outputs), first, self.config.temperature)

    @property
    def uses_xla(self) -> bool:
        """As the supervised page says, but on one replica alone: XLA cannot compile what crosses them."""
        return self.world.replicas == 1 and super().uses_xla

    # The linear probe -------------------------------------------------------------------------------------------

    def make_evaluation(self, source: Source) -> tf.types.experimental.PolymorphicFunction:
        """A linear probe of the features: fitted to the training split as it is, measured on the eval split."""
        strategy, spec, width = self.world.strategy, self.dataset.spec, self.config.features
        fitted = batches(strategy, self.dataset.train.sample(MOST_FITTED), source.batch_size, None)
        fitted.start(0)

        def encoded(rows: Source, feed: Any, step: tf.Tensor) -> tuple[tf.Tensor, ...]:
            share, weights, _ = rows.part(feed, rows.order(step, step + 1), step, 0)
            images, labels = self.dataset.prepare(share)
            return self.model.encoder(self.task.inputs(images), training=False), labels, weights

        def products(feed: Any, step: tf.Tensor) -> tf.Tensor:
            features, labels, weights = encoded(fitted, feed, step)
            return linear_probe.products(features, labels, spec.num_classes, weights)

        def errors(feed: Any, step: tf.Tensor, probe: tf.Tensor) -> tf.Tensor:
            return linear_probe.errors(*encoded(source, feed, step), probe)

        @tf.function(input_signature=[])
        def evaluate() -> tf.Tensor:
            sums = tf.zeros([width + 1, width + 1 + spec.num_classes], tf.float64)
            for step in tf.range(-(-fitted.size // fitted.batch_size), dtype=tf.int64):
                sums += strategy.reduce("SUM", strategy.run(products, args=(fitted.feed()[0], step)), axis=None)
            probe, wrong = linear_probe.solution(sums, RIDGE), tf.zeros([3], tf.float64)
            for step in tf.range(-(-source.size // source.batch_size), dtype=tf.int64):
                wrong += strategy.reduce("SUM", strategy.run(errors, args=(source.feed()[0], step, probe)), axis=None)
            return wrong[:2] / wrong[2]

        return evaluate

    # What people see, and use -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """The supervised page's rows, and how views are made."""
        config = self.config
        views = (
            f"{config.batch_size // 2} images × 2 views a step: {config.augment}; temperature {config.temperature:g}"
        )
        return super().describe() | {"views": views}

    def show(self, summaries: Summaries, step: int) -> None:
        """The features of the eval split, in their two main directions."""
        features, labels = [], []
        for share in self.dataset.eval.examples().take(examples.MOST_EXAMPLES).batch(self.examples_of_part):
            images, classes = self.dataset.prepare(share)
            features.append(self.model.encoder(self.task.inputs(images), training=False).numpy())
            labels.append(classes.numpy())
        drawings.show_features(summaries, step, np.concatenate(features), np.concatenate(labels))

    def export(self, path: Path) -> None:
        """Writes the encoder: images → `features [batch, features]`; `serve_prepared` takes prepared ones."""
        encoder, inputs = self.build_encoder()
        encoder(self.example_inputs(), training=False)
        with self.evaluated():
            for copy, weight in zip(encoder.variables, self.model.encoder.variables, strict=True):
                copy.assign(weight.numpy())
        exports.write_features(path, self.config.export, encoder, inputs, self.dataset)


def train(config: Settings, hooks: Hooks | None = None) -> start.Summary:
    """Runs or resumes the run that `config` (resolved) describes."""
    return start.train(config, Views, hooks)
