"""Optimizers and schedules against Keras and their formulas."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import cards, optimizers, options

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


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "stepwise", "warmup_stable_decay"])
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


# Rates by hand: the schedule's text, warm-up, steps, and step → share of the peak.
TABLES = {
    # Nine steps for each of ten epochs: ÷10 from the epochs 3, 6 and 8 on.
    "stepwise,at=3x6x8,of=10": (
        9,
        90,
        {0: 1 / 9, 8: 1, 26: 1, 27: 0.1, 53: 0.1, 54: 0.01, 71: 0.01, 72: 1e-3, 89: 1e-3},
    ),
    "stepwise,at=0.5,of=1,factor=0.5": (0, 7, {0: 1, 3: 1, 4: 0.5, 6: 0.5}),
    "cosine,floor=0.1": (10, 110, {0: 0.1, 9: 1, 10: 1, 35: 0.1 + 0.9 * 0.853553391, 60: 0.55, 110: 0.1, 500: 0.1}),
    "warmup_stable_decay": (10, 100, {4: 0.5, 9: 1, 80: 1, 81: 0.95, 90: 0.5, 99: 0.05, 100: 0}),
    "warmup_stable_decay,cooldown=0.5,floor=0.2,power=0.5": (0, 8, {0: 1, 4: 1, 5: 0.6, 8: 0.2}),
    "warmup_stable_decay,cooldown=1": (10, 30, {9: 1, 10: 1, 20: 0.5, 29: 0.05}),
    "cyclic": (20, 880, {0: 1e-4, 10: 0.50005, 20: 1, 235: 0.75, 450: 0.5, 879: 1 / 860}),
    "cyclic,cycles=2,start=0,floor=0.5": (0, 40, {0: 0, 5: 0.5, 10: 1, 15: 0.75, 19: 0.55, 20: 0, 30: 1, 39: 0.55}),
}


@pytest.mark.parametrize("text", TABLES)
def test_a_schedule_has_the_rates_of_a_table(text):
    warmup, total, table = TABLES[text]
    schedule = optimizers.schedule(text, PEAK, warmup, total)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    for step, share in table.items():
        assert float(schedule(tf.constant(step, tf.int64))) == pytest.approx(PEAK * share, rel=1e-5, abs=1e-8), step
        assert float(again(step)) == float(schedule(step))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cosine,floor=1.5", "floor 1.5 is outside"),
        ("stepwise,at=30x20,of=90", "at \\(30.0, 20.0\\) does not rise from above 0 to below 90.0"),
        ("stepwise,at=30x90,of=90", "does not rise"),
        ("stepwise,factor=0", "factor 0.0 is outside"),
        ("warmup_stable_decay,cooldown=2", "cooldown 2.0 is outside"),
        ("warmup_stable_decay,power=0", "power 0.0 is not above 0"),
        ("cyclic,cycles=20", "cycles 20 of a warm-up of 10 do not fit into 100 steps"),
    ],
)
def test_a_schedule_refuses_what_it_cannot_be(text, says):
    with pytest.raises(options.OptionError, match=says):
        optimizers.schedule(text, PEAK, WARMUP, TOTAL)
