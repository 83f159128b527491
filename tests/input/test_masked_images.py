"""Images with a label for each pixel: the embedded set, and held or read by index alike."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import metrics, weights
from sklearn import datasets

from trainers.input import batches, load


@pytest.fixture(scope="module")
def held(data_dir):
    return load.load("digit_masks", str(data_dir))


def test_a_picture_shows_its_digit_where_its_labels_say(held):
    digits = datasets.load_digits().images >= 8
    test = np.arange(len(digits)) % 5 == 4
    for split, rows in ((held.train, ~test), (held.eval, test)):
        masks, images = split.arrays["mask"], split.arrays["image"]
        assert images.shape == (rows.sum(), 32, 32, 1) and masks.shape == (rows.sum(), 32, 32)
        for mask, digit in zip(masks, digits[rows], strict=True):
            (top, bottom), (left, right) = ((where.min(), where.max() + 1) for where in np.nonzero(mask))
            ink = np.argwhere(digit)
            low, high = ink.min(axis=0), ink.max(axis=0) + 1
            shape = np.kron(digit[low[0] : high[0], low[1] : high[1]], np.ones([2, 2], bool))
            np.testing.assert_array_equal(mask[top:bottom, left:right], shape)
        # Brighter than what is around, and not by brightness alone: clutter is as bright.
        around = images[masks == 0]
        assert images[masks == 1].mean() > around.mean() + 50
        assert (around > np.median(images[masks == 1])).mean() > 0.02
    places = {tuple(np.argwhere(mask)[0]) for mask in held.train.arrays["mask"]}
    assert len(places) > 100


def test_the_set_is_the_same_each_time_and_however_it_is_read(held, data_dir):
    again = load.load("digit_masks", str(data_dir), "stream")
    assert again.fingerprint == held.fingerprint and again.spec == held.spec
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    for seed in (3, None):
        first = []
        for dataset in (held, again):
            source = batches.batches(strategy, dataset.train, 16, seed)
            source.start(0)
            zero, one = tf.constant(0, tf.int64), tf.constant(1, tf.int64)

            @tf.function
            def batch(source=source, zero=zero, one=one):
                order = strategy.run(source.order, args=(zero, one))
                return strategy.run(source.part, args=(source.feed()[0], order, zero, 0))[0]

            features = batch()
            first.append({key: value.numpy() for key, value in features.items()})
        np.testing.assert_array_equal(first[0]["mask"], first[1]["mask"])
        np.testing.assert_array_equal(first[0]["image"], first[1]["image"])


def test_a_segmentation_trains_alike_on_two_replicas_and_streamed(run, tmp_path):
    flags = {"model": "unet,width=4,depth=1", "optimizer": "sgd", "train_steps": 2, "batch_size": 16}
    flags |= {"augment": "crop,flip,erase", "eval_every": 0, "checkpoint_every": 0, "warmup_steps": 0}
    for name, more in (("1", {"replicas": 1}), ("2", {"replicas": 2}), ("s", {"replicas": 1, "input": "stream"})):
        assert run(name, **(flags | more)).step == 2
    one, two, streamed = (weights(tmp_path / name) for name in ("1", "2", "s"))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(streamed[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    line = metrics(tmp_path / "1")[-1]
    assert 0 < line["mean_iou"] < 1 and line["split"] == "eval"
