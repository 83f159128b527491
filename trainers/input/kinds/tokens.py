"""Packed tokens, for language models: `tokens:PATH`, with `PATH.json` beside it that says what they are."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from models.names import unknown
from models.tasks import DataSpec
from trainers.input.byte_tokens import content_of, decoder_of
from trainers.input.dataset import Dataset, Request, fingerprint
from trainers.input.raw.texts import RawTokens
from trainers.input.token_windows import LEAST_WINDOWS, TokenFile, count_windows, preparation
from trainers.settings.exit_codes import BadConfiguration

DTYPES = ("uint16", "uint32")
# Tokens are int32 in a model.
_LARGEST_VOCABULARY = 2**31 - 1
_NUMBERS = ("vocabulary", "length", "separator")


@dataclasses.dataclass(frozen=True)
class Description:
    """What `PATH.json` says. `length`: tokens that a window sees. `separator`: the token that ends a document."""

    dtype: str
    vocabulary: int
    length: int
    separator: int | None = None


def load(request: Request) -> Dataset:
    """The tokens of a file in windows; the last tenth is for evaluation.

    Raises:
      BadConfiguration: the file or its description cannot be read, do not fit, or hold too little.
    """
    path = request.path
    if not request.argument or not path.is_file():
        raise BadConfiguration(f"--dataset {request.name}:{request.argument} is not a file; write tokens:PATH")
    facts = description_of(path)
    masked = request.document_mask
    if masked and facts.separator is None:
        raise BadConfiguration(
            f"--document_mask needs the token that ends a document; add separator to {beside(path, '.json')}"
        )
    file = _token_file(path, facts)
    splits = file.splits(request)
    identity = f"{request.name}\n{facts.vocabulary}\n{facts.separator}"
    if splits[0].records:
        identity += f"\n{facts.dtype}\n{facts.length}\nby index\n{file.sample()}"
    spec = DataSpec("language", (facts.length,), "int32", facts.vocabulary, (facts.length,))
    spec = dataclasses.replace(spec, separator=facts.separator, document_mask=masked)
    prepare = preparation(facts.separator if masked else None)
    content = content_of(beside(path, ".tokenizer.json"))
    pieces = tuple(content.get(number, b"") for number in range(facts.vocabulary)) if content else ()
    raw = RawTokens(facts.length, pieces, facts.vocabulary)
    dataset = Dataset(request.full_name, spec, *splits, fingerprint(identity, *splits), prepare, raw=raw)
    return dataclasses.replace(dataset, as_text=decoder_of(content)) if content else dataset


def beside(path: Path, suffix: str) -> Path:
    """`PATH` → `PATH` + suffix."""
    return path.with_name(path.name + suffix)


def description_of(path: Path) -> Description:
    """Reads `PATH.json`.

    Raises:
      BadConfiguration: it is not there, is not JSON, or says something that cannot be.
    """
    place = beside(path, ".json")
    try:
        facts = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfiguration(
            f'{place} cannot be read ({error.strerror}); write what the tokens are: {{"dtype": "uint16", '
            '"vocabulary": 50257, "length": 1024}'
        ) from None
    except ValueError as error:
        raise BadConfiguration(f"{place} is not JSON ({error}); write it again") from None
    if not isinstance(facts, dict):
        raise BadConfiguration(f"{place} is not a JSON object; write dtype, vocabulary and length into it")
    names = [field.name for field in dataclasses.fields(Description)]
    for name in facts:
        if name not in names:
            raise BadConfiguration(f"{place}: {unknown('the key', name, names)}")
    for name in names[:3]:
        if name not in facts:
            raise BadConfiguration(f"{place} has no {name!r}; add it")
    _check_values(place, facts)
    return Description(**facts)


def _check_values(place: Path, facts: dict[str, Any]) -> None:
    """Raises a BadConfiguration for the first value that cannot be."""
    if facts["dtype"] not in DTYPES:
        raise BadConfiguration(f"{place}: dtype is {facts['dtype']!r}; it must be one of: {', '.join(DTYPES)}")
    for name in _NUMBERS:
        value = facts.get(name)
        if name == "separator" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadConfiguration(f"{place}: {name} is {value!r}; it must be a whole number")
    largest = min(np.iinfo(facts["dtype"]).max + 1, _LARGEST_VOCABULARY)
    highest = {"vocabulary": largest, "length": _LARGEST_VOCABULARY, "separator": facts["vocabulary"] - 1}
    for name, least in (("vocabulary", 2), ("length", 1), ("separator", 0)):
        value = facts.get(name)
        if value is not None and not least <= value <= highest[name]:
            raise BadConfiguration(f"{place}: {name} is {value}; it must be from {least} to {highest[name]}")


def _token_file(path: Path, facts: Description) -> TokenFile:
    """The file as its description has it, if its size can be that."""
    dtype, num_bytes = np.dtype(facts.dtype), path.stat().st_size
    if num_bytes % dtype.itemsize:
        raise BadConfiguration(
            f"{path} has {num_bytes} bytes, which is not a multiple of the {dtype.itemsize} of a {dtype}; it is cut "
            f"off or of another dtype; pack it again, or correct {beside(path, '.json')}"
        )
    num_tokens = num_bytes // dtype.itemsize
    if count_windows(num_tokens, facts.length) < LEAST_WINDOWS:
        raise BadConfiguration(
            f"{path} holds {num_tokens} tokens; at least {LEAST_WINDOWS * facts.length + 1} are needed for windows of "
            f"{facts.length}; pack more text, or name a smaller length in {beside(path, '.json')}"
        )
    remedy = f"pack the file again, or correct {beside(path, '.json')}"
    return TokenFile(path, dtype, facts.vocabulary, facts.length, num_bytes, remedy)
