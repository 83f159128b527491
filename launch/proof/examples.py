"""The examples of some steps, as each replica gets them, without a model: for rows on the input alone."""

import hashlib
import os
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.input import load
from trainers.input.batches import batches
from trainers.settings.config import Config
from trainers.settings.rules import check_batch
from trainers.world import cluster as clusters
from trainers.world import devices, process

# Where it is looked at: at the begin, and as after a resume in a later epoch.
FIRST_STEPS = (0, 3_001)
STEPS_OF_EACH = 4


def digest(*arrays: np.ndarray) -> str:
    """A name for the bytes of an example."""
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8).hexdigest()


def examples_of(config: Config) -> dict[int, dict[int, list[str]]]:
    """Step → position of the first example of a part in the global batch → names of the part's examples.

    What each replica of this process gets, augmented as in training.

    Raises:
      BadConfiguration: the data cannot be read, or the batch does not divide.
    """
    cluster = clusters.from_environment(os.environ) if config.strategy == "multi_worker" else None
    world = devices.set_up(config, cluster, process.say)
    check_batch(config, world.replicas)
    strategy, seen = world.strategy, {}
    train = load.load_for(config).train

    def record(step: np.ndarray, first: np.ndarray, *features: np.ndarray) -> None:
        names = [digest(*(array[i] for array in features)) for i in range(len(features[0]))]
        seen.setdefault(int(step), {})[int(first)] = names

    def replica(feed: Any, order: Any, step: tf.Tensor) -> None:
        for number in range(config.parts):
            features, _, first = source.part(feed, order, step, number)
            tf.numpy_function(record, [step, first, *(features[name] for name in sorted(features))], [])

    def look(step: tf.Tensor) -> None:
        order = strategy.run(source.order, args=(step, step + 1))
        strategy.run(replica, args=(source.feed()[0], order, step))

    source = batches(strategy, train, config.batch_size, config.seed, config.parts, config.views)
    compiled = tf.function(look)
    for first in FIRST_STEPS:
        source.start(first)
        if train.arrays is None:
            compiled = tf.function(look)  # anew: it holds an iterator
        for step in range(first, first + STEPS_OF_EACH):
            compiled(tf.constant(step, tf.int64))
    return seen
