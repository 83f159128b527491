"""Tasks of the user's own: all that a loop, pictures and a benchmark need of a task they find through it."""

import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from models import options, tasks
from trainers.input import load
from trainers.measure.peers import Peer
from trainers.record import reading
from trainers.run import examples
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve
from trainers.show import drawings
from trainers.world import devices

NET = '''
"""Several labels for each image, and a score for pairs of rows."""

import keras
import numpy as np
import tensorflow as tf

from models import metrics, tasks


class Net(keras.Model):
    def __init__(self, outputs):
        super().__init__(name="net")
        self.flatten = keras.layers.Flatten(name="flatten")
        self.head = keras.layers.Dense(outputs, name="head")

    def call(self, x, training=False):
        return self.head(self.flatten(x))


class Hamming(metrics.StreamingMetric):
    """The share of labels that are right."""

    def statistics(self, targets, outputs):
        right = tf.cast((outputs > 0) == (targets > 0), tf.float32)
        return tf.reduce_mean(right, axis=1, keepdims=True)


def sigmoid_loss(targets, outputs):
    values = tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(targets, tf.float32), outputs)
    return tf.reduce_mean(values, axis=1)


def pictures(predictions):
    right = (predictions.outputs > 0) == (predictions.targets > 0)
    return {"right": np.uint8(255 * np.repeat(right, 4, axis=1))}


def nonsense(predictions):
    return {"right": np.zeros([3, 3])}


def build(spec, *, shown: str = "pictures", best: str = "hamming", mode: str = "max"):
    shown = {"pictures": pictures, "nonsense": nonsense}.get(shown, shown)
    task = tasks.Task(sigmoid_loss, {"hamming": Hamming("hamming")}, best_metric=best, best_mode=mode, pictures=shown)
    return Net(spec.target_shape[0]), task


def ours(spec):
    return Net(3), tasks.classification(spec)


class Scorer(keras.Model):
    """The score of a pair: `[batch, 2, width]` → `[batch]`."""

    def __init__(self):
        super().__init__(name="scorer")
        self.embed = keras.layers.Dense(4, name="embed")

    def call(self, pairs, training=False):
        one, other = tf.unstack(self.embed(pairs), axis=1)
        return tf.reduce_sum(one * other, axis=1)


def score(spec):
    def loss(targets, outputs):
        return tf.square(tf.cast(targets, tf.float32) - outputs)

    return Scorer(), tasks.Task(loss, {})


def data(*, size: int = 48, kind: str = "images"):
    chance = np.random.default_rng(0)
    if kind == "pairs":
        rows = chance.normal(size=(size, 2, 5))
        targets = (rows[:, 0] * rows[:, 1]).sum(axis=1)
        return (rows, targets), (rows[:9], targets[:9])
    if kind == "pixels":
        images = chance.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8)
        masks = images[..., 0] // 90
        return (images, masks), (images[:9], masks[:9])
    images = chance.integers(0, 256, (size, 6, 6, 1)).astype(np.uint8)
    images = images if kind == "images" else images.astype(np.float32).reshape(size, 36)
    labels = (images.reshape(size, 36)[:, :3] > 128).astype(np.int64)
    return (images, labels), (images[:9], labels[:9])
'''
FLAGS = {"batch_size": 16, "train_steps": 20, "learning_rate": 0.01, "log_every": 0, "eval_every": 0}


@pytest.fixture
def net(tmp_path, monkeypatch):
    """`my_pkg_….net`, a package in the current directory, which no other test has imported."""
    package = "my_pkg_" + "".join(c if c.isalnum() else "_" for c in tmp_path.parent.name + tmp_path.name)
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield f"{package}.net"
    for name in [name for name in sys.modules if name.startswith(package)]:
        sys.modules.pop(name)


def tags(run_dir):
    reader = EventAccumulator(str(run_dir / "eval"))
    reader.Reload()
    return reader


@pytest.mark.parametrize(("kind", "augment"), [("images", "flip"), ("rows", "")])
def test_several_labels_train_with_their_loss_metric_best_and_picture(run, tmp_path, net, kind, augment):
    flags = FLAGS | {"model": f"{net}:build", "dataset": f"{net}:data,kind={kind}", "augment": augment}
    summary = run(**flags)
    assert set(summary.eval) == {"step", "loss", "hamming"} and summary.eval["hamming"] > 0.4
    facts = reading.read_run(tmp_path / "run")
    assert (facts["best_metric"], facts["best_mode"]) == ("hamming", "max")
    event = tags(tmp_path / "run").Tensors("right")[-1].tensor_proto.string_val
    assert event[:2] == [b"12", b"9"] and event[2].startswith(b"\x89PNG")


def test_a_score_for_pairs_trains_without_a_metric_or_a_picture(run, tmp_path, net):
    summary = run(**(FLAGS | {"model": f"{net}:score", "dataset": f"{net}:data,kind=pairs"}))
    assert set(summary.eval) == {"step", "loss"}
    assert not {"confusion_matrix", "predicted_over_true"} & set(tags(tmp_path / "run").Tags()["tensors"])


def test_labels_of_pixels_of_the_users_own_train_a_unet_and_are_drawn(run, tmp_path, net):
    flags = FLAGS | {"model": "unet,width=4,depth=1", "dataset": f"{net}:data,kind=pixels", "augment": "crop,flip"}
    summary = run(**(flags | {"train_steps": 4}))
    assert set(summary.eval) == {"step", "loss", "mean_iou", "pixel_accuracy"}
    event = tags(tmp_path / "run").Tensors("worst_examples")[-1].tensor_proto.string_val
    assert event[2].startswith(b"\x89PNG")
    with pytest.raises(BadConfiguration, match="--augment mixup does not move the labels of pixels"):
        run("other", **(flags | {"augment": "mixup"}))


def test_a_picture_that_is_none_ends_no_run(run, net, caplog):
    flags = FLAGS | {"model": f"{net}:build,shown=nonsense", "dataset": f"{net}:data"}
    assert run(**flags).step == 20
    assert "no pictures: BadConfiguration: the picture 'right' of the Task is float64 (3, 3)" in caplog.text


@pytest.mark.parametrize(
    ("model", "dataset", "part"),
    [
        ("NET:build,best=f2", "images", "best_metric 'f2' is not measured; name one of: loss, hamming"),
        ("NET:build,mode=most", "images", "best_mode 'most' is not max or min"),
        ("NET:build,shown=clases", "images", "pictures 'clases' are not known; name one of: classes, numbers"),
        ("NET:ours", "images", "no loss of ours is for labels data; let the model's Task bring one"),
        ("mlp", "images", "does not take the labels data of .*; bring one that does, --model=module:function"),
        ("mlp", "pixels", "does not take the segmentation data of .*; choose one of: unet"),
    ],
)
def test_a_task_that_does_not_fit_is_answered_in_one_line(run, net, model, dataset, part):
    flags = {"model": model.replace("NET", net), "dataset": f"{net}:data,kind={dataset}"}
    with pytest.raises(BadConfiguration, match=part) as failure:
        run(**(FLAGS | flags))
    assert "\n" not in str(failure.value)


def test_every_picture_that_a_task_can_name_is_drawn():
    assert {*drawings.KINDS, "text"} == set(tasks.PICTURES)
    assert callable(examples.continued_text)


@pytest.mark.parametrize(
    ("model", "kind", "count"), [("unet,width=2,depth=1", "pixels", 2), ("NET:build", "images", 1)]
)
def test_the_peers_of_the_benchmark_train_any_task(net, data_dir, model, kind, count):
    from trainers.custom_loop import Supervised

    flags = FLAGS | {"model": model.replace("NET", net), "dataset": f"{net}:data,kind={kind}", "replicas": 1}
    config = resolve(Config(data_dir=str(data_dir), run_dir="unused", **flags))
    loop = Supervised(config, devices.set_up(config, None, print), load.load_for(config))
    peer = Peer(loop)
    assert len(peer.metrics) == count  # an accuracy where targets are classes
    peer.update(*next(iter(peer.batches)))
    assert np.isfinite(float(peer.metrics[0].result()))


def test_a_loss_of_the_users_own_is_tried_with_labels_of_pixels():
    spec = tasks.DataSpec("segmentation", (64, 64, 1), num_classes=3, target_shape=(64, 64))
    made = tasks.named_loss(spec)(np.zeros([2, 64, 64], np.int32), np.zeros([2, 64, 64, 3], np.float32))
    np.testing.assert_allclose(made, np.log(3), rtol=1e-5)
    with pytest.raises(options.OptionError, match=r"--loss keras.losses:Poisson .* \(2, 2, 2"):
        tasks.named_loss(tasks.dataclasses.replace(spec, loss="keras.losses:Poisson"))


def test_as_many_examples_are_looked_at_as_a_bound_of_memory_allows(data_dir, monkeypatch):
    dataset = load.load("digits", str(data_dir))
    model, task = tasks.model_of("mlp", dataset.spec)
    whole = examples.predict(model, task, dataset, 100)
    of_one = sum(part.nbytes for part in whole) / len(whole.losses)
    assert len(whole.losses) == dataset.eval.size
    monkeypatch.setattr(examples, "MOST_BYTES", int(of_one * 50.5))
    for size in (7, 50, 64):
        some = examples.predict(model, task, dataset, size)
        assert {len(part) for part in some} == {50}
        np.testing.assert_array_equal(some.targets, whole.targets[:50])
    monkeypatch.setattr(examples, "MOST_BYTES", 1)
    assert len(examples.predict(model, task, dataset, 4).losses) == 1
