"""Graphs made readable: the forward pass with layers by their own names, and the compiled step with a box a replica."""

import re
from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf

from trainers.world import private_api

_REOPENED = re.compile(r"_\d+$")
# A replica's scope, as we and TensorFlow name it; opened again, it has another number behind.
_REPLICA = re.compile(r"replica_(\d+)(_\d+)?/")
# The update on another replica's device, in a scope of the first's.
_OTHER_UPDATE = re.compile(r"/update_[1-9]\d*(_\d+)?/")
# What replicas do together: boxes of their own, not inside a replica's.
_TOGETHER = ("all_reduce", "optimizer", "ema")
_TAPE = "gradient_tape/"
# Constants above this many bytes are shown without their values.
_LARGE_CONSTANT = 1024


def forward(model: keras.Model, spec: Any, inputs_of: Callable[[Any], Any]) -> tf.Graph:
    """The graph of `model(inputs_of(data), training=False)` for data of `spec` (nested `tf.TensorSpec`)."""
    function = tf.function(lambda inputs: model(inputs_of(inputs), training=False), autograph=False)
    return function.get_concrete_function(spec).graph


def flops(graph: tf.Graph) -> int:
    """Floating-point operations of one pass through a graph whose shapes are known, as TensorFlow counts them.

    Matrix products and convolutions are nearly all of it; a multiplication and an addition count as two.
    """
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation() | {"output": "none"}
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # that it was designed for TensorFlow 1
    try:
        return tf.compat.v1.profiler.profile(graph, options=options).total_float_ops
    finally:
        logger.setLevel(level)


def step(graph: tf.Graph, layers: Collection[str]) -> tf.compat.v1.GraphDef | None:
    """One update of the global batch, taken out of the compiled loop's graph: nothing is traced again.

    A box for each replica, with the layers by their own names and what is computed backwards under `gradients`; beside
    them `all_reduce` and `optimizer`. None where the loop has no such step.
    """
    library = graph.as_graph_def().library
    bodies = [body for body in library.function if any("/all_reduce/" in node.name for node in body.node_def)]
    if not bodies:
        return None
    body = private_api.graph_of_function(bodies[0])
    first = next(node.name for node in body.node if "/all_reduce/" in node.name)
    depth = _REPLICA.sub("", first).split("all_reduce/")[0]
    names: dict[str, str] = {}
    taken: set[str] = set()
    for node in body.node:
        name = _placed(node.name, depth)
        names[node.name] = name if name not in taken else f"{name}_again_{len(names)}"
        taken.add(names[node.name])
    whole = tf.compat.v1.GraphDef(versions=body.versions, library=_called(body, library))
    for node in body.node:
        if node.op == "Placeholder":
            continue  # what the loop hands in: variables and counters
        copy = whole.node.add()
        copy.CopyFrom(node)
        copy.name = names[node.name]
        del copy.input[:]
        for source in node.input:
            name, colon, port = source.partition(":")
            if name in names and not names[name].startswith("loop/while_"):
                copy.input.append(names[name] + colon + port)
    return clean(whole, layers)


def short_name(name: str) -> str:
    """A node's name without the loops around the step, for tables."""
    backwards = _TAPE in name
    match = _REPLICA.search(name)
    return f"{match[0]}{'gradients/' if backwards else ''}{name[match.end() :]}" if match else name


def of_first_replica(whole: tf.compat.v1.GraphDef) -> tf.compat.v1.GraphDef:
    """What the first replica does of a step: its own box opened, and its part of what replicas do together."""
    own = "replica_0/"
    kept = tf.compat.v1.GraphDef(versions=whole.versions)
    for node in whole.node:
        together = "/" in node.name and _is_together(node.name.partition("/")[0])
        together = together and not _REPLICA.search(node.name) and not _OTHER_UPDATE.search(node.name)
        if node.name.startswith(own) or together:
            kept.node.add().CopyFrom(node)
            kept.node[-1].name = node.name.removeprefix(own)
    names = {node.name for node in kept.node}
    kept.library.CopyFrom(_called(kept, whole.library))
    for node in kept.node:
        sources = [source.removeprefix(own) for source in node.input]
        del node.input[:]
        node.input.extend(source for source in sources if source.partition(":")[0] in names)
    return kept


def _is_together(scope: str) -> bool:
    """Whether a scope is of what replicas do together. Where a step does it several times, the later have numbers."""
    return _REOPENED.sub("", scope) in _TOGETHER


def _placed(name: str, depth: str) -> str:
    """A node's name without the loops around it, what is computed backwards and what is done together put apart."""
    backwards = name.startswith(_TAPE)
    while name.startswith(_TAPE):  # several times for a derivative of a derivative
        name = name.removeprefix(_TAPE).removeprefix(depth)
    name = name.removeprefix(depth)
    match = _REPLICA.match(name)
    if match is None:
        return f"loop/{name}"
    box, rest = f"replica_{match[1]}/", name[match.end() :]
    if backwards:
        return f"{box}gradients/{rest.removeprefix('gradients/')}"
    scope, _, inner = rest.partition("/")
    if _is_together(scope) and inner:
        return f"{scope}/{box if match[1] != '0' else ''}{inner}"
    return box + rest


def _called(graph: tf.compat.v1.GraphDef, library: Any) -> Any:
    """The functions that a graph calls, at every depth."""
    known, wanted = {one.signature.name: one for one in library.function}, []
    pending = list(graph.node)
    kept = type(library)()
    while pending:
        for attribute in pending.pop().attr.values():
            for function in [attribute.func, *attribute.list.func]:
                if function.name in known and function.name not in wanted:
                    wanted.append(function.name)
                    kept.function.add().CopyFrom(known[function.name])
                    pending.extend(known[function.name].node_def)
    return kept


def _own_name(name: str, layers: Collection[str]) -> str:
    """Keras 3 opens each scope twice (`net_1/block_1_1/conv_1`): each part gets its layer's name back."""
    parts = []
    for part in name.split("/"):
        short = _REOPENED.sub("", part)
        parts.append(short if part not in layers and short in layers else part)
    return "/".join(parts)


def clean(graph: tf.compat.v1.GraphDef, layers: Collection[str]) -> tf.compat.v1.GraphDef:
    """Drops what hides a model: scopes opened twice, NoOps, control edges and large values.

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
        copy.attr.pop("_class", None)  # names of other nodes, as they were
        if node.op == "Const" and node.attr["value"].ByteSize() > _LARGE_CONSTANT:
            del copy.attr["value"]
        del copy.input[:]
        for source in node.input:
            if source.startswith("^"):
                continue
            name, colon, port = source.partition(":")
            copy.input.append(names.get(name, name) + colon + port)
    return cleaned
