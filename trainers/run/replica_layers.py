"""Layers of other people that compute something else on several replicas than on one, found by what they do.

Two kinds: a layer that draws from a generator of Keras, which is the same on every replica; and a layer whose state
follows the examples that it sees, which on a replica are not all. Nothing is known of the layers but Keras's own
variables: the model is called twice on its own, and what it changed is put back.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from models import randomness
from trainers.world import private_api
from trainers.world.devices import native

NOISE, STATISTICS = "noise", "statistics"


class Suspect(NamedTuple):
    """A layer, its names from the model down, and what of it depends on the number of replicas.

    `kind`: `NOISE` or `STATISTICS`. `variables`: names of the state that shows it.
    """

    layer: Any
    path: str
    kind: str
    variables: tuple[str, ...]

    def __str__(self) -> str:
        if self.kind == NOISE:
            return (
                f"layer {self.path} draws the same noise on every replica, so the result depends on their number; use "
                "models.layers.Dropout or Noise, or draw with models.randomness"
            )
        return (
            f"layer {self.path} computes {' and '.join(self.variables)} from each replica's own examples, so the "
            "result depends on the number of replicas; use models.batch_norm.BatchNormalization, or sum over the "
            "replicas as it does"
        )


def find(model: keras.Model, inputs: Any) -> list[Suspect]:
    """The layers that depend on the number of replicas. Called in the strategy's scope, once the model is built.

    `inputs`: one example, as the model takes it. Where the model cannot be called on its own, every layer with a
    generator is one, and every batch normalization of Keras.
    """
    layers = list(named_layers(model))
    states = {path: _state_of(layer) for path, layer in layers}
    if not any(generators or others for generators, others in states.values()):
        return []
    changed, followed = _changes(model, inputs)
    suspects = []
    for path, layer in layers:
        generators, others = states[path]
        if any(id(variable) in changed for variable in generators):
            suspects.append(Suspect(layer, path, NOISE, tuple(variable.name for variable in generators)))
        names = tuple(variable.name for variable in others if id(variable) in followed)
        if names:
            suspects.append(Suspect(layer, path, STATISTICS, names))
    return suspects


def named_layers(model: keras.Model) -> Iterator[tuple[str, Any]]:
    """A model and all layers in it, each once, with the names from the model down: `mlp/lstm/lstm_cell`."""
    seen = set()

    def below(layer: Any, path: str) -> Iterator[tuple[str, Any]]:
        if id(layer) not in seen:
            seen.add(id(layer))
            yield path, layer
            for member in private_api.sublayers_of(layer):
                yield from below(member, f"{path}/{member.name}")

    return below(model, model.name)


def _state_of(layer: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """A layer's own state: of its generators; and what else training may change, unless it is the same everywhere."""
    generators, others = private_api.own_state_of(layer)
    # Statistics that are summed over the replicas, or that a flag leaves to each of them.
    known = getattr(layer, "synchronized", False) or hasattr(layer, "crosses_replicas")
    return generators, [] if known else others


def _changes(model: keras.Model, inputs: Any) -> tuple[set[int], set[int]]:
    """Which variables a call in training changes, and which of them follow the examples. By `id`."""
    # Weights too: a layer may normalize its own when it is called.
    state = [*model.variables, *private_api.metric_variables_of(model).values()]
    before = [variable.numpy() for variable in state]
    ends = []
    try:
        for example in (inputs, tf.nest.map_structure(_another, inputs)):
            with randomness.at(0, tf.constant(0, tf.int64), tf.constant(0, tf.int64)):
                model(example, training=True)
            ends.append([variable.numpy() for variable in state])
            _put_back(state, before)
    except Exception:  # whatever somebody's layer raises outside of a replica
        _put_back(state, before)
        norms = [layer for _, layer in named_layers(model) if isinstance(layer, keras.layers.BatchNormalization)]
        followed = {id(variable) for layer in norms if layer.trainable for variable in layer.non_trainable_variables}
        return {id(variable) for variable in state}, followed
    changed = _differing(state, before, ends[0])
    return changed, _differing(state, ends[0], ends[1]) & (changed | _differing(state, before, ends[1]))


def _another(example: tf.Tensor) -> tf.Tensor:
    """Another example of the same shape: normal numbers, or 0 and 1."""
    numbers = np.random.default_rng(0).normal(size=example.shape)
    return tf.cast(numbers if example.dtype.is_floating else numbers > 0, example.dtype)


def _put_back(state: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(state, values, strict=True):
        native(variable).assign(value)


def _differing(state: Sequence[Any], a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> set[int]:
    return {id(variable) for variable, one, other in zip(state, a, b, strict=True) if not np.array_equal(one, other)}


def without_training(layers: Sequence[Any]) -> None:
    """Has these layers compute in training what they do in evaluation, if they tell the two apart."""
    for layer in layers:
        layer.call = _in_evaluation(layer.call)


def _in_evaluation(call: Callable) -> Callable:
    def evaluated(*arguments: Any, **keywords: Any) -> Any:
        return call(*arguments, **(keywords | ({"training": False} if "training" in keywords else {})))

    return evaluated
