"""Errors of TensorFlow that the user can act on, as one line: unreadable data, and gradients that are not there."""

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from trainers.run.inner_loop import Source
from trainers.settings.exit_codes import BadConfiguration
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


# TensorFlow's words around what an operation that forbids its gradient says of itself.
_FORBIDDEN = re.compile(r"Gradient explicitly disabled\. Reason: b?([\"'])(.*)\1\.?$", re.DOTALL)


@contextlib.contextmanager
def missing_gradients_named() -> Iterator[None]:
    """Within the block, which traces a step, a gradient that is not there is an error of the step.

    A second derivative through an operation that has a first alone, for instance. Where the operation says what to do
    instead, its words are the message.

    Raises:
      BadConfiguration: in place of TensorFlow's LookupError, which AutoGraph wraps in an error of its own.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        # Not a KeyError or an IndexError, which are LookupErrors too.
        while cause is not None and type(cause) is not LookupError:
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        text = " ".join(str(cause).split())
        if forbidden := _FORBIDDEN.search(text):
            raise BadConfiguration(forbidden[2]) from error
        raise BadConfiguration(
            f"the step needs a gradient that TensorFlow does not have ({text}); compute with other operations, or stop "
            "the gradient there (tf.stop_gradient)"
        ) from error
