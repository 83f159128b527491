"""Regressors over rows of numbers, subclassed: residual, wide & deep, reconstructing.

Each takes `[batch, features]` and gives `[batch, outputs]`, float32, in standard deviations of the target.
"""

from typing import Any

import keras
import tensorflow as tf

from models import layers, metrics, tasks
from models.blocks import ResidualDense

register = keras.saving.register_keras_serializable("lockstep")


@register
class ResidualRegressor(keras.Model):
    """A dense layer, a residual block used `repeats` times (the same weights), another block, the output."""

    def __init__(self, num_outputs: int = 1, units: int = 32, repeats: int = 3, dropout: float = 0.2, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_outputs, self.units, self.repeats, self.dropout = num_outputs, units, repeats, dropout
        self.hidden = layers.Dense(units, "elu", "he_normal", name="hidden")
        self.repeated = ResidualDense(name="repeated")
        self.once = ResidualDense(name="once")
        self.drop = layers.Dropout(dropout, name="drop")
        self.head = layers.Dense(num_outputs, name="output", dtype="float32")

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = self.hidden(x)
        for _ in range(self.repeats):
            x = self.repeated(x)
        return self.head(self.drop(self.once(x), training=training))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "num_outputs": self.num_outputs,
            "units": self.units,
            "repeats": self.repeats,
            "dropout": self.dropout,
        }


@register
class WideDeep(keras.Model):
    """Two inputs and an auxiliary output: a wide one goes straight to the output, a deep one through hidden layers.

    `(wide [batch, …], deep [batch, …])` → `(main, auxiliary)`, `[batch, outputs]` each; the auxiliary output sees the
    deep part only. Source: Cheng et al., "Wide & deep learning for recommender systems", 2016.
    """

    def __init__(self, num_outputs: int = 1, units: int = 32, dropout: float = 0.2, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_outputs, self.units, self.dropout = num_outputs, units, dropout
        self.wide = layers.Dense(units, name="wide")
        self.hidden_1 = layers.Dense(units, "elu", "he_normal", name="hidden_1")
        self.hidden_2 = layers.Dense(units, "elu", "he_normal", name="hidden_2")
        self.drop = layers.Dropout(dropout, name="drop")
        self.merge = layers.GatedMerge(name="merge")
        self.main = layers.Dense(num_outputs, name="main", dtype="float32")
        self.auxiliary = layers.Dense(num_outputs, name="auxiliary", dtype="float32")

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor], training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        wide, deep = inputs
        deep = self.drop(self.hidden_2(self.hidden_1(deep)), training=training)
        merged, _ = self.merge((self.wide(wide), deep))
        return self.main(merged), self.auxiliary(deep)

    def get_config(self) -> dict[str, Any]:
        config = {"num_outputs": self.num_outputs, "units": self.units, "dropout": self.dropout}
        return super().get_config() | config


@register
class ReconstructingRegressor(keras.Model):
    """Hidden layers that must also reconstruct the inputs; `add_loss` adds the squared error of that as a penalty.

    `x: [batch, features]` → `(prediction [batch, outputs], reconstruction error [batch])`.
    """

    def __init__(self, num_outputs: int = 1, units: int = 30, depth: int = 3, penalty: float = 0.05, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_outputs, self.units, self.depth, self.penalty = num_outputs, units, depth, penalty
        self.hidden = [layers.Dense(units, "selu", "lecun_normal", name=f"hidden_{i}") for i in range(1, depth + 1)]
        self.noise = layers.Noise(0.1, name="noise")
        self.head = layers.Dense(num_outputs, name="output", dtype="float32")

    def build(self, input_shape: Any) -> None:
        self.reconstruct = layers.Dense(input_shape[-1], name="reconstruct", dtype="float32")
        shape = input_shape
        for hidden in self.hidden:
            hidden.build(shape)
            shape = (*shape[:-1], self.units)
        self.noise.build(input_shape)
        self.head.build(shape)
        self.reconstruct.build(shape)
        self.built = True

    def call(self, x: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        y = self.noise(x, training=training)
        for hidden in self.hidden:
            y = hidden(y)
        error = tf.reduce_mean(tf.square(self.reconstruct(y) - tf.cast(x, tf.float32)), axis=-1)
        self.add_loss(self.penalty * tf.reduce_mean(error))
        return self.head(y), error

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "num_outputs": self.num_outputs,
            "units": self.units,
            "depth": self.depth,
            "penalty": self.penalty,
        }


@register
class ReconstructionError(metrics.StreamingMetric):
    """Mean squared error of the reconstruction, which the model returns beside its prediction."""

    def __init__(self, name: str = "reconstruction_error", dtype: Any = None):
        super().__init__(name, dtype)

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The error of each example: `[batch, 1]`."""
        return outputs[1][:, None]


class _OfFirstOutput(metrics.StreamingMetric):
    """Applies a metric to the first of several outputs."""

    def __init__(self, metric: metrics.StreamingMetric):
        super().__init__(metric.name)
        self._metric = metric
        self.width = metric.width

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        return self._metric.statistics(targets, outputs[0])

    def result_of(self, total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        return self._metric.result_of(total, count)


def _several_outputs(spec: tasks.DataSpec, auxiliary_weight: float = 0.0, **changes: Any) -> tasks.Task:
    """A regression task whose prediction is the first of several outputs, the second weighted into the loss."""
    task = tasks.regression(spec)

    def loss(targets: tf.Tensor, outputs: tuple[tf.Tensor, ...]) -> tf.Tensor:
        main = task.loss(targets, outputs[0])
        if not auxiliary_weight:
            return main
        return (1 - auxiliary_weight) * main + auxiliary_weight * task.loss(targets, outputs[1])

    return tasks.Task(
        loss,
        {name: _OfFirstOutput(metric) for name, metric in task.metrics.items()} | changes.pop("metrics", {}),
        {name: _OfFirstOutput(metric) for name, metric in task.eval_metrics.items()},
        task.best_metric,
        task.best_mode,
        pictures=task.pictures,
        **changes,
    )


def build_residual(
    spec: tasks.DataSpec, *, width: int = 32, depth: int = 3, dropout: float = 0.2
) -> tuple[keras.Model, tasks.Task]:
    """The residual regressor. `depth`: how often the block that is used several times is."""
    layers.check_sizes(width=width, depth=depth)
    return ResidualRegressor(spec.num_outputs, width, depth, dropout, name="residual_regressor"), tasks.regression(spec)


def build_wide_deep(spec: tasks.DataSpec, *, width: int = 32, dropout: float = 0.2) -> tuple[keras.Model, tasks.Task]:
    """Wide & deep. All features are wide; all but the first two are deep too."""
    layers.check_sizes(width=width)
    deep_start = min(2, spec.input_shape[-1] - 1)

    def inputs(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return x, x[:, deep_start:]

    model = WideDeep(spec.num_outputs, width, dropout, name="wide_deep")
    return model, _several_outputs(spec, auxiliary_weight=0.1, inputs=inputs)


def build_reconstructing(
    spec: tasks.DataSpec, *, width: int = 30, depth: int = 3, penalty: float = 0.05
) -> tuple[keras.Model, tasks.Task]:
    """The reconstructing regressor, with its own metric. `penalty`: the factor of the reconstruction's error."""
    layers.check_sizes(width=width, depth=depth)
    metric = {"reconstruction_error": ReconstructionError()}
    model = ReconstructingRegressor(spec.num_outputs, width, depth, penalty, name="reconstructing_regressor")
    return model, _several_outputs(spec, metrics=metric)
