"""Trains a generator of images with labels against a critic: a Wasserstein GAN with gradient penalty.

python trainers/adversarial_loop.py --strategy=mirrored
python trainers/adversarial_loop.py --dataset=images:DIR --image_size=32 --train_steps=20000

Source: Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017, algorithm 1.
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.cards import Recipe
from trainers.settings.augmentation import mixes, parse
from trainers.settings.config import SUPERVISED_ALONE, Config, flag
from trainers.settings.data_cards import data_card
from trainers.settings.exit_codes import BadConfiguration


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """The flags of this loop."""

    loop, task = "adversarial", "classification"
    left_out = SUPERVISED_ALONE
    batch_size: int = flag(160, "training", "the GLOBAL batch of all critic steps of an update", low=1, fixed=True)
    critic_steps: int = flag(5, "algorithm", "critic steps before each generator step", low=1, high=100, fixed=True)
    penalty: float = flag(10.0, "algorithm", "weight of the gradient penalty", low=0, fixed=True)

    def defaults(self) -> Mapping[str, Any]:
        recipe = Recipe(1600, "adam,beta_1=0.0,beta_2=0.9", 1e-3, "linear", ema=0.99, log_every=50)
        return dataclasses.asdict(recipe) | {"dataset": "digits"}

    @property
    def parts(self) -> int:
        return self.critic_steps

    def check(self) -> None:
        if data_card(self.dataset).images is False:
            raise BadConfiguration(f"--dataset {self.dataset} has no images; take digits, images:DIR or cifar10")
        if self.precision == "float16":
            raise BadConfiguration("--precision float16 needs a loss scale, which this loop has not; take bfloat16")
        if mixes(parse(self.augment)):
            raise BadConfiguration(f"--augment {self.augment} blends labels, and an image has one here; leave it out")


if __name__ == "__main__":
    from trainers.run.command import main

    main(__file__, __doc__, Settings)

import tensorflow as tf

from models import frechet, randomness
from models.adversarial import Critic, Generator, slope_norms
from models.sums import Sums
from trainers.input.dataset import Dataset
from trainers.run import saved_model, start, weight_groups
from trainers.run.hooks import Hooks
from trainers.run.inner_loop import Source, Update
from trainers.run.models_loop import ModelsLoop, gradients
from trainers.run.replicas import first_local, on_replicas, summed
from trainers.show import drawings
from trainers.show.summaries import Summaries
from trainers.world.devices import World


class Adversarial(ModelsLoop):
    """A generator and a critic, with an optimizer each. Lines are those of the paper's algorithm 1."""

    norm_names = ("critic_gradient_norm", "generator_gradient_norm")
    sums = Sums.of_means("generator_loss", "gradient_penalty", "wasserstein")
    eval_names = ("wasserstein", "frechet")
    best = ("frechet", "min")

    def __init__(self, config: Settings, world: World, dataset: Dataset):
        super().__init__(config, world, dataset)
        self.count = config.batch_size // config.critic_steps  # examples of a step of either, over all replicas
        self.shape, self.classes = dataset.spec.input_shape, dataset.spec.num_classes
        what = f"--dataset {config.dataset}: examples of shape {self.shape}"
        if len(self.shape) != 3:
            raise BadConfiguration(f"{what} are no images; give images [size, height, width, channels]")
        if self.shape[0] % 4 or self.shape[1] % 4:
            raise BadConfiguration(f"{what} have sides that 4 does not divide; set --image_size=32, or give others")
        with self.building():
            self.generator, self.critic = Generator(self.shape, self.classes), Critic(self.shape, self.classes)
            self.models = {"generator": self.generator, "critic": self.critic}
            self.inputs = {name: model.inputs_spec for name, model in self.models.items()}
            self.groups = {}
            for name, steps in {"generator": 1, "critic": config.critic_steps}.items():
                self.models[name](self.example(name))
                self.groups[name] = weight_groups.group_of(config, self.models[name].trainable_variables, steps)
            self.optimizers = {f"{name}_optimizer": group.optimizer for name, group in self.groups.items()}
            self.averages = weight_groups.averages_of(config, self.generator, self.groups["generator"])

    def generated(self, labels: tf.Tensor, stream: str, training: bool = False) -> tf.Tensor:
        """An image for each label, from noise of its own: that of the current place in the run, and of this stream."""
        noise = randomness.normal([tf.shape(labels)[0], self.generator.latent], f"{stream}/noise")
        return self.generator((noise, labels), training=training)

    def critic_gradients(self, features: Any, step: tf.Tensor, first: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """A critic step over a part of the batch, from its example `first` on: gradients, sums. Lines 4 to 8."""
        images, labels = self.dataset.prepare(features)
        with randomness.at(self.config.seed, step, first):
            fakes = self.generated(labels, "critic", training=True)
            share = randomness.uniform([tf.shape(labels)[0], 1, 1, 1], "critic/share")
        with tf.GradientTape() as tape:
            norms = slope_norms(self.critic, share * images + (1 - share) * fakes, labels)
            penalties = self.config.penalty * tf.square(norms - 1)
            distances = self.critic((images, labels), training=True) - self.critic((fakes, labels), training=True)
            loss = tf.reduce_sum(penalties - distances) / self.count
        columns = penalties - distances, tf.ones_like(norms), tf.zeros_like(norms), penalties, distances
        return gradients(tape, loss, self.critic.trainable_variables), tf.reduce_sum(tf.stack(columns), axis=1)

    def generator_gradients(self, step: tf.Tensor, first: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The generator step, from its example `first` on: gradients, sums. Lines 10 and 11."""
        with randomness.at(self.config.seed, step, first), tf.GradientTape() as tape:
            labels = tf.cast(self.classes * randomness.uniform([self.examples_of_part], "generator/labels"), tf.int64)
            losses = -self.critic((self.generated(labels, "generator", training=True), labels), training=True)
            loss = tf.reduce_sum(losses) / self.count
        sums = tf.one_hot(2, self.sums.width) * tf.reduce_sum(losses) * self.config.critic_steps  # a mean of one step
        return gradients(tape, loss, self.generator.trainable_variables), sums

    def make_update(self, source: Source) -> Callable[[Any, Any, tf.Tensor], Update]:
        """One update: `critic_steps` steps of the critic, each with examples of its own, and one of the generator."""
        of_critic, of_generator = self.compiled(self.critic_gradients), self.compiled(self.generator_gradients)

        def step_of(model: str, found: list[tf.Tensor], sums: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
            with tf.name_scope("all_reduce"):
                *found, sums = summed([*found, sums])
            self.groups[model].apply(found, self.models[model].trainable_variables)
            return found, sums

        def replica_update(feed: Any, order: Any, step: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor, Any]:
            total = tf.zeros([self.sums.width])
            for number in range(self.config.critic_steps):
                features, _, first = source.part(feed, order, step, number)
                critic, sums = step_of("critic", *of_critic(features, step, first))
                total += sums
            generator, sums = step_of("generator", *of_generator(step, first))
            for average in self.averages.values():
                average.update()
            return [*generator, *critic], total + sums, [tf.linalg.global_norm(each) for each in (critic, generator)]

        def update(feed: Any, order: Any, step: tf.Tensor) -> Update:
            applied, sums, norms = on_replicas(self.world.strategy, replica_update)(feed, order, step)
            sums, *norms = (first_local(self.world.strategy, value) for value in (sums, *norms))
            return Update(sums, tuple(norms), tf.reduce_all(tf.math.is_finite([sums[0], *norms])), applied)

        return update

    def gradients_of(self, features: Any, step: tf.Tensor, first: tf.Tensor) -> Sequence[tf.Tensor]:
        return self.critic_gradients(features, step, first)[0] + self.generator_gradients(step, first)[0]

    def rates(self, step: tf.Tensor) -> Sequence[tf.Tensor]:
        return (self.groups["generator"].schedule(step),)

    def make_evaluation(self, source: Source) -> tf.types.experimental.PolymorphicFunction:
        """The eval split against images generated with its labels: what the critic says, and the Fréchet distance."""
        distance = frechet.FrechetDistance(self.shape)

        def sums_of(features: Any, weights: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
            images, labels = self.dataset.prepare(features)
            with randomness.at(self.config.seed, 0, position):
                fakes = self.generated(labels, "evaluation")
            scores = self.critic((images, labels)) - self.critic((fakes, labels))
            total = tf.cast([tf.reduce_sum(scores * weights)], tf.float64)
            return tf.concat([total, distance.sums(images, fakes, weights)], axis=0)

        def values(sums: tf.Tensor) -> tf.Tensor:
            return tf.stack([sums[0] / source.size, distance.result_of(sums[1:])])

        return self.evaluation_of(source, 1 + distance.width, sums_of, values)

    def show(self, summaries: Summaries, step: int) -> None:
        """Ten samples of each class, always from the same noise."""
        labels = tf.range(min(self.classes, drawings.MOST_CLASSES), dtype=tf.int64)
        with randomness.at(self.config.seed, 0, 0):
            images = self.generated(tf.repeat(labels, 10), "samples")
        drawings.show_samples(summaries, step, tf.reshape(images, [-1, 10, *self.shape]).numpy())

    def export(self, path: Path) -> None:
        """Writes the generator: `serve(noise [batch, latent], labels [batch])` → images in [-1, 1]."""
        with self.evaluated():
            saved_model.write_copy(path, self.config.export, self.generator, *self.generator.inputs_spec())


def train(config: Settings, hooks: Hooks | None = None) -> start.Summary:
    """Runs or resumes the run that `config` (resolved) describes."""
    return start.train(config, Adversarial, hooks)
