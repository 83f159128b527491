"""What a person sees while it trains: a bar with ETA on a terminal, plain lines otherwise."""

import sys
from collections.abc import Mapping

import tqdm


class Progress:
    """Progress over `total` steps from `first`. On a terminal a tqdm bar; else one line for each log or evaluation.

    `silent`: shows nothing; a worker that is not the chief has nothing to say that the chief does not.
    """

    def __init__(self, first: int, total: int, silent: bool = False):
        self.total, self.silent = total, silent
        self._bar = None
        if sys.stderr.isatty() and not silent:
            self._bar = tqdm.tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, file=sys.stderr)

    def advance(self, step: int) -> None:
        """Moves to a step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Shows training metrics."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.4f}")
        else:
            self.line(f"step {step}/{self.total}  train  {self.words(values)}")

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Shows evaluation metrics, on a line of their own."""
        self.line(f"step {step}/{self.total}  eval   {self.words(values)}")

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self.silent:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    @staticmethod
    def words(values: Mapping[str, float]) -> str:
        """`name value` for each metric."""
        return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
