"""Errors of libraries as a reason that fits into a line for the user."""

import re


def reason_of(error: Exception) -> str:
    """The first line of an error, without the names of operations that TensorFlow puts around its own words."""
    line = (str(getattr(error, "message", error)) or type(error).__name__).splitlines()[0]
    return re.sub(r"\{\{function_node .*?\}\}|\[Op:.*", "", line).strip()
