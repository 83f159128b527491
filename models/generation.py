"""How a language model goes on: token after token, drawn from its logits, with what it has computed before kept."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from models.sampling import Sampling

Cache = Mapping[str, tf.Tensor]
# Tokens that are drawn in one call of the compiled loop.
AT_ONCE = 16


def drawn(sampling: Sampling, logits: tf.Tensor, number: Any) -> tf.Tensor:
    """Token number `number`: logits `[batch, vocabulary]` → int32 `[batch]`."""
    if not sampling.temperature:
        return tf.argmax(logits, axis=-1, output_type=tf.int32)
    # Logits below the largest, so that no small temperature makes several of them infinite.
    scores = (logits - tf.reduce_max(logits, axis=-1, keepdims=True)) / max(sampling.temperature, 1e-30)
    seed = tf.stack([tf.constant(sampling.seed, tf.int64), tf.cast(number, tf.int64)])
    # The largest of scores with Gumbel noise is drawn with the probabilities of their softmax.
    noise = -tf.math.log(-tf.math.log(tf.random.stateless_uniform(tf.shape(logits), seed, alg="philox")))
    if not sampling.top_k and sampling.top_p == 1:
        return tf.argmax(scores + noise, axis=-1, output_type=tf.int32)
    size = tf.shape(logits)[-1]
    best, tokens = tf.math.top_k(scores, tf.minimum(sampling.top_k, size) if sampling.top_k else size)
    likelier = tf.cumsum(tf.nn.softmax(best), axis=-1, exclusive=True)
    best = tf.where(likelier < sampling.top_p, best, -math.inf)
    place = tf.argmax(best + tf.gather(noise, tokens, batch_dims=1), axis=-1)
    return tf.gather(tokens, place, batch_dims=1)


@dataclasses.dataclass(frozen=True)
class Steps:
    """How a model reads tokens one after another.

    `step(tokens [batch, time], cache)` → logits of the token that follows, `[batch, vocabulary]`, and the cache that
    holds these tokens too. `specs`: of the cache's tensors, with the batch first and the number of tokens left open;
    `seen [batch, past]` are the tokens. `length`: the most tokens that the model sees at once.
    """

    step: Callable[[tf.Tensor, Cache], tuple[tf.Tensor, Cache]]
    specs: Mapping[str, tf.TensorSpec]
    length: int

    def empty(self) -> dict[str, tf.Tensor]:
        """The cache of no tokens, of a batch of 1."""
        shapes = {name: [1, *(size or 0 for size in spec.shape[1:])] for name, spec in self.specs.items()}
        return {name: tf.zeros(shapes[name], spec.dtype) for name, spec in self.specs.items()}


def with_cache(model: Any) -> Steps | None:
    """The steps of a model that keeps keys and values, as `models.transformers.LanguageModel` does; else None."""
    if not (hasattr(model, "cache_specs") and hasattr(model, "length")):
        return None
    return Steps(lambda tokens, cache: model(tokens, training=False, cache=cache), model.cache_specs(), model.length)


def without_cache(outputs: Callable[[tf.Tensor], Any], length: int) -> Steps:
    """The steps of a model that keeps nothing: each computes all tokens again.

    `outputs(tokens [batch, length])` → logits `[batch, length, vocabulary]`, or a tuple that begins with them, of which
    none depends on later tokens.
    """

    def step(tokens: tf.Tensor, cache: Cache) -> tuple[tf.Tensor, Cache]:
        seen = tf.concat([cache["seen"], tokens], axis=1)
        count = tf.shape(seen)[1]
        window = tf.ensure_shape(tf.pad(seen, [[0, 0], [0, length - count]]), [None, length])
        logits = outputs(window)
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        return tf.cast(logits[:, count - 1], tf.float32), {"seen": seen}

    return Steps(step, {"seen": tf.TensorSpec([None, None], tf.int32, "seen")}, length)


def check_prompt(prompt: Sequence[int], length: int, vocabulary: int) -> None:
    """Raises ValueError where a model cannot go on from a prompt: it is empty, too long, or holds what is no token."""
    if not len(prompt):
        raise ValueError("the prompt is empty; pass at least one token")
    if len(prompt) > length:
        raise ValueError(f"the prompt has {len(prompt)} tokens, and the model sees {length} at once; shorten it")
    for place, token in enumerate(prompt, 1):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"token {place} of the prompt is {token}, outside of the vocabulary of {vocabulary}; pass "
                f"tokens from 0 to {vocabulary - 1}"
            )


class Generation:
    """A compiled loop over the steps of a model.

    Where as many tokens are seen as the model can see at once, the earlier half of them is forgotten, and the later
    half read again: so each token is drawn in sight of half of the context at least, with a cache or without.
    """

    def __init__(self, steps: Steps, sampling: Sampling):
        self.steps, self.sampling = steps, sampling
        number, tokens = tf.TensorSpec([], tf.int32), tf.TensorSpec([1, None], tf.int32)
        logits, cache = tf.TensorSpec([1, None], tf.float32), dict(steps.specs)
        self._read = tf.function(steps.step, input_signature=[tokens, cache], autograph=False)
        self._draw = tf.function(self._one, input_signature=[logits, number], autograph=False)
        self._more = tf.function(self._several, input_signature=[logits, cache, number, number], autograph=False)

    def _one(self, logits: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        return drawn(self.sampling, logits, number)

    def _several(
        self, logits: tf.Tensor, cache: Cache, count: tf.Tensor, number: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, Cache]:
        """Draws `count` tokens from token number `number` on and reads each: these `[count]`, and as `Steps.step`."""

        def body(i: tf.Tensor, logits: tf.Tensor, cache: Cache, found: tf.TensorArray) -> tuple[Any, ...]:
            token = self._one(logits, number + i)
            logits, cache = self.steps.step(token[:, None], cache)
            return i + 1, logits, dict(cache), found.write(i, token[0])

        begin = (0, logits, dict(cache), tf.TensorArray(tf.int32, count, element_shape=[]))
        shapes = {name: spec.shape for name, spec in self.steps.specs.items()}
        invariants = (tf.TensorShape([]), tf.TensorShape([None, None]), shapes, tf.TensorShape(None))
        found = tf.while_loop(lambda i, *_: i < count, body, begin, invariants)
        return found[3].stack(), found[1], found[2]

    def compile(self) -> None:
        """Traces everything, so that the first token takes no longer than others."""
        logits, cache = self._read(tf.zeros([1, 1], tf.int32), self.steps.empty())
        self._more(logits, cache, 0, 0)

    def continued(self, prompt: Sequence[int], count: int) -> Iterator[list[int]]:
        """`count` tokens after the prompt, some at a time. The prompt must be one that `check_prompt` allows."""
        seen, done, length = list(prompt), 0, self.steps.length
        logits, cache = self._read(tf.constant([seen], tf.int32), self.steps.empty())
        while done < count:
            room = length - len(seen)
            if room:
                found, logits, cache = self._more(logits, cache, min(room, AT_ONCE, count - done), done)
                new = np.asarray(found).tolist()
                seen += new
            else:
                new = np.asarray(self._draw(logits, done)).tolist()
                seen = [*seen, *new][-max(length // 2, 1) :]
                logits, cache = self._read(tf.constant([seen], tf.int32), self.steps.empty())
            done += len(new)
            yield new
