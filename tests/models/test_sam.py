"""Sharpness-aware minimization in the training loop."""

import numpy as np
import tensorflow as tf
from conftest import largest_relative_difference, weights

from trainers import custom_loop
from trainers.input import source
from trainers.input.load import load
from trainers.settings.config import Config
from trainers.settings.rules import resolve
from trainers.world import devices

SAM_FLAGS = {"model": "residual_regressor", "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
SAM_FLAGS |= {"learning_rate": 1e-3, "clip_norm": 0.0, "batch_size": 32, "eval_every": 0, "optimizer": "sam"}


def test_sam_takes_the_gradient_at_the_worst_neighbour(run, tmp_path, data_dir):
    """One step of the loop, against eager arithmetic on the very examples of that step."""
    run("loop", train_steps=1, replicas=2, **SAM_FLAGS)
    after = weights(tmp_path / "loop")
    config = resolve(
        Config(train_steps=1, replicas=1, data_dir=str(data_dir), run_dir=str(tmp_path / "x"), **SAM_FLAGS)
    )
    dataset = load(config.dataset, config.data_dir)
    loop = custom_loop.Supervised(config, devices.set_up(config), dataset)
    index = source.shuffled_index(tf.range(32, dtype=tf.int64), dataset.train.size, config.seed).numpy()
    features = {key: tf.constant(array[index]) for key, array in dataset.train.arrays.items()}
    start = [v.numpy() for v in loop.weights]

    def gradients():
        values, _ = loop.gradients_of_part(features, tf.constant(0, tf.int64), tf.constant(0, tf.int64))
        return [value.numpy() for value in values]

    first = gradients()
    norm = np.sqrt(sum(np.sum(np.square(gradient)) for gradient in first))
    for variable, value, gradient in zip(loop.weights, start, first, strict=True):
        variable.assign(value + 0.05 * gradient / norm)
    second = gradients()
    # The first Nesterov step of a velocity of zero: w - (1 + 0.9) · rate · g.
    expected = [value - 1.9 * 1e-3 * gradient for value, gradient in zip(start, second, strict=True)]
    names = [name for name in sorted(after) if name.startswith("model/")]
    for name, value in zip(names, expected, strict=True):
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-6)


def test_sam_does_not_depend_on_the_number_of_replicas(run, tmp_path):
    for replicas in (1, 2, 4):
        run(f"{replicas}", train_steps=20, replicas=replicas, **SAM_FLAGS)
    for replicas in (2, 4):
        assert largest_relative_difference(weights(tmp_path / "1"), weights(tmp_path / f"{replicas}")) < 1e-5
