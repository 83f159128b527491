"""Several optimizers for parts of one model: each weight has one of them.

Source of the idea: Cheng et al., "Wide & deep learning for recommender systems", 2016, section 3.3, where the wide part
is trained by one algorithm and the deep part by another.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from models import optimizers
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.optimizer_for import Request, parse
from trainers.world import private_api


class WeightGroup(NamedTuple):
    """Weights by their places in the list of all, and the optimizer and schedule that train them."""

    places: list[int]
    optimizer: keras.optimizers.Optimizer
    schedule: Any

    def of(self, values: Sequence[Any]) -> list[Any]:
        """The group's own of a list with a value for each weight."""
        return [values[place] for place in self.places]

    def build(self, weights: Sequence[keras.Variable]) -> None:
        """Makes the optimizer's variables. What is no matrix and no kernel has no weight decay. `weights`: all."""
        own = self.of(weights)
        self.optimizer.exclude_from_weight_decay(var_list=[weight for weight in own if len(weight.shape) < 2])
        self.optimizer.build(own)
        # Loops sum gradients themselves: a second all-reduce in `apply` would multiply them.
        private_api.apply_without_reduction(self.optimizer)

    def apply(self, gradients: Sequence[tf.Tensor], weights: Sequence[keras.Variable]) -> None:
        """Updates the group's weights. `gradients`, `weights`: those of all groups."""
        with tf.name_scope("optimizer"):
            self.optimizer.apply(self.of(gradients), self.of(weights))


def group_of(config: Config, weights: Sequence[keras.Variable], steps: int = 1) -> WeightGroup:
    """All weights of a model, with what `--optimizer` and its flags say. Called in the strategy's scope.

    `steps`: those that the optimizer takes in an update of the global batch; the schedule is spread over all of them.

    Raises:
      BadConfiguration: the optimizer takes two gradients an update, which a loop of its own kind does not.
    """
    warmup, total = config.warmup_steps * steps, config.train_steps * steps
    schedule = optimizers.schedule(config.schedule, config.learning_rate, warmup, total)
    optimizer = optimizers.build(config.optimizer, schedule, config.weight_decay)
    if hasattr(optimizer, "perturbation"):
        raise BadConfiguration(
            f"--optimizer {config.optimizer} takes two gradients an update, and the loop {config.loop} one; take adam"
        )
    group = WeightGroup(list(range(len(weights))), optimizer, schedule)
    group.build(weights)
    return group


def groups_of(config: Config, weights: Sequence[keras.Variable]) -> list[WeightGroup]:
    """Those of `--optimizer_for` in their order, then what is left to `--optimizer`, built. In the strategy's scope.

    Raises:
      BadConfiguration: a pattern has no weights or leaves none, or an optimizer takes two gradients.
    """
    requests = [*parse(config.optimizer_for), Request("", config.optimizer)]
    places, groups = places_of([weight.path for weight in weights], [each.pattern for each in requests[:-1]]), []
    for own, request in zip(places, requests, strict=True):
        rate = config.learning_rate if request.learning_rate is None else request.learning_rate
        decay = config.weight_decay if request.weight_decay is None else request.weight_decay
        schedule = optimizers.schedule(config.schedule, rate, config.warmup_steps, config.train_steps)
        groups.append(WeightGroup(own, optimizers.build(request.optimizer, schedule, decay), schedule))
    if len(groups) > 1 and any(hasattr(group.optimizer, "perturbation") for group in groups):
        raise BadConfiguration(
            "--optimizer_for does not go with an optimizer of two gradients an update (sam); pass another"
        )
    for group in groups:
        group.build(weights)
    return groups


def places_of(paths: Sequence[str], patterns: Sequence[str]) -> list[list[int]]:
    """The places of paths in which each pattern is found, those that an earlier one has apart; then those of the rest.

    Raises:
      BadConfiguration: a pattern has none, or nothing is left; the message names the paths.
    """
    left, groups = list(range(len(paths))), []
    for pattern in patterns:
        own = [place for place in left if re.search(pattern, paths[place])]
        if not own:
            found = any(re.search(pattern, path) for path in paths)
            why = "only in paths that an earlier pattern has" if found else "in the path of no weight"
            raise BadConfiguration(f"--optimizer_for: {pattern!r} is found {why}; there are: {', '.join(paths)}")
        groups.append(own)
        left = [place for place in left if place not in own]
    if patterns and not left:
        raise BadConfiguration(
            f"--optimizer_for: {patterns[-1]!r} leaves no weight to --optimizer; name that optimizer there"
        )
    return [*groups, left]
