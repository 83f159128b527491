"""What all pipelines of tf.data have in common."""

import tensorflow as tf

from trainers.world import machine

# Steps that are ready before they are asked for.
READY_STEPS = 2


def calls_at_once() -> int:
    """How many examples are read and decoded at once: one for each core."""
    return machine.cores()


def steady(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """In order, and without autotuning.

    The thread that tunes sleeps for up to a minute, and whoever lets an iterator go waits for it to wake: stalls of 40
    to 300 seconds were seen. Nor does it find more than a call for each core, which is right from the first example on.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    return dataset.with_options(options)
