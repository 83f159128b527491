"""Which examples form the global batch of a step, and how each replica gets its share.

Example `p` of the run (`p = step * batch_size + position in the batch`) is a pure function of the seed and `p`, so the
order does not depend on the number of replicas, epochs follow each other without a gap, and a resumed run needs no
saved position. With several views of each example, as many positions that follow each other hold the same one, and
differ by their augmentation.

A source has three functions: `order` runs for many steps at once, inside of each replica; `feed` once a step, outside
of them; `part` once for each part of a step, inside.
"""

import abc
import itertools
from typing import Any

import tensorflow as tf

from models import randomness
from trainers.input.dataset import Features, Split
from trainers.settings.exit_codes import BadConfiguration

_SHUFFLE_ROUNDS = 4
# Into which positions are cut, to be computed by several cores.
_SHUFFLE_PIECES = 4
# The examples of some steps: the first of the steps, and a row for each. It lies where the replica computes.
Order = tuple[tf.Tensor, tf.Tensor]


def shuffled_index(position: tf.Tensor, size: int, seed: int) -> tf.Tensor:
    """The example at positions `[n]` (int64) of a run over `size` examples, each epoch in an order of its own: `[n]`.

    Source: the pseudo-random permutation of `tf.random.experimental.index_shuffle`, keyed by seed and epoch.
    """
    count = tf.size(position)
    edges = [count * piece // _SHUFFLE_PIECES for piece in range(_SHUFFLE_PIECES + 1)]
    pieces = [position[begin:end] for begin, end in itertools.pairwise(edges)]
    return tf.concat([_shuffled_piece(piece, size, seed) for piece in pieces], axis=0)


def _shuffled_piece(position: tf.Tensor, size: int, seed: int) -> tf.Tensor:
    """As `shuffled_index`, in one operation, which one core computes: of 1,000 examples of a small set 0.4 ms."""
    epoch = position // size
    key = tf.stack([tf.fill(tf.shape(epoch), tf.cast(seed, tf.int64)), epoch, epoch // 2**32], axis=1)
    return tf.raw_ops.RandomIndexShuffle(
        index=position % size,
        seed=tf.cast(key, tf.uint32),
        max_index=tf.fill(tf.shape(epoch), tf.cast(size - 1, tf.int64)),
        rounds=_SHUFFLE_ROUNDS,
    )


class Batches(abc.ABC):
    """A source of global batches of `batch_size`, from a split of `size` examples.

    A global batch is cut into `parts` first and each part over the replicas, so that what is computed over a part
    (batch statistics) does not depend on the number of replicas. `seed=None`: in the order of the split, once, and not
    augmented. `views`: positions in training that follow each other and hold the same example; a replica's share of a
    part must hold all of them. `ordered`: the most steps that one call of `order` should cover.
    """

    ordered: int

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        split: Split,
        batch_size: int,
        seed: int | None,
        parts: int = 1,
        views: int = 1,
    ):
        self.size, self.batch_size, self.seed = split.size, batch_size, seed
        self.parts, self.replicas = parts, strategy.num_replicas_in_sync
        self.views = views if seed is not None else 1
        self.augmentation = split.augmentation if seed is not None else None
        self.take(strategy, split)

    @abc.abstractmethod
    def take(self, strategy: tf.distribute.Strategy, split: Split) -> None:
        """Called last when a source is made: keeps what it reads the split from, and sets `ordered`."""

    def index(self, position: tf.Tensor) -> tf.Tensor:
        """The examples at positions `[n]` of the run, int64: `[n]`; beyond the end of a pass in order, its last one."""
        if self.seed is None:
            return tf.minimum(position, self.size - 1)
        return shuffled_index(position // self.views if self.views > 1 else position, self.size, self.seed)

    @abc.abstractmethod
    def start(self, step: int) -> None:
        """Goes to a step: the next `feed` is that of its global batch."""

    @abc.abstractmethod
    def order(self, first: tf.Tensor, last: tf.Tensor) -> Order:
        """In a replica: its examples of steps `first … last`, those of a step part by part."""

    @abc.abstractmethod
    def feed(self) -> tuple[Any, tf.Tensor | None]:
        """What the replicas take a step's examples from, and the seconds that the step waits for it, float64.

        The seconds are None where no step waits, or nobody can tell.
        """

    @abc.abstractmethod
    def share(
        self, feed: Any, order: Order, step: tf.Tensor, first: tf.Tensor, part: int, count: int
    ) -> tuple[Features, tf.Tensor]:
        """Part number `part` of this replica's examples, `count` of them; weights `[count]`: 1, or 0 for padding.

        `first`: the position of its first example in the global batch of the step.
        """

    def augmented(self, features: Features) -> Features:
        """A share of the global batch, changed by what `--augment` names. Called within `models.randomness.at`."""
        return self.augmentation.of_batch(self.augmentation.of_resident(features))

    def part(self, feed: Any, order: Order, step: tf.Tensor, number: int) -> tuple[Features, tf.Tensor, tf.Tensor]:
        """In a replica: part `number` of its share of the step's global batch, as `(features, weights, first)`.

        `features`: `[batch_size / parts / replicas, …]` each; `weights`: as in `share`. `first`: the position of the
        first of these examples in the global batch, int64; the others follow it without a gap.
        """
        whole_part = self.batch_size // self.parts
        count = whole_part // self.replicas
        replica = randomness.known(tf.distribute.get_replica_context().replica_id_in_sync_group)
        replica = replica if isinstance(replica, int) else tf.cast(replica, tf.int64)
        first = tf.convert_to_tensor(replica * count + number * whole_part, tf.int64)
        features, weights = self.share(feed, order, step, first, number, count)
        if self.augmentation:
            with tf.name_scope("augment"), randomness.at(self.seed, step, first):
                features = self.augmented(features)
        return features, weights, first

    def examples_read(self) -> int | None:
        """Examples that this process has read so far; None where none is read while training."""
        return None

    def bytes_read(self) -> int | None:
        """Bytes that this process has read so far, as they are stored; None where that is not known."""
        return None

    def fault(self, first: int, last: int) -> BadConfiguration | None:
        """After an error in steps `first … last`: the example that cannot be read, as an error that names it."""
        return None
