"""Optimizers and schedules against Keras and their formulas."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import cards, optimizers

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


@pytest.mark.parametrize("name", cards.OPTIMIZERS)
def test_an_optimizer_comes_back_from_its_configuration(name):
    optimizer = optimizers.build(name, 0.01, 0.1)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    np.testing.assert_array_equal(minimized(again, 5), minimized(optimizers.build(name, 0.01, 0.1), 5))
    assert optimizer.clipnorm is None
    assert optimizer.global_clipnorm is None


def test_the_perturbation_has_length_rho():
    gradients = [tf.constant([3.0, 0.0]), tf.constant([[4.0]])]
    moved = optimizers.SAM(0.1, rho=0.5).perturbation(gradients, tf.linalg.global_norm(gradients))
    np.testing.assert_allclose(moved[0], [0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(moved[1], [[0.4]], rtol=1e-6)


def rates(name, warmup=WARMUP):
    schedule = optimizers.schedule(name, PEAK, warmup, TOTAL)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    values = np.array([float(schedule(tf.constant(step))) for step in range(TOTAL)])
    np.testing.assert_array_equal([float(again(step)) for step in range(TOTAL)], values)
    return values


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_a_schedule_warms_up_linearly_to_its_peak(name):
    np.testing.assert_allclose(rates(name)[:WARMUP], PEAK * np.arange(1, WARMUP + 1) / WARMUP, rtol=1e-6)
    assert rates(name, 0)[0] == pytest.approx(PEAK)


def test_schedules_follow_their_formulas():
    progress = (np.arange(WARMUP, TOTAL) - WARMUP) / (TOTAL - WARMUP)
    np.testing.assert_allclose(rates("linear")[WARMUP:], PEAK * (1 - progress), rtol=1e-5)
    np.testing.assert_allclose(rates("cosine")[WARMUP:], PEAK * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-4)
    steps = np.arange(WARMUP, TOTAL) + 1
    np.testing.assert_allclose(rates("inverse_sqrt")[WARMUP:], PEAK * np.sqrt(WARMUP / steps), rtol=1e-5)
    cycle = rates("one_cycle", 30)
    assert cycle[0] == pytest.approx(PEAK / 25)
    assert cycle[30] == pytest.approx(PEAK)
    assert cycle[-1] == pytest.approx(PEAK / 1e4, rel=1e-3)
    assert np.all(np.diff(cycle[:31]) > 0)
    assert np.all(np.diff(cycle[30:]) < 0)
    np.testing.assert_array_equal(rates("one_cycle", 0), cycle)
