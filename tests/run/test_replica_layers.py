"""Layers that depend on the number of replicas are named; a model that trains nothing is refused."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import batch_norm, layers, mlp, tasks
from trainers.run import replica_layers
from trainers.settings.exit_codes import BadConfiguration, UnsavedVariable


class Counter(keras.layers.Layer):
    """Counts its calls: the same on every replica."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count", aggregation="mean")

    def call(self, x, training=False):
        if training:
            self.count.assign(self.count + 1.0)
        return x


class Centered(keras.layers.Layer):
    """Subtracts a running mean of its own."""

    def build(self, shape):
        keywords = {"initializer": "zeros", "trainable": False, "name": "running", "aggregation": "mean"}
        self.running = self.add_weight(shape=(shape[-1],), **keywords)

    def call(self, x, training=False):
        if training:
            self.running.assign(0.9 * self.running + 0.1 * tf.reduce_mean(x, axis=0))
        return x - self.running


class Nested(keras.layers.Layer):
    """Holds its layer in a list of a list."""

    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.rows = [[keras.layers.GaussianDropout(0.2, name="inner")]]

    def call(self, x, training=False):
        return self.rows[0][0](x, training=training)


class OnlyOnReplicas(keras.layers.Layer):
    """Cannot be called outside of a replica."""

    def call(self, x, training=False):
        if training:
            x = x * tf.cast(tf.distribute.get_replica_context().num_replicas_in_sync, x.dtype)
        return x


def sequence(layer):
    """Turns 64 numbers into a sequence of 8 for a recurrent layer."""
    return [keras.layers.Reshape((8, 8)), layer]


def image(layer):
    return [keras.layers.Reshape((8, 8, 1)), layer, keras.layers.Flatten()]


SUSPECTS = {
    "Dropout": (lambda: [keras.layers.Dropout(0.1, name="x")], "model/x", "noise"),
    "GaussianNoise": (lambda: [keras.layers.GaussianNoise(0.1, name="x")], "model/x", "noise"),
    "AlphaDropout": (lambda: [keras.layers.AlphaDropout(0.1, name="x")], "model/x", "noise"),
    "in a list of a list": (lambda: [Nested(name="x")], "model/x/inner", "noise"),
    "RandomFlip": (lambda: image(keras.layers.RandomFlip(name="x")), "model/x", "noise"),
    "LSTM": (lambda: sequence(keras.layers.LSTM(4, dropout=0.2, name="x")), "model/x/lstm_cell", "noise"),
    "GRU": (lambda: sequence(keras.layers.GRU(4, recurrent_dropout=0.2, name="x")), "model/x/gru_cell", "noise"),
    "BatchNormalization": (lambda: [keras.layers.BatchNormalization(name="x")], "model/x", "statistics"),
    "a running mean": (lambda: [Centered(name="x")], "model/x", "statistics"),
    "beside what follows weights alone": (
        lambda: [keras.layers.SpectralNormalization(keras.layers.Dense(3)), keras.layers.Dropout(0.5, name="x")],
        "model/x",
        "noise",
    ),
}
OTHERS = {
    "LSTM without dropout": lambda: sequence(keras.layers.LSTM(4)),
    "our own": lambda: [layers.Dropout(0.1), layers.Noise(0.1), batch_norm.BatchNormalization()],
    "BatchNormalization over replicas": lambda: [keras.layers.BatchNormalization(synchronized=True)],
    "frozen BatchNormalization": lambda: [keras.layers.BatchNormalization(trainable=False)],
    "a count of calls": lambda: [Counter()],
    "a rate of 0": lambda: [keras.layers.Dropout(0.0)],
}


class Chain(keras.Model):
    def __init__(self, chain):
        super().__init__(name="model")
        self.chain, self.head = chain, keras.layers.Dense(10)

    def call(self, x, training=False):
        for layer in self.chain:
            x = layer(x, training=training) if "training" in inspect.signature(layer.call).parameters else layer(x)
        return self.head(tf.reshape(x, [tf.shape(x)[0], -1]) if x.shape.rank > 2 else x)


def built(make, replicas=2):
    devices = [device.name for device in tf.config.list_logical_devices("CPU")[:replicas]]
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        model = Chain(make())
        model(tf.zeros([1, 64]))
        before = [variable.numpy() for variable in model.variables]
        suspects = replica_layers.find(model, tf.zeros([1, 64]))
        for variable, value in zip(model.variables, before, strict=True):
            np.testing.assert_array_equal(variable.numpy(), value)
    return suspects


@pytest.mark.parametrize("name", SUSPECTS)
def test_a_layer_that_depends_on_the_number_of_replicas_is_found_with_its_path(name):
    make, path, kind = SUSPECTS[name]
    (suspect,) = built(make)
    assert (suspect.path, suspect.kind) == (path, kind)
    assert f"layer {path} " in str(suspect) and "use models." in str(suspect)


@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_that_does_not_is_not(name):
    assert built(OTHERS[name]) == []


def test_where_a_model_cannot_be_called_outside_of_a_replica_what_can_be_known_is_named():
    suspects = built(lambda: [OnlyOnReplicas(), keras.layers.Dropout(0.1, name="x"), keras.layers.BatchNormalization()])
    assert [suspect.kind for suspect in suspects] == ["noise", "statistics"]


def replaced(monkeypatch, call, **attributes):
    """Has `mlp` be a model with this `call(self, x)` before its head, and what `attributes` make of the model."""

    class Changed(mlp.MLP):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            for name, make in attributes.items():
                setattr(self, name, make())

        def call(self, x, training=False):
            return call(self, x, lambda y: super(Changed, self).call(y, training=training))

    monkeypatch.setattr(mlp, "build", lambda spec: (Changed(spec.num_classes, name="mlp"), tasks.classification(spec)))


@pytest.mark.parametrize(("replicas", "times"), [(1, 0), (2, 1)])
def test_a_run_warns_of_it_once_and_only_where_it_matters(run, monkeypatch, caplog, replicas, times):
    flip = {"flip": lambda: keras.layers.RandomFlip(name="flip")}
    replaced(monkeypatch, lambda self, x, rest: rest(self.flip(x, training=True)), **flip)
    run(train_steps=1, replicas=replicas)
    assert caplog.text.count("layer mlp/flip draws the same noise on every replica") == times


def test_a_metric_inside_of_a_model_is_refused_with_what_helps(run, monkeypatch):
    def call(self, x, rest):
        y = rest(x)
        self.mean.update_state(y)
        return y

    replaced(monkeypatch, call, mean=lambda: keras.metrics.Mean(name="activity"))
    with pytest.raises(UnsavedVariable, match=r"updates its metric activity/total .*models\.metrics\.StreamingMetric"):
        run(train_steps=1)


def test_a_metric_that_the_model_only_holds_is_no_error(run, monkeypatch):
    replaced(monkeypatch, lambda self, x, rest: rest(x), tracker=lambda: keras.metrics.Mean(name="loss"))
    run(train_steps=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: tf.cast(tf.argmax(y, axis=-1), tf.float32)[:, None] * tf.ones([1, 10]), "none of the 6 weights"),
        (tf.stop_gradient, "none of the 6 weights"),
        (tf.round, "none of the 6 weights"),
    ],
    ids=["argmax", "stop_gradient", "round"],
)
@pytest.mark.parametrize("jit", ["off", "on"])
def test_a_model_of_which_no_weight_gets_a_gradient_is_refused(run, monkeypatch, tmp_path, change, words, jit):
    replaced(monkeypatch, lambda self, x, rest: change(rest(x)))
    with pytest.raises(BadConfiguration, match=f"--model mlp: {words}.* gets a gradient, so nothing would be trained"):
        run(jit=jit)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_model_without_weights_is_refused(run, monkeypatch):
    class Empty(keras.Model):
        def call(self, x, training=False):
            return tf.reshape(x, [-1, 64])[:, :10]

    monkeypatch.setattr(mlp, "build", lambda spec: (Empty(name="mlp"), tasks.classification(spec)))
    with pytest.raises(BadConfiguration, match="the model has no weight, so nothing would be trained"):
        run()


def test_weights_without_a_gradient_are_named_once(run, monkeypatch, caplog):
    replaced(
        monkeypatch,
        lambda self, x, rest: rest(x) + 0.0 * tf.stop_gradient(self.side(tf.reshape(x, [-1, 64]))),
        side=lambda: keras.layers.Dense(10, name="side"),
    )
    run(train_steps=2, replicas=2, accumulate=2)
    assert caplog.text.count("the loss does not depend on") == 1
    assert "mlp/side/kernel, mlp/side/bias: no gradient trains it" in caplog.text
