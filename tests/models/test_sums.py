"""The vector of running sums against the metrics' own results."""

import numpy as np
import pytest
import tensorflow as tf

from models import metrics
from models.sums import Sums

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 3, 12)
LOGITS = RANDOM.normal(size=(12, 3)).astype(np.float32)
LOSSES = RANDOM.uniform(size=12).astype(np.float32)
ONES = np.ones(12, np.float32)


def all_metrics():
    """Metrics with 1, 9 and 30 statistics an example."""
    return {"accuracy": metrics.Accuracy(), "f1": metrics.F1(3), "calibration_error": metrics.CalibrationError()}


def sums_of(sums, part, weights=ONES):
    return sums.of_examples(LABELS[part], LOGITS[part], tf.constant(LOSSES[part]), tf.constant(weights[part]))


def test_the_layout_is_loss_count_and_the_statistics_of_each_metric():
    sums = Sums(all_metrics())
    assert sums.width == 2 + 1 + 9 + 30
    assert sums.names == ("loss", "accuracy", "f1", "calibration_error")
    vector = sums_of(sums, slice(None))
    assert vector.shape == (sums.width,)
    assert vector.dtype == tf.float32
    assert float(vector[0]) == pytest.approx(LOSSES.sum(), rel=1e-6)
    assert float(vector[1]) == 12
    assert float(vector[2]) == (LOGITS.argmax(-1) == LABELS).sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_values_are_the_mean_loss_and_the_results_of_the_metrics(compiled):
    sums = Sums(all_metrics())
    values_of = tf.function(sums.values) if compiled else sums.values
    total = sum(tf.cast(sums_of(sums, part), tf.float64) for part in (slice(0, 5), slice(5, 12)))
    values = values_of(total)
    assert values.shape == (len(sums.names),)
    assert values.dtype == tf.float64
    assert float(values[0]) == pytest.approx(LOSSES.mean(), rel=1e-6)
    for (name, metric), value in zip(all_metrics().items(), values[1:], strict=True):
        metric.update_state(LABELS, LOGITS)
        assert float(value) == pytest.approx(float(metric.result()), abs=1e-6), name


def test_an_example_of_weight_0_does_not_count():
    sums = Sums(all_metrics())
    weights = (np.arange(12) < 7).astype(np.float32)
    np.testing.assert_allclose(sums_of(sums, slice(None), weights), sums_of(sums, slice(0, 7)), rtol=1e-6)


def test_without_metrics_there_is_the_loss_and_without_examples_it_is_0():
    sums = Sums({})
    assert (sums.width, sums.names) == (2, ("loss",))
    np.testing.assert_array_equal(sums.values(tf.zeros([2], tf.float64)), [0.0])
