"""Weights that stay as a run begins with them: without a gradient, slots of an optimizer, decay or an average."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from trainers.settings.exit_codes import BadConfiguration
from trainers.world import private_api


def freeze(model: keras.Model, pattern: str) -> None:
    """Makes the weights of a built model in whose path a pattern is found non-trainable. Before optimizers are built.

    A layer all of whose trainable weights are frozen is frozen itself: batch normalization then takes its moving
    statistics, in training too, and leaves them as they are.

    Raises:
      BadConfiguration: the pattern is found nowhere, leaves nothing to train, or has a layer's statistics alone.
    """
    if not pattern:
        return
    weights = model.trainable_weights
    frozen = [weight for weight in weights if re.search(pattern, weight.path)]
    if not frozen:
        names = ", ".join(weight.path for weight in weights)
        raise BadConfiguration(f"--freeze: {pattern!r} is found in the path of no weight; there are: {names}")
    if len(frozen) == len(weights):
        raise BadConfiguration(
            f"--freeze: {pattern!r} is found in the path of every weight, so nothing would be trained"
        )
    for weight in frozen:
        weight.trainable = False
    before, left = ({id(weight) for weight in each} for each in (weights, model.trainable_weights))
    for layer in private_api.layers_of(model):
        own = {id(weight) for weight in layer.weights} & before
        named = any(re.search(pattern, variable.path) for variable in private_api.own_state_of(layer)[1])
        if (own or named) and not own & left:
            layer.trainable = False
        elif named:
            trained = next(weight.path for weight in layer.weights if id(weight) in own & left)
            raise BadConfiguration(
                f"--freeze: {pattern!r} is found in statistics of layer {layer.path}, which trains {trained}; let it "
                "be found in the whole layer, or in none of its statistics"
            )


@contextlib.contextmanager
def tape_of(weights: Sequence[Any]) -> Iterator[tf.GradientTape]:
    """In a replica: a tape that records what depends on these Keras variables alone, so no more has a backward pass."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        for weight in weights:
            tape.watch(weight.value)
        yield tape
