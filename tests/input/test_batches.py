"""The order of the data is a pure function of (seed, step), whatever the replicas and wherever the data lies."""

import numpy as np
import pytest
import tensorflow as tf

from trainers.input import batches, resident, source
from trainers.input.dataset import Split
from trainers.input.pipelines import steady
from trainers.input.records import Records
from trainers.world import private_api


class Numbers(Records):
    """Records that are their own numbers."""

    size = 50

    def read(self, index):
        return {"x": index}

    def decode(self, stored, crop=None):
        return stored

    def where(self, index):
        return f"number {index}"


SIZE, BATCH = 50, 12
ARRAYS = {"x": np.arange(SIZE, dtype=np.int64)}
RESIDENT = Split(SIZE, arrays=ARRAYS)
INDEXED = Split(SIZE, records=Numbers())
STREAMED = Split(SIZE, stream=lambda: tf.data.Dataset.from_tensor_slices(ARRAYS))


def strategy_of(replicas):
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def global_batches(split, replicas, steps, first=0, seed=3, parts=1, views=1):
    """The ids of the global batches `first … first + steps`, each in order of position, and their weights."""
    strategy = strategy_of(replicas)
    batch_source = batches.batches(strategy, split, BATCH, seed, parts, views)
    batch_source.start(first)
    count = BATCH // replicas // parts

    def replica(feed, order, step):
        start = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64) * count
        pieces = [
            batch_source.share(feed, order, step, start + part * (BATCH // parts), part, count) for part in range(parts)
        ]
        return [features["x"] for features, _ in pieces], [weights for _, weights in pieces]

    @tf.function
    def batch(step):
        order = strategy.run(
            batch_source.order, args=(tf.constant(first, tf.int64), tf.constant(first + steps, tf.int64))
        )
        return strategy.run(replica, args=(batch_source.feed()[0], order, step))

    ids, weights = [], []
    for step in range(first, first + steps):
        xs, ws = batch(tf.constant(step, tf.int64))
        ids.append(np.concatenate([x for part in xs for x in strategy.experimental_local_results(part)]))
        weights.append(np.concatenate([w for part in ws for w in strategy.experimental_local_results(part)]))
    return np.array(ids), np.array(weights)


@pytest.mark.parametrize("split", [RESIDENT, INDEXED, STREAMED], ids=["resident", "indexed", "streamed"])
def test_replicas_and_parts_do_not_change_the_batches(split):
    expected, _ = global_batches(split, 1, 9)
    for replicas, parts in ((2, 1), (4, 1), (2, 3)):
        ids, _ = global_batches(split, replicas, 9, parts=parts)
        np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("split", [RESIDENT, INDEXED, STREAMED], ids=["resident", "indexed", "streamed"])
def test_a_run_that_starts_in_the_middle_sees_the_same_batches(split):
    expected, _ = global_batches(split, 2, 12)
    ids, _ = global_batches(split, 2, 5, first=7)
    np.testing.assert_array_equal(ids, expected[7:])


@pytest.mark.parametrize("split", [RESIDENT, INDEXED, STREAMED], ids=["resident", "indexed", "streamed"])
def test_each_epoch_holds_each_example_once_in_an_order_of_its_own(split):
    ids, _ = global_batches(split, 2, 25)  # 300 examples: 6 epochs
    epochs = ids.reshape(6, SIZE)
    for epoch in epochs:
        assert sorted(epoch) == list(range(SIZE))
    assert len({tuple(epoch) for epoch in epochs}) == 6
    other, _ = global_batches(split, 2, 1, seed=4)
    assert not np.array_equal(other[0], ids[0])


@pytest.mark.parametrize("split", [RESIDENT, INDEXED, STREAMED], ids=["resident", "indexed", "streamed"])
def test_evaluation_goes_over_each_example_once_with_padding_of_weight_0(split):
    ids, weights = global_batches(split, 4, 5, seed=None)
    assert list(ids[weights == 1]) == list(range(SIZE))
    assert weights.sum() == SIZE
    assert weights.shape == (5, BATCH)


@pytest.mark.parametrize("seed", [3, None], ids=["training", "evaluation"])
@pytest.mark.parametrize(("replicas", "parts"), [(1, 1), (4, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("split", [RESIDENT, INDEXED, STREAMED], ids=["resident", "indexed", "streamed"])
def test_a_part_is_the_share_of_its_position(split, replicas, parts, seed):
    """Of the step that fills the batch up in an evaluation, and of the first step in training."""
    strategy = strategy_of(replicas)
    own = batches.batches(strategy, split, BATCH, seed, parts)
    step = 0 if seed else SIZE // BATCH
    own.start(step)
    if not seed and split.stream:
        for _ in range(step):
            own.feed()
    count = BATCH // parts // replicas

    def replica(feed, order):
        replica_id = tf.distribute.get_replica_context().replica_id_in_sync_group
        position = tf.constant(step, tf.int64)
        results = []
        for number in range(parts):
            features, weights, first = own.part(feed, order, position, number)
            expected_first = number * (BATCH // parts) + tf.cast(replica_id, tf.int64) * count
            shared, shared_weights = own.share(feed, order, position, expected_first, number, count)
            results.append((features["x"], shared["x"], weights, shared_weights, first, expected_first))
        return results

    @tf.function
    def compare():
        order = strategy.run(own.order, args=(tf.constant(step, tf.int64), tf.constant(step + 1, tf.int64)))
        return strategy.run(replica, args=(own.feed()[0], order))

    positions, total = [], 0
    for results in compare():
        for values in zip(*(strategy.experimental_local_results(result) for result in results), strict=True):
            ids, shared, weights, shared_weights, first, expected_first = (value.numpy() for value in values)
            np.testing.assert_array_equal(ids, shared)
            np.testing.assert_array_equal(weights, shared_weights)
            assert ids.shape == weights.shape == (count,)
            assert first == expected_first and first.dtype == np.int64
            positions += range(first, first + count)
            total += weights.sum()
            if not seed:
                expected = step * BATCH + np.arange(first, first + count)
                np.testing.assert_array_equal(weights, expected < SIZE)
                np.testing.assert_array_equal(ids[weights == 1], expected[expected < SIZE])
    assert positions == list(range(BATCH))
    assert total == (BATCH if seed else SIZE % BATCH)


@pytest.mark.parametrize("split", [RESIDENT, INDEXED, STREAMED], ids=["resident", "indexed", "streamed"])
def test_views_hold_each_example_several_times_in_the_order_that_it_has_once(split):
    once, _ = global_batches(split, 1, 9)
    for views in (2, 3):
        expected = np.repeat(once.ravel(), views)[: 9 * BATCH].reshape(9, BATCH)
        for replicas, parts in ((1, 1), (2, 1), (4, 1), (2, 2)):
            if BATCH // replicas // parts % views == 0:
                ids, _ = global_batches(split, replicas, 9, parts=parts, views=views)
                np.testing.assert_array_equal(ids, expected, err_msg=f"{views} views, {replicas} replicas")
        if views == 2:
            ids, _ = global_batches(split, 2, 3, first=6, views=views)
            np.testing.assert_array_equal(ids, expected[6:])
    # A pass in order is one over the split, and has each example once.
    ids, weights = global_batches(split, 2, 5, seed=None, views=2)
    assert list(ids[weights == 1]) == list(range(SIZE))


@pytest.mark.parametrize("first", [0, 10**9])
def test_views_that_are_read_by_index_have_the_order_of_resident_data(first):
    ids, _ = global_batches(INDEXED, 2, 4, first=first, parts=3, views=2)
    expected, _ = global_batches(RESIDENT, 1, 4, first=first, views=2)
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("split", [RESIDENT, INDEXED, STREAMED], ids=["resident", "indexed", "streamed"])
@pytest.mark.parametrize("most", [1, 7, 49, 50, 100])
def test_a_sample_of_a_split_is_spaced_evenly_over_it(split, most):
    sample = split.sample(most)
    expected = [i * SIZE // min(most, SIZE) for i in range(min(most, SIZE))]
    ids, weights = global_batches(sample, 2, -(-len(expected) // BATCH), seed=None)
    assert list(ids[weights == 1]) == expected and sample.size == len(expected)
    assert [int(example["x"]) for example in sample.examples()] == expected


@pytest.mark.parametrize("split", [RESIDENT, INDEXED], ids=["resident", "indexed"])
def test_seeking_far_ahead_costs_nothing(split):
    ids, _ = global_batches(split, 1, 1, first=10**12)
    assert ids.shape == (1, BATCH)


@pytest.mark.parametrize("first", [0, 10**9])
def test_what_is_read_by_index_has_the_order_of_resident_data(first):
    ids, _ = global_batches(INDEXED, 2, 9, first=first, parts=3)
    expected, _ = global_batches(RESIDENT, 1, 9, first=first)
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_read_their_own_examples_alone_and_together_all(workers):
    """Each worker's pipeline, as its `InputContext` describes it."""
    expected, _ = global_batches(RESIDENT, 4, 3)
    read = []
    for worker in range(workers):
        own = batches.batches(strategy_of(4), INDEXED, BATCH, 3)
        context = tf.distribute.InputContext(workers, worker, 4)
        elements = list(steady(own.pipeline(0, context)).take(3 * 4 // workers).as_numpy_iterator())
        read.append(np.concatenate([features["x"] for features, _ in elements]).reshape(3, -1))
    np.testing.assert_array_equal(np.concatenate(read, axis=1), expected)


def test_an_example_has_its_place_in_the_order_however_many_are_asked_for():
    whole = source.shuffled_index(tf.range(40, dtype=tf.int64), 13, 5).numpy()
    assert all(sorted(whole[first : first + 13]) == list(range(13)) for first in (0, 13, 26))
    for count in range(10):
        some = source.shuffled_index(tf.range(7, 7 + count, dtype=tf.int64), 13, 5)
        np.testing.assert_array_equal(some, whole[7 : 7 + count])


def test_one_example_is_a_data_set():
    index = source.shuffled_index(tf.range(5, dtype=tf.int64), 1, 0)
    assert index.numpy().tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.float32, np.bool_])
@pytest.mark.parametrize("shape", [(), (3,), (8,), (5, 7, 3)])
def test_what_gpus_cannot_gather_is_held_as_words_and_comes_back(monkeypatch, dtype, shape):
    """GPUs have no kernel for it: here the CPU does as they do."""
    chance = np.random.default_rng(0)
    array = chance.integers(-(2**40), 2**40, (SIZE, *shape)).astype(dtype)
    strategy, step = strategy_of(1), tf.constant(0, tf.int64)
    results = []
    for packs in (False, True):
        monkeypatch.setattr(resident, "_gathers_on_gpus", lambda strategy, packs=packs: packs)
        own = batches.batches(strategy, Split(SIZE, arrays={"x": array}), BATCH, 3)
        narrow = np.dtype(dtype).kind in "iu"
        [held] = strategy.experimental_local_results(own.feed()[0]["x"])
        assert (held.dtype == tf.int64) == (packs and narrow)
        features, _, _ = strategy.run(lambda own=own: own.part(own.feed()[0], own.order(step, step + 1), step, 0))
        results.append(strategy.experimental_local_results(features["x"])[0].numpy())
    assert results[1].dtype == dtype and results[1].shape == (BATCH, *shape)
    np.testing.assert_array_equal(*results)


def test_what_gpus_can_gather_is_what_tensorflow_registers():
    """The day a kernel for 8 bits is there, images need not be held as words."""
    types = private_api.types_of_kernel("GatherV2", "GPU")
    assert "int64" in types and not {"uint8", "int8", "uint16", "int16", "uint32"} & types
