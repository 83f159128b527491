"""`--mode=evaluate`: follows a run and evaluates each checkpoint as it comes, on devices of its own.

It reads `run_dir` and writes to `run_dir/evaluator/` alone. The trainer may then go without (`--eval_every=0`).
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from absl import logging

from trainers.input.batches import batches
from trainers.record import carriers, reading
from trainers.record.clock import Clock
from trainers.record.run_record import RunRecord
from trainers.record.state import State, assign
from trainers.run.faults import faults_named
from trainers.run.inner_loop import InnerLoop
from trainers.run.training import checkpoints_of
from trainers.settings.exit_codes import OK, PeerLost, Preempted
from trainers.show.progress import Progress
from trainers.show.summaries import Summaries
from trainers.world.signals import Preemption
from trainers.world.watchdog import Watchdog

FOLDER = carriers.EVALUATOR
_LOOK_SECONDS = 0.5


def follow(loop: InnerLoop, clock: Clock, watchdog: Watchdog) -> dict[str, Any]:
    """Evaluates the checkpoints of `config.run_dir`, oldest first, until the run has ended and none is left.

    Returns the last line.

    Raises:
      PeerLost: no new checkpoint came within `--startup_timeout`, and the run has not ended.
      Preempted: SIGTERM or SIGINT came.
    """
    run_dir = Path(loop.config.run_dir)
    record = RunRecord(dataclasses.replace(loop.config, run_dir=str(run_dir / FOLDER)), feed=watchdog.feed)
    with contextlib.closing(record), Preemption() as preemption:
        try:
            line = Follower(loop, record, clock, watchdog, preemption).run()
        except BaseException as error:
            record.end_by(error, clock.seconds)
            raise
        ended = reading.read_run(run_dir)
        reason = f"the run has ended with code {ended['exit_code']}: {ended['exit_reason']}"
        record.end(OK, reason, seconds=clock.seconds, final={"eval": line})
        return line


class Follower:
    """Evaluations of one run, continued after the last line that the record holds."""

    def __init__(self, loop: InnerLoop, record: RunRecord, clock: Clock, watchdog: Watchdog, preemption: Preemption):
        self.loop, self.config, self.run_dir = loop, loop.config, Path(loop.config.run_dir)
        self.record, self.clock, self.watchdog, self.preemption = record, clock, watchdog, preemption
        self.store = checkpoints_of(loop, self.run_dir)
        self.line = record.last("eval")
        self.done = self.line.get("step", -1)
        self.damaged: set[int] = set()
        self.came = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Evaluates until the run has ended. Returns the last line."""
        self.record.rewind_metrics(self.done)
        self.record.write(follows=carriers.shown(self.run_dir), replicas=self.loop.world.replicas)
        self.evaluate = self._evaluation()
        self.progress = Progress(max(self.done, 0), self.config.train_steps)
        self.summaries = Summaries(
            self.record.directory, max(self.done, 0), bounded=self.record.carried, splits=("eval",)
        )
        with contextlib.closing(self.progress), contextlib.closing(self.summaries):
            while True:
                step, ended = self.next_step()
                if self.preemption.requested:
                    raise Preempted(
                        f"{self.preemption.signal_name} came after the checkpoint of step {self.done}; the same "
                        "command continues"
                    )
                if step is None and ended:
                    return self.line
                if step is None:
                    self.wait()
                elif state := self.read(step):
                    self.tell(step, state)

    def _evaluation(self) -> Callable[[], tf.Tensor]:
        """A replica has as many examples at once as one of the run's: the whole batch may be too much for a device."""
        replicas = reading.read_run(self.run_dir).get("replicas", 1)
        share = max(self.config.batch_size // replicas // self.config.parts, 1)
        world = self.loop.world
        source = batches(world.strategy, self.loop.dataset.eval, share * world.replicas, None)
        source.start(0)
        self.source = source
        return self.loop.make_evaluation(source)

    def next_step(self) -> tuple[int | None, bool]:
        """The oldest checkpoint that is not evaluated yet, if there is one, and whether the run has ended."""
        # Read before the steps are listed: what a run writes last is there when run.json says that it has ended.
        facts = reading.read_run(self.run_dir)
        ended = reading.has_ended(facts, os.environ.get(reading.RUN_AFTER, ""))
        steps = self.store.steps()
        last = facts.get("step", -1) if ended else -1
        if last > self.done and reading.has_checkpoint(self.run_dir, last):
            steps = sorted({*steps, last})
        return next((step for step in steps if step > self.done and step not in self.damaged), None), ended

    def wait(self) -> None:
        """Sleeps a moment.

        Raises:
          PeerLost: no checkpoint came for too long.
        """
        if time.monotonic() - self.came > self.config.startup_timeout:
            raise PeerLost(
                f"no checkpoint after step {max(self.done, 0)} came to {carriers.shown(self.run_dir)} within "
                f"--startup_timeout {self.config.startup_timeout:g} s; start it again when the run goes on"
            )
        self.watchdog.feed("waiting for a checkpoint")
        time.sleep(_LOOK_SECONDS)

    def read(self, step: int) -> State | None:
        """The values of a checkpoint, or None if it cannot be read."""
        self.watchdog.feed(f"the evaluation of step {step}")
        try:
            return self.store.read(step, self.watchdog.feed)
        except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
            # Another process owns them: it may have removed this one just now, or will set it aside.
            if self.store.path(step).exists():
                self.damaged.add(step)
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logging.warning("checkpoint %s cannot be read and is skipped: %s", self.store.path(step), reason)
            return None

    def tell(self, step: int, state: State) -> None:
        """Evaluates the values of a step and writes the line."""
        steps = -(-self.source.size // self.source.batch_size)
        with (
            self.clock.phase("evaluate"),
            evaluated_as(self.loop, state),
            faults_named(self.source, 0, steps, self.watchdog),
        ):
            values = self.evaluate().numpy().tolist()
        line = dict(zip(self.loop.eval_names, values, strict=True))
        self.record.append_metrics([{"step": step, "split": "eval", **line}])
        self.record.sync_metrics()
        self.summaries.scalars("eval", step, line)
        self.summaries.flush()
        self.summaries.rotate()
        self.progress.advance(step)
        self.progress.metrics("eval", step, line)
        self.line, self.done, self.came = {"step": step, **line}, step, time.monotonic()


@contextlib.contextmanager
def evaluated_as(loop: InnerLoop, state: State) -> Iterator[None]:
    """Within the block the loop has the values of a checkpoint, as an evaluation takes them."""
    assign(loop.variables, {name: value for name, value in state.items() if not name.startswith("loop/")})
    with loop.evaluated():
        yield
