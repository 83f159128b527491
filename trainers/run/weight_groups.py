"""Several optimizers for parts of one model: each weight has one of them, with a rate of its own.

Source of the idea: Cheng et al., "Wide & deep learning for recommender systems", 2016, section 3.3, where the wide part
is trained by one algorithm and the deep part by another.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from models import optimizers
from trainers.run import depths
from trainers.run.replicas import MovingAverage, OptimizersAverage
from trainers.run.vector_optimizer import VectorOptimizer, rounds_slots, takes_vectors
from trainers.run.vectors import Vectors
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.optimizer_for import Request, parse
from trainers.settings.weight_patterns import factors
from trainers.world import private_api


class WeightGroup(NamedTuple):
    """Weights by their places in the list of all, and the optimizer and schedule that train them.

    `factor`: of the schedule, which the optimizer's rate has. `name`: the optimizer's in checkpoints.
    """

    places: list[int]
    optimizer: Any
    schedule: Any
    factor: float = 1.0
    name: str = "optimizer"

    def of(self, values: Sequence[Any]) -> list[Any]:
        """The group's own of a list with a value for each weight."""
        return [values[place] for place in self.places]

    def built(self, weights: Sequence[keras.Variable], seed: int = 0) -> "WeightGroup":
        """With the optimizer's variables. What is no matrix and no kernel has no weight decay. `weights`: all.

        `seed`: of noise by which slots are rounded.

        Raises:
          BadConfiguration: slots are to be rounded, and weights have what needs them one by one.
        """
        own = self.of(weights)
        if takes_vectors(self.optimizer, own):
            decays = [len(weight.shape) > 1 for weight in own]
            return self._replace(optimizer=VectorOptimizer(self.optimizer, own, decays, seed))
        if rounds_slots(self.optimizer):
            raise BadConfiguration(
                f"--optimizer: slots={self.optimizer.slots} does not go with a weight that has a constraint; leave it "
                "out"
            )
        self.optimizer.exclude_from_weight_decay(var_list=[weight for weight in own if len(weight.shape) < 2])
        self.optimizer.build(own)
        # Loops sum gradients themselves: a second all-reduce in `apply` would multiply them.
        private_api.apply_without_reduction(self.optimizer)
        return self

    @property
    def bundles(self) -> list[list[int]]:
        """The places of the weights of each vector that the optimizer updates, once it is built."""
        if isinstance(self.optimizer, VectorOptimizer):
            return [[self.places[i] for i in bundle] for bundle in self.optimizer.vectors.bundles]
        return [[place] for place in self.places]

    def apply(self, gradients: Sequence[tf.Tensor], weights: Sequence[keras.Variable]) -> None:
        """Updates the group's weights. `gradients`, `weights`: those of all groups."""
        with tf.name_scope("optimizer"):
            self.optimizer.apply(self.of(gradients), self.of(weights))


def vectors_of(groups: Sequence[WeightGroup], weights: Sequence[keras.Variable]) -> Vectors:
    """How values of all weights are cut into vectors: those of each group's optimizer, group by group."""
    return Vectors([weight.shape for weight in weights], [bundle for group in groups for bundle in group.bundles])


def apply_vectors(groups: Sequence[WeightGroup], gradients: Sequence[tf.Tensor]) -> None:
    """In a replica: updates all weights by gradients as `vectors_of(groups, …).pack` makes them."""
    left = list(gradients)
    with tf.name_scope("optimizer"):
        for group in groups:
            own, left = left[: len(group.bundles)], left[len(group.bundles) :]
            if isinstance(group.optimizer, VectorOptimizer):
                group.optimizer.apply_vectors(own)
            else:
                group.optimizer.apply(own)


def group_of(config: Config, weights: Sequence[keras.Variable], steps: int = 1) -> WeightGroup:
    """All weights of a model, with what `--optimizer` and its flags say. Called in the strategy's scope.

    `steps`: those that the optimizer takes in an update of the global batch; the schedule is spread over all of them.

    Raises:
      BadConfiguration: the optimizer takes two gradients an update or averages weights, which a loop of its own kind
        does not.
    """
    warmup, total = config.warmup_steps * steps, config.train_steps * steps
    schedule = optimizers.schedule(config.schedule, config.learning_rate, warmup, total)
    optimizer = optimizers.build(config.optimizer, schedule, config.weight_decay)
    if hasattr(optimizer, "perturbation"):
        raise BadConfiguration(
            f"--optimizer {config.optimizer} takes two gradients an update, and the loop {config.loop} one; take adam"
        )
    if hasattr(optimizer, "average"):
        raise BadConfiguration(
            f"--optimizer {config.optimizer} averages weights by itself, which the loop {config.loop} does not show; "
            "take adam with --ema"
        )
    return WeightGroup(list(range(len(weights))), optimizer, schedule).built(weights, config.seed)


def groups_of(config: Config, model: keras.Model) -> list[WeightGroup]:
    """Those of `--optimizer_for` in their order, then what is left to `--optimizer`, built. In the strategy's scope.

    Each is cut by the factors of `--layer_decay` and `--learning_rate_for`: a smaller *rate* is right for every
    optimizer, where a smaller gradient is none for those that divide by its size.

    Raises:
      BadConfiguration: a pattern has no weights or leaves none, or an optimizer takes two gradients.
    """
    weights, requests = model.trainable_variables, [*parse(config.optimizer_for), Request("", config.optimizer)]
    names = [f"optimizer_for_{i}" for i in range(1, len(requests))] + ["optimizer"]
    places, groups = places_of([weight.path for weight in weights], [each.pattern for each in requests[:-1]]), []
    rate_factors = factors_of(config, model)
    for own, request, name in zip(places, requests, names, strict=True):
        rate = config.learning_rate if request.learning_rate is None else request.learning_rate
        decay = config.weight_decay if request.weight_decay is None else request.weight_decay
        schedule = optimizers.schedule(config.schedule, rate, config.warmup_steps, config.train_steps)
        for number, factor in enumerate(sorted({rate_factors[place] for place in own} or {1.0}), 1):
            scaled = schedule if factor == 1 else optimizers.Scaled(schedule, factor)
            optimizer = optimizers.build(request.optimizer, scaled, decay)
            part = [place for place in own if rate_factors[place] == factor]
            groups.append(
                WeightGroup(part, optimizer, schedule, factor, name + (f"_part_{number}" if number > 1 else ""))
            )
    if len(requests) > 1 and any(hasattr(group.optimizer, "perturbation") for group in groups):
        raise BadConfiguration(
            "--optimizer_for does not go with an optimizer of two gradients an update (sam); pass another"
        )
    return [group.built(weights, config.seed) for group in groups]


def average_of(config: Config, weights: Sequence[keras.Variable], groups: Sequence[WeightGroup]) -> Any:
    """The average of all trained weights that is evaluated: that of `--ema`, or of optimizers that keep one; or None.

    Called in the strategy's scope, after the groups were built.

    Raises:
      BadConfiguration: there would be both.
    """
    own = {place: each.optimizer for each in groups if hasattr(each.optimizer, "average") for place in each.places}
    if own and config.ema:
        raise BadConfiguration(
            f"--ema {config.ema:g} averages weights that --optimizer {config.optimizer} averages itself; pass --ema=0"
        )
    if own:
        return OptimizersAverage(weights, own)
    return _moving_average(config, weights, groups[-1])


def averages_of(config: Config, model: keras.Model, group: WeightGroup) -> dict[str, MovingAverage]:
    """The moving average of a model whose weights are one group, by its name in checkpoints; empty without `--ema`."""
    average = _moving_average(config, model.trainable_variables, group)
    return {"ema": average} if average else {}


def _moving_average(config: Config, weights: Sequence[keras.Variable], group: WeightGroup) -> MovingAverage | None:
    """With `--ema_warmup` its decay depends on the optimizer's count of updates."""
    counter = group.optimizer.iterations if config.ema_warmup else None
    return MovingAverage(weights, config.ema, counter) if config.ema else None


def words(config: Config) -> list[str]:
    """What the plan says of the flags that treat some weights apart."""
    frozen = [f"frozen: {config.freeze}"] if config.freeze else []
    decay = [f"layer decay {config.layer_decay:g}"] if config.layer_decay != 1 else []
    rates = [f"factors of the rate: {config.learning_rate_for}"] if config.learning_rate_for else []
    return [*([config.optimizer_for] if config.optimizer_for else []), *frozen, *decay, *rates]


def schedules_of(groups: Sequence[WeightGroup]) -> dict[str, Any]:
    """The schedules by the names that their rates have in metrics, without factors; that of `--optimizer` first."""
    found = {group.name.partition("_part_")[0]: group.schedule for group in (groups[-1], *groups)}
    return {name.replace("optimizer", "learning_rate"): schedule for name, schedule in found.items()}


def factors_of(config: Config, model: keras.Model) -> list[float]:
    """What each trained weight's learning rate is multiplied by.

    Raises:
      BadConfiguration: a pattern of `--learning_rate_for` has no weights of its own; the message names the paths.
    """
    weights = model.trainable_variables
    requests, paths = factors(config.learning_rate_for), [weight.path for weight in weights]
    found = dict.fromkeys(range(len(weights)), 1.0)
    for own, request in zip(
        _matched(paths, [r.pattern for r in requests], "learning_rate_for")[0], requests, strict=True
    ):
        found |= dict.fromkeys(own, request.factor)
    levels = depths.levels_of(model)
    top = max(levels.values(), default=0)
    decays = [config.layer_decay ** (top - levels[id(weight)]) for weight in weights]
    return [found[place] * decay for place, decay in enumerate(decays)]


def places_of(paths: Sequence[str], patterns: Sequence[str]) -> list[list[int]]:
    """The places of paths in which each pattern is found, those that an earlier one has apart; then those of the rest.

    Raises:
      BadConfiguration: a pattern has none, or nothing is left; the message names the paths.
    """
    groups, left = _matched(paths, patterns, "optimizer_for")
    if patterns and not left:
        raise BadConfiguration(
            f"--optimizer_for: {patterns[-1]!r} leaves no weight to --optimizer; name that optimizer there"
        )
    return [*groups, left]


def _matched(paths: Sequence[str], patterns: Sequence[str], flag: str) -> tuple[list[list[int]], list[int]]:
    """The places of paths in which each pattern is found first, and the places of the rest."""
    left, groups = list(range(len(paths))), []
    for pattern in patterns:
        own = [place for place in left if re.search(pattern, paths[place])]
        if not own:
            found = any(re.search(pattern, path) for path in paths)
            why = "only in paths that an earlier pattern has" if found else "in the path of no weight"
            raise BadConfiguration(f"--{flag}: {pattern!r} is found {why}; there are: {', '.join(paths)}")
        groups.append(own)
        left = [place for place in left if place not in own]
    return groups, left
