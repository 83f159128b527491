"""What a person sees while it trains: a bar with the time left on a terminal, plain lines otherwise."""

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import tqdm


class Line(NamedTuple):
    """What a plain line says: the step of how many, the split, and `name value …` as it stands there."""

    step: int
    total: int
    split: str
    text: str


_LINE = re.compile(r"step (\d+)/(\d+)  (train|eval) *  (.*)")


def line_of(split: str, step: int, total: int, values: Mapping[str, float]) -> str:
    """A plain line: `step 20/400  train  loss 2.265  accuracy 0.2344 …`."""
    return f"step {step}/{total}  {split:<5}  {words(values)}  {shares(values)}".rstrip()


def parse_line(text: str) -> Line | None:
    """What a line of a log says if `line_of` made it, whatever stands before it; else None."""
    match = _LINE.search(text)
    return Line(int(match[1]), int(match[2]), match[3], match[4]) if match else None


def words(values: Mapping[str, float]) -> str:
    """`name value` for each metric; what a line has no room for is left to metrics.jsonl."""
    shown = (name for name in values if not name.startswith("share_") and name != "model_flops_per_second")
    return "  ".join(f"{name} {values[name]:.4g}" for name in shown)


def shares(values: Mapping[str, float]) -> str:
    """What the time went into, the largest first: `compute 93 % evaluate 5 %`."""
    parts = sorted(((v, n.removeprefix("share_")) for n, v in values.items() if n.startswith("share_")), reverse=True)
    return " ".join(f"{name} {share:.0%}".replace("%", " %") for share, name in parts if share >= 0.005)


class Progress:
    """Progress over `total` steps from `first`. On a terminal a tqdm bar; else a line for each log or evaluation.

    `silent`: shows nothing; a worker that is not the chief has nothing to say that the chief does not.
    """

    def __init__(self, first: int, total: int, silent: bool = False):
        self.total, self.silent = total, silent
        self._bar = None
        if not silent and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, file=sys.stderr)

    def advance(self, step: int) -> None:
        """Moves to a step."""
        with self._shown():
            if self._bar is not None:
                self._bar.update(step - self._bar.n)

    def metrics(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of a split: those of training behind the bar, if there is one."""
        if split == "train" and self._bar is not None:
            with self._shown():
                self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {shares(values)}")
        else:
            self.line(line_of(split, step, self.total, values))

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        with self._shown():
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            elif not self.silent:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        with self._shown():
            if self._bar is not None:
                self._bar.close()

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """Within the block a terminal that has gone is no error; nothing more is shown on it."""
        try:
            yield
        except (OSError, ValueError):
            self._bar, self.silent = None, True
