"""Noise is a pure function of (seed, step, position of the example)."""

import numpy as np
import pytest
import tensorflow as tf

from models import layers, randomness


def draw(count, first, step=5, seed=7, stream="a", jit=None, shape=(3, 5), kind=randomness.uniform):
    def numbers(step, first):
        with randomness.at(seed, step, first):
            return kind([count, *shape], stream)

    function = numbers if jit is None else tf.function(numbers, jit_compile=jit)
    return function(tf.constant(step, tf.int64), tf.constant(first, tf.int64)).numpy()


@pytest.mark.parametrize("kind", [randomness.uniform, randomness.normal])
def test_an_example_gets_the_same_numbers_wherever_the_batch_is_cut(kind):
    whole = draw(8, 0, kind=kind)
    parts = np.concatenate([draw(3, 0, kind=kind), draw(5, 3, kind=kind)])
    # The cosine of a normal draw is computed in vectors whose last, shorter one may round otherwise.
    np.testing.assert_allclose(parts, whole, rtol=0, atol=0 if kind is randomness.uniform else 1e-6)


def test_eager_graph_and_xla_draw_the_same_bits():
    np.testing.assert_array_equal(draw(8, 2, jit=False), draw(8, 2))
    np.testing.assert_array_equal(draw(8, 2, jit=True), draw(8, 2))


def mask(rate, dtype=tf.float32):
    return lambda shape, stream: randomness.dropout_mask(rate, shape, stream, dtype)


@pytest.mark.parametrize("shape", [(39,), (3, 8), (1,)])
def test_an_example_gets_the_same_mask_wherever_the_batch_is_cut_and_however_it_is_compiled(shape):
    whole = draw(64, 0, shape=shape, kind=mask(0.3))
    parts = [draw(count, first, shape=shape, kind=mask(0.3)) for count, first in ((5, 0), (58, 5), (1, 63))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for jit in (False, True):
        np.testing.assert_array_equal(draw(64, 0, shape=shape, jit=jit, kind=mask(0.3)), whole)
    for change in ({"step": 6}, {"seed": 8}, {"stream": "b"}, {"first": 64}):
        assert (draw(**({"count": 64, "first": 0, "shape": shape, "kind": mask(0.3)} | change)) != whole).any()


@pytest.mark.parametrize("shape", [(39,), (3, 8), (1,)])
def test_a_shape_that_the_graph_does_not_know_gets_the_same_mask(shape):
    unknown = tf.function(lambda step, first, shape: masked(step, first, shape))
    numbers = unknown(tf.constant(5, tf.int64), tf.constant(2, tf.int64), tf.constant([8, *shape]))
    np.testing.assert_array_equal(numbers, draw(8, 2, shape=shape, kind=mask(0.3)))


def masked(step, first, shape):
    with randomness.at(7, step, first):
        return randomness.dropout_mask(0.3, shape, "a")


def test_of_a_shape_that_is_known_nothing_is_computed_at_each_step():
    graph = tf.function(lambda step: masked(step, tf.constant(3, tf.int64), (8, 256))).get_concrete_function(
        tf.TensorSpec([], tf.int64)
    )
    kinds = sorted(op.type for op in graph.graph.get_operations() if op.type not in ("Const", "Placeholder"))
    drawn = ["Bitcast", "Bitcast", "Pack", "Reshape", "StatelessRandomUniformFullIntV2"]
    assert kinds == sorted([*drawn, "GreaterEqual", "Cast", "Mul", "Identity"])


@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.1, 1 / 3, 0.5, 0.9, 0.9999, 1 - 2**-24])
@pytest.mark.parametrize("placed", [True, False])
def test_a_dropout_mask_has_its_rate_and_a_mean_of_1(rate, placed):
    shape = (4000, 500)
    values = (
        draw(4000, 0, shape=(500,), kind=mask(rate)) if placed else randomness.dropout_mask(rate, shape, "a").numpy()
    )
    rounded = min(round(rate * 2**16), 2**16 - 2) / 2**16
    assert abs(rounded - rate) <= 2**-15
    assert set(np.unique(values)) <= {np.float32(0), np.float32(1 / (1 - rounded))}
    deviation = (rounded * (1 - rounded) / values.size) ** 0.5
    assert abs((values == 0).mean() - rounded) <= 5 * deviation
    assert abs(values.mean(dtype=np.float64) - 1) <= 5 * deviation / (1 - rounded) + 1e-7


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
@pytest.mark.parametrize("rate", [0.1, 0.9, 1 - 2**-24])
def test_a_mask_in_half_precision_drops_the_same_and_is_finite(rate, dtype):
    whole, half = (draw(100, 0, shape=(500,), kind=mask(rate, kind)) for kind in (tf.float32, dtype))
    np.testing.assert_allclose(half.astype(np.float32), whole, rtol=2**-8)


def test_the_elements_of_a_mask_are_independent_of_each_other():
    signs = (draw(2000, 0, shape=(256,), kind=mask(0.5)) > 0) * 2.0 - 1
    for a, b in ((signs[:, :-1], signs[:, 1:]), (signs[:, :-2], signs[:, 2:]), (signs[:-1], signs[1:])):
        assert abs((a * b).mean()) < 5 / a.size**0.5


@pytest.mark.parametrize("change", [{"step": 6}, {"seed": 8}, {"stream": "b"}, {"first": 8}])
def test_any_other_place_gets_other_numbers(change):
    base = {"count": 8, "first": 0}
    assert np.intersect1d(draw(**base), draw(**(base | change))).size <= 1


def test_the_numbers_are_uniform_and_normal():
    numbers = draw(1000, 0, shape=(100,))
    assert 0 <= numbers.min() and numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.005)
    assert numbers.var() == pytest.approx(1 / 12, abs=0.002)
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.01
    normal = draw(1000, 0, shape=(100,), kind=randomness.normal)
    assert normal.mean() == pytest.approx(0, abs=0.01)
    assert normal.var() == pytest.approx(1, abs=0.02)


def test_dropout_keeps_the_mean_and_acts_in_training_only():
    layer = layers.Dropout(0.25, name="drop")
    x = tf.ones([1000, 40])
    assert layer(x, training=False) is x
    with randomness.at(0, tf.constant(0), tf.constant(0)):
        y = layer(x, training=True).numpy()
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert layers.Dropout(0.25, dtype="bfloat16")(x, training=True).dtype == tf.bfloat16
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match="rate 1.5"):
        layers.Dropout(1.5)
