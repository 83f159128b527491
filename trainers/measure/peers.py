"""The contenders of `trainers/benchmark.py`: our loop, the ceiling, Model.fit, a call for each step, the eager loop."""

import contextlib
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from models import optimizers, tasks
from trainers import custom_loop
from trainers.custom_loop import Supervised
from trainers.measure import jax_process
from trainers.measure.jax_process import JaxProcess
from trainers.measure.rounds import Contender, Steps, best_of, calibrated
from trainers.record import reading
from trainers.record.state import put
from trainers.run import weight_groups
from trainers.run.models_loop import filled
from trainers.settings.config import Config


def from_the_start(variables: Sequence[keras.Variable | tf.Variable], steps: Steps) -> Steps:
    """`steps` from the values that the variables have now, at each call.

    A model that is trained on and on has nothing left to learn: its gradients become denormal numbers, with which a CPU
    computes at half the speed.
    """
    start = [variable.numpy() for variable in variables]

    def steps_from_the_start(count: int) -> float:
        put(zip(variables, start, strict=True))
        return steps(count)

    return steps_from_the_start


def after_a_call(steps: Steps) -> Steps:
    """`steps` after a call that is not counted.

    Seeding TensorFlow clears its cache of functions, and `train` seeds it: a compiled function is prepared again at its
    next call, which takes up to a second. Ours is timed from its second call on, and `fit` in its second epoch.
    """

    def steps_after_a_call(count: int) -> float:
        steps(1)
        return steps(count)

    return steps_after_a_call


def examples_of(loop: Supervised) -> tuple[Any, Any]:
    """All training examples as a model takes them, and their targets, in host memory."""
    dataset = loop.dataset
    inputs, targets = dataset.prepare({key: tf.constant(array) for key, array in dataset.train.arrays.items()})
    return loop.task.inputs(inputs), targets


def jax_process_of(loop: Supervised) -> AbstractContextManager[JaxProcess]:
    """The process of JAX's peers of `loop`: its model, recipe and examples."""
    config, model = loop.config, loop.model
    sizes = {"mlp": ("units", "dropout"), "resnet": ("widths", "num_blocks")}[config.model]
    recipe = ("batch_size", "train_steps", "learning_rate", "warmup_steps", "weight_decay", "clip_norm", "log_every")
    assert (config.optimizer, config.schedule) == ("adamw", "cosine"), "what JAX's peers have"
    inputs, targets = (array.numpy() for array in examples_of(loop))
    return jax_process.peers(
        {"kind": config.model, "classes": model.num_classes} | {name: getattr(model, name) for name in sizes},
        {name: getattr(config, name) for name in recipe},
        inputs,
        targets,
        loop.num_parameters,
    )


class Peer:
    """What the peers train: the model, optimizer and recipe of `loop`, built anew, without anything of our loop.

    On one replica there is no strategy: it costs them time, and they do not need it. Their input is as fast as tf.data
    can be: batches cut once, kept in memory, repeated without a shuffle and prefetched.
    """

    def __init__(self, loop: Supervised):
        config, dataset = loop.config, loop.dataset
        self.config = config
        self.strategy = loop.world.strategy if config.replicas > 1 else tf.distribute.get_strategy()
        with self.strategy.scope():
            self.model, self.task = tasks.model_of(config.model, dataset.spec)
            self.model(loop.example_inputs(), training=False)
            schedule = optimizers.schedule(
                config.schedule, config.learning_rate, config.warmup_steps, config.train_steps
            )
            self.optimizer = optimizers.build(config.optimizer, schedule, config.weight_decay)
            weights = self.model.trainable_variables
            self.optimizer.exclude_from_weight_decay(var_list=[v for v in weights if len(v.shape) < 2])
            self.optimizer.global_clipnorm = config.clip_norm or None
            self.optimizer.build(weights)
            self.metrics = [keras.metrics.Mean("loss")]
            if dataset.spec.num_classes:
                self.metrics.append(keras.metrics.SparseCategoricalAccuracy("accuracy"))
        batches = tf.data.Dataset.from_tensor_slices(examples_of(loop))
        self.batches = batches.batch(config.batch_size, drop_remainder=True).cache().repeat().prefetch(tf.data.AUTOTUNE)

    def from_the_start(self, steps: Steps) -> Steps:
        """`steps` from the initial weights, at each call."""
        return from_the_start([*self.model.variables, *self.optimizer.variables], steps)

    def loss(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The mean over the examples of this replica."""
        return tf.reduce_mean(self.task.loss(targets, outputs))

    def update(self, inputs: Any, targets: Any) -> None:
        """In a replica: one update and its metrics, as guides to custom loops write them."""
        with tf.GradientTape() as tape:
            outputs = self.model(inputs, training=True)
            loss = self.loss(targets, outputs)
        weights = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        self.metrics[0].update_state(loss)
        for metric in self.metrics[1:]:
            metric.update_state(targets, outputs)


def loop_of_calls(peer: Peer, eager: bool, jit: bool = False) -> Steps:
    """A Python call for each step; the metrics are read at the cadence of the log."""
    replica = tf.function(peer.update, jit_compile=True) if jit else peer.update
    if peer.config.replicas > 1:

        def step(batch: Any) -> None:
            peer.strategy.run(replica, args=batch)
    else:

        def step(batch: Any) -> None:
            replica(*batch)

    step = step if eager else tf.function(step)
    iterator = iter(peer.strategy.experimental_distribute_dataset(peer.batches))

    def steps(count: int) -> float:
        began = time.perf_counter()
        for i in range(1, count + 1):
            step(next(iterator))
            if i % peer.config.log_every == 0 or i == count:
                for metric in peer.metrics:
                    float(metric.result())
                    metric.reset_state()
        # Kernels of a GPU may still run: the last update is on the host when its weights are.
        peer.model.trainable_variables[-1].numpy()
        return time.perf_counter() - began

    return after_a_call(peer.from_the_start(steps))


class EpochTimes(keras.callbacks.Callback):
    """The seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Reads it, when the logs are on the host."""
        _ = {name: float(value) for name, value in (logs or {}).items()}
        self.seconds.append(time.perf_counter() - self._began)


def fit(peer: Peer, per_execution: int = 1, jit: bool | str = "auto") -> Steps:
    """Model.fit. The first epoch pays for the start of the iterator; the second is timed."""
    with peer.strategy.scope():
        peer.model.compile(
            peer.optimizer,
            loss=peer.loss,
            metrics=["sparse_categorical_accuracy"] if len(peer.metrics) > 1 else [],
            steps_per_execution=per_execution,
            jit_compile=jit,
        )

    def steps(count: int) -> float:
        # Whole executions, which may be more than `count`.
        per_epoch = math.ceil(count / per_execution) * per_execution
        times = EpochTimes()
        with contextlib.redirect_stdout(io.StringIO()):
            peer.model.fit(
                peer.batches, steps_per_epoch=per_epoch, epochs=2, verbose=0, callbacks=[times], shuffle=False
            )
        return times.seconds[1] * count / per_epoch

    return peer.from_the_start(steps)


def ceiling(loop: Supervised, jit: bool) -> Steps:
    """Forward and backward pass, sum over replicas, clipping and update, many in one call, on one resident batch."""
    config, world, task, weights = loop.config, loop.world, loop.task, loop.weights
    share = config.batch_size // world.replicas
    features = {key: tf.constant(array[:share]) for key, array in loop.dataset.train.arrays.items()}
    inputs, targets = (tf.nest.map_structure(tf.identity, part) for part in loop.dataset.prepare(features))
    inputs = task.inputs(inputs)

    def gradients_of_batch() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            losses = task.loss(targets, loop.model(inputs, training=True))
            loss = tf.reduce_sum(losses) / config.batch_size
        return loop.vectors.pack(filled(tape.gradient(loss, weights), weights))

    compiled = tf.function(gradients_of_batch, jit_compile=True) if jit else gradients_of_batch

    def update() -> None:
        gradients = compiled()
        if world.replicas > 1:
            context = tf.distribute.get_replica_context()
            gradients = context.all_reduce("sum", [tf.stop_gradient(gradient) for gradient in gradients])
        if config.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm)
        weight_groups.apply_vectors(loop.groups, gradients)

    @tf.function
    def call(count: tf.Tensor) -> None:
        for _ in tf.range(count):
            world.strategy.run(tf.autograph.experimental.do_not_convert(update))

    def steps(count: int) -> float:
        began = time.perf_counter()
        call(tf.constant(count))
        weights[-1].numpy()
        return time.perf_counter() - began

    return after_a_call(from_the_start([*loop.model.variables, *loop.optimizer.variables], steps))


def ours(configure: Callable[..., Config], **changes: Any) -> Steps:
    """`train` as a whole, in a temporary run_dir: timed from where its calls have reached their length to the end.

    `configure`: returns the resolved configuration with some flags changed.
    """

    def steps(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            run_dir = Path(folder, "run")
            config = configure(train_steps=max(count, 50), run_dir=str(run_dir), **changes)
            with contextlib.redirect_stderr(nowhere):
                custom_loop.train(config)
            steady = reading.read_run(run_dir)["steady"]
        return steady["seconds"] / steady["steps"] * count

    return steps


def contenders_of(loop: Supervised, configure: Callable[..., Config], seconds: float) -> list[Contender]:
    """All of them, the peers at the best settings in trials. `configure`: as in `ours`. `seconds`: of a measurement."""
    trial = seconds / 2
    plain = fit(Peer(loop))

    def fits() -> Iterator[Contender]:
        # An execution that lasts longer than a measurement gains nothing.
        step = calibrated(plain, trial)[1]
        for jit in (False, True):
            for per_execution in (n for n in (10, 50, 200) if n == 10 or n * step <= seconds):
                name = f"steps_per_execution={per_execution}, jit_compile={jit}"
                yield Contender("fit_best", name, fit(Peer(loop), per_execution, jit))

    def calls() -> Iterator[Contender]:
        for jit in (False, True):
            yield Contender("call", f"jit_compile={jit}", loop_of_calls(Peer(loop), False, jit))

    def ceilings() -> Iterator[Contender]:
        for jit in (False, True):
            yield Contender("ceiling", f"jit_compile={jit}", ceiling(loop, jit))

    return [
        best_of(ceilings(), trial),
        Contender("ours", "", ours(configure)),
        Contender("fit", "", plain),
        best_of(fits(), trial),
        best_of(calls(), trial),
        Contender("eager", "", loop_of_calls(Peer(loop), True)),
        Contender("ours_silent", "", ours(configure, log_every=0)),
        Contender("ours_saving", "", ours(configure, checkpoint_every=100)),
    ]
