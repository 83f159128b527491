"""Names that users type, and what is said of one that nobody knows."""

import difflib
from collections.abc import Collection


def nearest(name: str, choices: Collection[str], count: int = 1) -> list[str]:
    """The names most like `name`, in whatever case it is written."""
    written = {choice.lower(): choice for choice in choices}
    return [written[near] for near in difflib.get_close_matches(name.strip().lower(), written, n=count)]


def unknown(kind: str, name: str, choices: Collection[str]) -> str:
    """The line for a name that is in no registry: nearest names first, then all of them."""
    near = nearest(name, choices)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{kind} {name!r} is not known{hint}; choose one of: {', '.join(sorted(choices))}"
