"""`--accumulate=auto`: as few parts as fit into memory, found without a trace, kept for ever, and alike on all workers.

An update that does not fit allocates more than a machine can address: TensorFlow's own error, raised where it would be.
"""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, metrics, weights, without_times

from launch.workers import free_ports
from trainers import custom_loop
from trainers.record import reading
from trainers.run import parts, start
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import parts_allowed, resolve

# Batch normalization: what is computed depends on the number of parts.
BATCH_NORM = {"model": "resnet,blocks=1,width=4"}
FLAGS = {
    "model": "mlp",
    "batch_size": 32,
    "train_steps": 6,
    "deterministic": True,
    "seed": 3,
    "ema": 0.9,
}
FLAGS |= {"checkpoint_every": 3, "eval_every": 3, "log_every": 1, "replicas": 2}


def out_of_memory(x):
    """A scalar 0 whose computation needs 4 PiB, which no pass over a graph knows before."""
    number = ~tf.math.is_nan(tf.reduce_sum(tf.cast(x, tf.float32)))
    length = tf.cast(number, tf.int64) * 2**50
    return tf.reduce_max(tf.fill([length], 0.0))


class Heavy(custom_loop.Supervised):
    """A forward pass of more than 8 examples fits into no device; nor does the end of an update in `fails_late`."""

    most, fails_late = 8, 0

    def compared(self, targets, outputs, first):
        size = next(iter(tf.nest.flatten(outputs))).shape[0]
        if size > self.most:
            outputs = tf.nest.map_structure(lambda x: x + tf.cast(out_of_memory(x), x.dtype), outputs)
        return targets, outputs

    def replica_update(self, gradients):
        super().replica_update(gradients)
        if self.config.accumulate == self.fails_late:
            tf.debugging.assert_equal(out_of_memory(gradients[0]), 0.0)


class HeavyToTheEnd(Heavy):
    fails_late = 2


@pytest.fixture
def auto(data_dir, tmp_path, monkeypatch):
    """`auto(name, by=…, loop=…, memory=…, **flags)`: a run that tries, or estimates with so many bytes of memory."""

    def train(name="auto", by="Trial", loop=custom_loop.Supervised, memory=None, **flags):
        settings = FLAGS | {"accumulate": "auto", "data_dir": str(data_dir), "run_dir": str(tmp_path / name)}
        with monkeypatch.context() as patched:
            if by == "Trial":  # what devices other than CPUs have
                patched.setattr(parts, "Estimate", parts.Trial)
            if memory is not None:
                patched.setattr(parts.machine, "memory", lambda: memory)
            return start.train(resolve(Config(**(settings | flags))), loop)

    return train


def facts_of(run_dir):
    return json.loads((run_dir / "run.json").read_text())


def assert_same_bits(run_dir, expected_dir):
    expected, found = weights(expected_dir), weights(run_dir)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []
    assert without_times(metrics(run_dir)) == without_times(metrics(expected_dir))


@pytest.mark.parametrize("count", [1, 2, 12, 30, 64, 97, 360])
def test_the_smallest_number_that_fits_is_found_in_few_trials(count):
    choices = parts_allowed(resolve(Config(batch_size=count)), 1)
    assert choices == [n for n in range(1, count + 1) if count % n == 0]
    for least in [*choices, count + 1]:
        tried = []
        found = parts.smallest(choices, lambda n, least=least, tried=tried: tried.append(n) or n >= least)
        assert found == (least if least <= count else None)
        assert len(tried) == len(set(tried)) <= 1 + 2 * len(choices).bit_length() + 2
    assert parts_allowed(resolve(Config(batch_size=24, augment="mixup")), 2) == [1, 2, 3, 6]


# By trial -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        BATCH_NORM | {"batch_size": 64, "input": "stream", "augment": "flip"},
        {"batch_size": 64, "model": "transformer,depth=1,heads=2,width=16,dropout=0.2", "skip_spikes": 3.0},
        {"batch_size": 64, "precision": "float16", "optimizer": "sam"},
    ],
    ids=["streamed", "noise", "two gradients and a loss scale"],
)
def test_what_is_tried_leaves_no_trace_in_the_run(auto, tmp_path, flags):
    found = auto(loop=HeavyToTheEnd, **flags)
    auto("number", loop=custom_loop.Supervised, **(flags | {"accumulate": 4}))
    assert found.traces == 1
    assert_same_bits(tmp_path / "auto", tmp_path / "number")
    facts = facts_of(tmp_path / "auto")
    assert facts["flags"]["accumulate"] == 4 and "--accumulate=4" in (tmp_path / "auto/flags.txt").read_text()
    tried = {"1": False, "2": False, "4": True}
    assert facts["accumulate"] == {"parts": 4, "of_each_worker": [4], "by": "trial", "fitted": tried}


def test_a_replica_that_alone_has_no_memory_decides_for_all(auto, tmp_path):
    class OneIsSmall(custom_loop.Supervised):
        def compared(self, targets, outputs, first):
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            if int(tf.get_static_value(here)) == 1 and outputs.shape[0] > 8:
                outputs += out_of_memory(outputs)
            return targets, outputs

    auto(loop=OneIsSmall)
    assert facts_of(tmp_path / "auto")["flags"]["accumulate"] == 2


def test_any_other_error_of_a_trial_ends_the_run_as_it_would_have(auto):
    class Wrong(custom_loop.Supervised):
        def compared(self, targets, outputs, first):
            tf.debugging.assert_equal(tf.reduce_sum(outputs * 0), 1.0, "planted")
            return targets, outputs

    with pytest.raises(tf.errors.InvalidArgumentError, match="planted"):
        auto(loop=Wrong, jit="off")


def test_an_update_that_never_fits_is_refused_in_one_line(auto):
    class Huge(Heavy):
        most = 0

    with pytest.raises(BadConfiguration, match=r"even in 2 parts of 1 example \(.*\); pass --recompute") as error:
        auto(loop=Huge, batch_size=4)
    assert "\n" not in str(error.value)


# By the rule for CPUs -------------------------------------------------------------------------------------------------


@pytest.fixture
def estimate(auto):
    """`estimate(**flags)`: what run.json would say of how the number was found."""

    def dry(**flags):
        found = {}

        class Kept(custom_loop.Supervised):
            def describe(self):
                found.update(self.found["accumulate"])
                return super().describe()

        auto(by="rule", loop=Kept, dry_run=True, **flags)
        return found

    return dry


def test_the_rule_for_cpus_takes_as_few_parts_as_half_of_the_memory_holds(estimate):
    plain = estimate()
    assert plain["parts"] == 1 and plain["by"] == "estimate" and plain["fixed"] and plain["activations"]
    for least in (2, 4, 16):
        memory = 2 * (plain["fixed"] + plain["activations"] // least)
        for more in (0, plain["activations"] // least):
            assert estimate(memory=memory + more)["parts"] == least
    with pytest.raises(BadConfiguration, match=r"even in 16 parts .* above half of the 1 MiB"):
        estimate(memory=2**20)


def test_the_estimate_is_of_the_batch_and_knows_of_blocks_computed_again(estimate):
    small = {"model": "transformer,depth=4,heads=2,width=16"}
    cases = {"plain": {}, "one": {"replicas": 1}, "double": {"batch_size": 64}, "again": {"recompute": True}}
    found = {name: estimate(**(small | flags)) for name, flags in cases.items()}
    assert found["one"]["fixed"] * 2 == found["plain"]["fixed"]
    assert abs(found["one"]["activations"] / found["plain"]["activations"] - 1) < 0.02
    assert abs(found["double"]["activations"] / found["plain"]["activations"] - 2) < 0.02
    assert found["again"]["activations"] < 0.3 * found["plain"]["activations"]


def test_the_plan_tells_what_was_found(auto, capsys):
    auto(by="rule", dry_run=True)
    assert "= 2 × 16 (found by estimate)" in capsys.readouterr().out
    auto(loop=Heavy, dry_run=True)
    assert "= 2 × 16, each in 2 parts (found by trial)" in capsys.readouterr().out


def test_a_loop_without_gradients_of_is_told_on_a_cpu(auto):
    class Without(custom_loop.Supervised):
        def gradients_of(self, features, step, first):
            raise NotImplementedError

    with pytest.raises(BadConfiguration, match="no gradients_of, by which memory is estimated on a CPU; pass a number"):
        auto(by="rule", loop=Without)


# Afterwards -----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_number_that_it_has_found_wherever_it_goes_on(auto, tmp_path):
    for name, flags in {"plenty": {"memory": 2**40}, "one": {"replicas": 1, "accumulate": 2}}.items():
        auto(name, loop=Heavy, train_steps=3, schedule="constant")
        assert facts_of(tmp_path / name)["flags"]["accumulate"] == 2
        auto(name, by="rule", schedule="constant", **flags)
        facts = facts_of(tmp_path / name)
        assert facts["flags"]["accumulate"] == 2 and facts["accumulate"]["by"] == "trial" and facts["step"] == 6
    auto("straight", accumulate=2, schedule="constant")
    assert_same_bits(tmp_path / "plenty", tmp_path / "straight")
    with pytest.raises(BadConfiguration, match=r"--accumulate 4 differs from 2, with which"):
        auto("plenty", accumulate=4, schedule="constant")
    with pytest.raises(BadConfiguration, match="does not divide over 32 replicas × 2 parts|--replicas"):
        auto("plenty", replicas=32, schedule="constant", train_steps=9)


def test_a_run_whose_record_is_lost_goes_on_with_the_number_of_its_checkpoints(auto, tmp_path):
    auto(loop=Heavy, train_steps=3, schedule="constant")
    (tmp_path / "auto/run.json").unlink()
    auto(by="rule", schedule="constant")
    assert facts_of(tmp_path / "auto")["flags"]["accumulate"] == 2


def test_what_ended_before_its_first_step_is_found_anew(auto, tmp_path):
    class Nothing(Heavy):
        def check_traced(self):
            raise BadConfiguration("planted")

    with pytest.raises(BadConfiguration, match="planted"):
        auto(loop=Nothing)
    assert facts_of(tmp_path / "auto")["flags"]["accumulate"] == 2
    auto(by="rule")
    assert facts_of(tmp_path / "auto")["flags"]["accumulate"] == 1


def test_complete_runs_and_evaluators_take_the_run_s_number(auto, tmp_path, data_dir):
    auto(loop=Heavy)
    config = resolve(Config(**(FLAGS | {"accumulate": "auto", "run_dir": str(tmp_path / "auto")})))
    assert reading.completed(config)["step"] == 6
    followed = reading.config_of_run(dataclasses.replace(config, mode="evaluate"), ["run_dir", "accumulate"])
    assert followed.accumulate == 2
    auto(mode="evaluate", by="rule", accumulate=followed.accumulate)
    before, after = ([m for m in metrics(tmp_path / d) if m["split"] == "eval"] for d in ("auto", "auto/evaluator"))
    assert before[-1] == after[-1]


def test_other_values_are_refused_in_one_line(tmp_path):
    for value, words in {
        "many": "'many' is not a whole number, or auto",
        "0": "below 1",
        "1.5": "'1.5' is not",
    }.items():
        command = [sys.executable, str(ROOT / "trainers/custom_loop.py"), f"--accumulate={value}"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 2 and words in ended.stderr + ended.stdout
    with pytest.raises(BadConfiguration, match="--accumulate 'many' is no whole number; pass one, or auto"):
        resolve(Config(accumulate="many"))
    command = [sys.executable, str(ROOT / "launch/prove.py"), "--accumulate=auto"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 2 and "may find another number for each run" in ended.stderr + ended.stdout


PAGE = '''
"""A worker with less memory than the other."""
import json
import os
import sys

if __name__ == "__main__":
    from trainers.run.command import main

    main(__file__, __doc__)

import tensorflow as tf

from trainers import custom_loop
from trainers.run import parts, start

parts.Estimate = parts.Trial


class Small(custom_loop.Supervised):
    def compared(self, targets, outputs, first):
        if self.world.cluster.index == 1 and outputs.shape[0] > 4:
            length = tf.cast(~tf.math.is_nan(tf.reduce_sum(outputs)), tf.int64) * 2**50
            outputs += tf.reduce_max(tf.fill([length], 0.0))
        return targets, outputs


def train(config):
    return start.train(config, Small if config.accumulate == "auto" else custom_loop.Supervised)
'''


def test_workers_agree_on_what_the_smallest_of_them_needs(tmp_path, data_dir):
    (tmp_path / "small_worker.py").write_text(PAGE)
    for name, value in (("auto", "auto"), ("number", "4")):
        flags = [f"--{key}={value}" for key, value in (FLAGS | BATCH_NORM | {"replicas": 0}).items()]
        flags += [f"--data_dir={data_dir}", "--strategy=multi_worker", f"--run_dir={tmp_path / name}"]
        addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        members = []
        for index in range(2):
            place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            command = [sys.executable, str(ROOT / "trainers/run_loop.py"), "small_worker", *flags]
            members.append(
                subprocess.Popen(
                    [*command, f"--accumulate={value}"],
                    env=os.environ | {"TF_CONFIG": json.dumps(place), "PYTHONPATH": str(tmp_path)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        ended = [(member.communicate(timeout=300)[0], member.returncode) for member in members]
        assert [code for _, code in ended] == [0, 0], ended
    assert facts_of(tmp_path / "auto")["accumulate"]["of_each_worker"] == [1, 4]
    assert_same_bits(tmp_path / "auto", tmp_path / "number")
