"""Tokens as text again, for people: by the vocabulary of a byte-level tokenizer, without its library."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for.

    Source: `bytes_to_unicode` of Radford et al., "Language models are unsupervised multitask learners", 2019.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def content_of(path: Path) -> dict[int, bytes] | None:
    """The bytes of each token, by a file of Hugging Face's tokenizers; None if it is not there or of another kind."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["decoder"]["type"] != "ByteLevel":
            return None
        letters = _byte_of_letter()
        content = {
            number: bytes(letters[letter] for letter in token)
            for token, number in facts["model"]["vocab"].items()
            if all(letter in letters for letter in token)
        }
        return content | {each["id"]: each["content"].encode() for each in facts["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def decoder_of(content: Mapping[int, bytes]) -> Callable[[Sequence[int]], str]:
    """The text of tokens, of which the bytes are known."""
    return lambda tokens: b"".join(content.get(int(token), b"") for token in tokens).decode(errors="replace")
