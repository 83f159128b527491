"""From a description, as the metadata of an export has it, to how examples look."""

from collections.abc import Mapping
from typing import Any

from trainers.input.raw.form import Raw
from trainers.input.raw.images import RawImages
from trainers.input.raw.rows import RawRows
from trainers.input.raw.texts import RawText, RawTokens

_KINDS = {each.kind: each for each in (RawImages, RawRows, RawText, RawTokens)}


def raw_of(facts: Mapping[str, Any]) -> Raw:
    """What `facts()` has described."""
    return _KINDS[facts["kind"]].of_facts(facts)
