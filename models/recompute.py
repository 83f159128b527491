"""Activations of a block that are computed again in the backward pass instead of kept: less memory for more time.

What is kept of a block is its input. Source: Chen et al., "Training deep nets with sublinear memory cost", 2016.

`tf.recompute_grad` finds a block's variables by itself, which neither Keras's nor those of several replicas allow, and
runs everything a second time: noise would be drawn anew, and moving statistics would move twice.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from models import randomness

_WANTED: contextvars.ContextVar[bool] = contextvars.ContextVar("recompute", default=False)
_INSIDE: contextvars.ContextVar[bool] = contextvars.ContextVar("recomputed", default=False)


@contextlib.contextmanager
def blocks(wanted: bool) -> Iterator[None]:
    """Sets whether blocks that are made within compute their activations again."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


class Block(keras.layers.Layer):
    """A layer whose activations are computed again in the backward pass, where it was made within `blocks(True)`.

    Only where it is called with `training=True`, and within `models.randomness.at`: noise is the same both times. What
    the first pass writes to variables, moving statistics for instance, the second does not. A block within a block is
    computed again with it.

    Raises:
      ValueError: the block calls `add_loss`, which the second pass would not know.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.recompute = _WANTED.get()

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """As of any layer."""
        again = self.recompute and self.built and kwargs.get("training") is True and not _INSIDE.get()
        if not again or not randomness.is_placed():
            return super().__call__(*inputs, **kwargs)
        return _Recomputed(self, super().__call__, inputs, kwargs).run()


class _Recomputed:
    """One call of a layer, as a function of the floating-point inputs and the trained weights.

    `call`: computes the layer. `inputs`: tensors, nested, or None.
    """

    def __init__(self, layer: keras.layers.Layer, call: Callable, inputs: Sequence[Any], kwargs: Mapping[str, Any]):
        self.layer, self.call, self.inputs, self.kwargs = layer, call, list(inputs), dict(kwargs)
        self.flat = tf.nest.flatten(self.inputs)
        self.places = [i for i, x in enumerate(self.flat) if tf.is_tensor(x) and x.dtype.is_floating]
        self.trained = layer.trainable_variables
        known = {id(variable) for variable in self.trained}
        self.others = [variable for variable in layer.variables if id(variable) not in known]
        self.held = [tf.stop_gradient(_value_of(variable)) for variable in self.others]
        self.here = randomness.here()

    def run(self) -> Any:
        """The outputs. The layer's other variables are as its call has left them."""
        moved: dict[int, Any] = {}

        @tf.custom_gradient
        def computed(*values: tf.Tensor) -> tuple[Any, Callable]:
            outputs, changes = self.compute(values)
            moved.update(changes)

            def gradient(*upstream: tf.Tensor) -> Sequence[Any]:
                # Not before the gradient of the outputs is there: until then nothing is kept, and no pass over the
                # graph may find that the same was computed before.
                with tf.control_dependencies(upstream):
                    later = [_after(x, upstream[0]) if i < len(self.places) else x for i, x in enumerate(values)]
                    with tf.GradientTape() as tape:
                        tape.watch(later)
                        again, _ = self.compute(later)
                    return tape.gradient(tf.nest.flatten(again), later, output_gradients=list(upstream))

            return outputs, gradient

        outputs = computed(*(self.flat[i] for i in self.places), *map(_value_of, self.trained))
        for i, value in moved.items():
            self.others[i].assign(value)
        return outputs

    def compute(self, values: Sequence[tf.Tensor]) -> tuple[Any, dict[int, Any]]:
        """Outputs for values of inputs and weights, and by its place what another variable would become."""
        flat, count = list(self.flat), len(self.places)
        for place, value in zip(self.places, values[:count], strict=True):
            flat[place] = value
        weights = [*zip(self.trained, values[count:], strict=True), *zip(self.others, self.held, strict=True)]
        scope, token = keras.StatelessScope(collect_losses=True), _INSIDE.set(True)
        for pair in weights:
            scope.add_update(pair)  # its constructor casts values to what the layer around computes in
        try:
            with scope, self.here():
                outputs = self.call(*tf.nest.pack_sequence_as(self.inputs, flat), **self.kwargs)
        finally:
            _INSIDE.reset(token)
        if scope.losses:
            raise ValueError(
                f"block {self.layer.path} calls add_loss, which cannot be computed again; leave --recompute"
            )
        after = [scope.get_current_value(variable) for variable in self.others]
        return outputs, {i: now for i, now in enumerate(after) if now is not self.held[i]}


def _value_of(variable: keras.Variable) -> tf.Tensor:
    """A variable's value in its own type. `value` may be cast for the layer around, and casts again within."""
    return tf.convert_to_tensor(variable._value)


def _after(x: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """`x`, but not before `other` is there. XLA knows no control dependency, and must not see that this adds 0."""
    nothing = tf.minimum(tf.abs(tf.reduce_sum(tf.reshape(other, [-1])[:1])), 0)
    return x + tf.cast(nothing, x.dtype)
