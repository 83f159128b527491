"""Graphs made readable: one replica's forward pass with layers by their own names."""

import re
from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf

_REOPENED = re.compile(r"_\d+$")


def layer_names(model: keras.Model) -> set[str]:
    """The names of a model and of all layers in it, at every depth."""
    return {layer.name for layer in model._flatten_layers()}


def forward(model: keras.Model, spec: Any, inputs_of: Callable[[Any], Any]) -> tf.Graph:
    """The graph of `model(inputs_of(data), training=False)` for data of `spec` (nested `tf.TensorSpec`)."""
    function = tf.function(lambda inputs: model(inputs_of(inputs), training=False))
    return function.get_concrete_function(spec).graph


def flops(graph: tf.Graph) -> int:
    """Floating-point operations of one pass through a graph whose shapes are known, as TensorFlow counts them.

    Matrix products and convolutions are nearly all of it; a multiplication and an addition count as two.
    """
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation() | {"output": "none"}
    return tf.compat.v1.profiler.profile(graph, options=options).total_float_ops


def _own_name(name: str, layers: Collection[str]) -> str:
    """Keras 3 opens each scope twice (`net_1/block_1_1/conv_1`): each part gets its layer's name back."""
    parts = []
    for part in name.split("/"):
        short = _REOPENED.sub("", part)
        parts.append(short if part not in layers and short in layers else part)
    return "/".join(parts)


def clean(graph: tf.compat.v1.GraphDef, layers: Collection[str]) -> tf.compat.v1.GraphDef:
    """Drops what hides a model: scopes opened twice, NoOps and control edges.

    Names stay unique: where two nodes would meet, the later keeps the name it has.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for node in graph.node:
        short = _own_name(node.name, layers)
        names[node.name] = node.name if short in taken else short
        taken.add(names[node.name])
    cleaned = tf.compat.v1.GraphDef(versions=graph.versions, library=graph.library)
    for node in graph.node:
        if node.op == "NoOp":
            continue
        copy = cleaned.node.add()
        copy.CopyFrom(node)
        copy.name = names[node.name]
        del copy.input[:]
        for source in node.input:
            if source.startswith("^"):
                continue
            name, colon, port = source.partition(":")
            copy.input.append(names.get(name, name) + colon + port)
    return cleaned
