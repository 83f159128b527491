"""How a trained language model goes on from a prompt: told as it is drawn, with how fast that was."""

import codecs
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from models import generation
from models.generation import Cache, Generation, Steps
from models.sampling import Sampling
from trainers.input.raw.form import Raw
from trainers.record import carriers
from trainers.settings.exit_codes import OK, BadConfiguration
from trainers.show.tables import readable
from trainers.use import exports, predictor
from trainers.use.predictor import Predictor
from trainers.world import process


def generate(asked: Any, sampling: Sampling) -> int:
    """Prints how the model goes on from the prompt of `trainers/generate.py`. Returns the exit code.

    Raises:
      BadConfiguration: it is no language model, or cannot go on from this prompt.
    """
    with carriers.readable(asked.model_path) as folder:
        source = predictor.of(folder, asked)
    if source.kind != "text":
        raise BadConfiguration(f"{source.what}: only language models go on, and this answers with {source.kind}")
    prompt = prompt_of(source, asked.prompt)
    steps, how = steps_of(source)
    process.say(f"{source.what}: {how}")
    loop = Generation(steps, sampling)
    loop.compile()
    began, drawn = time.monotonic(), []
    show(source.raw, _until(loop.continued(prompt, asked.tokens), source.spec.separator, drawn))
    seconds = time.monotonic() - began
    end = ", where a document ends" if drawn and drawn[-1] == source.spec.separator else ""
    process.say(f"{len(drawn)} tokens in {readable(seconds)}, {len(drawn) / seconds:.4g} a second{end}")
    return OK


def prompt_of(source: Predictor, text: str) -> list[int]:
    """The tokens of a prompt: bytes of a text, or numbers with blanks between them.

    Raises:
      BadConfiguration: they are none, or the model cannot go on from them.
    """
    if source.raw.kind == "text":
        tokens = list(os.fsencode(text))
    else:
        words = text.split()
        if wrong := [word for word in words if not word.removeprefix("-").isdecimal()]:
            raise BadConfiguration(
                f"--prompt: {wrong[0]!r} is not a token; the model takes numbers of tokens with blanks between them"
            )
        tokens = [int(word[:20]) for word in words]  # longer ones are outside of every vocabulary too
    try:
        generation.check_prompt(tokens, source.raw.length, source.spec.num_classes)
    except ValueError as error:
        raise BadConfiguration(f"--prompt: {error}") from None
    return tokens


def steps_of(source: Predictor) -> tuple[Steps, str]:
    """How the model reads tokens one after another, and a word for people on how."""
    length = source.raw.length
    found = generation.with_cache(source.model) if source.model is not None else None
    if hasattr(source.exported, exports.STEP):
        found = _of_export(source.exported, length)
    if found is not None:
        return found, "with a cache"
    return generation.without_cache(source.outputs, length), "without a cache, so that each token takes a whole pass"


def _of_export(exported: Any, length: int) -> Steps:
    specs = dict(exported.signatures[exports.STEP].structured_input_signature[1])
    del specs["tokens"]

    def step(tokens: tf.Tensor, cache: Cache) -> tuple[tf.Tensor, Cache]:
        found = exported.generate_step(tokens, dict(cache))
        return found["logits"], {name: found[name] for name in specs}

    return Steps(step, specs, length)


def _until(parts: Iterable[list[int]], separator: int | None, drawn: list[int]) -> Iterator[list[int]]:
    """The tokens up to the separator, which is left out. All of them, and it, are added to `drawn`."""
    for part in parts:
        end = part.index(separator) if separator in part else len(part)
        drawn += part[: end + 1]
        yield part[:end]
        if end < len(part):
            return


def show(raw: Raw, parts: Iterable[list[int]]) -> None:
    """Prints tokens as they come, on standard output: as text where their bytes are known, else as numbers."""
    decode: Callable[[bytes], str] = codecs.getincrementaldecoder("utf-8")("replace").decode
    for part in parts:
        text = decode(b"".join(raw.pieces[token] for token in part)) if raw.pieces else "".join(f"{n} " for n in part)
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
