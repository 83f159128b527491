"""Importing TensorFlow and Keras: what a user's own configuration of Keras says changes no run."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, weights

OTHER = {"floatx": "float64", "epsilon": 1e-3, "backend": "jax", "image_data_format": "channels_first"}


def outcome(tmp_path, content, *command, **env):
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras/keras.json").write_text(content)
    env = os.environ | {"KERAS_HOME": str(tmp_path / "keras")} | env
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=False, env=env)


@pytest.mark.parametrize("env", [{}, {"KERAS_BACKEND": "torch"}])
def test_the_users_configuration_of_keras_is_not_that_of_a_run(tmp_path, env):
    code = """
from trainers.world import quiet
quiet.import_tensorflow()
import keras
c = keras.config
print(c.backend(), c.floatx(), c.epsilon(), c.image_data_format(), keras.layers.Dense(1).dtype)
"""
    done = outcome(tmp_path, json.dumps(OTHER), "-c", code, **env)
    assert done.stdout == "tensorflow float32 1e-07 channels_last float32\n", done.stderr


@pytest.mark.parametrize("content", ['{"floatx": "int8"}', '{"epsilon": 1}', "[]"])
def test_a_configuration_that_keras_does_not_take_is_one_line(tmp_path, content):
    done = outcome(tmp_path, content, "trainers/custom_loop.py", "--model=mlp", "--dry_run")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "Keras cannot use its configuration" in done.stderr and "keras.json in $KERAS_HOME" in done.stderr


def test_a_run_in_a_process_that_has_set_keras_otherwise_is_the_same(run):
    expected = weights(run("first", model="resnet", train_steps=2).run_dir)
    try:
        keras.config.set_image_data_format("channels_first")
        keras.config.set_epsilon(1e-2)
        keras.config.set_floatx("float64")
        found = weights(run("second", model="resnet", train_steps=2).run_dir)
    finally:
        keras.config.set_image_data_format("channels_last")
        keras.config.set_epsilon(1e-7)
        keras.config.set_floatx("float32")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
