"""What is built once for a run: model, task, optimizer and loop state, inside the strategy's scope."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from models import layers, optimizers
from models.tasks import Task
from trainers.input import load as data
from trainers.record import checkpoints
from trainers.run.loss_scale import LossScale
from trainers.settings.config import Config, check_batch
from trainers.show import graphs
from trainers.world.cluster import Cluster


@dataclasses.dataclass
class Job:
    """Everything that is built once for a run, inside the strategy's scope."""

    config: Config
    strategy: tf.distribute.Strategy
    dataset: data.Dataset
    model: keras.Model
    task: Task
    optimizer: keras.optimizers.Optimizer
    schedule: Callable[[tf.Tensor], tf.Tensor]
    ema: list[tf.Variable]
    loss_scale: LossScale | None
    cluster: Cluster | None = None
    traces: int = 0

    @property
    def chief(self) -> bool:
        """Whether this process writes what users read."""
        return self.cluster is None or self.cluster.index == 0

    @property
    def workers(self) -> int:
        """Number of processes."""
        return self.cluster.size if self.cluster else 1

    @property
    def replicas(self) -> int:
        """Replicas in all, over which the global batch is divided."""
        return self.strategy.num_replicas_in_sync

    @property
    def variables(self) -> dict[str, Any]:
        """Every variable of model, optimizer and loop, by name: what a checkpoint holds."""
        named = checkpoints.name_variables("model", self.model.variables)
        named |= checkpoints.name_variables("optimizer", self.optimizer.variables)
        named |= checkpoints.name_variables("ema", self.ema)
        return named | checkpoints.name_variables("loss_scale", self.loss_scale.variables if self.loss_scale else ())


def uses_xla(job: Job) -> bool:
    """Whether a replica's forward and backward pass is compiled with XLA: asked for, or on a GPU where it can be."""
    if job.config.jit != "auto":
        return job.config.jit == "on"
    return bool(tf.config.list_logical_devices("GPU")) and not crosses_replicas(job.model, job.replicas)


def crosses_replicas(model: keras.Model, replicas: int) -> bool:
    """Whether a layer reduces over replicas within the forward pass, which XLA cannot compile."""
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization) and layer.crosses_replicas(replicas):
            return True
        if isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized:
            return True
    return False


def build_job(config: Config, strategy: tf.distribute.Strategy, dataset: data.Dataset) -> Job:
    """Builds model, optimizer and loop state inside the strategy's scope, and checks what they are made of."""
    # Here and not earlier: what ran before (preparing the data, say) must not reach the initial weights.
    keras.utils.set_random_seed(config.seed)
    with strategy.scope(), layers.batch_statistics(config.batch_norm == "synchronized"):
        model, task = config.card.builder()(dataclasses.replace(dataset.spec, loss=config.loss))
        # One call on zeros: `build(shape)` leaves a subclassed model without variables.
        model(example_inputs(dataset, task), training=False)
        schedule = optimizers.SCHEDULES[config.schedule](config.learning_rate, config.warmup_steps, config.train_steps)
        optimizer = optimizers.build(config.optimizer, schedule, config.weight_decay)
        optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if len(v.shape) < 2])
        optimizer.build(model.trainable_variables)
        # The loop has summed the gradients already: a second all-reduce in `apply` would multiply them.
        optimizer._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables
        ema = [
            tf.Variable(v, trainable=False, name=f"{v.path}/average") for v in model.trainable_variables if config.ema
        ]
        loss_scale = LossScale() if config.precision == "float16" else None
    for layer in model._flatten_layers():
        if isinstance(layer, (keras.layers.Dropout, keras.layers.GaussianNoise)):
            logging.warning(
                "layer %s draws the same noise on every replica; use models.layers.Dropout instead", layer.path
            )
    return Job(config, strategy, dataset, model, task, optimizer, schedule, ema, loss_scale)


def example_inputs(dataset: data.Dataset, task: Task) -> Any:
    """One example of zeros, as the model takes it."""
    return task.inputs(tf.zeros([1, *dataset.spec.input_shape], dataset.spec.input_dtype))


def input_spec(dataset: data.Dataset, batch: int | None = None) -> tf.TensorSpec:
    """The shape of a batch of the data set's prepared inputs."""
    return tf.TensorSpec([batch, *dataset.spec.input_shape], dataset.spec.input_dtype, name="inputs")


def flops_of_step(job: Job, forward: tf.Graph) -> int:
    """Floating-point operations of the model in one update: the backward pass costs twice the forward pass.

    `forward`: that of one replica's part of the batch. Source: Kaplan et al., "Scaling laws", 2020, section 2.1.
    """
    passes = 2 if hasattr(job.optimizer, "perturbation") else 1
    return 3 * passes * graphs.flops(forward) * job.replicas * job.config.accumulate


@contextlib.contextmanager
def averaged_weights(job: Job) -> Iterator[None]:
    """Within the block the model's weights are their moving average, if there is one."""

    def exchange() -> None:
        pairs = list(zip(job.ema, (v.value for v in job.model.trainable_variables), strict=True))
        for average, weight, a, w in [(a, w, a.numpy(), w.numpy()) for a, w in pairs]:
            average.assign(w)
            weight.assign(a)

    if job.ema:
        exchange()
    try:
        yield
    finally:
        if job.ema:
            exchange()


def plan(job: Job) -> str:
    """What a run prints first, and `--dry_run` alone: devices, batch arithmetic, data, parameters and cadences."""
    config, replicas, dataset = job.config, job.replicas, job.dataset
    share = check_batch(config, replicas)
    placement = "resident on the device" if dataset.train.arrays is not None else "streamed"
    epochs = config.train_steps * config.batch_size / dataset.train.size
    call = config.steps_per_call or "about a second's worth"
    rows = {
        "strategy": f"{config.strategy}, {replicas} replica{'s' if replicas > 1 else ''}: "
        + ", ".join(device.split("device:")[-1] for device in job.strategy.extended.worker_devices),
        "batch": f"{config.batch_size} examples = {replicas} × {share}"
        + (f", each in {config.accumulate} parts" if config.accumulate > 1 else ""),
        "data": f"{dataset.name}: {dataset.train.size} train, {dataset.eval.size} eval examples, {placement}",
        "model": f"{config.model}: {job.model.count_params():,} parameters, {config.precision}",
        "training": f"{config.train_steps} steps = {epochs:.1f} epochs, "
        f"{config.optimizer}, learning rate {config.learning_rate:g} ({config.schedule})",
        "cadences": f"log {config.log_every}, evaluate {config.eval_every}, checkpoint {config.checkpoint_every}, "
        f"call {call}",
        "run_dir": config.run_dir,
    }
    return "\n".join(f"{name:<9} {value}" for name, value in rows.items())


def export_model(job: Job, path: Path) -> None:
    """Writes a SavedModel whose `serve` takes prepared inputs, `[batch, …]`, and returns the model's outputs."""
    model, task = job.config.card.builder()(job.dataset.spec)
    model(example_inputs(job.dataset, task), training=False)
    with averaged_weights(job):
        for copy, weight in zip(model.variables, job.model.variables, strict=True):
            copy.assign(weight.numpy())
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serve", lambda inputs: model(task.inputs(inputs), training=False), input_signature=[input_spec(job.dataset)]
    )
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    archive.write_out(str(aside), verbose=False)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(aside, path)
