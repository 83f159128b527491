"""What the chief has reaches all workers bit for bit, through the collective."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from trainers.run import workers
from trainers.world.cluster import Cluster
from trainers.world.devices import World


@pytest.mark.parametrize("at_once", [1, 3, 1 << 22])
def test_every_bit_of_every_type_comes_through_whatever_the_size_of_a_piece(monkeypatch, at_once):
    world = World(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), Cluster(0, ("127.0.0.1:1",), "a test"))
    monkeypatch.setattr(workers, "_WORDS_AT_ONCE", at_once)
    workers._compiled_broadcast.cache_clear()
    odd = np.array([-0.0, np.nan, -np.inf, 1e-45, 3.0], np.float32)
    odd.view(np.uint32)[1] = 0xFFC12345  # a NaN with a payload
    sent = {
        "odd": odd,
        "matrix": np.arange(6, dtype=np.float64).reshape(2, 3) - 2.5,
        "none": np.zeros([0, 4], np.float32),
        "scalar": np.array(2**62 + 1),
        "lowest": np.array([np.iinfo(np.int64).min, -1]),
        "bytes": np.arange(11, dtype=np.uint8),
        "flags": np.array([True, False, True]),
        "halves": odd.astype(np.float16),
        "short": odd.astype(ml_dtypes.bfloat16),
    }
    found = workers.broadcast(world, {name: tf.constant(value) for name, value in sent.items()})
    assert list(found) == list(sent)
    for name, value in sent.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes(), name
    assert workers.broadcast(world, {}) == {}


def test_a_worker_of_several_replicas_counts_once():
    world = World(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), Cluster(0, ("127.0.0.1:1",), "a test"))
    assert workers.gather(world, 0.1) == [0.1]
    found = tf.function(lambda: workers.mean(world, tf.constant([1.5, -2.0], tf.float64)))()
    assert found.numpy().tolist() == [1.5, -2.0]
