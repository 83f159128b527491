"""`--mode=evaluate`: follows a run and evaluates each checkpoint as it comes, on devices of its own.

It reads `run_dir` and writes to `run_dir/evaluator/` alone. The trainer may then go without (`--eval_every=0`).
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from absl import logging

from trainers.input import batches
from trainers.record import checkpoints
from trainers.record.run_record import RUN_AFTER, Clock, RunRecord, has_ended, read_json
from trainers.run.job import Job, averaged_weights
from trainers.settings.config import FIXED
from trainers.settings.exit_codes import CRASHED, OK, PeerLost, Preempted, RunEnded
from trainers.show.progress import Progress
from trainers.show.summaries import Summaries
from trainers.world.signals import Preemption
from trainers.world.watchdog import Watchdog

FOLDER = "evaluator"
_LOOK_SECONDS = 0.5


def follow(job: Job, make_evaluate: Callable, clock: Clock, watchdog: Watchdog, names: Sequence[str]) -> dict[str, Any]:
    """Evaluates the checkpoints of `config.run_dir`, oldest first, until the run has ended and none is left.

    `make_evaluate(job, source)` gives the compiled evaluation, whose values are `names`. Returns the last line.

    Raises:
      PeerLost: no new checkpoint came within `--startup_timeout`, and the run has not ended.
      Preempted: SIGTERM or SIGINT came.
    """
    config, run_dir = job.config, Path(job.config.run_dir)
    record = RunRecord(dataclasses.replace(config, run_dir=str(run_dir / FOLDER)))
    with contextlib.closing(record), Preemption() as preemption:
        try:
            line = _follow(job, make_evaluate, clock, watchdog, names, record, preemption)
        except BaseException as error:
            code = error.exit_code if isinstance(error, RunEnded) else CRASHED
            with contextlib.suppress(OSError):
                record.end(code, f"{type(error).__name__}: {error}", seconds=clock.seconds)
            raise
        ended = read_json(run_dir / "run.json")
        reason = f"the run has ended with code {ended['exit_code']}: {ended['exit_reason']}"
        record.end(OK, reason, seconds=clock.seconds, final={"eval": line})
        return line


def _follow(
    job: Job,
    make_evaluate: Callable,
    clock: Clock,
    watchdog: Watchdog,
    names: Sequence[str],
    record: RunRecord,
    preemption: Preemption,
) -> dict[str, Any]:
    config, run_dir = job.config, Path(job.config.run_dir)
    identity = {name: getattr(config, name) for name in FIXED} | {"data": job.dataset.fingerprint}
    store = checkpoints.Checkpoints(
        run_dir / "checkpoints", config.keep_checkpoints, identity, job.task.best_metric, job.task.best_mode
    )
    line = record.last("eval")
    done = line.get("step", -1)
    record.rewind_metrics(done)
    record.write(follows=str(run_dir), replicas=job.replicas)
    # A replica has as many examples at once as one of the run's: the whole batch may be too much for one device.
    share = max(config.batch_size // read_json(run_dir / "run.json").get("replicas", 1) // config.accumulate, 1)
    source = batches.batches(job.strategy, job.dataset.eval, share * job.replicas, None)
    source.start(0)
    evaluate = make_evaluate(job, source)
    damaged: set[int] = set()
    progress = Progress(max(done, 0), config.train_steps)
    summaries = Summaries(record.directory, max(done, 0), splits=("eval",))
    came = time.monotonic()
    with contextlib.closing(progress), contextlib.closing(summaries):
        while True:
            # Asked before the steps are looked up: what a run writes last is there when it says that it has ended.
            facts = read_json(run_dir / "run.json")
            ended = has_ended(facts, os.environ.get(RUN_AFTER, ""))
            steps = store.steps()
            last = facts.get("step", -1) if ended else -1
            if last > done and checkpoints.is_there(store.directory, last):
                steps = sorted({*steps, last})
            step = next((step for step in steps if step > done and step not in damaged), None)
            if preemption.requested:
                raise Preempted(
                    f"{preemption.signal_name} came after the checkpoint of step {done}; the same command continues"
                )
            if step is None:
                if ended:
                    return line
                if time.monotonic() - came > config.startup_timeout:
                    raise PeerLost(
                        f"no checkpoint after step {max(done, 0)} came to {store.directory} within --startup_timeout "
                        f"{config.startup_timeout:g} s; start it again when the run goes on"
                    )
                watchdog.feed("waiting for a checkpoint")
                time.sleep(_LOOK_SECONDS)
                continue
            watchdog.feed(f"the evaluation of step {step}")
            try:
                state = store.read(step)
            except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
                # Another process owns them: it may have removed this one just now, or will set it aside.
                if store.path(step).exists():
                    damaged.add(step)
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    logging.warning("checkpoint %s cannot be read and is skipped: %s", store.path(step), reason)
                continue
            with clock.phase("evaluate"), averaged_weights_of(job, state):
                values = evaluate().numpy().tolist()
            line = dict(zip(names, values, strict=True))
            record.append_metrics([{"step": step, "split": "eval", **line}])
            record.sync_metrics()
            summaries.scalars("eval", step, line)
            summaries.flush()
            progress.advance(step)
            progress.metrics("eval", step, line)
            line, done, came = {"step": step, **line}, step, time.monotonic()


@contextlib.contextmanager
def averaged_weights_of(job: Job, state: checkpoints.State) -> Iterator[None]:
    """Within the block the job has the values of a checkpoint, and its average weights if there are any."""
    state = {name: value for name, value in state.items() if not name.startswith("loop/")}
    checkpoints.assign(job.variables, state)
    with averaged_weights(job):
        yield
