"""The compiled loop around a loop's update: many updates in one call, with what is logged of them."""

import traceback
from collections.abc import Callable

import tensorflow as tf
from absl import logging

from trainers.run import workers
from trainers.run.inner_loop import InnerLoop, Source
from trainers.run.replicas import first_local, on_replicas
from trainers.run.vectors import vectors_of
from trainers.run.windows import Columns
from trainers.show.summaries import Summaries
from trainers.world.devices import first_component

# What a worker has to say at each call: whether it was asked to stop, and its seconds a step.
NUM_NEWS = 2
# Callers that the warning of a second trace names.
FRAMES = 10


@tf.autograph.experimental.do_not_convert
def own_weights(loop: InnerLoop) -> list[tf.Tensor]:
    """The weights as they are now, as vectors, outside of the replicas: those on this process's first device."""
    return [tf.identity(vector) for vector in vectors_of(loop.weights).pack(list(map(first_component, loop.weights)))]


def log_window(loop: InnerLoop) -> tf.Tensor:
    """Updates between two rows, an int64 scalar."""
    return tf.constant(loop.config.log_every or loop.config.train_steps, tf.int64)


def histogram_cadence(loop: InnerLoop, summaries: Summaries | None) -> int:
    """Updates between histograms that the compiled loop writes; 0 = none.

    The graphs of all workers must be equal: where only the chief writes, it does so between calls.
    """
    return loop.config.histogram_every if summaries is not None and loop.world.cluster is None else 0


def make_train_call(loop: InnerLoop, source: Source, summaries: Summaries | None = None) -> Callable:
    """The compiled loop: updates `first … last` of the run, in one call, stopping at the first that is not finite.

    Returns a function `(first, last, sums [width], news [NUM_NEWS], ahead) -> (windows, sums, finite, news, waited)`,
    numbers in float64. `windows [n, columns]`: a row of `trainers.run.windows.Columns` at each log step of the call and
    at its end; loss and metrics are those since the row before. `sums` are those with which the first window begins,
    and those of the last. `news` is what a worker reports, `[stop requested, seconds a step]`; it comes back as the
    mean over all workers, so that all decide alike. `ahead`: as `trainers.run.rewinds` has it, int64. `waited`: seconds
    that steps waited for input. With `summaries`, histograms are written at their cadence.
    """
    strategy, scalar = loop.world.strategy, tf.TensorSpec([], tf.int64)
    update, width = loop.make_update(source), len(Columns(loop))
    every, histogram_every = log_window(loop), histogram_cadence(loop, summaries)
    order_of = on_replicas(strategy, lambda first, last: _order(source, first, last))
    sums_spec, news_spec = (tf.TensorSpec([size], tf.float64) for size in (loop.sums.width, NUM_NEWS))

    @tf.function(input_signature=[scalar, scalar, sums_spec, news_spec, scalar])
    def train_call(first: tf.Tensor, last: tf.Tensor, sums: tf.Tensor, news: tf.Tensor, ahead: tf.Tensor) -> tuple:
        count_trace(loop)
        step, finite, waited = first, tf.constant(True), tf.constant(0.0, tf.float64)
        norms = tuple(tf.constant(0.0) for _ in loop.norm_names)
        windows = tf.TensorArray(tf.float64, size=0, dynamic_size=True, element_shape=[width])
        own, before = sums, own_weights(loop)
        while (step < last) & finite:
            edge = tf.minimum(last, (step // every + 1) * every)
            # Loops in loops, not a loop with conditions: what happens at every step is only what must. The last update
            # of a window stands alone, so that the weights before it show how far it went.
            while (step < edge) & finite:
                before = own_weights(loop)
                until = tf.minimum(tf.maximum(edge - 1, step + 1), step + source.ordered)
                order = order_of(step + ahead, until + ahead)
                while (step < until) & finite:
                    feed, seconds = source.feed()
                    waited = waited if seconds is None else waited + seconds
                    new_sums, found, finite, gradients = update(feed, order, step + ahead)
                    sums += tf.cast(new_sums, tf.float64)
                    norms, step = tuple(found), step + 1
                    if histogram_every and step % histogram_every == 0:
                        own_gradients = [first_local(strategy, gradient) for gradient in gradients]
                        summaries.histograms(step, loop.weights, own_gradients)
            windows = windows.write(windows.size(), _row(loop, step, norms, before, sums))
            own, sums = sums, tf.zeros_like(sums)
        return windows.stack(), own, finite, workers.mean(loop.world, news), waited

    return train_call


def _order(source: Source, first: tf.Tensor, last: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """In a replica: which examples it gets in steps `first … last`."""
    with tf.name_scope("input"):
        return source.order(first, last)


@tf.autograph.experimental.do_not_convert
def _row(loop: InnerLoop, step: tf.Tensor, norms: tuple, before: list[tf.Tensor], sums: tf.Tensor) -> tf.Tensor:
    """A row of the windows, `[columns]`, float64, after update number `step - 1`."""
    after = own_weights(loop)
    moved = tf.linalg.global_norm([a - b for a, b in zip(after, before, strict=True)])
    facts = (step, *loop.rates(step - 1), *norms, tf.linalg.global_norm(after), moved)
    return tf.concat([[tf.cast(value, tf.float64) for value in facts], loop.sums.values(sums)], axis=0)


@tf.autograph.experimental.do_not_convert
def count_trace(loop: InnerLoop) -> None:
    """Runs once for each trace of the train call. A second one is a defect that costs minutes: it is logged."""
    loop.traces += 1
    if loop.traces > 1:
        frames = [frame for frame in traceback.extract_stack()[:-1] if "site-packages" not in frame.filename]
        cause = "".join(traceback.format_list(frames[-FRAMES:]))
        logging.warning("the train step is traced again (trace %d); called from:\n%s", loop.traces, cause)
