"""From a configuration to the end of a run: the workers meet, the loop is built, and training or evaluation begins."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from absl import logging

from trainers.input import load
from trainers.input.dataset import Dataset
from trainers.record import carriers, prometheus, reading
from trainers.record.beats import Beats
from trainers.record.clock import Clock
from trainers.record.run_record import RunRecord
from trainers.record.tracking import Tracking
from trainers.run import evaluator, parts, trained, workers
from trainers.run.hooks import Hooks
from trainers.run.inner_loop import InnerLoop
from trainers.run.plan import plan
from trainers.run.training import Summary, Training
from trainers.settings import options
from trainers.settings.config import Config
from trainers.settings.exit_codes import PeerLost, StoreLost
from trainers.settings.rules import check_batch, check_task, finds_parts, with_epochs
from trainers.show.progress import words
from trainers.world import cluster as clusters
from trainers.world import collectives, devices, process
from trainers.world.cluster import Cluster
from trainers.world.devices import World
from trainers.world.signals import Preemption
from trainers.world.watchdog import Watchdog

MakeLoop = Callable[[Config, World, Dataset], InnerLoop]


def train(config: Config, make_loop: MakeLoop, hooks: Hooks | None = None) -> Summary:
    """Runs or resumes the run that `config` (resolved) describes, with the loop that `make_loop` builds.

    Raises:
      BadConfiguration, Diverged, PeerLost, Preempted: see `trainers.settings.exit_codes`.
    """
    clock, hooks = Clock(), hooks or Hooks()
    clock.add("import", process.import_seconds)
    options.import_objects(config.chosen)
    cluster = clusters.from_environment(os.environ) if config.strategy == "multi_worker" else None
    if config.dry_run and cluster:
        print(cluster.tf_config())
        return Summary(0, {}, {}, Path(config.run_dir), 0)
    chief = cluster is None or cluster.index == 0
    with carriers.sources(config), carriers.carried(config, chief) as carried:
        if carried is not config:
            carried.check_files()
        return run(carried, cluster, make_loop, clock, hooks)


def run(config: Config, cluster: Cluster | None, make_loop: MakeLoop, clock: Clock, hooks: Hooks) -> Summary:
    """What `train` does, once the run lies in a folder of this machine."""
    if cluster and config.mode == "train" and (summary := complete_already(config)):
        return summary
    with Watchdog(config.step_timeout) as watchdog:
        with clock.phase("build"):
            loop = build(config, cluster, make_loop, hooks, watchdog, clock)
        if config.dry_run:
            print(plan(loop))
            return Summary(0, {}, {}, Path(config.run_dir), 0)
        if config.mode == "evaluate":
            before = reading.read_run(Path(config.run_dir)).get(reading.SOURCES, {})
            options.warn_of_changes(before, config.chosen, f"--run_dir {carriers.shown(config.run_dir)}")
            line = evaluator.follow(loop, clock, watchdog)
            return Summary(line.get("step", 0), {}, line, Path(config.run_dir) / evaluator.FOLDER, 0)
        world = loop.world
        record = RunRecord(loop.config, world.chief, watchdog.feed, clock)
        meter = collectives.meter_of(world.strategy)
        index, sums = cluster.index if cluster else 0, (lambda: meter.read()[:2]) if meter else None
        beats = Beats(record, watchdog, index, world.workers, sums)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(record))
            preemption = stack.enter_context(Preemption())
            served = prometheus.served(record, config.metrics_port, beats.ear)
            for context in (beats, served, Tracking(record, watchdog)):
                stack.enter_context(context)
            stack.enter_context(recorded_end(record, clock, cluster, beats))
            return Training(loop, record, clock, preemption, watchdog, hooks).run()


def complete_already(config: Config) -> Summary | None:
    """The summary of a run of several workers that is complete. The others may have gone, and will not come to meet."""
    facts, run_dir = reading.completed(config), Path(config.run_dir)
    if not facts or not reading.has_checkpoint(run_dir, facts["step"]):
        return None
    final = {split: reading.numbers(line) for split, line in facts["final"].items()}
    process.say(f"complete already: {words(final['eval'])}  in {carriers.shown(run_dir)}")
    return Summary(facts["step"], final["train"], final["eval"], run_dir, 0)


def build(
    config: Config,
    cluster: Cluster | None,
    make_loop: MakeLoop,
    hooks: Hooks,
    watchdog: Watchdog,
    clock: Clock,
) -> InnerLoop:
    """Meets the other workers, starts the strategy, loads the data and builds the loop."""
    allowed = config.startup_timeout + config.step_timeout
    watchdog.feed("meeting the other workers", allowed)
    with clock.phase("peers" if cluster else "build"):
        world = devices.set_up(config, cluster, process.say)
    if config.mode == "train":
        check_batch(config, world.replicas)
    if load.lies_elsewhere(config) or trained.lie_elsewhere(config):
        workers.together(world, lambda feed: bring(config, world, feed), watchdog.feed)
    watchdog.feed("loading the data and building the model", allowed)
    dataset = load.load_for(config)
    config = with_epochs(config, dataset.train.size, reading.begun_with(config))
    check_task(config, dataset.spec.task)
    with options.one_line():
        loop = make_loop(dataclasses.replace(config, accumulate=1) if finds_parts(config) else config, world, dataset)
        if finds_parts(config):
            parts.settle(loop, watchdog)
    with world.strategy.scope():
        for suspect in loop.suspects() if world.replicas > 1 else ():  # on one replica they compute what they say
            logging.warning("%s", suspect)
        hooks.built(loop)
    return loop


def bring(config: Config, world: World, feed: Callable[[str], None]) -> None:
    """Brings what flags name in object stores: data to each worker, a run's weights to the chief. Raises as they do."""
    load.bring_for(config, feed)
    trained.bring_for(config, world, feed)


@contextlib.contextmanager
def recorded_end(record: RunRecord, clock: Clock, cluster: Cluster | None, beats: Beats):  # noqa: ANN201
    """Writes to run.json how the block ends if it raises, and raises a lost peer as such."""
    try:
        yield
    except BaseException as error:
        ended = workers.peer_lost(error) if cluster else error
        missing = ""
        with contextlib.suppress(Exception):  # what is only told hides no end; a store that is lost is no worker
            if isinstance(ended, PeerLost) and not isinstance(ended, StoreLost):
                missing = beats.before_end(str(ended), others=False)
        record.end_by(ended, clock.seconds, f"; {missing}" if missing else "")
        raise ended from (None if ended is error else error)
