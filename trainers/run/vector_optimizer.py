"""A Keras optimizer on a few long vectors instead of many weights. What it computes of each element is the same.

Its operations for each weight are more than half of what a step of many small weights is: to trace, to place on
devices, and to launch.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from models import randomness
from models.optimizers import SLOTS, Momentum
from trainers.record.state import Part
from trainers.run.rounded_slots import ForOneUpdate, RoundedSlot
from trainers.run.vectors import joined, vectors_of
from trainers.world import private_api
from trainers.world.devices import native

# Those whose `update_step` computes each element from that element alone, and asks the variable for no more than its
# type. Exactly these: a subclass may do anything.
_kinds = keras.optimizers
ELEMENTWISE = (
    Momentum,
    *(_kinds.SGD, _kinds.Adam, _kinds.AdamW, _kinds.Adamax, _kinds.RMSprop, _kinds.Adagrad, _kinds.Adadelta),
    _kinds.Lion,
)
# What Keras's `apply` does besides, which loops do themselves.
_BESIDES = (
    *("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor", "gradient_accumulation_steps"),
)


def rounds_slots(optimizer: Any) -> bool:
    """Whether an optimizer's slots are to be kept in bfloat16: by `slots`, as `models.optimizers` sets it."""
    return type(optimizer) in ELEMENTWISE and getattr(optimizer, "slots", SLOTS[0]) != SLOTS[0]


def takes_vectors(optimizer: Any, weights: Sequence[keras.Variable]) -> bool:
    """Whether an optimizer that is not built yet computes of vectors what it computes of these weights."""
    special = any(w.constraint is not None or getattr(w, "overwrite_with_gradient", False) for w in weights)
    return type(optimizer) in ELEMENTWISE and not special and not any(getattr(optimizer, each) for each in _BESIDES)


class _Values(ForOneUpdate):
    """What an update rule takes for a variable: values that last for one update, `[elements]` or those of one weight.

    Of an optimizer that is built they have the shape alone. Keras tells variables apart by `_unique_id`.
    """

    def __init__(self, number: int, shape: Sequence[int], dtype: Any, value: tf.Tensor | None = None, path: str = ""):
        self._unique_id = f"vector_{number}"
        self.path = self.name = path or self._unique_id
        self.shape, self.dtype, self.value = tuple(shape), tf.as_dtype(dtype).name, value


class VectorOptimizer:
    """An optimizer of `ELEMENTWISE`, built on vectors of weights. In the strategy's scope.

    `variables`: as the optimizer has them which is built on the weights themselves, in name, order, shape and value:
    what checkpoints hold. `decays`: for each weight whether it has weight decay. `seed`: of the noise by which slots of
    bfloat16 are rounded: a function of it, of the optimizer's count of updates, and of the place in a vector.
    Everything else is the optimizer's.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        weights: Sequence[keras.Variable],
        decays: Sequence[bool],
        seed: int = 0,
    ):
        self.optimizer, self.weights, self.seed = optimizer, list(weights), seed
        self.vectors = vectors_of(weights)
        for bundle in self.vectors.bundles:
            bundle.sort(key=lambda place: not decays[place])  # those that decay stand first, in their order
        self.decaying = [sum(decays[place] for place in bundle) for bundle in self.vectors.bundles]
        self.rounds, self.rounded = rounds_slots(optimizer), [[] for _ in self.vectors.bundles]
        owners = [
            weights[bundle[0]] if len(bundle) == 1 and not self.rounds else self._values(number)
            for number, bundle in enumerate(self.vectors.bundles)
        ]
        # L2 is a part of the gradient. It is added here, since a vector decays in part.
        self.coupled = getattr(optimizer, "coupled", False)
        if self.coupled:
            optimizer.exclude_from_weight_decay(var_list=owners)
        slots = private_api.build_recorded(optimizer, owners, self._rounded if self.rounds else None)
        held = {id(slot) for lists in slots for _, of_kind in lists for slot in of_kind}
        self.variables = [variable for variable in optimizer.variables if id(variable) not in held]
        for lists in slots:
            self.variables += self._of_weights(lists)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def _values(self, number: int, value: tf.Tensor | None = None) -> _Values:
        """What stands for the weights of a vector. Without a value, what the optimizer makes its slots for."""
        bundle = self.vectors.bundles[number]
        dtype = SLOTS[1] if self.rounds and value is None else self.weights[bundle[0]].dtype
        if len(bundle) == 1:
            return _Values(number, self.vectors.shapes[bundle[0]], dtype, value, self.weights[bundle[0]].path)
        return _Values(number, [sum(self.vectors.sizes[place] for place in bundle)], dtype, value)

    def _rounded(self, kind: str, number: int, slot: Any) -> RoundedSlot:
        """A slot of a vector as the update rule takes it."""
        stream = f"{self.weights[self.vectors.bundles[number][0]].path}/{kind}/rounding"
        self.rounded[number].append(RoundedSlot(slot, stream))
        return self.rounded[number][-1]

    def _of_weights(self, slots: Sequence[tuple[str, Sequence[Any]]]) -> list[Any]:
        """The slots of each weight, kind by kind, of those of the vectors: `[(kind, [slot, …]), …]`."""
        found: dict[tuple[int, int], Any] = {}
        for order, (kind, of_kind) in enumerate(slots):
            for bundle, slot in zip(self.vectors.bundles, of_kind, strict=True):
                scope, alone = slot.path.rpartition("/")[0], len(bundle) == 1
                for place, first in self.vectors.begins(bundle):
                    path = f"{scope}/{self.weights[place].path.replace('/', '_')}_{kind}"
                    found[place, order] = slot if alone else Part(slot, first, self.vectors.shapes[place], path)
        return [found[key] for key in sorted(found)]

    def apply(self, gradients: Sequence[tf.Tensor], weights: Sequence[keras.Variable] | None = None) -> None:
        """In a replica: an update by a gradient for each weight, the same on all replicas. `weights`: as built."""
        self.apply_vectors(self.vectors.pack(gradients))

    def apply_vectors(self, gradients: Sequence[tf.Tensor]) -> None:
        """In a replica: an update by gradients as `vectors.pack` makes them, the same on all replicas."""
        if not gradients:
            return  # of a model without weights, which a loop refuses once it is traced
        with tf.name_scope(self.optimizer.name):
            context = tf.distribute.get_replica_context()
            context.merge_call(self._update_all, args=(list(gradients), tf.convert_to_tensor(self.learning_rate)))
            self.optimizer.iterations.assign_add(1)

    def _update_all(self, strategy: tf.distribute.Strategy, gradients: list[tf.Tensor], rate: tf.Tensor) -> None:
        weights = [[native(self.weights[place]) for place in bundle] for bundle in self.vectors.bundles]
        strategy.extended.update(weights[0][0], self._update, args=(gradients, weights, rate), group=False)

    def _update(
        self, _: tf.Variable, gradients: list[tf.Tensor], weights: list[list[tf.Variable]], rate: tf.Tensor
    ) -> None:
        """On a device: updates what lies there."""
        with private_api.counter_read_once(self.optimizer):
            done: list[Any] = []
            for number, (gradient, own) in enumerate(zip(gradients, weights, strict=True)):
                # What is rounded one after the other: all float32 copies at once would need what bfloat16 saves.
                with tf.control_dependencies(done if self.rounds else []):
                    done = self._update_vector(number, gradient, own, rate)

    def _update_vector(self, number: int, gradient: tf.Tensor, own: list[tf.Variable], rate: tf.Tensor) -> list[Any]:
        """On a device: updates the weights of a vector, or a weight alone. Returns what has to be done for that."""
        decaying = self.decaying[number] if self.optimizer.weight_decay else 0
        if decaying and self.coupled:
            gradient, decaying = gradient + self._penalty(own, decaying), 0
        if len(own) == 1 and not self.rounds:
            if decaying:
                own[0].assign_sub(self._decay(own[0], rate), read_value=False)
            self.optimizer.update_step(gradient, own[0], rate)
            return []
        # What needs the weights alone could begin with the step, and would keep a core from the forward pass, which all
        # else waits for. After the rate it finds its place beside that.
        with tf.control_dependencies([rate]):
            values = list(own)
            if decaying:
                whole = joined(own[:decaying])
                values[:decaying] = [whole - self._decay(whole, rate)]
            target = self._values(number, joined(values))
        for slot in self.rounded[number]:
            slot.read()
        self.optimizer.update_step(gradient, target, rate)
        with randomness.at(self.seed, self.optimizer.iterations, tf.constant(0, tf.int64)):
            kept = [slot.keep() for slot in self.rounded[number]]
        parts = self.vectors.parts(self.vectors.bundles[number], target.value)
        return kept + [variable.assign(value, read_value=False) for variable, value in zip(own, parts, strict=True)]

    def _penalty(self, own: list[tf.Variable], decaying: int) -> tf.Tensor:
        """The gradient of L2 over a vector, or a weight alone, of which the first `decaying` weights have it."""
        slope = self.optimizer.weight_decay * joined(own[:decaying])
        if len(own) == 1:
            return slope
        slope = tf.reshape(slope, [-1])
        return tf.concat([slope, tf.zeros([sum(v.shape.num_elements() for v in own[decaying:])], slope.dtype)], axis=0)

    def _decay(self, value: Any, rate: tf.Tensor) -> tf.Tensor:
        """What weight decay takes off values in an update."""
        return value * tf.cast(self.optimizer.weight_decay, value.dtype) * tf.cast(rate, value.dtype)
