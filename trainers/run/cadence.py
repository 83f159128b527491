"""When to do something: one predicate and the distance to its next yes."""


def due(step: int, every: int, last: int) -> bool:
    """Whether an action with cadence `every` is due after `step` updates; 0 = only at the `last` step."""
    return step == last or (every > 0 and step > 0 and step % every == 0)


def next_due(step: int, every: int, last: int) -> int:
    """The first step after `step` at which `due` holds."""
    return min(last, (step // every + 1) * every) if every > 0 else last
