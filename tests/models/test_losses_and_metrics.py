"""Losses and metrics against independent references: NumPy, Keras, scikit-learn."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn import metrics as reference

from models import losses, metrics

RANDOM = np.random.default_rng(0)
TARGETS = RANDOM.normal(size=200).astype(np.float32)
OUTPUTS = (TARGETS + RANDOM.normal(size=200) * 2).astype(np.float32)
LABELS = RANDOM.integers(0, 5, size=200)
LOGITS = RANDOM.normal(size=(200, 5)).astype(np.float32) + 2 * np.eye(5, dtype=np.float32)[LABELS]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - logits.max(-1, keepdims=True)
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


LOG_P = log_softmax(LOGITS)
LABEL_LOG_P = LOG_P[np.arange(200), LABELS]
ERROR = OUTPUTS.astype(np.float64) - TARGETS
CLASS_WEIGHTS = [1.0, 2.0, 0.5, 3.0, 1.5]

REGRESSION = {
    "squared": (losses.SquaredError(), ERROR**2),
    "huber": (losses.Huber(0.7), np.where(abs(ERROR) <= 0.7, ERROR**2 / 2, 0.7 * abs(ERROR) - 0.7**2 / 2)),
    "huber of 1": (losses.Huber(), np.where(abs(ERROR) <= 1, ERROR**2 / 2, abs(ERROR) - 0.5)),
    "pseudo-Huber": (losses.PseudoHuber(1.5), 1.5**2 * (np.sqrt(1 + (ERROR / 1.5) ** 2) - 1)),
    "log-cosh": (losses.LogCosh(), np.log(np.cosh(ERROR))),
}
SMOOTHED = -(0.8 * LABEL_LOG_P + 0.2 * LOG_P.mean(-1))
CLASSES = {
    "cross-entropy": (losses.CrossEntropy(), -LABEL_LOG_P),
    "smoothed": (losses.CrossEntropy(0.2), SMOOTHED),
    "weighted": (losses.CrossEntropy(0.2, CLASS_WEIGHTS), SMOOTHED * np.array(CLASS_WEIGHTS)[LABELS]),
    "focal": (losses.Focal(2.0), -((1 - np.exp(LABEL_LOG_P)) ** 2) * LABEL_LOG_P),
    "focal of 0": (losses.Focal(0.0), -LABEL_LOG_P),
    "weighted focal": (
        losses.Focal(1.5, CLASS_WEIGHTS),
        -((1 - np.exp(LABEL_LOG_P)) ** 1.5) * LABEL_LOG_P * np.array(CLASS_WEIGHTS)[LABELS],
    ),
}


@pytest.mark.parametrize("name", REGRESSION)
def test_a_regression_loss_is_its_formula(name):
    loss, expected = REGRESSION[name]
    np.testing.assert_allclose(loss.call(TARGETS, OUTPUTS), expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(loss.call(TARGETS, OUTPUTS[:, None]), expected, rtol=2e-5, atol=1e-6)
    pairs = loss.call(TARGETS.reshape(100, 2), OUTPUTS.reshape(100, 2))
    np.testing.assert_allclose(pairs, expected.reshape(100, 2).mean(1), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_a_classification_loss_is_its_formula(name):
    loss, expected = CLASSES[name]
    np.testing.assert_allclose(loss.call(LABELS, LOGITS), expected, rtol=2e-5, atol=1e-6)


def test_losses_that_keras_has_equal_those_of_keras():
    unreduced = {"reduction": None}
    np.testing.assert_allclose(
        losses.Huber(0.7).call(TARGETS[:, None], OUTPUTS[:, None]),
        keras.losses.Huber(0.7, **unreduced)(TARGETS[:, None], OUTPUTS[:, None]),
        rtol=1e-6,
        atol=1e-7,
    )
    np.testing.assert_allclose(
        losses.LogCosh().call(TARGETS[:, None], OUTPUTS[:, None]),
        keras.losses.LogCosh(**unreduced)(TARGETS[:, None], OUTPUTS[:, None]),
        rtol=1e-5,
        atol=1e-6,
    )
    smoothed = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2, **unreduced)
    np.testing.assert_allclose(
        losses.CrossEntropy(0.2).call(LABELS, LOGITS), smoothed(np.eye(5)[LABELS], LOGITS), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", [*REGRESSION, *CLASSES])
def test_a_loss_and_its_gradient_are_finite_at_extremes(name):
    classes = name in CLASSES
    loss = (CLASSES if classes else REGRESSION)[name][0]
    if classes:
        targets = tf.constant([0, 1, 2, 3])
        outputs = tf.constant([[1e4, 0, 0, 0, 0], [1e4, 0, 0, 0, -1e4], [0, 0, 0, 0, 0], [-1e4, -1e4, 0, 1e4, 0]])
    else:
        extreme = [0.0, 1e-30, 1e18 if name == "squared" else 1e30, -1e4]
        targets, outputs = tf.zeros([4]), tf.constant(extreme)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        values = loss.call(targets, outputs)
    assert np.isfinite(values).all()
    assert np.isfinite(tape.gradient(values, outputs)).all()
    assert np.isfinite(loss.call(targets, tf.cast(outputs, tf.bfloat16))).all()


@pytest.mark.parametrize("name", [*REGRESSION, *CLASSES])
def test_a_loss_comes_back_from_its_configuration(name):
    loss = (REGRESSION | CLASSES)[name][0]
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is type(loss)
    targets, outputs = (LABELS, LOGITS) if name in CLASSES else (TARGETS, OUTPUTS)
    np.testing.assert_array_equal(again.call(targets, outputs), loss.call(targets, outputs))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: losses.Huber(0), "threshold 0"),
        (lambda: losses.PseudoHuber(-1), "threshold -1"),
        (lambda: losses.CrossEntropy(1.0), "label_smoothing 1.0"),
        (lambda: losses.Focal(-1), "gamma -1"),
    ],
)
def test_a_loss_refuses_what_makes_no_sense(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def calibration_error(labels, logits, bins=15):
    p = np.exp(log_softmax(logits))
    confidence, correct = p.max(-1), p.argmax(-1) == labels
    edges = np.linspace(0, 1, bins + 1)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return total


PREDICTED = LOGITS.argmax(-1)
MACRO = {"average": "macro", "zero_division": 0}
METRICS = {
    "accuracy": (metrics.Accuracy, reference.accuracy_score(LABELS, PREDICTED)),
    "top 2": (lambda: metrics.TopK(2), reference.top_k_accuracy_score(LABELS, LOGITS, k=2)),
    "precision": (lambda: metrics.Precision(5), reference.precision_score(LABELS, PREDICTED, **MACRO)),
    "recall": (lambda: metrics.Recall(5), reference.recall_score(LABELS, PREDICTED, **MACRO)),
    "f1": (lambda: metrics.F1(5), reference.f1_score(LABELS, PREDICTED, **MACRO)),
    "mean iou": (lambda: metrics.MeanIoU(5), reference.jaccard_score(LABELS, PREDICTED, **MACRO)),
    "calibration error": (metrics.CalibrationError, calibration_error(LABELS, LOGITS)),
    "huber": (lambda: metrics.HuberMetric(0.7), REGRESSION["huber"][1].mean()),
    "absolute error": (metrics.AbsoluteError, reference.mean_absolute_error(TARGETS, OUTPUTS)),
    "r2": (metrics.R2, reference.r2_score(TARGETS, OUTPUTS)),
}
OF_CLASSES = ("accuracy", "top 2", "precision", "recall", "f1", "mean iou", "calibration error")


def data_of(name):
    return (LABELS, LOGITS) if name in OF_CLASSES else (TARGETS, OUTPUTS)


def test_equal_logits_are_no_hit_but_for_the_first_k_classes():
    metric, logits = metrics.TopK(5), np.zeros([100, 100], np.float32)
    metric.update_state(np.arange(100), logits)
    assert float(metric.result()) == pytest.approx(0.05)
    logits[np.arange(100), np.arange(100)[::-1]] = [np.nan, np.inf] * 50
    metric.reset_state()
    metric.update_state(np.arange(100), logits)
    metric.update_state([-1, 100], np.zeros([2, 100], np.float32))
    assert float(metric.result()) == 0


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_that_of_the_whole_set_and_can_be_reset(name):
    make, expected = METRICS[name]
    metric, (targets, outputs) = make(), data_of(name)
    for piece in np.split(np.arange(200), [3, 50, 51, 130]):
        metric.update_state(targets[piece], outputs[piece])
    assert float(metric.result()) == pytest.approx(expected, abs=2e-6)
    metric.reset_state()
    metric.update_state(targets[:40], outputs[:40])
    once = make()
    once.update_state(targets[:40], outputs[:40])
    assert float(metric.result()) == float(once.result())


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_right_on_several_replicas_with_unequal_batches(name):
    make, expected = METRICS[name]
    targets, outputs = data_of(name)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        metric = make()
        metric._state()
    cuts = [(0, 30, 37), (37, 130, 200)]  # replica 0 gets 30, then 93 examples; replica 1 gets 7, then 70

    def value(array, low, middle, high):
        pieces = [tf.constant(array[low:middle]), tf.constant(array[middle:high])]
        return strategy.experimental_distribute_values_from_function(lambda c: pieces[c.replica_id_in_sync_group])

    for cut in cuts:
        strategy.run(metric.update_state, args=(value(targets, *cut), value(outputs, *cut)))
    assert float(metric.result()) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", METRICS)
def test_weights_of_examples_count(name):
    make, _ = METRICS[name]
    targets, outputs = data_of(name)
    weights = np.arange(200) % 3 > 0
    weighted, plain = make(), make()
    weighted.update_state(targets, outputs, weights)
    plain.update_state(targets[weights], outputs[weights])
    assert float(weighted.result()) == pytest.approx(float(plain.result()), abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_comes_back_from_its_configuration(name):
    metric = METRICS[name][0]()
    again = keras.metrics.deserialize(keras.metrics.serialize(metric))
    targets, outputs = data_of(name)
    for copy in (metric, again):
        copy.update_state(targets, outputs)
    assert float(again.result()) == float(metric.result())


def test_r2_of_several_outputs_is_their_mean():
    targets, outputs = TARGETS.reshape(100, 2), OUTPUTS.reshape(100, 2)
    metric = metrics.R2(2)
    metric.update_state(targets, outputs)
    assert float(metric.result()) == pytest.approx(reference.r2_score(targets, outputs), abs=1e-5)


def test_bits_per_token_of_a_uniform_guess_is_the_log_of_the_vocabulary():
    metric = metrics.BitsPerToken()
    metric.update_state(np.zeros([3, 7], np.int32), np.zeros([3, 7, 256], np.float32))
    assert float(metric.result()) == pytest.approx(8.0, abs=1e-5)


def test_labels_of_pixels_are_measured_as_keras_measures_them():
    chance = np.random.default_rng(5)
    labels, logits = chance.integers(0, 4, (6, 5, 7)), chance.normal(size=(6, 5, 7, 4)).astype(np.float32)
    logits[..., 3] = -9  # of a class that occurs as a label alone the intersection is empty
    ours, other = metrics.MeanIoU(4), keras.metrics.MeanIoU(4, sparse_y_pred=False)
    for part in (slice(0, 1), slice(1, 6)):
        ours.update_state(labels[part], logits[part])
    other.update_state(labels, logits)
    np.testing.assert_allclose(ours.result(), other.result(), rtol=1e-6)
    wide = metrics.MeanIoU(9)  # classes that do not occur at all do not count
    wide.update_state(labels, np.concatenate([logits, np.full((6, 5, 7, 5), -9, np.float32)], axis=-1))
    np.testing.assert_allclose(wide.result(), other.result(), rtol=1e-6)

    each = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)(labels, logits)
    loss = losses.PixelCrossEntropy()
    np.testing.assert_allclose(loss.call(labels, logits), np.mean(each, axis=(1, 2)), rtol=1e-5)
    again = keras.losses.deserialize(keras.losses.serialize(losses.PixelCrossEntropy(0.1, (1.0, 2.0, 1.0, 3.0))))
    assert type(again) is losses.PixelCrossEntropy
    assert again.get_config()["class_weights"] == [1.0, 2.0, 1.0, 3.0]
    weighted = np.mean(np.array([1.0, 2.0, 1.0, 3.0])[labels] * each, axis=(1, 2))
    np.testing.assert_allclose(
        losses.PixelCrossEntropy(0.0, (1.0, 2.0, 1.0, 3.0)).call(labels, logits), weighted, rtol=1e-5
    )
