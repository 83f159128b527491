"""Every model, layer, loss, metric and optimizer crossed with every property.

Losses, metrics and optimizers have their configuration round trips beside their references, in
`test_losses_and_metrics` and `test_optimizers`; here they meet eager against graph, replicas, precision and restoring.
"""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import as_after, largest_relative_difference, relative_difference_as_one_vector, weights

from models import batch_norm, blocks, cards, layers, metrics, options, randomness, signatures
from models.cards import MODELS, OPTIMIZERS
from models.signatures import written
from trainers import custom_loop
from trainers.input import batches, load
from trainers.record import state as state_lib
from trainers.run import driver
from trainers.settings.config import Config
from trainers.settings.rules import resolve
from trainers.world import devices

BATCH = 8
# Small rate, so that few steps of a deep network stay where rounding is not amplified.
FLAGS = {"optimizer": "sgd", "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "learning_rate": 1e-3}
FLAGS |= {
    "batch_size": BATCH,
    "train_steps": 3,
    "log_every": 0,
    "eval_every": 0,
    "checkpoint_every": 0,
    "clip_norm": 0.0,
}
ZERO = tf.constant(0, tf.int64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """Finished runs of each model on 1 and 2 replicas; the first also exports. Each is made once."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def directories(model):
        if model not in made:
            for replicas in (1, 2):
                run_dir = folder / f"{model}-{replicas}"
                settings = FLAGS | {
                    "replicas": replicas,
                    "export": "saved_model,keras" if replicas == 1 else "",
                    "run_dir": str(run_dir),
                }
                custom_loop.train(resolve(Config(model=model, data_dir=str(data_dir), **settings)))
            made[model] = folder / f"{model}-1", folder / f"{model}-2"
        return made[model]

    return directories


# Made of what a smaller one is made of, and of more of it: they are crossed at another size alone.
DEEP = ("resnet18", "resnet50")
# Each model once more, at another size: of every option another value than the default.
OTHER_SIZES = [
    "mlp,dropout=0.4,width=24x16x8",
    "resnet,blocks=1x2,stochastic_depth=0.3,width=8",
    "resnet18,blocks=1x1x2,stochastic_depth=0.3,width=8",
    "resnet50,blocks=1x2,stochastic_depth=0.3,width=4",
    "vit,depth=2,dropout=0.0,embedding=sincos,head=tanh,heads=2,patch=4,pool=mean,stochastic_depth=0.4,width=24",
    "transformer,bias=false,depth=1,dropout=0.2,heads=2,positions=rotary,scaled=true,stochastic_depth=0.5,tied=false,"
    "width=16",
    "residual_regressor,depth=1,dropout=0.0,width=12",
    "wide_deep,dropout=0.3,width=12",
    "reconstructing_regressor,depth=2,penalty=0.2,width=12",
    "unet,depth=1,width=4",
]
ALL = [*(name for name in MODELS if name not in DEEP), *OTHER_SIZES]
# Of those whose runs take longer than all others', another size stands for both.
TRAINED = [name for name in ALL if name not in ("resnet", "vit", "transformer", "unet")]


def built(model, data_dir, precision="float32", **flags):
    """A loop of one replica, and the first examples of its data."""
    config = resolve(
        Config(
            model=model, data_dir=str(data_dir), replicas=1, precision=precision, run_dir="unused", **(FLAGS | flags)
        )
    )
    dataset = load.load(config.dataset, config.data_dir)
    loop = custom_loop.Supervised(config, devices.set_up(config, None, print), dataset)
    features = {key: tf.constant(array[:BATCH]) for key, array in dataset.train.arrays.items()}
    return loop, features


@pytest.mark.parametrize("model", ALL)
def test_a_model_has_the_same_gradients_eager_and_in_a_graph(model, data_dir):
    loop, features = built(model, data_dir)
    start = state_lib.values_of(loop.variables)
    eager, sums = loop.gradients_of_part(features, ZERO, ZERO)
    state_lib.assign(loop.variables, start)
    graph, graph_sums = tf.function(lambda: loop.gradients_of_part(features, ZERO, ZERO))()
    np.testing.assert_allclose(graph_sums, sums, rtol=1e-5, atol=1e-6)
    largest = max(float(tf.reduce_max(tf.abs(gradient))) for gradient in eager)
    for one, other in zip(eager, graph, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=2e-5 * largest)


@pytest.mark.parametrize(
    ("optimizer", "model", "jit"),
    [*((name, "mlp", "off") for name in OPTIMIZERS), ("adamw", "mlp", "on"), ("adamw", "resnet", "off")],
)
def test_values_that_were_read_stay_when_the_compiled_loop_updates_the_variables(optimizer, model, jit, data_dir):
    """They are not copied: a checkpoint is written from them while the next steps run."""
    loop, _ = built(model, data_dir, optimizer=optimizer, jit=jit, ema=0.0 if optimizer == "schedule_free" else 0.9)
    source = batches.batches(loop.world.strategy, loop.dataset.train, BATCH, 0)
    call = driver.make_train_call(loop, source).get_concrete_function()
    sums, news = (tf.zeros([n], tf.float64) for n in (loop.sums.width, driver.NUM_NEWS))
    read, step = state_lib.reader(loop.variables), ZERO
    for _ in range(3):
        state = read()
        copied = {name: np.array(value) for name, value in state.items()}
        call(step, step + 2, sums, news, ZERO)
        step += 2
        after = read()
        for name, value in state.items():
            np.testing.assert_array_equal(value, copied[name], err_msg=name)
        moved = [name for name in state if np.any(np.array(after[name]) != copied[name])]
        assert len(moved) >= 2 * len(loop.model.trainable_variables)  # the average of each weight moves too


@pytest.mark.parametrize("model", TRAINED)
def test_a_model_ends_with_the_same_weights_on_two_replicas(model, trained):
    one, two = (weights(run_dir) for run_dir in trained(model))
    measure = relative_difference_as_one_vector if model.startswith(("resnet", "unet")) else largest_relative_difference
    assert measure(one, two) <= 1e-5


@pytest.mark.parametrize("model", TRAINED)
def test_a_model_comes_back_from_its_checkpoint_and_its_configuration(model, trained, data_dir):
    run_dir, _ = trained(model)
    loop, features = built(model, data_dir)
    inputs = loop.task.inputs(loop.dataset.prepare(features)[0])
    again = type(loop.model).from_config(json.loads(json.dumps(loop.model.get_config())))
    again(inputs, training=False)
    state = weights(run_dir)
    state.pop("loop/sums")
    state_lib.assign(loop.variables, state)
    assert len(again.variables) == len(loop.model.variables)
    for copy, variable in zip(again.variables, loop.model.variables, strict=True):
        copy.assign(variable.numpy())
    for one, other in zip(tf.nest.flatten(loop.model(inputs)), tf.nest.flatten(again(inputs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", TRAINED)
def test_an_exported_model_gives_the_outputs_of_the_trained_one(model, trained, data_dir):
    run_dir, _ = trained(model)
    loop, features = built(model, data_dir)
    state = weights(run_dir)
    state.pop("loop/sums")
    state_lib.assign(loop.variables, state)
    inputs = loop.dataset.prepare(features)[0]
    exported = tf.saved_model.load(str(run_dir / "export"))
    served = exported.serve_prepared(inputs)
    expected = loop.model(loop.task.inputs(inputs), training=False)
    for one, other in zip(tf.nest.flatten(expected), tf.nest.flatten(served), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", ALL)
def test_a_model_is_finite_in_mixed_precision(model, precision, data_dir):
    loop, features = built(model, data_dir, precision)
    if loop.loss_scale:
        loop.loss_scale.factor.assign(64.0)  # where it settles; from its start it is halved until nothing overflows
    gradients, sums = loop.gradients_of_part(features, ZERO, ZERO)
    assert np.isfinite(sums).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert all(v.dtype == "float32" for v in loop.model.trainable_variables)
    outputs = loop.model(loop.task.inputs(loop.dataset.prepare(features)[0]), training=False)
    assert tf.nest.flatten(outputs)[0].dtype == tf.float32


@pytest.mark.parametrize(("model", "parameters"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_a_resnet_has_the_published_shape_at_the_size_of_imagenet(model, parameters):
    from models.tasks import DataSpec

    network, _ = MODELS[model].builder()(DataSpec("classification", (224, 224, 3), num_classes=1000))
    shapes = []
    for block in network.stages:
        call = block.call
        block.call = lambda x, training=False, call=call: shapes.append((y := call(x, training=training)).shape) or y
    assert network(tf.zeros([1, 224, 224, 3])).shape == (1, 1000)
    sizes = [shape[1] for shape in shapes]
    assert sorted(set(sizes), reverse=True) == [56, 28, 14, 7]
    # Moving statistics are variables that no gradient trains; papers do not count them.
    assert sum(int(np.prod(v.shape)) for v in network.trainable_variables) == parameters


LAYERS = {
    "dropout": (lambda: layers.Dropout(0.3, name="x"), (6,)),
    "noise": (lambda: layers.Noise(0.5, name="x"), (6,)),
    "dense": (lambda: layers.Dense(5, "relu", name="x"), (6,)),
    "dense over time": (lambda: layers.Dense(5, "gelu", name="x"), (3, 6)),
    "layer normalization": (lambda: layers.LayerNormalization(name="x"), (3, 6)),
    "batch normalization": (lambda: batch_norm.BatchNormalization(name="x"), (6,)),
    "batch normalization of images": (lambda: batch_norm.BatchNormalization(name="x"), (5, 5, 6)),
    "gated merge": (lambda: layers.GatedMerge(name="x"), ((6,), (6,))),
    "attention": (lambda: blocks.AttentionBlock(2, dropout=0.1, causal=True, name="x"), (5, 8)),
    "attention with rotary positions": (lambda: blocks.AttentionBlock(2, causal=True, rotary=True, name="x"), (5, 8)),
    "residual dense": (lambda: blocks.ResidualDense(name="x"), (6,)),
    "residual block": (lambda: blocks.ResidualBlock(4, name="x"), (6, 6, 4)),
    "residual block with a projection": (lambda: blocks.ResidualBlock(8, 2, name="x"), (6, 6, 4)),
    "bottleneck block": (lambda: blocks.BottleneckBlock(4, 2, name="x"), (6, 6, 4)),
}


def layer_inputs(shape):
    chance = np.random.default_rng(1)
    shapes = shape if isinstance(shape[0], tuple) else (shape,)
    tensors = [tf.constant(chance.normal(size=(BATCH, *one)).astype(np.float32)) for one in shapes]
    return tuple(tensors) if len(tensors) > 1 else tensors[0]


def called(layer, inputs, first=0):
    with randomness.at(3, tf.constant(4), tf.convert_to_tensor(first)):
        return (
            layer(inputs)
            if isinstance(layer, (layers.Dense, layers.LayerNormalization, layers.GatedMerge, blocks.ResidualDense))
            else layer(inputs, training=True)
        )


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_does_the_same_eager_in_a_graph_and_under_xla(name):
    make, shape = LAYERS[name]
    layer, inputs = make(), layer_inputs(shape)
    layer(inputs)
    eager = tf.nest.flatten(called(layer, inputs))
    for jit in (False, True):
        compiled = tf.nest.flatten(tf.function(lambda x: called(layer, x), jit_compile=jit)(inputs))
        for one, other in zip(eager, compiled, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_does_the_same_on_two_replicas(name):
    make, shape = LAYERS[name]
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())
    inputs = layer_inputs(shape)
    with strategy.scope():
        layer = make()
        layer(inputs)
    whole = tf.nest.flatten(called(layer, inputs))
    half = BATCH // 2

    def replica(inputs):
        first = tf.distribute.get_replica_context().replica_id_in_sync_group * half
        mine = tf.nest.map_structure(lambda x: x[first : first + half], inputs)
        return called(layer, mine, first)

    parts = tf.function(lambda: strategy.run(replica, args=(inputs,)))()
    for one, value in zip(whole, tf.nest.flatten(parts, expand_composites=False), strict=True):
        found = np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_comes_back_from_its_configuration_with_its_weights(name):
    make, shape = LAYERS[name]
    layer, inputs = make(), layer_inputs(shape)
    layer(inputs)
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    again(inputs)
    again.set_weights(layer.get_weights())
    for one, other in zip(tf.nest.flatten(called(layer, inputs)), tf.nest.flatten(called(again, inputs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_finite_in_mixed_precision_and_keeps_float32_weights(name, policy):
    make, shape = LAYERS[name]
    keras.config.set_dtype_policy(policy)
    layer, inputs = make(), layer_inputs(shape)
    outputs = tf.nest.flatten(called(layer, inputs))
    assert all(np.isfinite(tf.cast(output, tf.float32)).all() for output in outputs)
    assert all(output.dtype == layer.compute_dtype for output in outputs)
    assert all(v.dtype == "float32" for v in layer.weights)


def test_layer_normalization_equals_that_of_keras():
    x = layer_inputs((3, 6)) * 5 + 2
    ours, theirs = layers.LayerNormalization(), keras.layers.LayerNormalization(epsilon=1e-6)
    for layer in (ours, theirs):
        layer.build(x.shape)
    chance = np.random.default_rng(2)
    for mine, other in ((ours.scale, theirs.gamma), (ours.offset, theirs.beta)):
        value = chance.normal(size=6)
        mine.assign(value)
        other.assign(value)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (5, 5, 6)])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_batch_normalization_has_the_output_gradients_and_statistics_of_keras_over_the_global_batch(replicas, shape):
    x = layer_inputs(shape) * 3 + 5
    upstream = tf.constant(np.random.default_rng(4).normal(size=x.shape).astype(np.float32))
    theirs = keras.layers.BatchNormalization(momentum=0.9)
    theirs.build(x.shape)
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)], tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        ours = batch_norm.BatchNormalization()
        ours.build(x.shape)
    for mine, other in ((ours.gamma, theirs.gamma), (ours.beta, theirs.beta)):
        value = np.random.default_rng(5).normal(size=6)
        mine.assign(value)
        other.assign(value)

    def gradients(layer, x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            weighted = tf.reduce_sum(y * upstream)
        return y, *tape.gradient(weighted, [x, *layer.trainable_variables])

    def replica():
        context, share = tf.distribute.get_replica_context(), BATCH // replicas
        first = context.replica_id_in_sync_group * share
        y, to_x, *to_weights = gradients(ours, x[first : first + share], upstream[first : first + share])
        return y, to_x, *context.all_reduce("sum", [tf.stop_gradient(value) for value in to_weights])

    found = [strategy.experimental_local_results(value) for value in tf.function(lambda: strategy.run(replica))()]
    found = [np.concatenate(found[0]), np.concatenate(found[1]), found[2][0], found[3][0]]
    for one, other in zip(found, gradients(theirs, x, upstream), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)
    for mine, other in ((ours.moving_mean, theirs.moving_mean), (ours.moving_variance, theirs.moving_variance)):
        for copy in strategy.experimental_local_results(mine.value):
            np.testing.assert_allclose(copy, other, rtol=1e-5)


def test_batch_normalization_over_replicas_refuses_a_second_derivative():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        layer = batch_norm.BatchNormalization()
        layer.build((BATCH, 6))

    def replica():
        x = layer_inputs((6,))
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(layer(x, training=True) ** 2)
            slope = inner.gradient(y, x)
        return outer.gradient(slope, x)

    with pytest.raises(LookupError, match="first derivative"):
        tf.function(lambda: strategy.run(replica), autograph=False)()


def test_tracing_does_not_grow_with_the_square_of_the_depth_on_two_replicas(run):
    """TensorFlow's search for variables at each all-reduce made a deep model's trace take minutes."""
    from tensorflow.python.ops import op_selector

    visited, walk = [0], op_selector.get_backward_walk_ops

    def counted(*args, **kwargs):
        ops = walk(*args, **kwargs)
        visited[0] += len(ops)
        return ops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_selector, "get_backward_walk_ops", counted)
        run(model="resnet", batch_size=8, replicas=2, train_steps=1)
    # 30 all-reduces forward and backward, a dozen operations behind each.
    assert visited[0] < 2000


def test_causal_attention_does_not_see_the_future():
    layer = blocks.AttentionBlock(2, causal=True)
    x = layer_inputs((5, 8)).numpy()
    before = layer(x).numpy()
    x[:, 3:] += 1
    after = layer(x).numpy()
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert not np.allclose(after[:, 3:], before[:, 3:])


ALL_LOSSES = [(task, name) for task, choices in cards.LOSSES.items() for name in choices]


@pytest.mark.parametrize(("task", "name"), ALL_LOSSES)
def test_a_loss_does_the_same_eager_in_a_graph_under_xla_and_in_half_precision(task, name):
    loss = cards.load(cards.LOSSES[task][name])()
    chance = np.random.default_rng(3)
    shapes = {"classification": (BATCH, 5), "regression": (BATCH,), "language": (BATCH, 4, 5)}
    shape = (shapes | {"segmentation": (BATCH, 3, 4, 5)})[task]
    outputs = tf.constant(chance.normal(size=shape).astype(np.float32))
    targets = chance.integers(0, 5, shape[:-1]) if task != "regression" else chance.normal(size=shape)
    targets = tf.constant(targets.astype(np.int32 if task != "regression" else np.float32))
    eager = loss.call(targets, outputs)
    assert eager.shape == (BATCH,)
    for jit in (False, True):
        found = tf.function(loss.call, jit_compile=jit)(targets, outputs)
        np.testing.assert_allclose(found, eager, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss.call(targets, tf.cast(outputs, tf.bfloat16)), eager, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", [name for names in (cards.LOSSES["regression"],) for name in names])
def test_a_loss_trains_by_its_name_and_does_not_depend_on_replicas(run, tmp_path, name):
    for replicas in (1, 2):
        run(f"{replicas}", model="residual_regressor", loss=name, replicas=replicas, **(FLAGS | {"train_steps": 10}))
    assert largest_relative_difference(weights(tmp_path / "1"), weights(tmp_path / "2")) <= 1e-5


@pytest.mark.parametrize("name", ["focal", "smoothed"])
def test_a_classification_loss_trains_by_its_name(run, name):
    summary = run(loss=name, train_steps=150, batch_size=64, log_every=0, eval_every=0)
    assert summary.eval["accuracy"] > 0.85


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_does_the_same_on_two_replicas_and_resumes(run, tmp_path, name):
    flags = {key: value for key, value in FLAGS.items() if key not in ("optimizer", "train_steps")}
    flags |= {
        "model": "residual_regressor,depth=1,width=16",
        "optimizer": name,
        "deterministic": True,
        "checkpoint_every": 4,
    }
    for replicas in (1, 2):
        run(f"{replicas}", replicas=replicas, train_steps=8, **flags)
    as_after(4, tmp_path / "2", "resumed")
    assert run("resumed", replicas=2, train_steps=8, **flags).traces == 1
    one, two, resumed = (weights(tmp_path / run_dir) for run_dir in ("1", "2", "resumed"))
    # Adam divides by the root of a squared gradient, and Muon makes small singular values large: rounding shows.
    assert largest_relative_difference(one, two) <= (1e-4 if name in ("adam", "adamw", "muon") else 1e-5)
    assert all(np.array_equal(two[key], resumed[key]) for key in two)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_finite_in_mixed_precision(run, name):
    summary = run(optimizer=name, precision="bfloat16", train_steps=3, learning_rate=1e-3, replicas=1)
    assert np.isfinite(summary.eval["loss"])


def all_metrics():
    return [
        metrics.Accuracy(),
        metrics.TopK(2),
        metrics.Precision(5),
        metrics.Recall(5),
        metrics.F1(5),
        metrics.MeanIoU(5),
        metrics.CalibrationError(),
    ]


@pytest.mark.parametrize("metric", all_metrics(), ids=lambda metric: metric.name)
def test_a_metric_does_the_same_eager_in_a_graph_and_under_xla(metric):
    chance = np.random.default_rng(4)
    logits = tf.constant(chance.normal(size=(BATCH, 5)).astype(np.float32))
    labels = tf.constant(chance.integers(0, 5, BATCH))
    eager = metric.statistics(labels, logits)
    assert eager.shape == (BATCH, metric.width)
    for jit in (False, True):
        found = tf.function(metric.statistics, jit_compile=jit)(labels, logits)
        np.testing.assert_allclose(found, eager, rtol=1e-5, atol=1e-6)


def test_every_optimizer_loss_and_model_of_the_registries_is_crossed():
    for text, name in zip(OTHER_SIZES, MODELS, strict=True):
        choice = options.choose("model", text)
        defaults = {one.name: one.shown for one in options.accepted("model", signatures.read(choice.entry)).values()}
        assert choice.text == text and choice.name == name
        assert all(written(choice.values[key]) != defaults[key] for key in defaults)
    assert all(callable(cards.load(entry)) for entry in OPTIMIZERS.values())
    assert {card.task for card in MODELS.values()} == set(cards.LOSSES)
    assert all(dataclasses.is_dataclass(card) for card in MODELS.values())
