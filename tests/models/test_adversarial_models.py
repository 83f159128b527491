"""Generator, critic and the distance by which they are judged."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import linalg

from models import adversarial, frechet


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (12, 20, 3)])
def test_generator_and_critic_take_images_of_many_sizes(shape):
    generator = adversarial.Generator(shape, 7, latent=5, width=4)
    critic = adversarial.Critic(shape, 7, width=4)
    labels = tf.constant([0, 6, 3], tf.int64)
    images = generator((tf.random.normal([3, 5]), labels))
    assert images.shape == (3, *shape)
    assert critic((images, labels)).shape == (3,)
    assert float(tf.reduce_max(tf.abs(images))) <= 1
    assert not np.allclose(images[0], images[1])


def test_both_are_made_again_from_their_configuration():
    generator = adversarial.Generator((8, 8, 1), 10, latent=6, width=4)
    critic = adversarial.Critic((8, 8, 1), 10, width=4)
    noise, labels = tf.random.normal([2, 6]), tf.constant([3, 4], tf.int64)
    images = generator((noise, labels))
    scores = critic((images, labels))
    for model, inputs, outputs in ((generator, (noise, labels), images), (critic, (images, labels), scores)):
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
        again(inputs)
        again.set_weights(model.get_weights())
        np.testing.assert_array_equal(again(inputs), outputs)


def test_an_example_is_scored_and_generated_apart_from_the_others():
    generator, critic = adversarial.Generator((8, 8, 1), 10, width=4), adversarial.Critic((8, 8, 1), 10, width=4)
    noise, labels = tf.random.normal([4, 64]), tf.constant([1, 2, 3, 4], tf.int64)
    images = generator((noise, labels), training=True)
    np.testing.assert_allclose(generator((noise[1:2], labels[1:2]), training=True), images[1:2], atol=1e-6)
    scores = critic((images, labels), training=True)
    np.testing.assert_allclose(critic((images[1:2], labels[1:2]), training=True), scores[1:2], atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 8, 1), (8, 10, 3)])
def test_a_size_that_is_not_a_multiple_of_4_is_refused(shape):
    for build in (adversarial.Generator, adversarial.Critic):
        with pytest.raises(ValueError, match="multiples of 4"):
            build(shape, 10)


def of_whole_sets(one, other):
    """The distance by its definition, with SciPy's root of a matrix."""
    one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
    s, t = np.cov(one.T, bias=True), np.cov(other.T, bias=True)
    squared = np.sum((one.mean(0) - other.mean(0)) ** 2)
    return squared + np.trace(s + t - 2 * np.real(linalg.sqrtm(s @ t)))


def test_the_distance_is_that_of_its_definition_in_any_grouping():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(200, 3, 3, 2))
    other = (rng.normal(size=(200, 18)) @ rng.normal(size=(18, 18)) * 0.3 + 0.2).reshape(one.shape)
    distance = frechet.FrechetDistance((3, 3, 2))
    expected = of_whole_sets(one.astype(np.float32).astype(np.float64), other.astype(np.float32).astype(np.float64))
    for size in (200, 50, 8):
        total = sum(distance.sums(one[i : i + size], other[i : i + size], tf.ones([size])) for i in range(0, 200, size))
        np.testing.assert_allclose(distance.result_of(total), expected, rtol=1e-9)


def test_the_distance_leaves_padding_out_and_is_0_between_equal_sets():
    images = np.random.default_rng(1).uniform(-1, 1, size=(40, 8, 8, 1))
    images[:, 0, 0] = -1  # a pixel that never changes
    distance = frechet.FrechetDistance((8, 8, 1))
    assert float(distance.result_of(distance.sums(images, images, tf.ones([40])))) == pytest.approx(0, abs=1e-6)
    weights = np.float32(np.arange(40) < 30)
    padded = distance.sums(images, images + weights[:, None, None, None] - 1, weights)
    np.testing.assert_allclose(distance.result_of(padded), 0, atol=1e-6)


def test_many_values_are_projected_the_same_way_each_time_and_keep_their_distances():
    rng = np.random.default_rng(2)
    one, other = rng.uniform(-1, 1, size=(500, 16, 16, 3)), rng.normal(0, 0.3, size=(500, 16, 16, 3))
    distance = frechet.FrechetDistance((16, 16, 3))
    assert distance.features == 64
    found = [frechet.FrechetDistance((16, 16, 3)).sums(one, other, tf.ones([500])) for _ in range(2)]
    np.testing.assert_array_equal(*found)
    between = np.sum((one - other) ** 2, axis=(1, 2, 3))
    projected = np.sum(np.square(distance.features_of(one) - distance.features_of(other)), axis=1)
    assert projected.mean() == pytest.approx(between.mean(), rel=0.1)
