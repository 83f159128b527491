"""Contrastive training: the same weights and the same probe at every size, resume bit for bit, one-line errors."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, as_after, largest_relative_difference, metrics, weights, without_times
from sklearn.linear_model import Ridge

from models import linear_probe
from trainers import contrastive_loop
from trainers.input import batches, load
from trainers.run.command import config_from
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import check_batch, resolve
from trainers.world import devices

SETTINGS = {"model": "mlp", "train_steps": 6, "batch_size": 32, "log_every": 2, "eval_every": 3, "checkpoint_every": 3}
SGD = {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.05, "warmup_steps": 0}


@pytest.fixture
def settings(data_dir, tmp_path):
    def of(name="run", **flags):
        values = SETTINGS | {"data_dir": str(data_dir), "run_dir": str(tmp_path / name)} | flags
        return resolve(contrastive_loop.Settings(**values))

    return of


@pytest.fixture
def contrast(settings):
    """`contrast(name, **flags)` trains in this process, by default for a few steps in `tmp_path / name`."""
    return lambda name="run", **flags: contrastive_loop.train(settings(name, **flags))


def loop_of(config):
    """The loop that a run of `config` builds, before its first step."""
    world = devices.set_up(config, None, print)
    return contrastive_loop.Views(config, world, load.load_for(config))


@pytest.mark.parametrize(
    ("sizes", "flags"),
    [((1, 2, 4), {}), ((1, 2), {"input": "stream", "clip_norm": 0.1})],
    ids=["resident", "read by index"],
)
def test_weights_and_probe_do_not_depend_on_the_replicas(contrast, tmp_path, sizes, flags):
    ends = {replicas: contrast(str(replicas), replicas=replicas, **SGD, **flags) for replicas in sizes}
    for replicas in sizes[1:]:
        assert largest_relative_difference(weights(tmp_path / "1"), weights(tmp_path / str(replicas))) <= 1e-5
        for name, value in ends[1].eval.items():
            if name.startswith("probe"):
                assert ends[replicas].eval[name] == pytest.approx(value, rel=1e-4)
        assert ends[replicas].train["pair_accuracy"] == ends[1].train["pair_accuracy"]


def test_batch_statistics_of_views_do_not_depend_on_the_replicas(contrast, tmp_path):
    for replicas in (1, 2):
        contrast(str(replicas), model="resnet", batch_size=16, train_steps=2, replicas=replicas, **SGD)
    assert largest_relative_difference(weights(tmp_path / "1"), weights(tmp_path / "2")) <= 1e-4


def test_negatives_of_the_replica_alone_would_show_in_the_weights(contrast, tmp_path, monkeypatch):
    """The planted mistake that the tests above must see."""

    def local(self, targets, outputs, first):
        own = tf.zeros([], tf.int64)
        return contrastive_loop.among_all(outputs, outputs, own, self.config.temperature)

    contrast("right", replicas=2, **SGD)
    monkeypatch.setattr(contrastive_loop.Views, "compared", local)
    contrast("wrong", replicas=2, **SGD)
    assert largest_relative_difference(weights(tmp_path / "right"), weights(tmp_path / "wrong")) > 1e-3


@pytest.mark.parametrize(
    "flags",
    [{"ema": 0.9}, pytest.param({"ema": 0.9, "optimizer": "sam"}, marks=pytest.mark.long)],
    ids=["adamw", "sam"],
)
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(contrast, tmp_path, flags):
    flags |= {"replicas": 2, "warmup_steps": 2, "schedule": "constant"}
    contrast("whole", **flags)
    as_after(3, tmp_path / "whole", "halves")
    contrast("halves", **flags)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    one, other = (without_times(metrics(tmp_path / name)) for name in ("whole", "halves"))
    assert [line for line in one if line["split"] == "eval"] == [line for line in other if line["split"] == "eval"]


def test_float16_scales_its_loss(contrast):
    end = contrast(precision="float16", replicas=2)
    assert end.step == 6 and np.isfinite(end.train["loss"])


def test_another_process_evaluates_its_checkpoints(contrast):
    end = contrast(replicas=2)
    follower = contrast(replicas=1, mode="evaluate")
    assert follower.eval["probe_accuracy"] == end.eval["probe_accuracy"]
    assert follower.eval["probe_squared_error"] == pytest.approx(end.eval["probe_squared_error"], rel=1e-4)


# The probe ------------------------------------------------------------------------------------------------------------


def test_the_probe_is_the_ridge_regression_of_scikit_learn(settings):
    config = settings(replicas=2)
    loop = loop_of(config)
    source = batches.batches(loop.world.strategy, loop.dataset.eval, 32, None)
    source.start(0)
    evaluate = loop.make_evaluation(source)
    accuracy, squared = evaluate().numpy()
    features = {}
    for name in ("train", "eval"):
        arrays = getattr(loop.dataset, name).arrays
        images, labels = loop.dataset.prepare({key: tf.constant(value) for key, value in arrays.items()})
        encoded = loop.model.encoder(images, training=False).numpy().astype(np.float64)
        features[name] = encoded, np.eye(10)[labels.numpy()]
    (x, y), (x_eval, y_eval) = features["train"], features["eval"]
    said = Ridge(alpha=contrastive_loop.RIDGE * x.var(axis=0).mean() * len(x)).fit(x, y).predict(x_eval)
    assert squared == pytest.approx(np.square(said - y_eval).sum(axis=1).mean(), rel=1e-4)
    assert accuracy == pytest.approx((said.argmax(axis=1) == y_eval.argmax(axis=1)).mean(), abs=1 / 359)
    # A second time, and nothing has moved.
    np.testing.assert_array_equal(evaluate().numpy(), [accuracy, squared])


def test_the_probe_of_constant_features_says_the_most_frequent_class():
    features, labels = tf.ones([10, 3]), tf.constant([1] * 6 + [0] * 4)
    sums = linear_probe.products(features, labels, 2, tf.ones([10]))
    right, _, count = linear_probe.errors(features, labels, tf.ones([10]), linear_probe.solution(sums, 1e-3)).numpy()
    assert (right, count) == (6, 10)


def test_the_probe_of_features_that_collapsed_is_a_bad_one_and_no_error():
    """All examples alike: what is left of the covariance is rounding, with signs of its own."""
    chance = np.random.default_rng(0)
    labels = tf.constant(chance.integers(0, 10, 1438))
    for _ in range(5):
        features = tf.tile(tf.constant(chance.normal(size=[1, 128]).astype(np.float32)), [1438, 1])
        sums = tf.add_n(
            [
                linear_probe.products(features[i : i + 256], labels[i : i + 256], 10, tf.ones([min(256, 1438 - i)]))
                for i in range(0, 1438, 256)
            ]
        )
        right, wrong, count = linear_probe.errors(
            features, labels, tf.ones([1438]), linear_probe.solution(sums, 1e-3)
        ).numpy()
        assert np.isfinite(wrong) and right == np.bincount(labels).max() and count == 1438


def test_a_weight_of_0_leaves_an_example_out_of_the_probe():
    chance = np.random.default_rng(0)
    features, labels = chance.normal(size=(20, 4)).astype(np.float32), chance.integers(0, 3, 20)
    kept = np.arange(20) < 13
    some = linear_probe.products(tf.constant(features), tf.constant(labels), 3, tf.constant(kept.astype(np.float32)))
    alone = linear_probe.products(tf.constant(features[kept]), tf.constant(labels[kept]), 3, tf.ones([13]))
    np.testing.assert_allclose(some, alone, rtol=1e-12)
    probe = linear_probe.solution(alone, 1e-3)
    weighted = linear_probe.errors(
        tf.constant(features), tf.constant(labels), tf.constant(kept.astype(np.float32)), probe
    )
    np.testing.assert_allclose(
        weighted, linear_probe.errors(tf.constant(features[kept]), tf.constant(labels[kept]), tf.ones([13]), probe)
    )


# What people see ------------------------------------------------------------------------------------------------------


def test_the_export_gives_the_features_of_the_run(contrast, tmp_path):
    end = contrast(export=True, replicas=1, ema=0.9)
    config = resolve(contrastive_loop.Settings(**(SETTINGS | {"replicas": 1, "run_dir": str(tmp_path / "other")})))
    exported = tf.saved_model.load(str(tmp_path / "run/export"))
    images = tf.random.uniform([5, 8, 8, 1], -1, 1)
    features = exported.serve_prepared(images)
    pixels = tf.cast(tf.round((images + 1) * 127.5), tf.uint8)
    np.testing.assert_allclose(
        exported.serve(pixels)["features"], exported.serve_prepared(tf.cast(pixels, tf.float32) * (2 / 255) - 1)
    )
    assert features.shape == (5, config.features) and end.step == 6
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["best_metric"] == "probe_accuracy"


def test_the_plan_counts_images_and_views(settings):
    rows = loop_of(settings(replicas=2, train_steps=90)).describe()
    assert "16 images × 2 views a step" in rows["views"]
    assert "1.0 epochs" in rows["training"]


# Flags ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"augment": ""}, "--augment is empty"),
        ({"augment": "crop,mixup"}, "--augment mixup blends an image with its neighbour"),
        ({"augment": "cutmix=0.5"}, "--augment cutmix blends"),
        ({"model": "wide_deep"}, "--dataset diabetes has no images"),
        ({"dataset": "text"}, "--dataset text has no images"),
        ({"model": "transformer", "dataset": "digits"}, "does not take the classification data"),
        ({"batch_size": 2}, "--batch_size 2 is below 4"),
        ({"temperature": 0.0}, "--temperature 0.0 is below"),
        ({"features": 0}, "--features 0 is below 1"),
        ({"projection": -1}, "--projection -1 is below 1"),
    ],
)
def test_what_makes_no_views_is_refused_in_one_line(settings, flags, message):
    with pytest.raises(BadConfiguration, match=message) as caught:
        settings(**flags)
    assert "\n" not in str(caught.value)


def test_a_pair_of_views_is_not_divided(settings):
    assert check_batch(settings(batch_size=32), 4) == 8
    with pytest.raises(BadConfiguration, match="does not divide over 4 replicas × 2 views; use 16 or 24"):
        check_batch(settings(batch_size=20), 4)


def test_xla_over_several_replicas_is_refused(contrast):
    with pytest.raises(BadConfiguration, match="--jit=on cannot compile a loss over several replicas"):
        contrast(jit="on", replicas=2)
    assert contrast(jit="on", replicas=1).step == 6


@pytest.mark.parametrize("name", sorted(contrastive_loop.Settings.left_out))
def test_flags_without_a_meaning_are_no_flags(name):
    with pytest.raises(BadConfiguration, match=f"Unknown command line flag '{name}'"):
        config_from(["contrastive_loop.py", f"--{name}=1"], "", contrastive_loop.Settings)


def test_words_for_views_fit_the_data(settings):
    assert settings().augment == "crop,erase=0.5"
    assert settings(dataset="cifar10").augment == "inception,flip,randaugment"
    assert settings(augment="erase").augment == "erase"
    assert settings().views == 2 and dataclasses.replace(settings(), seed=1).views == 2


def test_rows_of_the_users_own_are_no_images_of_which_views_are_made(contrast, tmp_path, monkeypatch):
    rows = "rows = np.zeros([8, 2]), np.arange(8) % 2"
    (tmp_path / "unseen_rows.py").write_text(f"import numpy as np\n\n{rows}\n\n\ndef data():\n    return rows, rows\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadConfiguration, match="are no images, which the loop contrastive needs; give uint8"):
        contrast(dataset="unseen_rows:data")


# Workers --------------------------------------------------------------------------------------------------------------


def test_2_workers_end_with_the_weights_of_one_process(contrast, tmp_path, data_dir):
    contrast("process", replicas=1, **SGD)
    command = [sys.executable, str(ROOT / "launch/workers.py"), "--workers=2", "--trainer=contrastive_loop", "--"]
    flags = SETTINGS | SGD | {"data_dir": data_dir, "run_dir": tmp_path / "workers"}
    command += [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert largest_relative_difference(weights(tmp_path / "process"), weights(tmp_path / "workers")) <= 1e-5
    one, two = (
        [line for line in metrics(tmp_path / name) if line["split"] == "eval"] for name in ("process", "workers")
    )
    for a, b in zip(one, two, strict=True):
        assert b["probe_accuracy"] == pytest.approx(a["probe_accuracy"], abs=1e-9)
        assert b["probe_squared_error"] == pytest.approx(a["probe_squared_error"], rel=1e-4)
