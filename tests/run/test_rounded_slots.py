"""Slots of bfloat16: half of the memory, unbiased, the same at every size, exact after a resume."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    ROOT,
    as_after,
    metrics,
    relative_difference_as_one_vector,
    weights,
    without_times,
)

from models import optimizers, randomness
from trainers.record import state
from trainers.run import vectors
from trainers.run.replicas import on_replicas
from trainers.run.weight_groups import WeightGroup
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve

NAMES = ("adam", "adamw", "lion")
SHAPES = [(8, 4), (4,), (40, 5), (), (7, 3)]
EXACT = {"deterministic": True, "seed": 3, "replicas": 2, "optimizer": "adamw,slots=bfloat16", "log_every": 1}
# The gap between two numbers of bfloat16, relative to either.
GAP = 2.0**-7


@pytest.fixture
def short_vectors(monkeypatch):
    """Some weights stand alone."""
    monkeypatch.setattr(vectors, "MOST_ON_CPU", 100)


# Rounding by chance ---------------------------------------------------------------------------------------------------


def draws(x, count, stream="s"):
    values = []
    for step in range(count):
        with randomness.at(5, tf.constant(step, tf.int64), tf.constant(0, tf.int64)):
            values.append(np.asarray(randomness.rounded(tf.constant(x), stream)).astype(np.float64))
    return np.stack(values)


def test_rounding_is_unbiased_and_goes_to_neighbours_alone():
    chance = np.random.default_rng(0)
    x = (chance.normal(size=400) * 10.0 ** chance.uniform(-30, 30, size=400)).astype(np.float32)
    found, count = draws(x, 2000), 2000
    below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    gap = np.exp2(np.floor(np.log2(np.abs(x.astype(np.float64)))) - 7)
    share = (np.abs(x) - np.abs(below)) / gap
    assert ((found == below) | (found == below + np.sign(x) * gap)).all()
    error = (found.mean(axis=0) - x) / gap
    assert (np.abs(error) <= 5 * np.sqrt(share * (1 - share) / count) + 1e-9).all()
    assert abs(error.mean()) < 5 * 0.5 / np.sqrt(count * len(x))
    nearest = np.asarray(tf.cast(x, tf.bfloat16)).astype(np.float64)
    assert np.abs((nearest - x) / gap).mean() > 10 * np.abs(error).mean()


def test_rounding_keeps_what_bfloat16_has_and_what_is_not_finite():
    x = np.array([0, -0.0, 1, -1.5, 2**-100, 3.0e38, np.inf, -np.inf], np.float32)
    x = np.asarray(tf.cast(x, tf.bfloat16)).astype(np.float32)
    assert (draws(x, 20) == x).all()
    assert np.isnan(draws(np.array([np.nan, -np.nan], np.float32), 20)).all()
    odd = np.array([0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(draws(odd, 20)).all()


def test_rounding_is_a_function_of_step_and_stream_in_a_graph_and_under_xla_too():
    x = tf.constant(np.random.default_rng(1).normal(size=(33, 7)).astype(np.float32))

    def call(step):
        with randomness.at(5, step, tf.constant(0, tf.int64)):
            return randomness.rounded(x, "s")

    step = tf.constant(4, tf.int64)
    eager = np.asarray(call(step)).astype(np.float32)
    for compiled in (tf.function(call), tf.function(call, jit_compile=True)):
        np.testing.assert_array_equal(np.asarray(compiled(step)).astype(np.float32), eager)
    several = draws(x.numpy(), 2), draws(x.numpy(), 1, "other")
    assert len({each.tobytes() for each in (several[0][0], several[0][1], several[1][0])}) == 3


def test_what_is_large_is_rounded_piece_by_piece_to_the_same_bits(monkeypatch):
    x = np.random.default_rng(1).normal(size=(23, 5)).astype(np.float32)
    whole = draws(x, 3)
    monkeypatch.setattr(randomness, "_ROUNDED_AT_ONCE", 16)
    np.testing.assert_array_equal(draws(x, 3), whole)

    def call(step):
        with randomness.at(5, step, tf.constant(0, tf.int64)):
            return randomness.rounded(tf.constant(x), "s")

    for compiled in (tf.function(call), tf.function(call, jit_compile=True)):
        np.testing.assert_array_equal(np.asarray(compiled(tf.constant(2, tf.int64))).astype(np.float64), whole[2])


# In an optimizer ------------------------------------------------------------------------------------------------------


def built(text, shapes=SHAPES, seed=0):
    """A group of weights with an optimizer on them."""
    chance = np.random.default_rng(0)
    own = [keras.Variable(chance.normal(size=s).astype("float32"), name=f"w{i}") for i, s in enumerate(shapes)]
    return WeightGroup(list(range(len(own))), optimizers.build(text, 0.01, 0.1), None).built(own, seed), own


def updated(strategy, text, gradients):
    """Weights and slots by name, after an update for each list of gradients."""
    keras.backend.clear_session()  # as a run does: optimizers are numbered
    with strategy.scope():
        group, own = built(text)
        apply = tf.function(on_replicas(strategy, lambda values: group.apply(values, own)))
        for each in gradients:
            apply([tf.constant(g) for g in each])
        named = state.name_variables("optimizer", group.optimizer.variables) | state.name_variables("model", own)
        return state.values_of(named)


def gradients_of(count):
    chance = np.random.default_rng(7)
    return [[chance.normal(size=shape).astype("float32") for shape in SHAPES] for _ in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_slots_have_half_of_the_bytes_and_the_names_and_shapes_of_others(short_vectors, name):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    plain, half = (updated(strategy, text, []) for text in (name, f"{name},slots=bfloat16"))
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in half.items()}
    slots = [k for k in plain if k.startswith("optimizer/") and k.endswith(("momentum", "velocity"))]
    assert len(slots) == (1 if name == "lion" else 2) * len(SHAPES)
    assert sum(half[k].nbytes for k in slots) * 2 == sum(plain[k].nbytes for k in slots)
    assert {half[k].dtype.name for k in slots} == {"bfloat16"}
    assert [k for k in plain if k not in slots and half[k].dtype != plain[k].dtype] == []


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_computed_in_float32_and_slots_are_rounded_when_they_are_kept(short_vectors, name):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    plain, half = (updated(strategy, text, gradients_of(1)) for text in (name, f"{name},slots=bfloat16"))
    for key, value in plain.items():
        if half[key].dtype.name == "bfloat16":
            found = half[key].astype(np.float32)
            assert (np.abs(found - value) <= GAP * np.abs(value)).all() and not np.array_equal(found, value)
        else:
            np.testing.assert_array_equal(half[key], value)


def test_a_moment_falls_as_it_should_though_each_step_is_less_than_a_gap():
    """A gradient once, then none: Adam's second moment falls by 1 / 1000 a step, 1 / 8 of a gap at most."""
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        shapes = [(100, 100)]
        group, own = built("adam,slots=bfloat16", shapes)
        apply = tf.function(on_replicas(tf.distribute.get_strategy(), lambda g: group.apply([g], own)))
        apply(tf.ones(shapes[0]))
        for _ in range(700):
            apply(tf.zeros(shapes[0]))
        (velocity,) = (v for v in group.optimizer.variables if v.path.endswith("velocity"))
        found = np.asarray(velocity.numpy()).astype(np.float64)
    expected = 0.001 * 0.999**700
    assert abs(found.mean() / expected - 1) < 0.005 and 0.005 < found.std() / expected < 0.1


# In a run -------------------------------------------------------------------------------------------------------------


def slots_of(run_dir):
    return {k: v for k, v in weights(run_dir).items() if k.startswith("optimizer") and v.ndim and "rate" not in k}


def assert_same_bits(run_dir, expected_dir):
    expected, found = weights(expected_dir), weights(run_dir)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []
    assert without_times(metrics(run_dir)) == without_times(metrics(expected_dir))


@pytest.mark.parametrize(
    "flags",
    [{}, {"optimizer": "lion,slots=bfloat16", "precision": "float16"}, {"layer_decay": 0.5, "skip_spikes": 3.0}],
    ids=["adamw", "loss scale", "parts of a model"],
)
def test_a_resumed_run_has_the_bits_of_one_that_was_left_alone(run, tmp_path, flags):
    flags = EXACT | {"schedule": "constant"} | flags
    run("whole", train_steps=6, **flags)
    as_after(3, tmp_path / "whole", "resumed")
    run("resumed", train_steps=6, **flags)
    assert_same_bits(tmp_path / "resumed", tmp_path / "whole")
    slots = slots_of(tmp_path / "resumed")
    assert slots and {value.dtype.name for value in slots.values()} == {"bfloat16"}
    newest = max((tmp_path / "resumed/checkpoints").glob("step-*"))
    stored = tf.train.load_checkpoint(str(next(newest.glob("*.index")).with_suffix("")))
    types = stored.get_variable_to_dtype_map()
    assert {types[name] for name in slots} == {tf.bfloat16}


@pytest.mark.parametrize(
    "name, tolerance, flags",
    [("adamw", 5e-3, {"accumulate": 2, "clip_norm": 0.1, "ema": 0.9}), ("lion", 1e-5, {})],
    ids=["adamw", "lion"],
)
def test_any_number_of_replicas_ends_with_the_same_weights_to_the_rounding_of_bfloat16(
    run, tmp_path, flags, name, tolerance
):
    """Sums that differ in their last bits are rounded to other neighbours now and then. Lion takes signs alone."""
    flags = EXACT | flags | {"optimizer": f"{name},slots=bfloat16", "train_steps": 50, "log_every": 10}
    for replicas in (1, 2, 4):
        run(f"{replicas}", **(flags | {"replicas": replicas, "checkpoint_every": 0, "eval_every": 0}))
    one = weights(tmp_path / "1")
    for replicas in (2, 4):
        assert relative_difference_as_one_vector(one, weights(tmp_path / f"{replicas}")) < tolerance


def test_training_reaches_the_loss_of_slots_of_float32(run, tmp_path):
    flags = {"train_steps": 300, "checkpoint_every": 0, "eval_every": 0, "batch_size": 64, "seed": 1}
    final = {}
    for name in ("adamw", "lion"):
        for slots in ("float32", "bfloat16"):
            rate = {"learning_rate": 1e-3 if name == "adamw" else 1e-4}
            final[name, slots] = run(f"{name} {slots}", optimizer=f"{name},slots={slots}", **rate, **flags)
        plain, half = (final[name, slots] for slots in ("float32", "bfloat16"))
        print(name, plain.train, half.train, plain.eval, half.eval)
        assert abs(half.eval["loss"] - plain.eval["loss"]) < 0.05 * plain.eval["loss"] + 0.005
        assert abs(half.eval["accuracy"] - plain.eval["accuracy"]) < 0.01


def test_evaluators_and_runs_that_begin_with_an_optimizer_read_them(run, tmp_path):
    run("half", **EXACT)
    run("half", mode="evaluate", **EXACT)
    before, after = ([m for m in metrics(tmp_path / d) if m["split"] == "eval"] for d in ("half", "half/evaluator"))
    assert [m["loss"] for m in before] == [m["loss"] for m in after]
    begin = {"init_from": str(tmp_path / "half"), "init_optimizer": True, "train_steps": 1, "checkpoint_every": 1}
    run("float32", **(EXACT | {"optimizer": "adamw"} | begin))
    assert {value.dtype.name for value in slots_of(tmp_path / "float32").values()} == {"float32"}
    begin["init_from"] = str(tmp_path / "float32")
    run("again", **(EXACT | begin))
    assert {value.dtype.name for value in slots_of(tmp_path / "again").values()} == {"bfloat16"}


def test_what_does_not_go_with_them_is_refused_in_one_line(run):
    with pytest.raises(BadConfiguration, match="--optimizer sgd has no option 'slots'; it takes: "):
        resolve(Config(optimizer="sgd,slots=bfloat16"))
    with pytest.raises(BadConfiguration, match="slots=float16 is neither float32 nor bfloat16; pass one of them"):
        run(optimizer="adam,slots=float16")
    with pytest.raises(BadConfiguration, match="would round the maxima of amsgrad up and up; leave one"):
        run(optimizer="adam,slots=bfloat16,amsgrad=true")
    with pytest.raises(BadConfiguration, match="does not go with a weight that has a constraint"):
        weight = keras.Variable(np.ones([2, 2], "float32"))
        weight.constraint = keras.constraints.NonNeg()
        WeightGroup([0], optimizers.build("adam,slots=bfloat16", 0.1, 0), None).built([weight])
    command = [sys.executable, str(ROOT / "trainers/custom_loop.py"), "--optimizer=lion,help"]
    row = [line.split() for line in subprocess.check_output(command, text=True).splitlines() if "slots" in line]
    assert ["slots", "str", "default", "float32"] in row
