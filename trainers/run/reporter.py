"""Tells of a run wherever metrics are read: lines of metrics.jsonl, TensorBoard, the terminal."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from trainers.record.run_record import RunRecord
from trainers.run.inner_loop import InnerLoop
from trainers.run.left_out import SKIPPED
from trainers.run.windows import Columns
from trainers.show import graphs
from trainers.show.progress import Progress
from trainers.show.summaries import Summaries
from trainers.world import machine

# Share of the time from which on waiting for input is told.
WAIT_WORTH_A_LINE = 0.2
# Between two times that goodput is told.
_GOODPUT_SECONDS = 1.0


@contextlib.contextmanager
def only_warned(what: str) -> Iterator[None]:
    """Within the block an error is logged and no more: what is only shown must not end a run."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:300]
        logging.warning("%s: %s: %s", what, type(error).__name__, reason)


class Reporter:
    """What is written and shown of a run. Its methods may be called in the background; none reads what the loop moves.

    `flops`: of a step; `peak`: operations a second of a device at its best, or None.
    """

    def __init__(
        self,
        loop: InnerLoop,
        record: RunRecord,
        summaries: Summaries,
        progress: Progress,
        flops: int,
        peak: float | None,
    ):
        self.loop, self.record, self.summaries, self.progress = loop, record, summaries, progress
        self.flops, self.peak, self.columns = flops, peak, Columns(loop)
        self._reports, self._advised, self._goodput_told = 0, False, -_GOODPUT_SECONDS
        self._skipped = loop.final_facts().get(SKIPPED, 0)

    def lines(self, split: str, steps: Sequence[int], lines: Sequence[Mapping[str, float]]) -> None:
        """Lines of a split, one for each step."""
        self.record.append_metrics(
            [{"step": step, "split": split, **line} for step, line in zip(steps, lines, strict=True)]
        )
        for step, line in zip(steps, lines, strict=True):
            self.summaries.scalars(split, step, line)
            self.progress.metrics(split, step, line)

    def windows(self, rows: np.ndarray, rates: Sequence[float], spent: Mapping[str, float]) -> None:
        """The windows of a call that are logged: `rows [n, columns]`, steps a second of each, shares of the time."""
        lines = []
        for row, rate in zip(rows, rates, strict=True):
            line = self.columns.line(row)
            line |= {"steps_per_second": rate, "examples_per_second": rate * self.loop.config.batch_size}
            line |= {"model_flops_per_second": rate * self.flops}
            if self.peak:
                line |= {"utilization": rate * self.flops / self.peak / self.loop.world.replicas}
            lines.append(line | dict(spent))
        self.lines("train", [int(step) for step in self.columns.column(rows, "step")], lines)
        self._tell_goodput(int(self.columns.column(rows[-1], "step")))
        self._advise(spent.get("share_input", 0.0))
        if SKIPPED in self.columns.names:
            self._tell_spikes(*(int(self.columns.column(rows[-1], name)) for name in ("step", SKIPPED)))

    def _tell_goodput(self, step: int) -> None:
        """In TensorBoard: the parts of the wall time of all attempts, as shares of 1. At most once a second."""
        now, last = time.monotonic(), step >= self.loop.config.train_steps
        if self.record.goodput and self.record.writes and (last or now - self._goodput_told >= _GOODPUT_SECONDS):
            self._goodput_told = now
            shares = self.record.goodput.facts()["shares"]
            self.summaries.scalars("train", step, {f"goodput/{part}": share for part, share in shares.items()})

    def _tell_spikes(self, step: int, count: int) -> None:
        """Says it when updates were left out since it was said last. `count`: in the whole run."""
        more, self._skipped = count - self._skipped, count
        if more > 0:
            updates = "1 update was" if more == 1 else f"{more} updates were"
            self.progress.line(
                f"up to step {step}, {updates} left out, {count} in all: the norm of the gradient was "
                f"{self.loop.config.skip_spikes:g} times its median or more"
            )

    def _advise(self, waited: float) -> None:
        """Says once that input is what training waits for. The first report pays for the begin of reading."""
        self._reports += 1
        if self._advised or self._reports == 1 or waited < WAIT_WORTH_A_LINE:
            return
        self._advised = True
        self.progress.line(
            f"{waited:.0%} of the time is spent waiting for input, which {machine.cores()} CPU cores read and decode; "
            "use more cores, a smaller --image_size, or in another run --input=resident, if the data fits"
        )

    def introduction(self, step: int, forward: Mapping[str, tf.Graph], concrete: Any) -> None:
        """What TensorBoard shows of a run before its first update: what it is, and its graphs."""
        with only_warned("TensorBoard shows no graphs"):
            config = self.loop.config
            flags = {k: value for k, value in config.values(config.names("compared")).items() if value is not None}
            # The loss stands last; an evaluation may have none.
            metrics = dict.fromkeys((*self.loop.sums.names, *self.loop.eval_names))
            metrics["loss"] = metrics.pop("loss")
            self.summaries.hparams(step, flags, tuple(metrics), time.time())
            self.summaries.text("train", step, "run", facts_table(self.record.card()))
            self._graphs(forward, concrete)

    def _graphs(self, forward: Mapping[str, tf.Graph], concrete: Any) -> None:
        """The first model's forward pass by itself, those of further models under their names, then the step."""
        names = self.loop.layer_names
        (_, first), *others = [(k, graphs.clean(g.as_graph_def(add_shapes=True), names)) for k, g in forward.items()]
        self.summaries.graph(first)
        for name, graph in others:
            self.summaries.tagged_graph(name, graph)
        whole = graphs.step(concrete.graph, names)
        if whole is not None:
            self.summaries.tagged_graph("step of one replica", graphs.of_first_replica(whole))
            self.summaries.tagged_graph("step of all replicas", whole)


def facts_table(facts: Mapping[str, Any]) -> str:
    """A Markdown table of names and values."""
    rows = [f"| {name} | {str(value).replace('|', '¦')} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
