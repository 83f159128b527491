"""Weights that stay, and rates that differ by pattern and by depth: the same at every size, resumed bit for bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import as_after, largest_relative_difference, metrics, weights

from models import optimizers, tasks
from trainers.run import depths, freezing
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve
from trainers.world import private_api

IMAGES = tasks.DataSpec("classification", (8, 8, 1), num_classes=10)
STEPS = {"train_steps": 4, "warmup_steps": 0, "learning_rate": 0.01, "schedule": "constant", "clip_norm": 0.0}


def built(name):
    model, _ = tasks.model_of(name, IMAGES)
    model(tf.zeros([1, *IMAGES.input_shape]))
    return model


def test_frozen_weights_end_with_their_bits_and_have_no_slots(run, tmp_path):
    flags = {"model": "resnet,width=8", "ema": 0.9, "weight_decay": 0.1, "train_steps": 3}
    run("one", **flags, freeze="stem|stage_[12]")
    run("none", **(flags | {"train_steps": 1, "learning_rate": 0.0}), freeze="stem|stage_[12]")
    ended, began = weights(tmp_path / "one"), weights(tmp_path / "none")
    frozen = [name for name in ended if name.startswith("model/") and ("stem" in name or "stage_1" in name)]
    assert any(name.endswith("moving_mean") for name in frozen)
    for name in frozen:
        np.testing.assert_array_equal(ended[name], began[name], err_msg=name)
    moved = [name for name in ended if name.startswith("model/") and not np.array_equal(ended[name], began[name])]
    assert any("stage_3" in name and name.endswith("moving_mean") for name in moved)
    assert any("logits" in name for name in moved)
    for group in ("optimizer/", "ema/"):
        names = [name for name in ended if name.startswith(group)]
        assert any("logits" in name for name in names)
        assert not [name for name in names if "stem" in name or "stage_1" in name or "stage_2" in name]


def test_frozen_batch_normalization_crosses_no_replicas_and_normalizes_by_what_it_has():
    model = built("resnet")
    freezing.freeze(model, "resnet/st")
    norms = [layer for layer in private_api.layers_of(model) if "norm" in layer.name]
    assert norms and not any(layer.trainable or layer.crosses_replicas(2) for layer in norms)
    assert [weight.path for weight in model.trainable_weights] == ["resnet/logits/kernel", "resnet/logits/bias"]
    x = tf.random.normal([4, 8, 8, 1])
    np.testing.assert_array_equal(model(x, training=True), model(x, training=False))


def test_a_frozen_normalization_of_keras_keeps_its_statistics():
    model = keras.Sequential(
        [keras.layers.Dense(4), keras.layers.BatchNormalization(name="norm"), keras.layers.Dense(2)]
    )
    model(tf.zeros([1, 3]))
    freezing.freeze(model, "norm/(gamma|beta)")
    model(tf.random.normal([8, 3]), training=True)
    assert not model.layers[1].trainable and not model.layers[1].moving_mean.numpy().any()


def test_what_lies_before_the_first_trained_weight_has_no_backward_pass():
    model = built("mlp")
    freezing.freeze(model, "hidden")

    @tf.function
    def gradients(x):
        with freezing.tape_of(model.trainable_weights) as tape:
            loss = tf.reduce_sum(model(x, training=False))
        return tape.gradient(loss, model.trainable_weights)

    kinds = [each.type for each in gradients.get_concrete_function(tf.zeros([2, 8, 8, 1])).graph.get_operations()]
    assert "ReluGrad" not in kinds and kinds.count("MatMul") == 3 + 1


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("hiden", "'hiden' is found in the path of no weight; there are: mlp/hidden_1/kernel, mlp/hidden_1/bias"),
        ("mlp/", "'mlp/' is found in the path of every weight, so nothing would be trained"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_everything_is_one_line(run, pattern, says):
    with pytest.raises(BadConfiguration, match=f"--freeze: {says}"):
        run("bad", freeze=pattern)


def test_statistics_alone_are_not_frozen():
    with pytest.raises(BadConfiguration, match="is found in statistics of layer resnet/stem_norm, which trains"):
        freezing.freeze(built("resnet"), "moving_|logits")


def test_levels_rise_with_the_blocks_of_a_model():
    def level_of(name):
        model = built(name)
        levels = depths.levels_of(model)
        return {weight.path.split("/", 1)[1]: levels[id(weight)] for weight in model.weights}

    vit = level_of("vit,depth=2")
    assert {vit[name] for name in ("class_token", "positions", "embed/kernel")} == {0}
    assert (vit["block_1/expand/kernel"], vit["block_2/expand/bias"], vit["norm/scale"], vit["logits/bias"]) == (
        1,
        2,
        2,
        3,
    )
    resnet = level_of("resnet")
    assert (resnet["stem/kernel"], resnet["stem_norm/gamma"], resnet["stem_norm/moving_mean"]) == (0, 0, 0)
    assert (resnet["stage_3_block_1/shortcut/kernel"], resnet["logits/kernel"]) == (3, 4)
    mlp = level_of("mlp,width=8x8x8")
    assert [mlp[f"{name}/kernel"] for name in ("hidden_1", "hidden_2", "hidden_3", "logits")] == [0, 1, 2, 3]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "momentum", "sam"])
def test_an_update_is_as_long_as_the_factors_say(run, tmp_path, optimizer):
    flags = STEPS | {"optimizer": optimizer, "train_steps": 1, "weight_decay": 0.0, "log_every": 1}
    run("start", **(flags | {"learning_rate": 0.0}))
    run("all", **flags)
    run("apart", **flags, layer_decay=0.5, learning_rate_for="logits/kernel=10;bias=2")
    start, whole, apart = (weights(tmp_path / name) for name in ("start", "all", "apart"))
    factors = {"hidden_1/kernel": 0.25, "hidden_1/bias": 0.5, "hidden_2/kernel": 0.5, "hidden_2/bias": 1.0}
    factors |= {"logits/kernel": 10.0, "logits/bias": 2.0}
    for end, factor in factors.items():
        name = next(name for name in start if name.startswith("model/") and name.endswith(end))
        expected = factor * (whole[name] - start[name])
        np.testing.assert_allclose(apart[name] - start[name], expected, rtol=1e-3, atol=1e-6, err_msg=name)
    assert metrics(tmp_path / "apart")[0]["learning_rate"] == pytest.approx(0.01)


def test_factors_hold_within_the_groups_of_other_optimizers_and_for_weight_decay(run, tmp_path):
    flags = STEPS | {"train_steps": 1, "optimizer_for": "hidden=sgd,learning_rate=0.5", "weight_decay": 0.1}
    run("start", **(flags | {"learning_rate": 0.0, "optimizer_for": ""}))
    run("all", **flags)
    run("apart", **flags, learning_rate_for="hidden_1=0.5")
    start, whole, apart = (weights(tmp_path / name) for name in ("start", "all", "apart"))
    for name in (name for name in start if name.startswith("model/") and name.split("/")[-1] in ("kernel", "bias")):
        factor = 0.5 if "hidden_1" in name else 1.0
        expected = factor * (whole[name] - start[name])
        np.testing.assert_allclose(apart[name] - start[name], expected, rtol=1e-3, atol=1e-6, err_msg=name)
    assert {name.split("/")[0] for name in apart} >= {"optimizer", "optimizer_for_1", "optimizer_for_1_part_2"}


@pytest.mark.parametrize("model", ["mlp", "resnet,width=8"])
def test_it_is_the_same_at_every_size_and_resumes_bit_for_bit(run, tmp_path, model):
    flags = STEPS | {"model": model, "ema": 0.9, "deterministic": True, "layer_decay": 0.5, "checkpoint_every": 2}
    flags |= {"freeze": "hidden_1|stem", "learning_rate_for": "logits/kernel=10;bias=2", "learning_rate": 1e-3}
    for replicas in (1, 2, 4):
        run(f"of {replicas}", **flags, replicas=replicas)
    one = weights(tmp_path / "of 1")
    for replicas in (2, 4):
        assert largest_relative_difference(one, weights(tmp_path / f"of {replicas}")) < 1e-4
    as_after(2, tmp_path / "of 2", "halves")
    run("halves", **flags, replicas=2)
    whole, halves = weights(tmp_path / "of 2"), weights(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], halves[name], err_msg=name)
    with pytest.raises(BadConfiguration, match="--layer_decay 0.25 differs from 0.5"):
        run("halves", **(flags | {"layer_decay": 0.25}), replicas=2)


def test_a_pattern_of_rates_that_matches_nothing_lists_the_paths(run):
    with pytest.raises(
        BadConfiguration, match="--learning_rate_for: 'head' is found in the path of no weight; there are"
    ):
        run("bad", learning_rate_for="head=10")
    with pytest.raises(BadConfiguration, match="only in paths that an earlier pattern has"):
        run("bad", learning_rate_for="logits=10;logits/kernel=2")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"freeze": "(stem"}, r"--freeze '\(stem' is no regular expression"),
        ({"learning_rate_for": "logits"}, "--learning_rate_for 'logits' is no request; write PATTERN=FACTOR"),
        ({"learning_rate_for": "[=2"}, r"--learning_rate_for '\[' is no regular expression"),
        ({"learning_rate_for": "logits=ten"}, "'ten' is no number"),
        ({"learning_rate_for": "a=1;logits=0"}, "'logits=0': 0 is not a finite number above 0"),
        ({"layer_decay": 0.0}, "--layer_decay 0.0 is below 0.01"),
        ({"layer_decay": 1.5}, "--layer_decay 1.5 is above 1"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(flags, says):
    with pytest.raises(BadConfiguration, match=says):
        resolve(Config(model="mlp", **flags))


def test_a_scaled_schedule_is_written_and_read():
    scaled = optimizers.Scaled(optimizers.schedule("cosine", 0.1, 2, 10), 0.5)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(scaled))
    assert [float(copy(step)) for step in (0, 5)] == [float(scaled(step)) for step in (0, 5)]
    assert float(scaled(2)) == pytest.approx(0.05)
