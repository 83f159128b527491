"""The source of batches that fits a split."""

import tensorflow as tf

from trainers.input.dataset import Split
from trainers.input.indexed import IndexedBatches
from trainers.input.resident import ResidentBatches
from trainers.input.source import Batches
from trainers.input.streamed import StreamedBatches


def batches(
    strategy: tf.distribute.Strategy,
    split: Split,
    batch_size: int,
    seed: int | None,
    parts: int = 1,
    views: int = 1,
) -> Batches:
    """The source for a split: resident if it holds arrays, read by index if it can be, streamed otherwise.

    `seed=None`: in order, once. `parts`: pieces of the global batch that are computed one after another. `views`:
    positions in training that follow each other and hold the same example.
    """
    streaming = IndexedBatches if split.records else StreamedBatches
    source = streaming if split.arrays is None else ResidentBatches
    return source(strategy, split, batch_size, seed, parts, views)
