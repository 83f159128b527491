"""The values of a run's variables: named, read, compared with what a compiled step uses, and put back.

Values are kept by list, not by object graph: Keras 3 hides variables from `tf.train.Checkpoint` (16 of 20 of a model
that keeps layers in lists).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.settings.exit_codes import BadConfiguration, UnsavedVariable
from trainers.world import collectives, private_api
from trainers.world.devices import components, first_component, native

State = dict[str, np.ndarray | tf.Tensor]


class Part:
    """A part of a vector variable, under the name and in the shape that it has in checkpoints.

    `vector`: a Keras or TensorFlow variable `[elements]`; `first`: the part's first element in it.
    """

    def __init__(self, vector: Any, first: int, shape: Sequence[int], path: str):
        self.vector, self.first, self.shape, self.path, self.name = vector, first, tuple(shape), path, path
        self.size = math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """That of the vector."""
        return self.vector.dtype

    def of(self, whole: np.ndarray) -> np.ndarray:
        """The part of a value of the vector, not copied."""
        return whole[self.first : self.first + self.size].reshape(self.shape)

    def numpy(self) -> np.ndarray:
        """The value now."""
        return self.of(first_component(self.vector).numpy())

    def assign(self, value: Any) -> None:
        """Outside of replicas: sets this part alone. For many parts, `put` is faster."""
        put([(self, value)])


def put(values: Iterable[tuple[Any, Any]]) -> None:
    """Outside of replicas: sets variables, and parts of vectors, to the values that stand with them."""
    vectors: dict[int, tuple[Any, np.ndarray]] = {}
    for variable, value in values:
        if not isinstance(variable, Part):
            native(variable).assign(value)
            continue
        if id(variable.vector) not in vectors:
            vectors[id(variable.vector)] = variable.vector, np.array(first_component(variable.vector))
        variable.of(vectors[id(variable.vector)][1])[...] = value
    for vector, whole in vectors.values():
        native(vector).assign(whole)


def name_variables(group: str, variables: Iterable[Any]) -> dict[str, Any]:
    """Names for a list of Keras or TensorFlow variables, unique and in order: `model/0003/resnet/stem/kernel`."""
    return {f"{group}/{i:04d}/{getattr(v, 'path', v.name)}": v for i, v in enumerate(variables)}


def reader(variables: Mapping[str, Any]) -> Callable[[], State]:
    """A function that gives the variables' values on the host, fast enough to be called between two steps.

    Later updates do not reach what it gave. On a CPU nothing is copied, they are tensors: TensorFlow gives a variable
    that is updated while somebody holds its value new memory.
    """
    held: dict[str, tuple[int, Callable | None]] = {}
    wholes: dict[int, tf.Variable] = {}
    for name, variable in variables.items():
        component = first_component(_whole(variable))
        wholes[id(component.handle)] = component
        held[name] = id(component.handle), variable.of if isinstance(variable, Part) else None

    def read() -> State:
        found = {}
        for key, component in wholes.items():
            value = tf.raw_ops.ReadVariableOp(resource=component.handle, dtype=component.dtype)
            found[key] = value if "CPU" in component.device else np.asarray(value)
        return {name: part(np.asarray(found[key])) if part else found[key] for name, (key, part) in held.items()}

    return read


def _whole(variable: Any) -> Any:
    """The variable that holds a value: the vector of a part."""
    return variable.vector if isinstance(variable, Part) else variable


def values_of(variables: Mapping[str, Any]) -> State:
    """The variables' values as arrays, once. Later updates do not reach them."""
    return {name: np.asarray(value) for name, value in reader(variables)().items()}


def unsaved_variables(
    strategy: tf.distribute.Strategy, variables: Mapping[str, Any], function: Any
) -> list[tuple[str, Any, Any, Any]]:
    """Name, handle, dtype and shape of each variable that a concrete function uses and that is not in `variables`."""
    saved = {id(component.handle) for v in variables.values() for component in components(_whole(v))}
    saved |= {id(token.handle) for token in private_api.ordering_tokens(strategy)}
    if meter := collectives.meter_of(strategy):
        saved.add(id(meter.counts.handle))
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
    put((variable, state[name]) for name, variable in variables.items())
