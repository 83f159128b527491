"""Names that users type, and what is said of one that nobody knows."""

import difflib
from collections.abc import Collection


def unknown(kind: str, name: str, choices: Collection[str]) -> str:
    """The line for a name that is in no registry: nearest names first, then all of them."""
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{kind} {name!r} is not known{hint}; choose one of: {', '.join(sorted(choices))}"
