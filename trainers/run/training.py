"""The outer loop, phase by phase: restore, build, advance, report, evaluate, save, draw, finish."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainers.input.batches import batches
from trainers.record import reading, state
from trainers.record.background import Background
from trainers.record.checkpoints import Checkpoints
from trainers.record.clock import Clock, Shares
from trainers.record.run_record import RunRecord
from trainers.run import driver, exported, workers
from trainers.run.cadence import due, next_due
from trainers.run.faults import faults_named, missing_gradients_named
from trainers.run.hooks import Hooks
from trainers.run.inner_loop import InnerLoop
from trainers.run.pace import Pace
from trainers.run.plan import plan
from trainers.run.reporter import Reporter, only_warned
from trainers.run.rewinds import Rewinds
from trainers.run.windows import Columns
from trainers.settings import paths
from trainers.settings.exit_codes import OK, BadConfiguration, Diverged, Preempted, RunDirRemoved
from trainers.show.profiles import Profiles
from trainers.show.progress import Progress, words
from trainers.show.summaries import Summaries
from trainers.world import devices, process
from trainers.world.signals import Preemption
from trainers.world.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `train` returns: the last step, the last metrics of each split, and where everything lies."""

    step: int
    train: dict[str, float]
    eval: dict[str, float]
    run_dir: Path
    traces: int


def checkpoints_of(loop: InnerLoop, run_dir: Path) -> Checkpoints:
    """The checkpoints of a run, which belong to the flags that decide its mathematics and to its data."""
    config = loop.config
    identity = paths.identity(config) | {"data": loop.dataset.fingerprint}
    complete = functools.partial(paths.completed, kind=type(config))
    return Checkpoints(run_dir, config.keep_checkpoints, identity, *loop.best, complete=complete)


class Training:
    """One attempt at a run, from its newest checkpoint to its last step or to what ends it before."""

    def __init__(
        self,
        loop: InnerLoop,
        record: RunRecord,
        clock: Clock,
        preemption: Preemption,
        watchdog: Watchdog,
        hooks: Hooks,
    ):
        self.loop, self.config, self.world = loop, loop.config, loop.world
        self.record, self.clock, self.preemption, self.watchdog, self.hooks = record, clock, preemption, watchdog, hooks
        self.store = checkpoints_of(loop, record.directory)
        self.columns, self.rewinds = Columns(loop), Rewinds(self.config.rewind, record, self.world)
        # Steps that are done, and the running sums of the window that they ended in.
        self.step, self.sums = 0, np.zeros([loop.sums.width], np.float64)
        self.read_variables: Callable[[], state.State] | None = None
        self.restored = ""  # what is said of it
        self.stopping = False

    def run(self) -> Summary:
        """All phases. Returns what the run ended with.

        Raises:
          BadConfiguration, Diverged, PeerLost, Preempted: see `trainers.settings.exit_codes`.
        """
        try:
            return self.phases()
        except (OSError, tf.errors.OpError, BadConfiguration) as error:
            if not self.record.is_gone():
                raise
            removed = f"--run_dir {self.record.directory} was removed while the run wrote to it"
            raise RunDirRemoved(f"{removed}; {self.kept_of_removed()}") from error

    def kept_of_removed(self) -> str:
        """Writes what is left of a run whose run_dir was removed, its state, to the same place. Returns the words."""
        if self.step == 0 or self.read_variables is None:
            return "no step was finished; the same command begins again"
        try:
            self.watchdog.feed(f"the checkpoint of step {self.step}")
            values = self.values()
            self.record.make_again()
            self.store.save(self.step, values)
        except (BadConfiguration, OSError, tf.errors.OpError) as error:
            return f"step {self.step} could not be saved there again ({str(error).splitlines()[0]}) and is lost"
        return (
            f"its metrics and older checkpoints are lost; the checkpoint of step {self.step} was written there again, "
            "and the same command continues from it"
        )

    def phases(self) -> Summary:
        """What `run` does, while run_dir is there."""
        self.restore()
        self.begin_record()
        if self.step >= self.config.train_steps:
            self.record.leave_goodput()
            return self.finish("complete already")
        self.build()
        with self.opened():
            self.stopping = self.asked_to_stop()
            while self.step < self.config.train_steps and not self.stopping:
                rows = self.advance()
                if rows is None:
                    continue
                self.report(rows)
                evaluation = self.evaluate()
                self.save(evaluation)
                self.draw()
            self.settle()
        self.wait_for_others()
        self.check_ended()
        return self.finish("complete")

    # Before the first update ------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Takes up the newest whole checkpoint, or begins."""
        with self.clock.phase("checkpoint"):
            if self.config.resume == "never" and self.store.steps():
                where = f"--run_dir {self.record.directory}"
                raise BadConfiguration(f"--resume=never and {where} holds a checkpoint; name another, or --resume=auto")
            began = time.monotonic()
            if self.take_checkpoint():
                self.restored = workers.resumed(self.world, self.step, time.monotonic() - began)
            else:
                self.record.facts.update(self.loop.begin())

    def take_checkpoint(self) -> bool:
        """Takes up the newest whole checkpoint, if there is one, and drops the metrics that came after it."""
        self.watchdog.feed("restoring a checkpoint", together=True)
        checkpoint = workers.restore(self.world, self.store, self.watchdog.feed)
        if checkpoint:
            self.step, values = checkpoint
            self.sums = values.pop("loop/sums")
            self.rewinds.take(self.step, values)
            state.assign(self.loop.variables, values)
        self.record.rewind_metrics(self.step)
        return checkpoint is not None

    def begin_record(self) -> None:
        """Writes flags.txt and the first run.json."""
        metric, mode = self.loop.best
        self.record.goodput.begin(self.step)
        self.record.facts.update(
            replicas=self.world.replicas,
            devices=list(self.world.strategy.extended.worker_devices),
            parameters=self.loop.num_parameters,
            data_fingerprint=self.loop.dataset.fingerprint,
            resumed_from=self.step if self.restored else None,
            best_metric=metric,
            best_mode=mode,
            **self.loop.found,
        )
        self.record.begin()

    def build(self) -> None:
        """Makes the sources of batches, also of evaluation in parts, and the compiled functions, and traces them."""
        config, loop, world = self.config, self.loop, self.world
        with self.clock.phase("build"):
            source = batches(
                world.strategy, loop.dataset.train, config.batch_size, config.seed, config.parts, config.views
            )
            source.start(self.step + self.rewinds.ahead)
            eval_source = batches(world.strategy, loop.dataset.eval, config.batch_size // config.parts, None)
            eval_source.start(0)
            self.source, self.eval_source = source, eval_source
            self.summaries = Summaries(self.record.directory, self.step, not world.chief, self.record.carried)
            train_call = driver.make_train_call(loop, self.hooks.source(loop, source), self.summaries)
            evaluation = loop.make_evaluation(eval_source)
            self.read_variables = state.reader(loop.variables)
        with self.clock.phase("trace"):
            self.watchdog.feed("tracing the train step", config.startup_timeout + config.step_timeout)
            # Both now: AutoGraph reads the loop's file, which may be edited while the run goes on.
            with missing_gradients_named():
                self.train_call = train_call.get_concrete_function()
            self.evaluation = evaluation.get_concrete_function()
            self.hooks.traced(loop, self.train_call)
            functions = self.train_call, self.evaluation
            state.check_complete(world.strategy, loop.variables, *functions, metrics=loop.metric_variables)
            loop.check_traced()
            self.forward = loop.forward_graphs()
            flops = self.record.facts["flops_per_step"] = loop.flops_of_step(self.forward)
        self.progress = Progress(self.step, config.train_steps, silent=not world.chief)
        peak = devices.peak_flops(config.precision)
        self.reporter = Reporter(loop, self.record, self.summaries, self.progress, flops, peak)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Within the block what runs beside the loop is open: progress, event files, the background, profiles."""
        if self.restored:
            self.progress.line(self.restored)
        self.progress.line(plan(self.loop))
        self.pace, self.shares = Pace(self.config.steps_per_call), Shares(self.clock)
        self.record.goodput.open()
        self.background, self.saved = Background(), 0  # the number of the last checkpoint
        self.profiles = Profiles(
            self.config.profile_steps,
            self.record.directory / "train",
            self.summaries,
            single=self.world.cluster is None,
            chief=self.world.chief,
            say=self.progress.line,
        )
        if self.world.chief:
            self.background.do(self.reporter.introduction, self.step, self.forward, self.train_call)
        with contextlib.ExitStack() as stack:
            for resource in (self.progress, self.summaries, self.background, self.profiles):
                stack.enter_context(contextlib.closing(resource))
            yield

    def asked_to_stop(self) -> bool:
        """Whether to stop before the first call. Several workers meet here, and agree on it in their first call."""
        if self.world.cluster:
            return bool(workers.from_chief(self.world, 0))
        return self.preemption.requested

    # A call, and what is due after it ---------------------------------------------------------------------------

    def next_stop(self) -> int:
        """Where the next call ends: at the next thing to do, or after about a second."""
        config = self.config
        cadences = [config.eval_every, config.checkpoint_every, config.pictures_every]
        cadences += [config.histogram_every] if self.world.cluster else []
        stop = min(next_due(self.step, every, config.train_steps) for every in cadences)
        return self.profiles.stop_of(self.step, min(stop, self.step + self.pace.longest_call()))

    def advance(self) -> np.ndarray | None:
        """A compiled call. Returns its windows, `[n, columns]`, or None if the run went back.

        Raises:
          Diverged: a loss or a gradient is not finite, and the run does not go back.
        """
        config, stop = self.config, self.next_stop()
        with only_warned("no profile"):
            self.profiles.begin(self.step)
        self.pace.begin_call()
        with self.clock.phase("train"), self.profiles.mark(self.step):
            allowed = config.step_timeout + (config.startup_timeout if self.pace.calls == 0 else 0)
            self.watchdog.feed(f"steps {self.step} to {stop}", allowed, together=True)
            news = tf.constant([float(self.preemption.requested), self.pace.own_seconds], tf.float64)
            first, last, ahead = (tf.constant(n, tf.int64) for n in (self.step, stop, self.rewinds.ahead))
            self.background.start()
            with faults_named(self.source, self.step + self.rewinds.ahead, stop + self.rewinds.ahead, self.watchdog):
                results = self.train_call(first, last, tf.constant(self.sums), news, ahead)
            rows, self.sums, finite, (stops, agreed), waited = (result.numpy() for result in results)
            self.clock.move("train", "input_wait", waited)
            self.clock.move("train", "peers", self.world.waited())
        self.took = self.pace.end_call(self.step, int(self.columns.column(rows, "step")[-1]))
        if self.world.cluster is None:
            stops, agreed = self.preemption.requested, self.pace.own_seconds
        self.stopping, self.pace.seconds_per_step = stops > 0, agreed
        self.record.facts.update(self.pace.facts)
        if not finite:
            return self.diverge(rows[-1])
        with only_warned("no profile"):
            self.profiles.end(stop, stop - self.step, config.train_steps)
        self.progress.advance(stop)
        return rows

    def diverge(self, row: np.ndarray) -> None:
        """Goes back from a step that is not finite to the last checkpoint, or ends the run."""
        self.background.wait()
        rewinds, at = self.rewinds, int(self.columns.column(row, "step"))
        norms = ", ".join(f"{name.replace('_', ' ')} {self.columns.column(row, name)}" for name in self.loop.norm_names)
        what, position = f"the loss or a gradient is not finite at step {at} ({norms})", at + rewinds.ahead
        if rewinds.count < rewinds.most and self.take_checkpoint():
            rewinds.went_back(at, self.step, position - self.step)
            self.record.goodput.go_back(self.step)
            self.summaries.go_back(self.step)
            self.progress.advance(self.step)
            times = f"{rewinds.count} of --rewind={rewinds.most}"
            self.progress.line(f"{what}; back to the checkpoint of step {self.step}, over the data since ({times})")
            return
        good, times = self.store.steps(), f"it has gone back {rewinds.count} times; " if rewinds.count else ""
        raise Diverged(
            f"{what}; the last good checkpoint is {self.store.path(good[-1]) if good else 'none'}; {times}"
            "lower --learning_rate or set --clip_norm, and begin in another --run_dir"
        )

    def report(self, rows: np.ndarray) -> None:
        """Moves to the end of the call. What is due of its windows is written while the next call runs."""
        steps = self.columns.column(rows, "step")
        logged = [due(int(step), self.config.log_every, self.config.train_steps) for step in steps]
        rates = self.pace.rates(self.step, steps, logged, self.took)
        self.step = int(steps[-1])
        self.record.goodput.reach(self.step)
        if logged[-1]:
            self.sums = np.zeros_like(self.sums)
        if rates:
            self.background.do(self.reporter.windows, rows[logged], rates, self.shares.take())
        every = self.config.histogram_every
        if self.world.cluster and self.world.chief and every and self.step % every == 0:
            self.summaries.histograms(self.step, self.loop.weights)

    def evaluate(self) -> dict[str, float] | None:
        """The values of an evaluation, if one is due."""
        if not due(self.step, self.config.eval_every, self.config.train_steps):
            return None
        self.watchdog.feed(f"the evaluation at step {self.step}", together=True)
        self.background.start()
        steps = -(-self.eval_source.size // self.eval_source.batch_size)
        with (
            self.clock.phase("evaluate"),
            self.loop.evaluated(),
            faults_named(self.eval_source, 0, steps, self.watchdog),
        ):
            values = dict(zip(self.loop.eval_names, self.evaluation().numpy().tolist(), strict=True))
        self.background.do(self.reporter.lines, "eval", [self.step], [values])
        return values

    def save(self, evaluation: Mapping[str, float] | None) -> None:
        """Writes a checkpoint, while the next call runs, if one is due, if it is the best so far, or before the end."""
        is_due = due(self.step, self.config.checkpoint_every, self.config.train_steps) or self.stopping
        if not self.world.chief or not (is_due or evaluation):
            return
        with self.clock.phase("checkpoint"):
            self.watchdog.feed(f"the checkpoint of step {self.step}")
            # For the one before; what is told of the last call need not be there, unless event files are rotated.
            self.background.wait(None if self.summaries.bounded else self.saved)
            if is_due or self.store.improves(evaluation):
                values = self.values()
                self.record.goodput.mark(self.step, self.store.steps())
                self.summaries.rotate()
                self.saved = self.background.do(self.write_checkpoint, self.step, values, evaluation)

    def values(self) -> state.State:
        """What a checkpoint holds."""
        return self.read_variables() | {"loop/sums": self.sums} | self.rewinds.state()

    def write_checkpoint(self, step: int, values: state.State, evaluation: Mapping[str, float] | None) -> None:
        """In the background: what the checkpoint covers is on the disk before it. The last one always comes there."""
        self.record.check_there()
        to_disk = self.stopping or step >= self.config.train_steps or self.store.is_time_to_sync()
        if to_disk:
            self.record.sync_metrics()
        self.summaries.flush()
        self.store.save(step, values, evaluation, to_disk)

    def draw(self) -> None:
        """Pictures of what the model does, if they are due."""
        if self.world.chief and due(self.step, self.config.pictures_every, self.config.train_steps):
            self.watchdog.feed(f"the pictures at step {self.step}")
            with self.clock.phase("evaluate"), self.loop.evaluated(), only_warned("no pictures"):
                self.loop.show(self.summaries, self.step)

    # After the last update --------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Waits until everything is written."""
        with self.clock.phase("checkpoint"):
            self.watchdog.feed(f"the checkpoint of step {self.step}")
            self.background.wait()
        self.summaries.end_of_session(self.step, self.step >= self.config.train_steps)

    def wait_for_others(self) -> None:
        """Nobody leaves before the chief's last checkpoint is there. What each has read is told, where it reads."""
        own, read = self.source.examples_read(), None
        if self.world.cluster:
            self.watchdog.feed("waiting for the other workers to finish", together=True)
            done = lambda: self.world.chief or reading.has_checkpoint(self.record.directory, self.step)  # noqa: E731
            with self.clock.phase("peers"):
                read = workers.leave_together(self.world, done, own or 0)
        if own is not None:
            counts = [own] if read is None else [round(count) for count in read]
            self.record.facts.update(examples_read=counts, input_bytes=self.source.bytes_read())

    def check_ended(self) -> None:
        """Raises Preempted if the run was stopped before its last step."""
        if self.step >= self.config.train_steps:
            return
        if not self.preemption.requested:
            raise Preempted(f"another worker was told to stop at step {self.step}; the same command continues")
        grace = time.monotonic() - self.preemption.requested_at
        saved = f"the checkpoint of step {self.step} was there after {grace:.1f} s"
        saved = saved if self.step > 0 else "no step was finished"
        raise Preempted(f"{self.preemption.signal_name} came at step {self.step}; {saved}; the same command continues")

    def export(self, evaluation: Mapping[str, float]) -> None:
        """Writes what `--export` names, unless it is there."""
        if reading.is_exported(self.record.directory, self.config.export, self.step):
            return
        self.watchdog.feed("the export", self.config.startup_timeout + self.config.step_timeout)
        with self.clock.phase("export"):
            exported.write(self.loop, self.record, self.step, evaluation)

    def finish(self, reason: str) -> Summary:
        """Exports if asked, completes run.json and returns the summary."""
        last = {split: self.record.last(split) for split in ("train", "eval")}
        final = {split: {k: v for k, v in line.items() if k != "split"} for split, line in last.items()}
        if self.config.export and self.world.chief:
            self.export(final["eval"])
        facts = {"final": final, "seconds": self.clock.seconds, "step": self.step, "traces": self.loop.traces}
        facts |= {"peak_device_mib": devices.peak_memory_mib(), **self.loop.final_facts()}
        self.watchdog.feed("waiting for the chief's end", 2 * self.config.step_timeout)
        # Nobody leaves before the chief has done all: alone it could not be started again.
        done = lambda: self.world.chief or bool(reading.completed(self.config))  # noqa: E731
        workers.together(self.world, functools.partial(self.record.end, OK, reason, **facts), self.watchdog.feed, done)
        if self.world.chief:
            process.say(f"{reason}: {words(final['eval'])}  in {self.record.shown}")
            self.record.tell_goodput()
        return Summary(self.step, final["train"], final["eval"], self.record.directory, self.loop.traces)
