"""Each optimizer over ten updates against its published equations, written out in float64 NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import optimizers

RATE, DECAY, STEPS = 0.02, 0.1, 10
CHANCE = np.random.default_rng(7)
# A matrix that is higher than wide and one that is wider, a bias that begins at 0, an output layer.
NAMES = ("tall", "wide", "bias", "logits")
START = {
    "tall": CHANCE.normal(size=(5, 3)),
    "wide": CHANCE.normal(size=(3, 4)),
    "bias": np.zeros(4),
    "logits": CHANCE.normal(size=(4, 2)),
}
TARGET = {name: CHANCE.normal(size=value.shape) for name, value in START.items()}
# Far from 0, so that no sign of a gradient hangs on rounding.
SLOPES = [{name: CHANCE.normal(size=value.shape) for name, value in START.items()} for _ in range(STEPS)]


def gradient(name, weight, step):
    """Of an uneven bowl, with noise: depends on the weight, so that an error of one update reaches the next."""
    return (weight - TARGET[name]) * 0.7 + SLOPES[step][name]


def rate_at(step):
    """A warm-up of three updates, then the peak."""
    return RATE * min((step + 1) / 3, 1.0)


def found(text, decay):
    """Where the optimizer of a flag's text ends, float32, and what is left out of the decay as in a run."""
    with tf.device("CPU:0"):
        variables = [keras.Variable(START[name].astype(np.float32), name=name) for name in NAMES]
        schedule = optimizers.schedule("constant", RATE, 3, STEPS)
        optimizer = optimizers.build(text, schedule, decay)
        optimizer.exclude_from_weight_decay(var_list=[v for v in variables if len(v.shape) < 2])
        optimizer.build(variables)
        for step in range(STEPS):
            values = [
                gradient(name, v.numpy().astype(np.float64), step) for name, v in zip(NAMES, variables, strict=True)
            ]
            optimizer.apply([tf.constant(value, tf.float32) for value in values], variables)
    return {name: v.numpy() for name, v in zip(NAMES, variables, strict=True)}, optimizer, variables


def expected(update, decay):
    """`update(name, weight, gradient, state, step, rate, decay)` gives the weight after a step; `state` is a dict."""
    weights = {name: value.copy() for name, value in START.items()}
    states = {name: {} for name in NAMES}
    for step in range(STEPS):
        for name in NAMES:
            own = decay if START[name].ndim > 1 else 0.0
            slope = gradient(name, weights[name], step)
            weights[name] = update(name, weights[name], slope, states[name], step, rate_at(step), own)
    return weights, states


def adam(weight, slope, state, step, rate, beta_1, beta_2, epsilon):
    """Kingma and Ba, ICLR 2015, algorithm 1 as in section 2, last paragraph (epsilon hat): its change of the weight."""
    state["m"] = beta_1 * state.get("m", 0) + (1 - beta_1) * slope
    state["v"] = beta_2 * state.get("v", 0) + (1 - beta_2) * slope**2
    alpha = rate * np.sqrt(1 - beta_2 ** (step + 1)) / (1 - beta_1 ** (step + 1))
    return weight - alpha * state["m"] / (np.sqrt(state["v"]) + epsilon)


def adamw(name, weight, slope, state, step, rate, decay):
    """Loshchilov and Hutter, ICLR 2019, algorithm 2, decay times the rate."""
    return adam(weight * (1 - rate * decay), slope, state, step, rate, 0.9, 0.95, 1e-8)


def momentum(name, weight, slope, state, step, rate, decay):
    """Polyak's momentum with L2: the gradient of `decay / 2 · ‖w‖²` is part of the gradient."""
    state["v"] = 0.9 * state.get("v", 0) - rate * (slope + decay * weight)
    return weight + state["v"]


def lamb(name, weight, slope, state, step, rate, decay):
    """You et al., ICLR 2020, algorithm 2, with φ the identity; the decay decoupled, as Keras has it."""
    weight = weight * (1 - rate * decay)
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * slope
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * slope**2
    ratio = state["m"] / (1 - 0.9 ** (step + 1)) / (np.sqrt(state["v"] / (1 - 0.999 ** (step + 1))) + 1e-7)
    size, length = np.linalg.norm(weight), np.linalg.norm(ratio)
    return weight - rate * (size / length if size > 0 and length > 0 else 1.0) * ratio


def lars(name, weight, slope, state, step, rate, decay):
    """You, Gitman and Ginsburg, 2017, algorithm 1 with equation 6; biases by plain momentum."""
    if weight.ndim > 1:
        size, length = np.linalg.norm(weight), np.linalg.norm(slope)
        slope = 0.02 * size / (length + decay * size) * (slope + decay * weight)
    state["v"] = 0.9 * state.get("v", 0) + rate * slope
    return weight - state["v"]


def lion(name, weight, slope, state, step, rate, decay):
    """Chen et al., NeurIPS 2023, algorithm 2."""
    m = state.get("m", np.zeros_like(weight))
    change = np.sign(0.9 * m + 0.1 * slope)
    state["m"] = 0.99 * m + 0.01 * slope
    return weight * (1 - rate * decay) - rate * change


def muon(name, weight, slope, state, step, rate, decay):
    """Jordan, 2024 (five Newton-Schulz iterations, Nesterov), scaled as in Liu et al., 2025, equation 4."""
    weight = weight * (1 - rate * decay)
    if weight.ndim != 2 or name == "logits":
        return adam(weight, slope, state, step, rate, 0.9, 0.999, 1e-7)
    state["m"] = 0.95 * state.get("m", 0) + slope
    x = slope + 0.95 * state["m"]
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    x = x.T if weight.shape[0] > weight.shape[1] else x
    return weight - rate * 0.2 * np.sqrt(max(weight.shape)) * x


def schedule_free(name, weight, slope, state, step, rate, decay):
    """Defazio et al., NeurIPS 2024, algorithm 1: z, x and y apart. `weight`, where the gradient is, is y."""
    if not state:
        state |= {"z": weight, "x": weight, "v": 0.0, "sum": 0.0}
    state["v"] = 0.99 * state["v"] + 0.01 * slope**2
    second = state["v"] / (1 - 0.99 ** (step + 1))
    state["z"] = state["z"] - rate * slope / (np.sqrt(second) + 1e-8) - rate * decay * weight
    state["sum"] += rate**2
    share = rate**2 / state["sum"]
    state["x"] = (1 - share) * state["x"] + share * state["z"]
    return 0.1 * state["z"] + 0.9 * state["x"]


REFERENCES = {
    "adamw,beta_2=0.95,epsilon=1e-8": adamw,
    "momentum,coupled=true,nesterov=false": momentum,
    "lamb": lamb,
    "lars,trust=0.02": lars,
    "lion": lion,
    "muon": muon,
    "schedule_free,beta_2=0.99": schedule_free,
}


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("text", REFERENCES)
def test_ten_updates_are_those_of_the_published_equations(text, decay):
    ours, theirs = found(text, decay)[0], expected(REFERENCES[text], decay)[0]
    for name in NAMES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=2e-6, err_msg=name)
        assert np.abs(theirs[name] - START[name]).max() > 1e-3


def test_the_average_of_a_schedule_free_optimizer_is_the_mean_of_its_steps():
    weights, optimizer, variables = found("schedule_free,beta_2=0.99", DECAY)
    _, states = expected(schedule_free, DECAY)
    for name, variable in zip(NAMES, variables, strict=True):
        average = optimizer.average(variable.value, optimizer.base_of(variable).value)
        np.testing.assert_allclose(average, states[name]["x"], rtol=2e-5, atol=2e-6, err_msg=name)
        assert np.abs(average - weights[name]).max() > 1e-4


def test_weights_set_after_it_was_built_are_where_a_schedule_free_optimizer_begins():
    with tf.device("CPU:0"):
        weight = keras.Variable(np.zeros(3, np.float32))
        optimizer = optimizers.build("schedule_free", 0.1, 0.0)
        optimizer.build([weight])
        weight.assign([5.0, 5.0, 5.0])
        optimizer.apply([tf.constant([1.0, -1.0, 1.0])], [weight])
    np.testing.assert_allclose(weight.numpy(), [4.9, 5.1, 4.9], rtol=1e-5)
