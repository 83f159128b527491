"""Trouble while training: spikes of the gradient that are left out, and losses that are not finite and gone back from.

Each is survived with the same bits by a run that is left alone and by one that ends in the middle and is started again.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, metrics, relative_difference_as_one_vector, weights, without_times

from trainers.input import load as data
from trainers.input.dataset import Split
from trainers.run import left_out, rewinds, training
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration, Diverged
from trainers.settings.rules import resolve

# Rows with two classes. `spike`: the place of two that are very large, alike and of each class, so that nobody learns
# them; `nan`: of one that is no number; `every`: so many rows have one of these.
MODULE = """
import json
import os
import pathlib
import signal
import threading
import time

import numpy as np


def end_chief(run_dir):
    # Once, as soon as the run has gone back: kill -9.
    told, facts = pathlib.Path(run_dir + ".ended"), pathlib.Path(run_dir) / "run.json"
    while not told.exists():
        if facts.exists() and '"rewinds"' in facts.read_text():
            told.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)


def data(spike: int = -1, nan: int = -1, every: int = 0, size: int = 320, end: str = ""):
    if end and json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 0:
        threading.Thread(target=end_chief, args=[end], daemon=True).start()
    chance = np.random.default_rng(0)
    rows = chance.normal(size=(size, 8)).astype("float32")
    classes = (rows.sum(axis=1) > 0).astype("int64")
    clean = rows[:32].copy(), classes[:32].copy()
    if spike >= 0:
        rows[spike : spike + 2] = 1000 * rows[spike]
        classes[spike : spike + 2] = 0, 1
    if nan >= 0:
        rows[nan] = np.nan
    if every:
        rows[::every] = np.nan
    return (rows, classes), clean
"""
COUNT = itertools.count()
FLAGS = {"model": "mlp", "batch_size": 16, "deterministic": True, "seed": 3, "log_every": 1, "eval_every": 0}
SPIKE = FLAGS | {"train_steps": 200, "checkpoint_every": 30, "skip_spikes": 10.0, "ema": 0.9}
# An epoch is 60 steps: the second one meets the row again.
NAN = FLAGS | {"train_steps": 100, "checkpoint_every": 8, "rewind": 3, "log_every": 4, "eval_every": 24}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """`rows(option=value, …)`: what `--dataset` is called that holds these rows."""
    name = f"troubled_rows_{next(COUNT)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda **options: ",".join([f"{name}:data", *(f"{k}={v}" for k, v in options.items())])
    sys.modules.pop(name, None)


class Killed(BaseException):
    """In place of a signal: nothing of the run sees to it."""


def ended(monkeypatch, run, place, name, function, condition, **flags):
    """Runs until `condition(training or rewinds)` holds after a method, and no further."""
    with monkeypatch.context() as patched:
        before = getattr(place, function)

        def ending(self, *arguments):
            before(self, *arguments)
            if condition(self):
                raise Killed

        patched.setattr(place, function, ending)
        with pytest.raises(Killed):
            run(name, **flags)


def assert_same_bits(run_dir, expected_dir):
    expected, found = weights(expected_dir), weights(run_dir)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []
    assert without_times(metrics(run_dir)) == without_times(metrics(expected_dir))


def train_lines(run_dir):
    return [line for line in metrics(run_dir) if line["split"] == "train"]


def facts_of(run_dir):
    return json.loads((run_dir / "run.json").read_text())


# Spikes --------------------------------------------------------------------------------------------------------------


def test_spikes_are_left_out_by_the_median_of_the_last_norms_and_nothing_else_is(run, rows, tmp_path, capfd):
    run(dataset=rows(spike=7), replicas=1, **SPIKE)
    lines = train_lines(tmp_path / "run")
    norms = np.array([line["gradient_norm"] for line in lines])
    expected = [
        t >= left_out.WINDOW and norms[t] >= 10 * np.median(norms[t - left_out.WINDOW : t]) for t in range(len(norms))
    ]
    assert 3 <= sum(expected) <= 8  # two rows in each epoch of 20 steps
    assert [line["skipped_spikes"] for line in lines] == np.cumsum(expected).tolist()
    assert [line["update_norm"] == 0 for line in lines] == expected
    assert facts_of(tmp_path / "run")["skipped_spikes"] == sum(expected)
    assert (
        f"1 update was left out, {sum(expected)} in all: the norm of the gradient was 10 times"
        in capfd.readouterr().err
    )
    # Optimizers count what they did: the next rate is that of the update that was left out.
    rates = np.array([line["learning_rate"] for line in lines])
    assert (np.diff(rates) == 0)[left_out.WINDOW - 1 :].tolist() == expected[left_out.WINDOW :]


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_run_that_ends_after_a_spike_goes_on_to_the_same_bits(run, rows, tmp_path, monkeypatch, replicas):
    flags = SPIKE | {"dataset": rows(spike=7), "replicas": replicas}
    run("whole", **flags)
    first = next(line["step"] for line in train_lines(tmp_path / "whole") if line["skipped_spikes"])
    ended(monkeypatch, run, training.Training, "parts", "report", lambda self: self.step > first + 1, **flags)
    assert run("parts", **flags).step == 200
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")
    assert facts_of(tmp_path / "parts")["skipped_spikes"] == facts_of(tmp_path / "whole")["skipped_spikes"] >= 3


def test_the_same_updates_are_left_out_on_one_and_on_two_replicas(run, rows, tmp_path):
    for replicas in (1, 2):
        run(str(replicas), dataset=rows(spike=7), replicas=replicas, **SPIKE)
    one, two = (train_lines(tmp_path / name) for name in ("1", "2"))
    assert [line["skipped_spikes"] for line in one] == [line["skipped_spikes"] for line in two]
    assert one[-1]["skipped_spikes"] > 0
    assert relative_difference_as_one_vector(weights(tmp_path / "1"), weights(tmp_path / "2")) <= 1e-4


def test_float16_leaves_out_spikes_and_overflows_and_counts_each(run, rows, tmp_path):
    run(dataset=rows(spike=7), precision="float16", replicas=2, **SPIKE)
    lines, facts = train_lines(tmp_path / "run"), facts_of(tmp_path / "run")
    assert facts["skipped_spikes"] + facts["skipped_steps"] == sum(line["update_norm"] == 0 for line in lines) > 0


def test_norms_that_have_grown_for_good_are_no_spikes_for_ever():
    spikes = left_out.Spikes(10.0)
    found = [bool(spikes.found(tf.constant(norm))) for norm in [1.0] * 128 + [20.0] * 200 + [np.nan] + [0.5] * 3]
    assert sum(found) == 64 and found[128:192] == [True] * 64
    assert int(spikes.skipped) == 64 and np.isfinite(spikes.norms.numpy()).all()


def test_a_gradient_of_zero_makes_no_spike_of_every_other():
    spikes = left_out.Spikes(10.0)
    assert not any(bool(spikes.found(tf.constant(norm))) for norm in [0.0] * 128 + [1.0] * 64)


def test_a_factor_that_leaves_out_every_second_update_is_refused():
    with pytest.raises(BadConfiguration, match=r"--skip_spikes 0.5 would leave out every second.*above 1, e\.g\. 10"):
        resolve(Config(skip_spikes=0.5))


# Losses that are not finite ------------------------------------------------------------------------------------------


def stays_finite(run_dir):
    return all(np.isfinite(value).all() for value in weights(run_dir).values() if value.dtype.kind == "f")


@pytest.mark.parametrize(("form", "replicas"), [("resident", 1), ("resident", 2), ("by index", 2), ("stream", 1)])
def test_a_nan_is_gone_back_from_and_a_restart_ends_with_the_same_bits(
    run, rows, tmp_path, monkeypatch, capfd, replicas, form
):
    """Ended at once after the run has gone back, and a few steps later, between two checkpoints."""
    flags = NAN | {"dataset": rows(nan=70, size=960), "replicas": replicas}
    if form == "by index":
        flags["input"] = "stream"
    elif form == "stream":
        load = data.load

        def streamed(*arguments):
            dataset = load(*arguments)
            arrays = dataset.train.arrays
            split = Split(dataset.train.size, stream=lambda: tf.data.Dataset.from_tensor_slices(arrays))
            return dataclasses.replace(dataset, train=split)

        monkeypatch.setattr(data, "load", streamed)
    whole = run("whole", **flags)
    assert whole.step == 100 and whole.traces == 1
    assert "over the data since (1 of --rewind=3)" in capfd.readouterr().err
    times = facts_of(tmp_path / "whole")["rewinds"]
    assert len(times) == 2 and stays_finite(tmp_path / "whole")
    ahead = 0
    for each in times:
        assert each["to"] % 8 == 0 and 0 < each["at"] - each["to"] <= 8
        ahead += each["at"] - each["to"]
        assert each["ahead"] == ahead
    at = times[0]["to"]
    ended(monkeypatch, run, rewinds.Rewinds, "parts", "went_back", lambda self: True, **flags)
    ended(monkeypatch, run, training.Training, "parts", "report", lambda self: self.step > at + 9, **flags)
    ended(monkeypatch, run, rewinds.Rewinds, "parts", "went_back", lambda self: self.count == 2, **flags)
    assert run("parts", **flags).step == 100
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")
    assert facts_of(tmp_path / "parts")["rewinds"] == times


def test_a_restart_does_not_begin_to_count_anew(run, rows, tmp_path):
    flags = NAN | {"dataset": rows(every=200, size=960), "checkpoint_every": 1, "rewind": 2}
    for _ in range(2):
        with pytest.raises(Diverged, match="it has gone back 2 times; lower --learning_rate"):
            run(**flags)
        assert len(facts_of(tmp_path / "run")["rewinds"]) == 2
    assert run(**(flags | {"rewind": 100})).step == 100
    assert len(facts_of(tmp_path / "run")["rewinds"]) > 2 and stays_finite(tmp_path / "run")


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(run, rows):
    with pytest.raises(Diverged, match="the last good checkpoint is none"):
        run(dataset=rows(every=2), **(NAN | {"checkpoint_every": 0}))


def test_a_damaged_checkpoint_is_not_gone_back_to_and_the_data_go_on(run, rows, tmp_path, monkeypatch):
    """The one before is, and what run.json knows of the other does not count."""
    flags = NAN | {"dataset": rows(nan=70, size=960)}
    run("whole", **flags)
    times = facts_of(tmp_path / "whole")["rewinds"]
    ended(monkeypatch, run, rewinds.Rewinds, "parts", "went_back", lambda self: True, **flags)
    newest = tmp_path / "parts/checkpoints" / f"step-{times[0]['to']:010d}"
    (newest / "manifest.json").write_text("{}")
    assert run("parts", **flags).step == 100
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")
    assert facts_of(tmp_path / "parts")["rewinds"] == times


def test_tensorboard_forgets_what_is_trained_again(run, rows, tmp_path):
    """Histograms are written by the compiled loop, which holds the writer."""
    run(dataset=rows(nan=70, size=960), histogram_every=2, **NAN)
    files = sorted((tmp_path / "run/train").glob("events.out.tfevents.*"))
    steps, starts = [], []
    for path in files:
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            if event.HasField("session_log"):
                starts.append(event.step)
                steps = [step for step in steps if step < event.step]
            steps += [event.step for value in event.summary.value if value.tag == "loss"]
    assert starts[1:] == [each["to"] + 1 for each in facts_of(tmp_path / "run")["rewinds"]]
    assert steps == [line["step"] for line in train_lines(tmp_path / "run")]


# Several workers -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_workers_leave_out_and_go_back_alike_and_a_killed_chief_changes_no_bit(rows, tmp_path, data_dir):
    flags = ["--model=mlp", "--batch_size=16", "--train_steps=300", "--checkpoint_every=10", "--eval_every=100"]
    flags += ["--log_every=5", "--skip_spikes=10", "--rewind=4", "--deterministic", "--ema=0.9"]
    flags += [f"--data_dir={data_dir}", "--step_timeout=240"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for name in ("whole", "parts"):
        own = {"end": tmp_path / name} if name == "parts" else {}
        command = [sys.executable, str(ROOT / "launch/workers.py"), "--workers=2", "--restarts=1", "--", *flags]
        command += [f"--dataset={rows(spike=7, nan=700, size=2400, **own)}", f"--run_dir={tmp_path / name}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    whole, parts = (facts_of(tmp_path / name) for name in ("whole", "parts"))
    assert (whole["attempts"], parts["attempts"]) == (1, 2) and (tmp_path / "parts.ended").exists()
    assert parts["rewinds"] == whole["rewinds"] != []
    assert parts["skipped_spikes"] == whole["skipped_spikes"] > 0
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")
