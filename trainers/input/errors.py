"""Errors of libraries as a reason that fits into a line for the user."""

import re

# Letters of a reason for a person.
_MOST = 200


def one_line(text: str) -> str:
    """The text as one line of at most 200 letters: its begin and its end."""
    text = " ".join(text.split())
    return text if len(text) <= _MOST else f"{text[: _MOST // 2 - 2]} … {text[1 - _MOST // 2 :]}"


def reason_of(error: Exception) -> str:
    """The first line of an error, without the names of operations that TensorFlow puts around its own words."""
    line = (str(getattr(error, "message", error)) or type(error).__name__).splitlines()[0]
    return re.sub(r"\{\{function_node .*?\}\}|\[Op:.*", "", line).strip()
