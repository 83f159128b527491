"""Where somebody may look into a run, or change it on purpose: `launch/prove.py` does both."""

from typing import Any

from trainers.run.inner_loop import InnerLoop, Source


class Hooks:
    """Called on the way. These do nothing."""

    def built(self, loop: InnerLoop) -> None:
        """After the loop is built and before a checkpoint is restored, inside the strategy's scope."""

    def source(self, loop: InnerLoop, source: Source) -> Source:
        """Returns the source of training batches that is used instead of `source`."""
        return source

    def traced(self, loop: InnerLoop, concrete: Any) -> None:
        """After the train call is traced, with its concrete function: a checkpoint is restored by then."""
