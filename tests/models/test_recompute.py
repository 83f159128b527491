"""Blocks computed again in the backward pass: the same gradients, noise and statistics, and less that is kept."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import metrics, relative_difference_as_one_vector, weights

from models import layers, randomness, recompute, resnet, tasks, transformers, unet
from trainers.settings.exit_codes import BadConfiguration

ZERO = tf.constant(0, tf.int64)
IMAGES = tasks.DataSpec("classification", (16, 16, 3), "float32", 10)
MASKS = tasks.DataSpec("segmentation", (16, 16, 3), "float32", 3, (16, 16))
# With noise, and with the inputs of a block that are no numbers.
BUILD = {
    "vit": lambda: transformers.build_vit(IMAGES, depth=3, width=32, stochastic_depth=0.2)[0],
    "transformer": lambda: transformers.LanguageModel(50, 64, 32, 3, 4, 0.1, separator=0, name="language"),
    "resnet": lambda: resnet.build(IMAGES, width=8, blocks=(1, 2), stochastic_depth=0.2)[0],
    "unet": lambda: unet.build(MASKS, width=8)[0],
}
CHANCE = np.random.default_rng(0)
PICTURES, TOKENS = CHANCE.normal(size=(4, 16, 16, 3)).astype("float32"), CHANCE.integers(0, 50, (4, 64))


def made(name, again):
    """A model with the same weights each time, and its inputs."""
    keras.utils.set_random_seed(1)
    inputs = tf.constant(TOKENS if name == "transformer" else PICTURES)
    with recompute.blocks(again):
        model = BUILD[name]()
    model(inputs, training=False)
    return model, inputs


def step_of(model, **options):
    """The compiled gradients of a loss, and where in its graph the backward pass begins."""
    begins = []

    def step(inputs):
        with tf.GradientTape() as tape, randomness.at(3, ZERO, ZERO):
            outputs = tf.cast(model(inputs, training=True), tf.float32)
            loss = tf.reduce_mean(tf.square(outputs - tf.cast(tf.range(outputs.shape[-1]), tf.float32)))
        if not tf.executing_eagerly():
            begins.append(len(tf.compat.v1.get_default_graph().get_operations()))
        return tape.gradient(loss, model.trainable_variables)

    return tf.function(step, autograph=False, **options), step, begins


def assert_same(found, expected, apart):
    assert [each is None for each in found] == [each is None for each in expected]
    scale = max(float(tf.reduce_max(tf.abs(each))) for each in expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=100 * apart, atol=apart * scale)


@pytest.mark.parametrize(
    ("name", "way"), [*((name, way) for name in BUILD for way in ("eager", "graph")), ("vit", "XLA"), ("resnet", "XLA")]
)
def test_gradients_and_statistics_are_those_of_a_model_that_keeps_its_activations(name, way):
    found = []
    for again in (False, True):
        model, inputs = made(name, again)
        compiled, step, _ = step_of(model, jit_compile=way == "XLA")
        gradients = step(inputs) if way == "eager" else compiled(inputs)
        statistics = [variable.numpy() for variable in model.non_trainable_variables]
        found.append((gradients, statistics))
    assert_same(found[1][0], found[0][0], 1e-6)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert (name in ("resnet", "unet")) == any(np.any((value != 0) & (value != 1)) for value in found[0][1])


def kept(model, inputs):
    """Bytes that the forward pass computes and the backward pass reads; and kinds of the operations of the latter."""
    compiled, _, begins = step_of(model)
    operations = compiled.get_concrete_function(inputs).graph.get_operations()
    forward, backward = operations[: begins[0]], operations[begins[0] :]
    computed = {operation.name for operation in forward if operation.type not in ("Const", "ReadVariableOp")}
    read = {t.name: t for operation in backward for t in operation.inputs if t.op.name in computed and t.op.inputs}
    sizes = [(t.shape.num_elements() or 0) * t.dtype.size for t in read.values() if t.dtype != tf.resource]
    return sum(sizes), [operation.type for operation in backward]


@pytest.mark.parametrize(("name", "kind"), [("vit", "Softmax"), ("transformer", "Softmax"), ("resnet", "Conv2D")])
def test_what_a_block_computes_is_in_the_backward_pass_and_not_kept(name, kind):
    (much, without), (little, again) = (kept(*made(name, wanted)) for wanted in (False, True))
    assert without.count(kind) == 0
    assert again.count(kind) == {"vit": 3, "transformer": 3, "resnet": 7}[name]
    assert little < 0.4 * much


def test_xla_does_not_find_that_it_was_computed_before():
    counts = []
    for again in (False, True):
        model, inputs = made("transformer", again)
        compiled, _, _ = step_of(model, jit_compile=True)
        text = compiled.experimental_get_compiler_ir(inputs)(stage="optimized_hlo")
        counts.append(len(re.findall(r" (?:dot|custom-call)\(", text)))
    assert counts[1] - counts[0] == 5 * 3  # products of a block; what the sixth adds, the backward pass does not read


def test_in_mixed_precision_a_float32_layer_within_a_block_has_its_weights_as_they_are():
    """The layer around casts what it reads of a variable, for itself."""

    class Scaled(recompute.Block):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.exact = layers.Dense(4, name="exact", dtype="float32")

        def build(self, shape):
            self.exact.build(shape)
            self.built = True

        def call(self, x, training=False):
            return self.exact(tf.cast(x, tf.float32))

    class Around(keras.Model):
        def __init__(self):
            super().__init__()
            self.block = Scaled(name="block")

        def call(self, x, training=False):
            return self.block(x, training=training)

    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs, found = tf.constant(CHANCE.normal(size=(2, 4)), tf.float32), []
    for again in (False, True):
        keras.utils.set_random_seed(1)
        with recompute.blocks(again):
            model = Around()
        model(inputs)
        with tf.GradientTape() as tape, randomness.at(3, ZERO, ZERO):
            outputs = model(inputs, training=True)
        found.append([outputs, *tape.gradient(outputs, model.trainable_variables)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_block_that_adds_a_loss_is_refused():
    class Penal(recompute.Block):
        def build(self, shape):
            self.built = True

        def call(self, x, training=False):
            self.add_loss(tf.reduce_sum(x))
            return x

    with recompute.blocks(True):
        block = Penal(name="penal")
    block(tf.ones([1, 2]))
    with randomness.at(3, ZERO, ZERO), pytest.raises(ValueError, match="block penal calls add_loss, which cannot be"):
        block(tf.ones([1, 2]), training=True)


# In the loop ---------------------------------------------------------------------------------------------------------

SGD = {"optimizer": "sgd", "schedule": "constant", "warmup_steps": 0, "learning_rate": 0.01, "train_steps": 4}


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("resnet,blocks=1x2,stochastic_depth=0.3,width=8", {"replicas": 2}),
        ("vit,depth=2,width=24,patch=4", {"replicas": 2, "accumulate": 2, "ema": 0.9}),
    ],
)
def test_a_run_ends_where_one_that_keeps_its_activations_does(run, tmp_path, model, flags):
    for name in ("kept", "again"):
        run(name, model=model, recompute=name == "again", **SGD, **flags)
    one, other = (weights(tmp_path / name) for name in ("kept", "again"))
    assert one.keys() == other.keys()
    assert relative_difference_as_one_vector(one, other) <= 1e-5
    for line, expected in zip(metrics(tmp_path / "again"), metrics(tmp_path / "kept"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_model_without_blocks_is_refused(run):
    with pytest.raises(
        BadConfiguration, match=r"--recompute: model has no layer of the class models\.recompute\.Block"
    ):
        run(model="mlp", recompute=True)
