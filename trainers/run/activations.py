"""How much memory an update takes on a CPU, as its graph tells: what the forward pass keeps for the backward pass."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from trainers.input.batches import batches
from trainers.run.faults import missing_gradients_named
from trainers.run.inner_loop import InnerLoop
from trainers.run.replicas import on_replicas
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import private_api

# Where loops and TensorFlow put the operations of a backward pass.
_BACKWARD = re.compile(r"(^|/)gradient(s|_tape)(_\d+)?/")
# They give what they take, under another shape or name.
_VIEWS = frozenset({"Reshape", "Identity", "StopGradient", "PreventGradient", "Squeeze", "ExpandDims"})
# They look at a shape alone.
_SHAPES = frozenset({"Shape", "ShapeN", "Size", "Rank"})
# What they give is there anyway.
_HELD = frozenset({"Const", "Placeholder", "ReadVariableOp"})


def size_of(shape: Sequence[int | None], dtype: Any) -> int:
    """Bytes of a tensor; a length that is not known counts as 1."""
    return math.prod(length or 1 for length in shape) * tf.as_dtype(dtype).size


def held_by(variables: Mapping[str, Any]) -> int:
    """Bytes of the variables of a loop on one device."""
    return sum(size_of(variable.shape, variable.dtype) for variable in variables.values())


def kept_by(graph: tf.Graph) -> int:
    """Bytes of all tensors of the forward passes in a graph which its backward passes take, each once."""
    kept = {}
    for operation in graph.get_operations():
        if operation.type in _SHAPES or not _BACKWARD.search(operation.name):
            continue
        for tensor in map(_seen_through, operation.inputs):
            plain = tensor.dtype not in (tf.resource, tf.variant, tf.string)
            if plain and tensor.op.type not in _HELD and not _BACKWARD.search(tensor.op.name):
                kept[tensor.ref()] = size_of(tensor.shape.as_list() if tensor.shape.rank else [], tensor.dtype)
    return sum(kept.values())


def _seen_through(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor of which another is a view."""
    while tensor.op.type in _VIEWS:
        tensor = tensor.op.inputs[0]
    return tensor


def of_update(loop: InnerLoop) -> int:
    """Bytes that the forward passes of all replicas of this process keep, were the batch computed in one part.

    `loop.config.parts` is 1.

    Raises:
      BadConfiguration: the loop has no `gradients_of`.
    """
    config, strategy, train = loop.config, loop.world.strategy, loop.dataset.train
    source = batches(strategy, train, config.batch_size, config.seed, config.parts, config.views)
    source.start(0)
    begin = tf.constant(0, tf.int64)

    def gradients(feed: Any) -> tuple[tf.Tensor, ...]:
        features, _, first = source.part(feed, source.order(begin, begin + 1), begin, 0)
        with tf.name_scope("gradients_of"):
            return tuple(loop.gradients_of(features, begin, first))

    @tf.function(autograph=False)
    def update() -> Any:
        return on_replicas(strategy, gradients)(source.feed()[0])

    try:
        with private_api.without_collectives(), missing_gradients_named():
            return kept_by(update.get_concrete_function().graph)
    except NotImplementedError as error:
        raise BadConfiguration(
            f"--accumulate=auto: the loop {config.loop} has no gradients_of, by which memory is estimated on a CPU; "
            "pass a number, or write it (docs/own-loops.md)"
        ) from error
