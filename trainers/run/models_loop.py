"""An inner loop that is made of Keras models, their optimizers and moving averages: what follows from these alone."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from models import batch_norm, recompute
from trainers.input.dataset import Dataset
from trainers.record.state import name_variables
from trainers.run import replica_layers
from trainers.run.inner_loop import InnerLoop, Source
from trainers.run.replicas import MovingAverage
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.show import graphs
from trainers.world import private_api
from trainers.world.devices import World


class ModelsLoop(InnerLoop):
    """The base of a loop with any number of models. `__init__` of a subclass fills these, within `building()`:

    `models`: built Keras models, trained or frozen. `optimizers`: built optimizers. `averages`: moving averages of
    weights. `others`: lists of further variables. The keys of all four are the first parts of the names of variables in
    checkpoints; a name stands for one thing.
    `inputs`: for each model a function `batch -> nested tf.TensorSpec` of what it is called with.
    """

    def __init__(self, config: Config, world: World, dataset: Dataset):
        super().__init__(config, world, dataset)
        # Here and not earlier: what ran before (preparing the data, say) must not reach the initial weights.
        keras.utils.set_random_seed(config.seed)
        self.models: dict[str, keras.Model] = {}
        self.optimizers: dict[str, keras.optimizers.Optimizer] = {}
        self.averages: dict[str, MovingAverage] = {}
        self.others: dict[str, Sequence[Any]] = {}
        self.inputs: dict[str, Callable[[int], Any]] = {}

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Within the block models are made: in the strategy's scope, with what flags say of all layers."""
        statistics = batch_norm.batch_statistics(self.config.batch_norm == "synchronized")
        with self.world.strategy.scope(), statistics, recompute.blocks(self.config.recompute):
            yield

    def check_traced(self) -> None:
        """Refuses `--recompute` where no model has a block.

        Raises:
          BadConfiguration: it is so.
        """
        layers = [layer for model in self.models.values() for layer in private_api.layers_of(model)]
        if self.config.recompute and not any(isinstance(layer, recompute.Block) for layer in layers):
            raise BadConfiguration(
                f"--recompute: {', '.join(self.models)} has no layer of the class models.recompute.Block; leave it "
                "out, or derive the blocks of your own model from that"
            )

    @property
    def weights(self) -> Sequence[keras.Variable]:
        """The trainable variables of all models."""
        return [weight for model in self.models.values() for weight in model.trainable_variables]

    @property
    def variables(self) -> dict[str, Any]:
        """Those of models, optimizers and moving averages, and the others.

        Names of what is trained begin with `model/`, whatever the model is called: `launch/prove.py` compares these.
        """
        trained = {k if k == "model" or not m.trainable_variables else f"model/{k}": m for k, m in self.models.items()}
        holders = {**trained, **self.optimizers, **self.averages}
        groups = {name: holder.variables for name, holder in holders.items()} | self.others
        return {k: v for group, members in groups.items() for k, v in name_variables(group, members).items()}

    @property
    def metric_variables(self) -> dict[str, Any]:
        """Those of Keras's metrics in the models, by the metric's name."""
        held = [private_api.metric_variables_of(model) for model in self.models.values()]
        return {name: variable for each in held for name, variable in each.items()}

    @property
    def num_parameters(self) -> int:
        """Elements of the models' variables."""
        return sum(model.count_params() for model in self.models.values())

    @property
    def layer_names(self) -> set[str]:
        """The names of the models and of all layers in them, at every depth."""
        return {layer.name for model in self.models.values() for layer in private_api.layers_of(model)}

    def example(self, model: str) -> Any:
        """One example of zeros, as the model is called with."""
        return tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), self.inputs[model](1))

    def suspects(self) -> Iterator[replica_layers.Suspect]:
        """The layers of trained models whose result depends on the number of replicas."""
        for name, model in self.models.items():
            if model.trainable_variables:
                yield from replica_layers.find(model, self.example(name))

    @property
    def examples_of_part(self) -> int:
        """Examples that a replica computes with at once."""
        return max(self.config.batch_size // self.config.parts // self.world.replicas, 1)

    def forward_graphs(self) -> dict[str, tf.Graph]:
        """The forward pass of each model over a replica's part of the batch."""
        count = self.examples_of_part
        return {name: graphs.forward(m, self.inputs[name](count), lambda x: x) for name, m in self.models.items()}

    def describe(self) -> dict[str, str]:
        """The models and the recipe."""
        config = self.config
        sizes = ", ".join(f"{name} {model.count_params():,}" for name, model in self.models.items())
        epochs = config.train_steps * config.batch_size / config.views / self.dataset.train.size
        return {
            "models": f"{sizes} parameters, {config.precision}",
            "training": f"{config.train_steps} steps = {epochs:.1f} epochs, {config.optimizer}, learning rate "
            f"{config.learning_rate:g} ({config.schedule})",
        }

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Within the block weights that have a moving average are that."""
        with contextlib.ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.exchanged())
            yield

    def evaluation_of(
        self,
        source: Source,
        width: int,
        sums_of_part: Callable[[Any, tf.Tensor, tf.Tensor], tf.Tensor],
        values_of: Callable[[tf.Tensor], tf.Tensor],
    ) -> tf.types.experimental.PolymorphicFunction:
        """The compiled evaluation by sums over one pass of a split, which are the same at every number of replicas.

        `sums_of_part(features, weights, position) -> [width]`, float32 or float64, is called in a replica. `position`:
        that of its first example in the split, for noise that does not depend on the size of the batch; the others
        follow. Examples that fill up the last batch have weight 0. `values_of(sums) -> [values]`: from the sums of all,
        float64.
        """
        strategy, num_batches = self.world.strategy, -(-source.size // source.batch_size)

        @tf.autograph.experimental.do_not_convert
        def replica_sums(feed: Any, step: tf.Tensor) -> tf.Tensor:
            features, weights, first = source.part(feed, source.order(step, step + 1), step, 0)
            return sums_of_part(features, weights, step * source.batch_size + first)

        @tf.function(input_signature=[])
        def evaluate() -> tf.Tensor:
            sums = tf.zeros([width], tf.float64)
            for step in tf.range(num_batches, dtype=tf.int64):
                feed, _ = source.feed()
                new = strategy.run(replica_sums, args=(feed, step))
                sums += tf.cast(strategy.reduce("SUM", new, axis=None), tf.float64)
            return tf.autograph.experimental.do_not_convert(values_of)(sums)

        return evaluate

    @property
    def uses_xla(self) -> bool:
        """Whether forward and backward passes are compiled with XLA: on demand, or on a GPU where they can be."""
        if self.config.jit != "auto":
            return self.config.jit == "on"
        trained = [model for model in self.models.values() if model.trainable_variables]
        crossing = any(crosses_replicas(model, self.world.replicas) for model in trained)
        return bool(tf.config.list_logical_devices("GPU")) and not crossing

    def compiled(self, function: Callable) -> Callable:
        """A replica's function of tensors, compiled with XLA if this loop is."""
        return tf.function(function, jit_compile=True, autograph=False) if self.uses_xla else function


def gradients(tape: tf.GradientTape, loss: tf.Tensor, weights: Sequence[keras.Variable]) -> list[tf.Tensor]:
    """The gradient of each weight as a tensor, as `filled` has it."""
    return filled(tape.gradient(loss, weights), weights)


def filled(found: Sequence[Any], weights: Sequence[keras.Variable]) -> list[tf.Tensor]:
    """What a tape has found as tensors: 0 where the loss does not depend on a weight, whole where rows were looked up.

    The tape's own zeros do not know Keras's variables.
    """
    pairs = zip(found, weights, strict=True)
    return [tf.zeros(w.shape, w.dtype) if g is None else tf.convert_to_tensor(g) for g, w in pairs]


def crosses_replicas(model: keras.Model, replicas: int) -> bool:
    """Whether a layer reduces over replicas within the forward pass, which XLA cannot compile."""
    for layer in private_api.layers_of(model):
        if hasattr(layer, "crosses_replicas") and layer.crosses_replicas(replicas):
            return True
        if isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized and layer.trainable:
            return True
    return False
