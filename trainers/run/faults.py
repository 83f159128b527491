"""Errors of reading data while a run goes on, with the name of what cannot be read."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from trainers.run.inner_loop import Source
from trainers.world.watchdog import Watchdog

# Seconds: one example after the other is read and decoded.
LONGEST_SEARCH = 3600.0

# What reading and decoding raise. Others tell of devices or of workers that are lost.
_OF_READING = (
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.DataLossError,
    tf.errors.OutOfRangeError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnknownError,
)


@contextlib.contextmanager
def faults_named(source: Source, first: int, last: int, watchdog: Watchdog) -> Iterator[None]:
    """Within the block, which takes steps `first … last` of a source, an example that cannot be read is named.

    Raises:
      BadConfiguration: in place of TensorFlow's error, which does not know the example.
    """
    try:
        yield
    except _OF_READING as error:
        watchdog.feed("looking for the example that cannot be read", LONGEST_SEARCH)
        fault = source.fault(first, last)
        if fault is None:
            raise
        raise fault from error
