"""Stochastic depth, the warm-up of a moving average, smoothed labels with mixup: right, and the same at every size."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import as_after, largest_relative_difference, weights

from models import layers, randomness, tasks
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve

STEP = tf.constant(3, tf.int64)


def dropped(layer, x, first):
    with randomness.at(5, STEP, tf.constant(first, tf.int64)):
        return layer(x, training=True).numpy()


def test_stochastic_depth_leaves_out_whole_examples_by_their_position():
    layer, x = layers.StochasticDepth(0.25), tf.ones([4096, 2, 3])
    whole = dropped(layer, x, 0)
    assert set(np.unique(whole)) == {0.0, np.float32(4 / 3)}
    assert np.all(whole == whole[:, :1, :1]), "an example is left out as a whole"
    assert np.mean(whole[:, 0, 0] == 0) == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(np.concatenate([dropped(layer, x[:1000], 0), dropped(layer, x[1000:], 1000)]), whole)
    np.testing.assert_array_equal(layer(x, training=False), x)
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert isinstance(again, layers.StochasticDepth) and again.rate == 0.25


def test_its_rate_grows_with_the_depth():
    assert layers.rates_by_depth(0.2, 4) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    spec = tasks.DataSpec("classification", (8, 8, 1), num_classes=3)
    model, _ = tasks.model_of("resnet,blocks=1x3,stochastic_depth=0.4", spec)
    assert [block.skip.rate for block in model.stages] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    model, _ = tasks.model_of("vit,depth=2,stochastic_depth=0.4", spec)
    assert [block.skip_dense.rate for block in model.blocks] == pytest.approx([0.2, 0.4])
    with pytest.raises(ValueError, match="stochastic_depth 1.0 is outside"):
        tasks.model_of("vit,stochastic_depth=1", spec)


def test_smoothed_labels_of_mixup_are_the_blend_smoothed():
    chance = np.random.default_rng(3)
    logits, share = chance.normal(size=(6, 4)), chance.uniform(size=6)
    own, other = chance.integers(0, 4, 6), chance.integers(0, 4, 6)
    spec = tasks.DataSpec("classification", (8, 8, 1), num_classes=4, loss="smoothed,label_smoothing=0.2")
    targets = tasks.Mixed(tf.constant(own), tf.constant(other), tf.constant(share, tf.float32))
    found = tasks.classification(spec).losses(targets, tf.constant(logits, tf.float32))
    blend = share[:, None] * np.eye(4)[own] + (1 - share[:, None]) * np.eye(4)[other]
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, -np.sum((0.8 * blend + 0.2 / 4) * log_p, axis=1), rtol=1e-5)


def test_the_warm_up_of_a_moving_average_follows_its_formula(run, tmp_path):
    steps = {"train_steps": 5, "checkpoint_every": 1, "keep_checkpoints": 9, "log_every": 0, "eval_every": 0}
    run("warm", ema=0.3, ema_warmup=True, replicas=2, **steps)
    states = [weights(tmp_path / "warm", step) for step in range(1, 6)]
    names = [name for name in states[0] if name.startswith("ema/")]
    own = dict(zip(names, (name for name in states[0] if name.startswith("model/")), strict=True))
    for before, after, t in zip(states, states[1:], range(2, 6), strict=False):
        decay = min(0.3, (1 + t) / (10 + t))  # 3/12, 4/13, then 0.3
        for name in names:
            expected = decay * before[name] + (1 - decay) * after[own[name]]
            np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-7, err_msg=name)


def test_the_warm_up_of_no_average_is_refused():
    with pytest.raises(BadConfiguration, match="--ema_warmup is for --ema, which is 0"):
        resolve(Config(model="mlp", ema_warmup=True))


def test_all_regularization_together_does_not_depend_on_replicas_and_resumes(run, tmp_path):
    flags = {
        "model": "vit,depth=2,width=16,heads=2,patch=4,dropout=0.1,stochastic_depth=0.4",
        "loss": "smoothed",
        "augment": "crop,mixup",
        "ema": 0.9,
        "ema_warmup": True,
        "optimizer": "momentum",
        "deterministic": True,
        "schedule": "constant",
        "warmup_steps": 2,
        "eval_every": 0,
        "log_every": 0,
    }
    for replicas in (1, 2):
        run(f"{replicas}", replicas=replicas, **flags)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for group in ("model/", "ema/"):
        assert largest_relative_difference(one, two, group) <= 1e-5
    as_after(3, tmp_path / "2", "halves")
    run("halves", replicas=2, **flags)
    halves = weights(tmp_path / "halves")
    assert all(np.array_equal(two[name], halves[name]) for name in two)
