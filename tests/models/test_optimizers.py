"""Optimizers and schedules against Keras and their formulas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import largest_relative_difference, weights

from models import optimizers
from trainers import custom_loop
from trainers.input import batches
from trainers.input import load as data
from trainers.settings.config import Config, resolve
from trainers.world import devices

TOTAL, PEAK, WARMUP = 100, 0.5, 10


def minimized(optimizer, steps=40):
    """Where an optimizer ends on an uneven bowl of two variables."""
    with tf.device("CPU:0"):
        w = keras.Variable(np.linspace(-2, 3, 12).reshape(3, 4).astype(np.float32))
        b = keras.Variable(np.ones(4, np.float32))
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(w.value) * [1.0, 2, 3, 4]) + tf.reduce_sum(tf.sin(b.value * w.value[0]))
        optimizer.apply(tape.gradient(loss, [w.value, b.value]), [w, b])
    return np.concatenate([w.numpy().ravel(), b.numpy()])


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [None, 0.1])
def test_momentum_equals_keras_sgd(nesterov, decay):
    rate = keras.optimizers.schedules.CosineDecay(0.02, 40)
    ours = optimizers.Momentum(rate, 0.9, nesterov, weight_decay=decay)
    keras_sgd = keras.optimizers.SGD(rate, momentum=0.9, nesterov=nesterov, weight_decay=decay)
    np.testing.assert_allclose(minimized(ours), minimized(keras_sgd), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_an_optimizer_comes_back_from_its_configuration(name):
    optimizer = optimizers.build(name, 0.01, 0.1)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    np.testing.assert_array_equal(minimized(again, 5), minimized(optimizers.build(name, 0.01, 0.1), 5))
    assert optimizer.clipnorm is None
    assert optimizer.global_clipnorm is None


SAM_FLAGS = {"model": "residual_regressor", "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
SAM_FLAGS |= {"learning_rate": 1e-3, "clip_norm": 0.0, "batch_size": 32, "eval_every": 0, "optimizer": "sam"}


def test_sam_takes_the_gradient_at_the_worst_neighbour(run, tmp_path, data_dir):
    """One step of the loop, against eager arithmetic on the very examples of that step."""
    run("loop", train_steps=1, replicas=2, **SAM_FLAGS)
    found = weights(tmp_path / "loop")
    config = resolve(
        Config(train_steps=1, replicas=1, data_dir=str(data_dir), run_dir=str(tmp_path / "x"), **SAM_FLAGS)
    )
    strategy = devices.set_up(config, None, print)
    dataset = data.load(config.dataset, config.data_dir)
    job = custom_loop.build_job(config, strategy, dataset)
    index = batches.shuffled_index(tf.range(32, dtype=tf.int64), dataset.train.size, config.seed).numpy()
    features = {key: tf.constant(array[index]) for key, array in dataset.train.arrays.items()}
    variables = job.model.trainable_variables
    start = [v.numpy() for v in variables]

    def gradients():
        values, _ = custom_loop.gradients_of_part(job, features, tf.constant(0, tf.int64), tf.constant(0, tf.int64))
        return [value.numpy() for value in values]

    first = gradients()
    norm = np.sqrt(sum(np.sum(np.square(gradient)) for gradient in first))
    for variable, value, gradient in zip(variables, start, first, strict=True):
        variable.assign(value + 0.05 * gradient / norm)
    second = gradients()
    # The first Nesterov step of a velocity of zero: w - (1 + 0.9) · rate · g.
    expected = [value - 1.9 * 1e-3 * gradient for value, gradient in zip(start, second, strict=True)]
    names = [name for name in sorted(found) if name.startswith("model/")]
    for name, value in zip(names, expected, strict=True):
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_sam_does_not_depend_on_the_number_of_replicas(run, tmp_path):
    for replicas in (1, 2, 4):
        run(f"{replicas}", train_steps=20, replicas=replicas, **SAM_FLAGS)
    for replicas in (2, 4):
        assert largest_relative_difference(weights(tmp_path / "1"), weights(tmp_path / f"{replicas}")) < 1e-5


def test_the_perturbation_has_length_rho():
    gradients = [tf.constant([3.0, 0.0]), tf.constant([[4.0]])]
    moved = optimizers.SAM(0.1, rho=0.5).perturbation(gradients, tf.linalg.global_norm(gradients))
    np.testing.assert_allclose(moved[0], [0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(moved[1], [[0.4]], rtol=1e-6)


def rates(name, warmup=WARMUP):
    schedule = optimizers.SCHEDULES[name](PEAK, warmup, TOTAL)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    values = np.array([float(schedule(tf.constant(step))) for step in range(TOTAL)])
    np.testing.assert_array_equal([float(again(step)) for step in range(TOTAL)], values)
    return values


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_a_schedule_warms_up_linearly_to_its_peak(name):
    np.testing.assert_allclose(rates(name)[:WARMUP], PEAK * np.arange(1, WARMUP + 1) / WARMUP, rtol=1e-6)
    assert rates(name, 0)[0] == pytest.approx(PEAK)


def test_schedules_follow_their_formulas():
    share = (np.arange(WARMUP, TOTAL) - WARMUP) / (TOTAL - WARMUP)
    np.testing.assert_allclose(rates("linear")[WARMUP:], PEAK * (1 - share), rtol=1e-5)
    np.testing.assert_allclose(rates("cosine")[WARMUP:], PEAK * (1 + np.cos(np.pi * share)) / 2, rtol=1e-4)
    steps = np.arange(WARMUP, TOTAL) + 1
    np.testing.assert_allclose(rates("inverse_sqrt")[WARMUP:], PEAK * np.sqrt(WARMUP / steps), rtol=1e-5)
    one = rates("one_cycle", 30)
    assert one[0] == pytest.approx(PEAK / 25)
    assert one[30] == pytest.approx(PEAK)
    assert one[-1] == pytest.approx(PEAK / 1e4, rel=1e-3)
    assert np.all(np.diff(one[:31]) > 0)
    assert np.all(np.diff(one[30:]) < 0)
    np.testing.assert_array_equal(rates("one_cycle", 0), one)
