"""How a language model goes on: with a cache as without, by the seed alone, and from no token that is not allowed."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import generation, tasks
from models.blocks import rotated
from models.generation import Generation, drawn, with_cache, without_cache
from models.sampling import Sampling

VOCABULARY, LENGTH, SEPARATOR = 50, 24, 7
KINDS = {
    "learned positions": ("transformer,depth=2,width=32", False),
    "documents": ("transformer,depth=2,width=32", True),
    "rotary positions": ("transformer,depth=2,positions=rotary,width=32", False),
    "rotary positions and documents": ("transformer,depth=2,heads=2,positions=rotary,width=32", True),
    "an output of its own, without biases": ("transformer,bias=false,depth=2,tied=false,width=32", False),
}
WAYS = [Sampling(0), Sampling(seed=3), Sampling(0.7, top_k=5), Sampling(1.5, top_p=0.8), Sampling(1.0, 10, 0.9)]


def made(kind):
    """A model with weights large enough that every token and position shows."""
    text, masked = KINDS[kind]
    keras.utils.set_random_seed(0)
    spec = tasks.DataSpec(
        "language", (LENGTH,), "int32", VOCABULARY, (LENGTH,), separator=SEPARATOR, document_mask=masked
    )
    model, _ = tasks.model_of(text, spec)
    model.build((1, LENGTH))
    for weight in model.weights:
        weight.assign_add(0.2 * tf.random.normal(weight.shape))
    return model


def tokens_of(steps, sampling, prompt, count):
    return list(itertools.chain(*Generation(steps, sampling).continued(prompt, count)))


def window(count=LENGTH, seed=0):
    tokens = np.random.default_rng(seed).integers(8, VOCABULARY, [2, count]).astype(np.int32)
    tokens[0, 9:11], tokens[1, 4] = SEPARATOR, SEPARATOR
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_logits_with_a_cache_are_those_of_the_whole(kind):
    model, tokens = made(kind), window()
    whole = model(tf.constant(tokens)).numpy()
    steps = with_cache(model)
    for cuts in ([1] * LENGTH, [5, 1, 1, 6, 1, 10], [LENGTH]):
        cache, at = {name: tf.repeat(value, 2, axis=0) for name, value in steps.empty().items()}, 0
        for count in cuts:
            logits, cache = steps.step(tf.constant(tokens[:, at : at + count]), cache)
            at += count
            np.testing.assert_allclose(logits, whole[:, at - 1], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(cache["seen"], tokens)
    for name, spec in steps.specs.items():
        assert spec.is_compatible_with(cache[name])


@pytest.mark.parametrize("kind", ["learned positions", "rotary positions and documents"])
def test_with_a_cache_a_model_goes_on_as_without_also_beyond_its_context(kind):
    model, prompt, sampling = made(kind), window()[0, :6].tolist(), Sampling(seed=3)
    steps = with_cache(model), without_cache(lambda tokens: model(tokens), LENGTH)
    found = [tokens_of(each, sampling, prompt, 40) for each in steps]
    assert found[0] == found[1] and len(found[0]) == 40 and len(set(found[0])) > 5
    # What it is drawn from: a window that loses its earlier half where it is full.
    seen = prompt
    for number, token in enumerate(found[0]):
        logits = model(tf.constant([seen], tf.int32))[:, -1]
        assert int(drawn(sampling, logits, number)[0]) == token
        seen = [*seen, token] if len(seen) < LENGTH else [*seen, token][-LENGTH // 2 :]


def test_the_seed_alone_decides_and_not_how_many_tokens_are_drawn_at_once(monkeypatch):
    steps = with_cache(made("rotary positions"))
    same = Generation(steps, Sampling(seed=5))
    first = list(itertools.chain(*same.continued([1, 2], 30)))
    assert tokens_of(steps, Sampling(seed=6), [1, 2], 30) != first
    monkeypatch.setattr(generation, "AT_ONCE", 4)
    assert list(itertools.chain(*same.continued([1, 2], 30))) == first


def test_a_full_prompt_is_seen_whole_and_a_context_of_one_token_suffices():
    model = made("learned positions")
    prompt = window()[1].tolist()
    first = next(Generation(with_cache(model), Sampling(0)).continued(prompt, 3))
    assert first == [int(np.argmax(model(tf.constant([prompt]))[0, -1]))]
    spec = tasks.DataSpec("language", (1,), "int32", VOCABULARY, (1,))
    short, _ = tasks.model_of("transformer,depth=1,width=8", spec)
    assert len(tokens_of(with_cache(short), Sampling(), [3], 5)) == 5


@pytest.mark.parametrize("sampling", WAYS, ids=str)
def test_tokens_are_drawn_with_their_probabilities(sampling):
    logits = tf.constant(np.random.default_rng(1).normal(scale=2, size=[1, 12]).astype(np.float32))
    numbers = tf.range(4000)
    tokens = tf.function(lambda: tf.map_fn(lambda n: drawn(sampling, logits, n)[0], numbers))().numpy()
    found = np.bincount(tokens, minlength=12) / len(tokens)
    values = logits.numpy()[0].astype(np.float64) / (sampling.temperature or 1e-9)
    order = np.argsort(-values)
    shares = np.exp(values - values.max())
    if sampling.top_k:
        shares[order[sampling.top_k :]] = 0
    shares /= shares.sum()
    fewest = int(np.searchsorted(np.cumsum(shares[order]), sampling.top_p - 1e-9)) + 1
    shares[order[fewest:]] = 0
    expected = shares / shares.sum()
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_the_smallest_temperature_and_top_p_are_the_most_likely_token():
    logits = tf.constant([[1.0, 90.0, 89.0, -3.0]])
    for sampling in (Sampling(1e-38), Sampling(top_p=1e-30), Sampling(top_k=1), Sampling(0)):
        assert [int(drawn(sampling, logits, n)[0]) for n in range(5)] == [1] * 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.5}, "temperature -0.5 is not a number from 0 on"),
        ({"temperature": float("nan")}, "temperature nan is not"),
        ({"top_k": -1}, r"top_k -1 is outside \[0, 2\^31\)"),
        ({"top_p": 0.0}, r"top_p 0 is outside \(0, 1\]"),
        ({"top_p": 1.5}, "top_p 1.5 is outside"),
        ({"seed": -1}, "seed -1 is outside"),
        ({"seed": 2**63}, "seed 9223372036854775808 is outside"),
    ],
)
def test_a_value_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * (LENGTH + 1), "the prompt has 25 tokens, and the model sees 24 at once"),
        ([1, VOCABULARY], "token 2 of the prompt is 50, outside of the vocabulary of 50"),
        ([-1], "token 1 of the prompt is -1, outside"),
    ],
)
def test_a_prompt_that_a_model_cannot_go_on_from_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        generation.check_prompt(prompt, LENGTH, VOCABULARY)
    generation.check_prompt([0, VOCABULARY - 1] * (LENGTH // 2), LENGTH, VOCABULARY)


def test_a_cache_is_held_in_the_precision_of_the_model():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = made("rotary positions")
    steps = with_cache(model)
    assert steps.empty()["keys_1"].dtype == tf.bfloat16
    assert len(tokens_of(steps, Sampling(seed=1), [1, 2, 3], 30)) == 30
    logits, _ = steps.step(tf.constant(window()[:1]), steps.empty())
    assert logits.dtype == tf.float32
    np.testing.assert_allclose(logits, model(tf.constant(window()[:1]))[:, -1], rtol=0.05, atol=0.3)


def test_a_rotary_vector_is_turned_as_complex_numbers_are_and_products_know_distances_alone():
    x = np.random.default_rng(2).normal(size=[2, 5, 8]).astype(np.float32)
    pairs = x[..., :4] + 1j * x[..., 4:]
    for first in (0, 3):
        angles = (first + np.arange(5))[:, None] * 10_000.0 ** -(np.arange(4) / 4)
        turned = pairs * np.exp(1j * angles)
        np.testing.assert_allclose(
            rotated(tf.constant(x), first), np.concatenate([turned.real, turned.imag], -1), atol=1e-5
        )
    near, far = (tf.matmul(rotated(x, first), rotated(x, first), transpose_b=True) for first in (0, 900))
    np.testing.assert_allclose(near, far, atol=2e-3)
    np.testing.assert_array_equal(rotated(tf.constant(x))[:, 0], x[:, 0])


def test_options_of_positions_that_cannot_be_are_one_line():
    spec = tasks.DataSpec("language", (8,), "int32", 50, (8,))
    with pytest.raises(ValueError, match="positions=rotary needs an even number; choose a multiple of 8"):
        tasks.model_of("transformer,positions=rotary,width=12", spec)
    with pytest.raises(ValueError, match="positions sincos is none of: learned, rotary"):
        tasks.model_of("transformer,positions=sincos", spec)


def test_rotary_positions_and_an_own_output_have_their_parameters():
    spec = tasks.DataSpec("language", (LENGTH,), "int32", VOCABULARY, (LENGTH,))
    counts = []
    for text in ("transformer", "transformer,positions=rotary", "transformer,tied=false"):
        model, _ = tasks.model_of(text, spec)
        model.build((1, LENGTH))
        counts.append(model.count_params())
    assert counts[0] - counts[1] == LENGTH * 96 and counts[2] - counts[0] == VOCABULARY * 96
