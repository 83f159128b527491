"""With a separator, what one document holds reaches no other: neither its logits, its loss nor its gradients."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import losses, metrics, tasks, transformers
from models.sums import Sums
from trainers.input.token_windows import preparation

VOCABULARY, LENGTH, SEPARATOR = 50, 24, 7
SPEC = tasks.DataSpec("language", (LENGTH,), "int32", VOCABULARY, separator=SEPARATOR, document_mask=True)
# Documents: tokens 0 … 9, 10 … 19, and what follows.
ENDS = [9, 19]


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model, _ = transformers.build_language_model(SPEC)
    model(tf.zeros([1, LENGTH], tf.int32))
    return model


def window(seed=0):
    tokens = np.random.default_rng(seed).integers(8, VOCABULARY, [1, LENGTH + 1]).astype(np.uint16)
    tokens[0, ENDS] = SEPARATOR
    return tokens


def replaced(tokens, part, seed=1):
    """The same window with other content of a part, without its separator."""
    other = tokens.copy()
    other[0, part] = window(seed)[0, part]
    other[0, ENDS] = SEPARATOR
    return other


def losses_of(model, tokens, part):
    """Logits, and the gradients of the loss of some positions."""
    inputs, targets = preparation(SEPARATOR)({"tokens": tokens})
    with tf.GradientTape() as tape:
        logits = model(inputs)
        loss = losses.TokenCrossEntropy().call(targets[:, part], logits[:, part])
    return logits.numpy()[0], [gradient.numpy() for gradient in tape.gradient(loss, model.trainable_variables)]


def test_another_document_in_the_window_changes_nothing(model):
    tokens = window()
    logits, gradients = losses_of(model, tokens, slice(10, 20))
    for changed in (slice(0, 9), slice(20, LENGTH), slice(20, LENGTH + 1)):
        other = replaced(tokens, changed)
        assert (other != tokens).any()
        new_logits, new_gradients = losses_of(model, other, slice(10, 20))
        np.testing.assert_array_equal(new_logits[10:20], logits[10:20])
        assert (new_logits != logits).any()
        for one, two in zip(gradients, new_gradients, strict=True):
            np.testing.assert_array_equal(one, two)


def test_within_a_document_what_comes_before_is_seen_and_what_comes_after_is_not(model):
    tokens = window()
    other = replaced(tokens, slice(12, 13))
    assert other[0, 12] != tokens[0, 12]
    logits, new = losses_of(model, tokens, slice(None))[0], losses_of(model, other, slice(None))[0]
    same = (logits == new).all(axis=1)
    assert same.tolist() == [not 12 <= position <= 19 for position in range(LENGTH)]


def test_without_the_mask_documents_are_seen(model):
    plain, _ = transformers.build_language_model(dataclasses.replace(SPEC, document_mask=False))
    plain(tf.zeros([1, LENGTH], tf.int32))
    plain.set_weights(model.get_weights())
    tokens = window()
    logits, new = (losses_of(plain, each, slice(None))[0] for each in (tokens, replaced(tokens, slice(0, 9))))
    assert (logits[10:20] != new[10:20]).any()
    one = np.where(tokens == SEPARATOR, 8, tokens)
    np.testing.assert_array_equal(losses_of(plain, one, slice(None))[0], losses_of(model, one, slice(None))[0])


def test_a_separator_predicts_nothing_and_each_other_token_counts_the_same(model):
    tokens = np.concatenate([window(), window(1), np.full([1, LENGTH + 1], SEPARATOR, np.uint16)])
    inputs, targets = preparation(SEPARATOR)({"tokens": tokens})
    predicted = tokens[:, :-1] != SEPARATOR
    np.testing.assert_array_equal(np.asarray(targets) >= 0, predicted)
    logits = model(inputs).numpy().astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, tokens[:, 1:, None].astype(int), -1)[..., 0] * predicted
    np.testing.assert_allclose(losses.TokenCrossEntropy().call(targets, logits), nats.sum(1) / LENGTH, rtol=1e-5)
    task = tasks.language(SPEC)
    sums = Sums(dict(task.metrics) | dict(task.eval_metrics))
    names = ("loss", "bits_per_token", "accuracy")
    assert sums.names == names
    values = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        vectors = [
            sums.of_examples(targets[p], logits[p], task.loss(targets[p], logits[p]), tf.ones([len(tokens[p])]))
            for p in parts
        ]
        values.append(sums.values(tf.cast(tf.add_n(vectors), tf.float64)).numpy())
    expected = [
        nats.sum() / LENGTH / 3,
        nats.sum() / np.log(2) / predicted.sum(),
        ((logits.argmax(-1) == tokens[:, 1:]) & predicted).sum() / predicted.sum(),
    ]
    np.testing.assert_allclose(values[0], expected, rtol=1e-5)
    np.testing.assert_allclose(values[1], expected, rtol=1e-5)


def test_metrics_of_a_window_without_a_target_are_0():
    targets, logits = -np.ones([1, 3], np.int32), np.zeros([1, 3, 5], np.float32)
    for metric in (metrics.BitsPerPredictedToken(), metrics.PredictedTokenAccuracy()):
        metric.update_state(targets, logits)
        assert float(metric.result()) == 0


def test_a_large_vocabulary_and_another_length():
    spec = tasks.DataSpec("language", (40,), "int32", 50_257, separator=50_256, document_mask=True)
    model, task = transformers.build_language_model(spec)
    tokens = np.array([[*range(0, 50_000, 1300), 50_256, 50_255]], np.uint16)
    inputs, targets = preparation(50_256)({"tokens": tokens})
    logits = model(inputs)
    assert logits.shape == (1, 40, 50_257)
    assert np.asarray(targets)[0, -1] == -1 and np.isfinite(task.loss(targets, logits)).all()
    assert model.get_config()["separator"] == 50_256
