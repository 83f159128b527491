"""Workers as real processes: who is slower than the others is named, and who does not come."""

import contextlib
import json
import os
import re
import signal
import time

import pytest

from launch.workers import free_ports
from trainers.record import fleet, goodput, reading
from trainers.record.beats import Beats
from trainers.record.run_record import RunRecord
from trainers.settings.config import Config
from trainers.settings.rules import resolve
from trainers.world import host
from trainers.world.watchdog import Watchdog

# Each update takes 60 ms at least, on worker 1 as much longer as PLANTED says; or reading one of the 16 examples
# that it has of an update takes 100 ms.
PLANTED = """
import json
import os
import time

import keras
import numpy as np
import tensorflow as tf

from models import tasks
from trainers.input import array_records

kind, _, number = os.environ["PLANTED"].partition("=")
SLOW = json.loads(os.environ.get("TF_CONFIG", "{}"))["task"]["index"] == 1
read = array_records.ArrayRecords.read


def sleep(seconds):
    return tf.numpy_function(lambda: time.sleep(seconds) or 0.0, [], tf.double)


def slow_read(self, index):
    with tf.control_dependencies([tf.cond(index % 16 == 0, lambda: sleep(0.1), lambda: tf.zeros([], tf.double))]):
        return read(self, tf.identity(index))


if kind == "input" and SLOW:
    array_records.ArrayRecords.read = slow_read


class Net(keras.Model):
    def __init__(self, num_classes):
        super().__init__(name="net")
        self.flatten = keras.layers.Flatten(name="flatten")
        self.head = keras.layers.Dense(num_classes, name="logits", dtype="float32")

    def call(self, x, training=False):
        seconds = 0.06 * (1 + float(number) * SLOW) if training and number else 0.0
        with tf.control_dependencies([sleep(seconds)]):
            return self.head(self.flatten(tf.identity(x)))


def load():
    rows = np.random.default_rng(0).normal(size=(320, 8)).astype("float32")
    classes = (rows.sum(axis=1) > 0).astype("int64")
    return (rows, classes), (rows[:64], classes[:64])


def build(spec):
    return Net(spec.num_classes), tasks.classification(spec)
"""
# A worker whose main thread a signal makes sleep, while TensorFlow's own threads go on.
STUCK = "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: time.sleep(1e6))\n"
FLAGS = ("--strategy=multi_worker", "--batch_size=32", "--checkpoint_every=100", "--eval_every=0", "--log_every=100")


@pytest.fixture
def pair(trainer, tmp_path):
    """`pair(*flags, **environment)` starts two workers, with the modules above to be found."""
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    (tmp_path / "planted.py").write_text(PLANTED)

    def start(*flags, **environment):
        addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        members = []
        for index in range(2):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            env = {"TF_CONFIG": json.dumps(config), "PYTHONPATH": str(tmp_path)} | environment
            members.append(trainer(*FLAGS, f"--run_dir={tmp_path / 'run'}", *flags, env=env))
        return members

    return start


@pytest.mark.parametrize(("planted", "what"), [("compute=0.3", "compute"), ("input", "input")])
def test_a_worker_that_holds_the_others_up_is_named_with_what_it_waits_for(pair, tmp_path, planted, what):
    flags = (
        "--model=planted:build",
        "--dataset=planted:load",
        "--input=stream",
        "--train_steps=220",
    )
    results = [one.wait() for one in pair(*flags, PLANTED=planted)]
    assert [code for code, _ in results] == [0, 0], results
    told = re.findall(
        r"worker (\d) \(.*\) is (\d+)% slower than the median of the others over (\d+) steps: .*", results[0][1]
    )
    line = next(line for line in results[0][1].splitlines() if "slower than the median" in line)
    assert told[0][0] == "1" and int(told[0][1]) >= 20 and int(told[0][2]) >= 100, line
    assert line.endswith(f"it waits for {what}"), line
    assert "slower than" not in results[1][1], "the chief says it"
    other = reading.told_by(tmp_path / "run", 0)
    assert other["pace"]["peers"] > 0.01, "its wait is not its own time"


def wait_for_step(run_dir, members, step):
    until = time.monotonic() + 300
    while (reading.checkpoint_steps(run_dir) or [0])[-1] < step:
        assert all(one.process.poll() is None for one in members), [one.wait() for one in members]
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("fault", ["frozen", "stuck in Python"])
def test_before_a_worker_ends_that_waits_in_vain_the_one_that_did_not_come_is_named(pair, tmp_path, fault):
    run_dir = tmp_path / "run"
    members = pair("--model=mlp", "--train_steps=1000000", "--step_timeout=8")
    wait_for_step(run_dir, members, 200)
    time.sleep(2)  # stacks of an earlier moment would be told from those of now
    members[1].process.send_signal(signal.SIGSTOP if fault == "frozen" else signal.SIGUSR1)
    code, output = members[0].wait(120)
    if fault == "frozen":
        members[1].process.kill()
    else:
        assert members[1].wait(120)[0] == 75
    assert code == 75, output
    line = next(line for line in output.splitlines() if "did not come" in line)
    assert re.match(rf"worker 1 \(.*, process {members[1].process.pid}\) did not come: ", line), line
    own = reading.stacks_file(run_dir, 0).read_text()
    assert (own.startswith("worker 0 (") and "Thread 0x" in own) or "Current thread 0x" in own
    if fault == "frozen":
        assert "stopped (SIGSTOP), and cannot write its stacks; last heard of" in line
        return
    assert "steps " in line and str(reading.stacks_file(run_dir, 1)) in line
    stacks = reading.stacks_file(run_dir, 1).read_text()
    assert stacks.startswith("worker 1 (") and 'sitecustomize.py", line 2' in stacks
    assert "waiting in sum" in own.splitlines()[0] and "in no sum over workers" in stacks.splitlines()[0]
    assert reading.read_json(run_dir / "workers/hang.json")["line"] == line


def test_a_process_alone_that_stands_still_leaves_its_stacks_and_the_reason_in_run_dir(trainer, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    run_dir = tmp_path / "run"
    flags = ("--model=mlp", *FLAGS[1:], "--train_steps=1000000", "--step_timeout=5", f"--run_dir={run_dir}")
    one = trainer(*flags, env={"PYTHONPATH": str(tmp_path)})
    wait_for_step(run_dir, [one], 200)
    one.process.send_signal(signal.SIGUSR1)
    code, output = one.wait(120)
    assert code == 75 and "did not come" not in output, output
    assert 'sitecustomize.py", line 2' in reading.stacks_file(run_dir, 0).read_text()
    (attempt,) = goodput.of_run(run_dir)["attempts"]
    assert attempt["code"] == 75 and attempt["reason"].startswith("nothing has moved in: steps ")


def told(worker, compute, wait=0.0, **more):
    """What a worker tells, of this machine and this process."""
    pace = {"steps": 100, "compute": compute, "input": more.pop("input", 0.0), "peers": wait}
    known = {
        "host": "here",
        "pid": os.getpid(),
        "processes": host.processes(),
        "time": time.time(),
        "every": 1.0,
        "pace": pace,
    }
    known |= {
        fleet.UNHEARD: 0.0,
        "worker": worker,
        "met": 5,
        "meeting": True,
        "sums": [10, 9],
        "doing": "steps 0 to 9",
        "for_seconds": 3,
    }
    return known | more


def test_who_holds_nobody_up_is_not_named():
    assert fleet.straggler([told(0, 0.010)]) is None
    assert fleet.straggler([told(0, 0.010), told(1, 0.0119)]) is None
    assert fleet.straggler([told(0, 0.010), told(1, 0.0121)])[0] == 1
    assert fleet.straggler([told(0, 1e-4, 5e-3), told(1, 2e-4, 5e-3)]) is None, "that is noise"
    assert fleet.straggler([told(0, 0.01), told(1, 0.01), told(2, 0.01, input=0.01)])[1].endswith("it waits for input")


def test_a_gpu_that_is_held_back_is_the_reason():
    gpus = [{"gpu": 0, "throttled": []}, {"gpu": 3, "throttled": ["hardware thermal slowdown"]}]
    line = fleet.straggler([told(0, 0.01), told(1, 0.01), told(2, 0.02, gpus=gpus)])[1]
    assert line.endswith("it waits for compute: GPU 3 is throttled (hardware thermal slowdown)")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"sums": [9, 9]}, "it is in: steps 0 to 9 (for 3 s), in no sum over workers, 9 done; its stacks are in "),
        ({"met": 4, "sums": [12, 12]}, "it is in: "),
        ({"meeting": False, "doing": "the checkpoint of step 9"}, "it is in: the checkpoint of step 9"),
        (
            {"host": "elsewhere", "processes": "others", "time": time.time() + 3600},
            "it was not heard of, so it is frozen, cut off or gone, and cannot write its stacks; last heard of 6 s ago",
        ),
        ({"pid": 2**22 + 1}, "its process is gone"),
    ],
)
def test_who_is_behind_is_told_from_what_each_has_told(tmp_path, other, words):
    (tmp_path / "workers").mkdir()
    now = [0.0]
    ear = fleet.Ear(lambda: now[0])

    def who(workers=3):
        return fleet.who_did_not_come(tmp_path, workers, ear)

    def tell(*workers):
        for one in workers:
            reading.worker_file(tmp_path, one["worker"]).write_text(json.dumps(one))

    tell(told(0, 0.01), told(1, 0.01, **other), told(2, 0.01))
    who()
    if "processes" in other:  # the others go on to tell
        now[0] = 6.0
        tell(told(0, 0.01, for_seconds=9), told(2, 0.01, for_seconds=9))
    assert words in who() and who().startswith("worker 1 (")
    assert who(4) == "worker 3 did not come: it has told nothing in this run"
    tell(told(1, 0.01))
    assert who() == "", "all wait in the same place"


def test_who_is_silent_is_judged_by_one_clock(tmp_path):
    """A clock of another machine may be hours off; what counts is that a worker tells something new."""
    (tmp_path / "workers").mkdir()
    now = [0.0]
    ear = fleet.Ear(lambda: now[0])

    def states(*times):
        for number, at in enumerate(times):
            one = told(number, 0.01, time=at, host="elsewhere", processes="others")
            del one[fleet.UNHEARD]
            reading.worker_file(tmp_path, number).write_text(json.dumps(one))
        return [fleet.state_of(one) for one in fleet.told_by_all(tmp_path, ear)]

    assert states(0.0, 1e10) == ["", ""] and not ear.has_news(tmp_path, 0)
    now[0] = 4.0
    assert states(1.0, 1e10) == ["", ""] and ear.has_news(tmp_path, 0) and not ear.has_news(tmp_path, 1)
    now[0] = 6.0
    assert states(2.0, 1e10) == ["", "silent"]
    now[0] = 20.0
    assert states(0.5, 1e10 - 7200) == ["", ""], "that a clock was set is news too"


def test_a_demand_for_stacks_is_of_its_attempt_whatever_the_clocks_say(tmp_path):
    entry = {"began": 1e10, "until": 1e10, "first": 0, "step": 5, "seconds": {}, "marks": {}, "code": None}
    facts = {"attempts": 2, "ended": None, goodput.FACT: {"attempts": [entry]}}
    for attempt, code in ((2, 75), (1, None)):
        hang = {"id": "x", "time": 5.0 if attempt == 2 else 2e10, "attempt": attempt, "reason": "nothing has moved"}
        assert goodput.attempts_of(facts, {}, hang)[-1]["code"] == code


def test_a_driver_that_does_not_answer_delays_no_beat(plant, tmp_path):
    """A worker whose beats come late would be taken for a silent one."""
    plant("nvidia-smi", "sleep 60")
    config = resolve(Config(model="mlp", run_dir=str(tmp_path / "run")))
    with Watchdog(0) as watchdog, contextlib.closing(RunRecord(config)) as record, Beats(record, watchdog, 0, 1):
        record.begin()
        path, times = reading.worker_file(record.directory, 0), set()
        until = time.monotonic() + 30
        while len(times) < 3:
            assert time.monotonic() < until, times
            times.add(reading.told_by(record.directory, 0).get("time"))
            time.sleep(0.05)
        assert time.monotonic() < until - 22, "sooner than the driver would have been given up"
        assert path.exists() and reading.told_by(record.directory, 0).get("load") is not None
