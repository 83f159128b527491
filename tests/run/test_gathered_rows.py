"""Rows gathered over replicas, and the contrastive loss over them, against one replica and against NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from models import contrastive
from models.losses import CrossEntropy
from trainers.run.replicas import gathered, on_replicas

ROWS, INPUTS, WIDTH, TEMPERATURE = 16, 5, 4, 0.3
CHANCE = np.random.default_rng(0)
X = CHANCE.normal(size=(ROWS, INPUTS)).astype(np.float32)
WEIGHT = CHANCE.normal(size=(INPUTS, WIDTH)).astype(np.float32)


def strategy_of(replicas):
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def own_rows(rows):
    """Negatives of the replica alone: the planted mistake."""
    return rows


def mean_gradient(rows):
    """The gradient divided by the replicas once more: the planted mistake."""
    every = gathered(rows)
    replicas = tf.distribute.get_replica_context().num_replicas_in_sync
    return every / replicas + tf.stop_gradient(every * (1 - 1 / replicas))


def no_gradient(rows):
    """The gradient of other replicas' anchors dropped: the planted mistake."""
    context = tf.distribute.get_replica_context()
    first = context.replica_id_in_sync_group * rows.shape[0]
    every = tf.stop_gradient(gathered(rows))
    return tf.concat([every[:first], rows, every[first + rows.shape[0] :]], axis=0)


def loss_and_gradient(replicas, gather=gathered):
    """Of NT-Xent of `X @ WEIGHT` by the weight, twice in a compiled while loop, as a run has it."""
    strategy, count = strategy_of(replicas), ROWS // replicas

    def replica(weight, first_row):
        context = tf.distribute.get_replica_context()
        first = tf.cast(context.replica_id_in_sync_group, tf.int64) * count + first_row
        x = tf.ensure_shape(tf.constant(X)[first : first + count], [count, INPUTS])
        with tf.GradientTape() as tape:
            tape.watch(weight)
            z = tf.math.l2_normalize(tf.tanh(x @ weight), axis=1)
            every = gather(z)
            own = first if every.shape[0] == ROWS else tf.constant(0, tf.int64)
            pairs, logits = contrastive.among_all(z, every, own, TEMPERATURE)
            loss = tf.reduce_sum(CrossEntropy().call(pairs, logits)) / ROWS
        values = [loss, tf.stop_gradient(tape.gradient(loss, weight))]
        return context.all_reduce(tf.distribute.ReduceOp.SUM, values)

    on_each = on_replicas(strategy, replica)

    @tf.function
    def steps():
        total, gradient = tf.constant(0.0), tf.zeros_like(WEIGHT)
        for _ in tf.range(2):
            values = on_each(tf.constant(WEIGHT), tf.constant(0, tf.int64))
            loss, more = (strategy.experimental_local_results(value)[0] for value in values)
            total, gradient = total + loss / 2, gradient + more / 2
        return total, gradient

    return [value.numpy() for value in steps()]


def reference(weight):
    """NT-Xent by the formula of the paper, in float64, pair by pair."""
    z = np.tanh(X.astype(np.float64) @ weight)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(ROWS):
        j = i + 1 if i % 2 == 0 else i - 1
        terms = [np.exp(z[i] @ z[k] / TEMPERATURE) for k in range(ROWS) if k != i]
        total += -np.log(np.exp(z[i] @ z[j] / TEMPERATURE) / sum(terms))
    return total / ROWS


def test_nt_xent_and_its_gradient_are_those_of_the_formula():
    loss, gradient = loss_and_gradient(1)
    np.testing.assert_allclose(loss, reference(WEIGHT.astype(np.float64)), rtol=1e-5)
    step = 1e-6
    for place in np.ndindex(*WEIGHT.shape):
        up, down = WEIGHT.astype(np.float64), WEIGHT.astype(np.float64)
        up[place] += step
        down[place] -= step
        slope = (reference(up) - reference(down)) / (2 * step)
        np.testing.assert_allclose(gradient[place], slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("replicas", [2, 4])
def test_the_loss_of_gathered_rows_and_its_gradient_do_not_depend_on_the_replicas(replicas):
    loss, gradient = loss_and_gradient(1)
    for got, expected in zip(loss_and_gradient(replicas), (loss, gradient), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mistake", [own_rows, mean_gradient, no_gradient])
@pytest.mark.parametrize("replicas", [2, 4])
def test_a_planted_mistake_shows_in_the_gradient(mistake, replicas):
    _, expected = loss_and_gradient(1)
    _, got = loss_and_gradient(replicas, mistake)
    assert np.abs(got - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_rows_are_gathered_bit_for_bit_in_the_order_of_the_global_batch(replicas):
    strategy, count = strategy_of(replicas), ROWS // replicas

    def replica():
        first = tf.distribute.get_replica_context().replica_id_in_sync_group * count
        return gathered(tf.ensure_shape(tf.constant(X)[first : first + count], [count, INPUTS]))

    every = strategy.experimental_local_results(tf.function(on_replicas(strategy, replica))())
    assert len(every) == replicas
    for one in every:
        np.testing.assert_array_equal(one.numpy(), X)


@pytest.mark.parametrize("replicas", [2, 4])
def test_a_second_derivative_of_gathered_rows_does_not_depend_on_the_replicas(replicas):
    def hessian_times_ones(replicas):
        strategy, count = strategy_of(replicas), ROWS // replicas

        def replica(weight):
            context = tf.distribute.get_replica_context()
            first = context.replica_id_in_sync_group * count
            x = tf.ensure_shape(tf.constant(X)[first : first + count], [count, INPUTS])
            with tf.GradientTape() as outer:
                outer.watch(weight)
                with tf.GradientTape() as inner:
                    z = tf.tanh(x @ weight)
                    inner.watch(z)
                    every = gathered(z)
                    loss = tf.reduce_sum(tf.square(tf.matmul(z, every, transpose_b=True)))
                # Linear in the slopes of this replica's rows, which depend on the rows of all.
                slopes = tf.reduce_sum(inner.gradient(loss, z))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(outer.gradient(slopes, weight)))

        results = tf.function(on_replicas(strategy, replica))(tf.constant(WEIGHT))
        return strategy.experimental_local_results(results)[0].numpy()

    expected = hessian_times_ones(1)
    np.testing.assert_allclose(hessian_times_ones(replicas), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
