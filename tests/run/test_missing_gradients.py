"""A step that needs a gradient which is not there ends as one line, however deep in the trace it was asked for."""

import pytest
import tensorflow as tf

from models import randomness
from trainers.custom_loop import Supervised
from trainers.run import faults, start
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve


class Penalized(Supervised):
    """Penalizes the slope of the outputs over the inputs: a second derivative through every layer."""

    def gradients_of_part(self, features, step, first):
        inputs, targets = self.dataset.prepare(features)
        with tf.GradientTape() as tape, randomness.at(self.config.seed, step, first):
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                outputs = self.model(inputs, training=True)
            slopes = inner.gradient(outputs, inputs)
            losses = self.task.losses(targets, outputs)
            loss = tf.reduce_sum(losses) / self.config.batch_size + tf.reduce_mean(tf.square(slopes))
        gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, self.weights)]
        return gradients, self.sums.of_examples(targets, outputs, losses, tf.ones_like(losses))


@pytest.fixture
def train(data_dir, tmp_path):
    def begin(make_loop, **flags):
        settings = {"model": "resnet", "train_steps": 1, "batch_size": 8, "data_dir": str(data_dir), "jit": "off"}
        settings |= {"run_dir": str(tmp_path / "run"), "replicas": 2}
        return start.train(resolve(Config(**(settings | flags))), make_loop)

    return begin


def test_a_second_derivative_through_synchronized_batch_normalization_ends_as_one_line(train):
    with pytest.raises(BadConfiguration) as caught:
        train(Penalized)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("layer resnet/")
    assert "norm" in line.partition(":")[0]
    assert "first derivative only" in line
    assert "LayerNormalization" in line and "--batch_norm=per_replica" in line


def test_the_remedy_of_that_line_trains(train):
    assert train(Penalized, batch_norm="per_replica").step == 1


def test_an_operation_without_a_gradient_ends_as_one_line(train):
    class Through(Supervised):
        def gradients_of_part(self, features, step, first):
            inputs, _ = self.dataset.prepare(features)
            with tf.GradientTape() as tape:
                square = tf.linalg.matmul(inputs[..., 0], inputs[..., 0], transpose_a=True) + tf.eye(8)
                scaled = square * tf.reduce_sum(self.weights[0].value)
                loss = tf.reduce_sum(tf.raw_ops.Lu(input=scaled)[0])
            return tape.gradient(loss, self.weights), tf.zeros([self.sums.width])

    with pytest.raises(BadConfiguration, match="a gradient that TensorFlow does not have.*Lu") as caught:
        train(Through, model="mlp")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("a"), IndexError("b"), ValueError("c")])
def test_other_errors_of_a_trace_stay_what_they_are(error):
    with pytest.raises(type(error)), faults.missing_gradients_named():
        raise error
