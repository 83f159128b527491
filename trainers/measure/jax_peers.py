"""Peers in JAX, in a process of `.venv.jax`: Keras 3's `fit`, and a loop that is written by hand. It has no TensorFlow.

`trainers.measure.jax_process` starts it and asks. Each question and each answer is a JSON object on a line:

    {"model": …, "recipe": …, "data": FILE}         → {"parameters": …, "versions": …, "contenders": {KEY: {NAME: N}}}
    {"key": KEY, "name": NAME, "steps": COUNT}      → {"seconds": …, "loss": …, "accuracy": …}, or {"error": …}

A contender makes N updates at once, the first of each key one. Where its input ends, the process does. Both peers train
the model of our row on its batches, cut once and held as arrays of JAX, with its optimizer, schedule and clipping, from
their initial weights at each question.
"""

import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax

# Of updates that one call makes.
_LENGTHS = (1, 10, 50, 200)
_BETAS, _EPSILON = (0.9, 0.999), 1e-7
_MOMENTUM, _NORM_EPSILON = 0.9, 1e-3

# Seconds of n updates, and the loss and the accuracy of the last that were read together.
Steps = Callable[[int], tuple[float, float, float]]
# By name: how many updates a contender makes at once, and its steps.
Ways = dict[str, tuple[int, Steps]]


class Data:
    """The training examples, cut into whole batches: `inputs` `[batches, batch, …]`, `targets` `[batches, batch]`."""

    def __init__(self, path: str, batch_size: int):
        with np.load(path) as arrays:
            inputs, targets = arrays["inputs"], arrays["targets"]
        self.count = len(inputs) // batch_size
        self.inputs, self.targets = (
            jnp.asarray(array[: self.count * batch_size]).reshape(self.count, batch_size, *array.shape[1:])
            for array in (inputs, targets)
        )

    def batches(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Each batch as arrays of its own, again and again."""
        yield from itertools.cycle([(self.inputs[i], self.targets[i]) for i in range(self.count)])


def rate_at(recipe: dict[str, Any], step: Any) -> jax.Array:
    """The learning rate of an update: the warm-up and the cosine of `models/optimizers.py`."""
    warmup, total = recipe["warmup_steps"], recipe["train_steps"]
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0, 1)
    return (
        recipe["learning_rate"] * jnp.minimum((step + 1) / max(warmup, 1), 1) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    )


# ----------------------------------------------------------------------------------------------------------------------
# Keras 3 on JAX.


def keras_mlp(model: dict[str, Any], shape: Sequence[int]) -> keras.Model:
    """The network of `models/mlp.py`."""
    inputs = keras.Input(shape)
    x = keras.layers.Flatten()(inputs)
    for units in model["units"]:
        x = keras.layers.Dense(units, "relu", kernel_initializer="he_normal")(x)
        x = keras.layers.Dropout(model["dropout"])(x)
    return keras.Model(inputs, keras.layers.Dense(model["classes"])(x))


def keras_resnet(model: dict[str, Any], shape: Sequence[int]) -> keras.Model:
    """The network of `models/resnet.py` for small images."""

    def convolution(x: Any, filters: int, size: int, stride: int, gamma: str = "ones") -> Any:
        chosen = {"use_bias": False, "kernel_initializer": "he_normal"}
        x = keras.layers.Conv2D(filters, size, stride, "same", **chosen)(x)
        return keras.layers.BatchNormalization(momentum=_MOMENTUM, epsilon=_NORM_EPSILON, gamma_initializer=gamma)(x)

    inputs = keras.Input(shape)
    x = keras.ops.relu(convolution(inputs, model["widths"][0], 3, 1))
    for filters, stride in blocks_of(model):
        y = keras.ops.relu(convolution(x, filters, 3, stride))
        y = convolution(y, filters, 3, 1, "zeros")
        shortcut = convolution(x, filters, 1, stride) if stride > 1 or x.shape[-1] != filters else x
        x = keras.ops.relu(shortcut + y)
    return keras.Model(inputs, keras.layers.Dense(model["classes"])(keras.layers.GlobalAveragePooling2D()(x)))


def blocks_of(model: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Filters and stride of each residual block."""
    for stage, (width, count) in enumerate(zip(model["widths"], model["num_blocks"], strict=True)):
        yield from ((width, 2 if stage and not block else 1) for block in range(count))


class Rate(keras.optimizers.schedules.LearningRateSchedule):
    """`rate_at` of a recipe."""

    def __init__(self, recipe: dict[str, Any]):
        self.recipe = recipe

    def __call__(self, step: Any) -> jax.Array:
        return rate_at(self.recipe, step)


class Clock(keras.callbacks.Callback):
    """The seconds of each epoch, with its logs on the host, and the logs of the last."""

    def on_train_begin(self, logs: Any = None) -> None:
        """Forgets earlier epochs."""
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts."""
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stops, when the logs are there."""
        self.logs = {name: float(value) for name, value in (logs or {}).items()}
        self.seconds.append(time.perf_counter() - self._began)


class Fit:
    """`Model.fit` under XLA. Each epoch after the first is timed, as with `fit` on TensorFlow."""

    def __init__(self, model: dict[str, Any], recipe: dict[str, Any], data: Data):
        self.data, self.batch_size = data, data.inputs.shape[1]
        make = {"mlp": keras_mlp, "resnet": keras_resnet}[model["kind"]]
        self.model = make(model, data.inputs.shape[2:])
        optimizer = keras.optimizers.AdamW(
            Rate(recipe), recipe["weight_decay"], *_BETAS, _EPSILON, global_clipnorm=recipe["clip_norm"] or None
        )
        weights = self.model.trainable_variables
        optimizer.exclude_from_weight_decay(var_list=[weight for weight in weights if len(weight.shape) < 2])
        optimizer.build(weights)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.compile = functools.partial(
            self.model.compile, optimizer, loss, metrics=["sparse_categorical_accuracy"], jit_compile=True
        )
        self.variables = [*self.model.variables, *optimizer.variables]
        self.start = [np.asarray(variable) for variable in self.variables]

    def steps(self, arrays: bool, per_execution: int) -> Steps:
        """`arrays`: `fit` cuts batches out of arrays, an epoch for each pass; else it is handed batches without end."""

        def steps(count: int) -> tuple[float, float, float]:
            if self.model.steps_per_execution != per_execution or not self.model.compiled:
                self.compile(steps_per_execution=per_execution)
            for variable, value in zip(self.variables, self.start, strict=True):
                variable.assign(value)
            clock, fit = Clock(), functools.partial(self.model.fit, verbose=0, shuffle=False)
            if arrays:
                inputs, targets = (
                    array.reshape(-1, *array.shape[2:]) for array in (self.data.inputs, self.data.targets)
                )
                epochs = math.ceil(count / self.data.count)
                fit(inputs, targets, batch_size=self.batch_size, epochs=1 + epochs, callbacks=[clock])
                done = epochs * self.data.count
            else:
                done = math.ceil(count / per_execution) * per_execution
                fit(self.data.batches(), steps_per_epoch=done, epochs=2, callbacks=[clock])
            seconds = sum(clock.seconds[1:]) * count / done
            return seconds, clock.logs["loss"], clock.logs["sparse_categorical_accuracy"]

        return steps

    def ways(self) -> Ways:
        """Fed in both ways, and at each length."""
        return {
            f"{'arrays' if arrays else 'batches'}, steps_per_execution={per_execution}": (
                per_execution,
                self.steps(arrays, per_execution),
            )
            for arrays in (False, True)
            for per_execution in _LENGTHS
        }


# ----------------------------------------------------------------------------------------------------------------------
# JAX by hand: pure functions of pytrees.


class Mlp:
    """As `models/mlp.py`. Weights: a list of `(kernel, bias)`."""

    def __init__(self, model: dict[str, Any]):
        self.model = model

    def begin(self, key: jax.Array, shape: Sequence[int]) -> tuple[Any, Any]:
        """The initial weights and statistics."""
        sizes = [math.prod(shape), *self.model["units"], self.model["classes"]]
        kernels = [(jax.nn.initializers.he_normal(), n, m) for n, m in itertools.pairwise(sizes)]
        kernels[-1] = (jax.nn.initializers.glorot_uniform(), *sizes[-2:])
        keys = jax.random.split(key, len(kernels))
        return [(make(k, (n, m)), jnp.zeros(m)) for k, (make, n, m) in zip(keys, kernels, strict=True)], ()

    def apply(self, weights: Any, statistics: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """Logits in training, and the statistics after it."""
        x, keep = x.reshape(len(x), -1), 1 - self.model["dropout"]
        for i, (kernel, bias) in enumerate(weights[:-1]):
            x = jax.nn.relu(x @ kernel + bias)
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), keep, x.shape), x / keep, 0)
        kernel, bias = weights[-1]
        return x @ kernel + bias, statistics


class Resnet:
    """As `models/resnet.py`. Weights: `(kernel, gamma, beta)` of each convolution, then `(kernel, bias)`."""

    def __init__(self, model: dict[str, Any]):
        self.model = model

    def convolutions(self, channels: int) -> Iterator[tuple[int, int, int, int, float]]:
        """Size, inputs, outputs, stride and initial gamma of each convolution, in the order of `apply`."""
        width = self.model["widths"][0]
        yield 3, channels, width, 1, 1.0
        for filters, stride in blocks_of(self.model):
            yield 3, width, filters, stride, 1.0
            yield 3, filters, filters, 1, 0.0
            if stride > 1 or width != filters:
                yield 1, width, filters, stride, 1.0
            width = filters

    def begin(self, key: jax.Array, shape: Sequence[int]) -> tuple[Any, Any]:
        """The initial weights and moving statistics."""
        he, weights, statistics = jax.nn.initializers.he_normal(), [], []
        for i, (size, inputs, outputs, _, gamma) in enumerate(self.convolutions(shape[-1])):
            kernel = he(jax.random.fold_in(key, i), (size, size, inputs, outputs))
            weights.append((kernel, jnp.full(outputs, gamma), jnp.zeros(outputs)))
            statistics.append((jnp.zeros(outputs), jnp.ones(outputs)))
        sizes = self.model["widths"][-1], self.model["classes"]
        return [*weights, (jax.nn.initializers.glorot_uniform()(key, sizes), jnp.zeros(sizes[1]))], statistics

    def apply(self, weights: Any, statistics: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """Logits in training, and the statistics after it."""
        layers, after = iter(zip(weights, statistics, strict=False)), []

        def convolution(x: jax.Array, stride: int) -> jax.Array:
            (kernel, gamma, beta), moving = next(layers)
            x = lax.conv_general_dilated(
                x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            mean = x.mean((0, 1, 2))
            variance = jnp.square(x).mean((0, 1, 2)) - jnp.square(mean)
            now = mean, variance
            after.append(tuple(_MOMENTUM * a + (1 - _MOMENTUM) * b for a, b in zip(moving, now, strict=True)))
            return (x - mean) * (gamma * lax.rsqrt(variance + _NORM_EPSILON)) + beta

        x = jax.nn.relu(convolution(x, 1))
        for filters, stride in blocks_of(self.model):
            y = convolution(jax.nn.relu(convolution(x, stride)), 1)
            x = jax.nn.relu((convolution(x, stride) if stride > 1 or x.shape[-1] != filters else x) + y)
        kernel, bias = weights[-1]
        return x.mean((1, 2)) @ kernel + bias, after


def adamw(recipe: dict[str, Any], step: jax.Array, weights: Any, moments: Any, gradients: Any) -> tuple[Any, Any]:
    """Weights and moments after an update, with the warm-up, the cosine and the clipping of the recipe."""
    rate = rate_at(recipe, step)
    if recipe["clip_norm"]:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        factor = jnp.minimum(1, recipe["clip_norm"] / jnp.maximum(norm, 1e-30))
        gradients = jax.tree.map(lambda g: g * factor, gradients)
    made = step + 1.0
    alpha = rate * jnp.sqrt(1 - _BETAS[1] ** made) / (1 - _BETAS[0] ** made)
    first = jax.tree.map(lambda m, g: m + (g - m) * (1 - _BETAS[0]), moments[0], gradients)
    second = jax.tree.map(lambda v, g: v + (jnp.square(g) - v) * (1 - _BETAS[1]), moments[1], gradients)

    def moved(w: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        kept = w * (1 - rate * recipe["weight_decay"]) if w.ndim > 1 else w
        return kept - alpha * m / (jnp.sqrt(v) + _EPSILON)

    return jax.tree.map(moved, weights, first, second), (first, second)


class ByHand:
    """A compiled `jax.lax.scan` over updates, or a compiled call for each of them."""

    def __init__(self, model: dict[str, Any], recipe: dict[str, Any], data: Data):
        self.recipe, self.data = recipe, data
        self.network = {"mlp": Mlp, "resnet": Resnet}[model["kind"]](model)
        self.key = jax.random.key(0)
        weights, statistics = self.network.begin(self.key, data.inputs.shape[2:])
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves((weights, statistics)))
        zeros = jax.tree.map(jnp.zeros_like, weights)
        self.start = jnp.zeros((), jnp.int32), weights, statistics, (zeros, zeros), jnp.zeros(2)

    def update(self, state: Any) -> Any:
        """One update, and its loss and hits on top of the sums so far."""
        step, weights, statistics, moments, sums = state
        at = step % self.data.count
        x, y = (lax.dynamic_index_in_dim(array, at, keepdims=False) for array in (self.data.inputs, self.data.targets))

        def loss_of(weights: Any) -> tuple[jax.Array, Any]:
            logits, after = self.network.apply(weights, statistics, x, jax.random.fold_in(self.key, step))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=-1)
            hits = jnp.mean(jnp.argmax(logits, -1) == y)
            return -jnp.mean(chosen), (after, hits)

        (loss, (statistics, hits)), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights)
        weights, moments = adamw(self.recipe, step, weights, moments, gradients)
        return step + 1, weights, statistics, moments, sums + jnp.stack([loss, hits])

    def steps(self, length: int) -> Steps:
        """`length`: updates in a call. Loss and accuracy are read at the cadence of the log, or after each call."""

        def call(state: Any) -> Any:
            if length == 1:
                return self.update(state)
            return lax.scan(lambda state, _: (self.update(state), None), state, length=length)[0]

        call = jax.jit(call, donate_argnums=0)

        def steps(count: int) -> tuple[float, float, float]:
            state = jax.tree.map(jnp.copy, self.start)
            calls, means, since = math.ceil(count / length), (0.0, 0.0), 0
            began = time.perf_counter()
            for number in range(1, calls + 1):
                state, since = call(state), since + length
                if since >= self.recipe["log_every"] or number == calls:
                    means, since = tuple(float(value) / since for value in state[-1]), 0
                    state = (*state[:-1], jnp.zeros(2))
            jax.block_until_ready(state)
            return (time.perf_counter() - began) * count / (calls * length), *means

        return steps

    def ways(self) -> Ways:
        """At each length. Within a loop XLA computes convolutions many times slower on a CPU, so there is none too."""
        scans = {f"jax.lax.scan of {length} updates": (length, self.steps(length)) for length in _LENGTHS[1:]}
        return {"a compiled call for each update": (1, self.steps(1))} | scans


# ----------------------------------------------------------------------------------------------------------------------
# The process.


def answer(contenders: dict[str, Ways], question: dict[str, Any]) -> dict[str, Any]:
    """What is said to a question; why a contender cannot run, if it cannot."""
    try:
        _, steps = contenders[question["key"]][question["name"]]
        seconds, loss, accuracy = steps(question["steps"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"seconds": seconds, "loss": loss, "accuracy": accuracy}


def main() -> None:
    """Answers, line by line. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    questions = map(json.loads, sys.stdin)
    asked = next(questions)
    data = Data(asked["data"], asked["recipe"]["batch_size"])
    fit, by_hand = (kind(asked["model"], asked["recipe"], data) for kind in (Fit, ByHand))
    assert fit.model.count_params() == by_hand.parameters, "both are one model"
    contenders = {"jax_fit": fit.ways(), "jax_scan": by_hand.ways()}
    facts = {
        "parameters": by_hand.parameters,
        "versions": {"jax": jax.__version__, "keras": keras.__version__},
        "device": jax.devices()[0].platform,
        "contenders": {key: {name: way[0] for name, way in ways.items()} for key, ways in contenders.items()},
    }
    print(json.dumps(facts), file=answers)
    for question in questions:
        print(json.dumps(answer(contenders, question)), file=answers)
