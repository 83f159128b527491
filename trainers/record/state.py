"""The values of a run's variables: named, read, compared with what a compiled step uses, and put back.

Values are kept by list, not by object graph: Keras 3 hides variables from `tf.train.Checkpoint` (16 of 20 of a model
that keeps layers in lists).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.settings.exit_codes import BadConfiguration, UnsavedVariable
from trainers.world import private_api
from trainers.world.devices import components, first_component, native

State = dict[str, np.ndarray | tf.Tensor]


def name_variables(group: str, variables: Iterable[Any]) -> dict[str, Any]:
    """Names for a list of Keras or TensorFlow variables, unique and in order: `model/0003/resnet/stem/kernel`."""
    return {f"{group}/{i:04d}/{getattr(v, 'path', v.name)}": v for i, v in enumerate(variables)}


def reader(variables: Mapping[str, Any]) -> Callable[[], State]:
    """A function that gives the variables' values on the host, fast enough to be called between two steps.

    Later updates do not reach what it gave. On a CPU nothing is copied, they are tensors: TensorFlow gives a variable
    that is updated while somebody holds its value new memory.
    """
    held = {}
    for name, variable in variables.items():
        component = first_component(variable)
        on_host = (lambda value: value) if "CPU" in component.device else np.asarray
        held[name] = component.handle, component.dtype, on_host
    return lambda: {
        name: on_host(tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype))
        for name, (handle, dtype, on_host) in held.items()
    }


def values_of(variables: Mapping[str, Any]) -> State:
    """The variables' values as arrays, once. Later updates do not reach them."""
    return {name: np.asarray(value) for name, value in reader(variables)().items()}


def unsaved_variables(
    strategy: tf.distribute.Strategy, variables: Mapping[str, Any], function: Any
) -> list[tuple[str, Any, Any, Any]]:
    """Name, handle, dtype and shape of each variable that a concrete function uses and that is not in `variables`."""
    saved = {id(component.handle) for v in variables.values() for component in components(v)}
    saved |= {id(token.handle) for token in private_api.ordering_tokens(strategy)}
    captured = private_api.captured_variables(function)
    return [(name, handle, dtype, shape) for handle, name, dtype, shape in captured if id(handle) not in saved]


def check_complete(
    strategy: tf.distribute.Strategy,
    variables: Mapping[str, Any],
    *functions: Any,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Checks that each variable that a compiled function uses is among those that are saved.

    `metrics`: variables of metrics inside of models, by name, for which there is another remedy.

    Raises:
      UnsavedVariable: one is not: a plain `tf.Variable` that Keras does not track, for instance.
    """
    metric_of = {id(part.handle): name for name, v in (metrics or {}).items() for part in components(v)}
    for function in functions:
        for name, handle, _, shape in unsaved_variables(strategy, variables, function):
            if metric := metric_of.get(id(handle)):
                raise UnsavedVariable(
                    f"the model updates its metric {metric} when it is called: each replica counts its own examples "
                    "there, and no checkpoint holds it; take it out of the model, and name a "
                    "models.metrics.StreamingMetric in its task"
                )
            raise UnsavedVariable(
                f"variable {name or f'of shape {shape}'} is used in training but would be missing from checkpoints; "
                "make it with add_weight, or assign the layer that holds it to an attribute of the model"
            )


def assign(variables: Mapping[str, Any], state: State) -> None:
    """Puts a checkpoint's values into the variables.

    Raises:
      BadConfiguration: a variable is missing, left over, or of another shape: the model's code has changed.
    """
    missing, left = variables.keys() - state.keys(), state.keys() - variables.keys()
    if missing or left:
        names = f"missing: {sorted(missing)[:3]}, left over: {sorted(left)[:3]}"
        raise BadConfiguration(
            f"the checkpoint does not fit the model ({names}); restore the model's code, or name another --run_dir"
        )
    for name, variable in variables.items():
        value = state[name]
        if tuple(variable.shape) != value.shape:
            raise BadConfiguration(
                f"{name} has shape {tuple(variable.shape)}, in the checkpoint {value.shape}; "
                "restore the model's code, or name another --run_dir"
            )
        native(variable).assign(value)
