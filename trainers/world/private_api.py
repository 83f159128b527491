"""Every use of an interface that TensorFlow, Keras or TensorBoard does not document, with the reason.

Checked with TensorFlow 2.21.0, Keras 3.15.1 and TensorBoard 2.21.0. `tests/world/test_private_api.py` fails first when
a new version moves one of them. Imports stand inside the functions, so that this module is free of TensorFlow.
"""

from __future__ import annotations  # launch/doctor.py runs on Python 3.9 too

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any


def layers_of(model: Any) -> list[Any]:
    """A model and all layers in it, at every depth.

    Keras has no public way: `model.layers` holds the first level alone, and not what lies in lists of a list.
    """
    return list(model._flatten_layers())


def sublayers_of(layer: Any) -> list[Any]:
    """The layers that a layer holds itself, in attributes and in lists. Publicly a model alone names them."""
    return list(layer._layers)


def own_state_of(layer: Any) -> tuple[list[Any], list[Any]]:
    """Variables of a layer, not of those in it, that no gradient changes: the states of its generators, and others.

    Keras's public lists are of all layers below as well.
    """
    return [each.state for each in layer._seed_generators], list(layer._non_trainable_variables)


def metric_variables_of(model: Any) -> dict[str, Any]:
    """The variables of all metrics that a model and its layers hold, by `metric/variable`."""
    metrics = [metric for layer in layers_of(model) for metric in layer._metrics]
    return {f"{metric.name}/{variable.name}": variable for metric in metrics for variable in metric.variables}


def places_in_weight_files(model: Any) -> dict[int, str]:
    """Where Keras's files have each variable of a model, by its `id`: `stem/vars/0`, a path of attributes.

    Files hold no names of variables, and Keras's loader tells nobody what it has not found. The walk is Keras's own.
    """
    from keras.src.saving import saving_lib
    from keras.src.saving.keras_saveable import KerasSaveable
    from keras.src.utils import naming

    places: dict[int, str] = {}
    seen: set[int] = set()

    def visit(thing: Any, path: str) -> None:
        if not isinstance(thing, (KerasSaveable, list, dict, tuple)) or id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, KerasSaveable):
            own: dict[str, Any] = {}
            if hasattr(thing, "save_own_variables"):
                thing.save_own_variables(own)
            places.update({id(variable): f"{path}/vars/{key}".removeprefix("/") for key, variable in own.items()})
            for name, member in saving_lib._walk_saveable(thing):
                visit(member, f"{path}/{name}".removeprefix("/"))
            return
        used: dict[str, int] = {}
        for member in thing.values() if isinstance(thing, dict) else thing:
            if isinstance(member, (KerasSaveable, list, dict, tuple)):
                kind = naming.to_snake_case(type(member).__name__) if isinstance(member, KerasSaveable) else "container"
                visit(member, f"{path}/{saving_lib._get_unique_name(kind, used)}")

    visit(model, "")
    return places


def apply_without_reduction(optimizer: Any) -> None:
    """Makes `optimizer.apply` take gradients as they are.

    The loop sums gradients over the replicas before it clips them. Keras would reduce them a second time in `apply`,
    and has no public switch for it.
    """
    optimizer._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables


def build_recorded(
    optimizer: Any, owners: Any, taken: Callable[[str, int, Any], Any] | None = None
) -> list[list[tuple[str, list[Any]]]]:
    """Builds an optimizer on Keras variables, or on what has a path, a shape and a dtype. Returns what slots it made.

    `taken(kind, number, slot)`: what its update rule takes in place of the slot of an owner.

    For each call of `add_optimizer_variables`: the kinds of slots in it, each with a slot for each of `owners`. Keras
    keeps slots in attributes of many names, and asks TensorFlow to colocate them with variables alone.
    """
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    made, add = [], optimizer.add_optimizer_variables

    def recorded(variables: Any, name: Any, initializer: Any = "zeros") -> Any:
        found = add(variables, name, initializer)
        kinds = [(name, found)] if isinstance(name, str) else list(zip(name, found, strict=True))
        made.append(kinds)
        if taken is None:
            return found
        lists = [[taken(kind, number, slot) for number, slot in enumerate(slots)] for kind, slots in kinds]
        return lists[0] if isinstance(name, str) else lists

    optimizer.add_variable_from_reference = lambda *args, **keywords: BaseOptimizer.add_variable_from_reference(
        optimizer, *args, **keywords
    )
    optimizer.add_optimizer_variables = recorded
    optimizer.build(owners)
    return made


@contextlib.contextmanager
def without_collectives() -> Iterator[None]:
    """While a graph is made: what is to be reduced over replicas and workers stays each one's own.

    So no replica waits for another that fails. The methods are public; that they are what layers, loops and Keras
    call, whatever the strategy, is not.
    """
    import tensorflow as tf
    from tensorflow.python.distribute.distribute_lib import StrategyBase

    def own(_: Any, __: Any, value: Any, *___: Any, **____: Any) -> Any:
        return tf.nest.map_structure(tf.convert_to_tensor, value)

    def first(strategy: Any, _: Any, value: Any, *__: Any, **___: Any) -> Any:
        return strategy.experimental_local_results(value)[0]

    context = tf.distribute.ReplicaContext
    before = context.all_reduce, StrategyBase.reduce
    context.all_reduce, StrategyBase.reduce = own, first
    try:
        yield
    finally:
        context.all_reduce, StrategyBase.reduce = before


@contextlib.contextmanager
def counter_read_once(optimizer: Any) -> Iterator[None]:
    """While a graph is made: update rules take the number of the update as one tensor, not as a variable each reads.

    TensorFlow computes what follows from one tensor once, and what follows from two reads of a variable twice.
    """
    import tensorflow as tf

    counter = optimizer._iterations
    optimizer._iterations = tf.convert_to_tensor(counter)
    try:
        yield
    finally:
        optimizer._iterations = counter


def ordering_tokens(strategy: Any) -> list[Any]:
    """Variables by which TensorFlow keeps collectives in order. They hold no value of the run.

    They appear among the variables of a compiled step, and nothing public tells them from the run's own.
    """
    operations = (getattr(strategy.extended, f"_{where}cross_device_ops", None) for where in ("", "host_"))
    launchers = [launcher for each in operations for launcher in getattr(each, "_launchers", ())]
    return [launcher._ordering_token for launcher in launchers if hasattr(launcher, "_ordering_token")]


def captured_variables(function: Any) -> Iterator[tuple[Any, str, Any, Any]]:
    """Handle, name, dtype and shape of each variable that a concrete function uses.

    `function.variables` leaves out variables that nothing but the graph holds, which are those to be found.
    """
    import tensorflow as tf

    for handle, _ in function.graph.captures:
        data = getattr(handle, "_handle_data", None)
        if handle.dtype != tf.resource or data is None or not data.is_set:
            continue  # an iterator or a table: it has no value of its own
        content = data.shape_and_type[0]
        yield (
            handle,
            (getattr(handle, "_name", None) or "").partition(":")[0],
            tf.as_dtype(content.dtype),
            tf.TensorShape(content.shape),
        )


def graph_of_function(definition: Any) -> Any:
    """A function of a graph's library, as the `GraphDef` of its body. There is no public conversion."""
    from tensorflow.python.framework import function_def_to_graph

    return function_def_to_graph.function_def_to_graph_def(definition)[0]


def is_deterministic() -> bool:
    """Whether `tf.config.experimental.enable_op_determinism` was called. It has no public counterpart that reads."""
    from tensorflow.python.framework import config

    return config.is_op_determinism_enabled()


def rewrite_graphs_little() -> None:
    """Has Grappler go over a new graph once instead of twice, and only with the passes that make a step faster.

    Left out are its passes in MLIR, and those for memory, layouts, fused kernels and constants: on a CPU they took half
    of a first call, and no step of a model here was slower without them. `tf.config.optimizer` takes not all of it.
    What an options proto of the start would say is what is set here.
    """
    from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
    from tensorflow.python.eager import context

    of_process, rewriter = context.context(), rewriter_config_pb2.RewriterConfig
    config = of_process._config or config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.meta_optimizer_iterations = rewriter.ONE
    options.disable_tfg_optimizer = True
    options.memory_optimization = rewriter.NO_MEM_OPT
    options.layout_optimizer = options.remapping = options.constant_folding = rewriter.OFF
    of_process._config = config
    of_process._thread_local_data.function_call_options = None  # made anew, as after each change of an option


def types_of_kernel(operation: str, device: str) -> set[str]:
    """Names of the types for which TensorFlow has a kernel of an operation. It documents them nowhere."""
    import tensorflow as tf
    from tensorflow.python.framework import kernels

    registered = kernels.get_registered_kernels_for_op(operation).kernel
    constraints = [
        constraint for kernel in registered if kernel.device_type == device for constraint in kernel.constraint
    ]
    return {tf.as_dtype(number).name for each in constraints for number in each.allowed_values.list.type}


def profile_from(content: bytes) -> Any:
    """The `XSpace` message of a profile's file. TensorFlow ships its class, and exports it nowhere."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    return xplane_pb2.XSpace.FromString(content)


def remove_generated_sources() -> None:
    """Deletes the files in which AutoGraph keeps the code it made. At an ordinary exit it does so itself.

    The trainers leave without Python's exit handlers, see `trainers.world.process.leave`.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file") and getattr(module, "__file__", None):
            with contextlib.suppress(OSError):
                os.unlink(module.__file__)


def reopen(writer: Any, directory: str, between: Callable[[], None]) -> None:
    """Ends the event file of a writer, calls `between` and begins another, also for graphs that hold the writer.

    TensorFlow's own `close` is for good. The numbers are its defaults.
    """
    import tensorflow as tf

    with tf.device("CPU:0"):
        tf.raw_ops.FlushSummaryWriter(writer=writer._resource)
        tf.raw_ops.CloseSummaryWriter(writer=writer._resource)
        between()
        tf.raw_ops.CreateSummaryFileWriter(
            writer=writer._resource, logdir=directory, max_queue=10, flush_millis=120_000, filename_suffix=".v2"
        )


def tensorboard() -> types.SimpleNamespace:
    """TensorBoard's classes of events and the modules in which its plugins say what their events hold.

    What TensorBoard documents are the operations of `tf.summary`, of which each event costs an operation; a fast model
    would lose its speed to them. These messages make the same events.
    """
    names = {
        "event_pb2": "compat.proto.event_pb2",
        "summary_pb2": "compat.proto.summary_pb2",
        "tensor_pb2": "compat.proto.tensor_pb2",
        "types_pb2": "compat.proto.types_pb2",
        "api_pb2": "plugins.hparams.api_pb2",
        "plugin_data_pb2": "plugins.hparams.plugin_data_pb2",
        "hparams": "plugins.hparams.metadata",
        "histogram": "plugins.histogram.metadata",
        "image": "plugins.image.metadata",
        "pr_curve": "plugins.pr_curve.metadata",
        "scalar": "plugins.scalar.summary_v2",
        "text": "plugins.text.metadata",
    }
    modules = {name: importlib.import_module(f"tensorboard.{module}") for name, module in names.items()}
    return types.SimpleNamespace(**modules)
