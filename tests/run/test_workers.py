"""Several workers, as real processes: the same mathematics, and an end within a bound whatever happens to one of them.

Each fault is followed by a start of all workers, and the run must end with the bits of the uninterrupted one. The
figures are printed as a table at the end.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import (
    LONG_TESTS,
    ROOT,
    Trainer,
    largest_relative_difference,
    made_once,
    metrics,
    short,
    weights,
    without_times,
)

from launch.workers import free_ports
from trainers.record import reading

LONG = ("--model=mlp", "--train_steps=1500", "--batch_size=48", "--checkpoint_every=50", "--eval_every=500")
LONG += ("--log_every=50", "--deterministic", "--seed=3", "--step_timeout=240", "--startup_timeout=600", "--ema=0.9")
SGD = ("--model=mlp", "--optimizer=sgd", "--schedule=constant", "--learning_rate=0.05", "--warmup_steps=0")
SGD += ("--batch_size=48", "--log_every=0", "--eval_every=0", "--checkpoint_every=0", "--train_steps=50")
ROWS: list[tuple[str, ...]] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n\n| event | exit codes | seconds until all had ended | steps lost | bits equal after a new start |")
    print("|---|---|---|---|---|")
    for row in ROWS:
        print("| " + " | ".join(row) + " |")


@pytest.fixture
def gang(data_dir):
    """`gang(n, *flags)` starts n workers, or `only` some of them; all are killed at the end."""
    started = []

    def start(count, *flags, only=None, ports=None, env=None, indices=None):
        ports = ports or free_ports(count)
        addresses = [f"127.0.0.1:{port}" for port in ports]
        members = []
        for place in only if only is not None else range(count):
            index = indices[place] if indices else place
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            own = {"TF_CONFIG": json.dumps(config)} | (env or {})
            members.append(Trainer("--strategy=multi_worker", *flags, data_dir=data_dir, env=own))
        started.extend(members)
        return members

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def ends(members, timeout=300):
    """Exit codes and outputs of all, and the seconds until the last had ended."""
    began = time.monotonic()
    results = [one.wait(timeout) for one in members]
    return [code for code, _ in results], [output for _, output in results], time.monotonic() - began


def newest_step(run_dir):
    folder = run_dir / "checkpoints"
    steps = [int(path.name[5:]) for path in folder.glob("step-*") if path.suffix == ""] if folder.exists() else []
    return max(steps, default=0)


def wait_for_step(run_dir, members, step=1, seconds=300):
    deadline = time.monotonic() + seconds
    while newest_step(run_dir) < step:
        assert time.monotonic() < deadline, "no checkpoint came"
        assert all(one.process.poll() is None for one in members), ends(members)
        time.sleep(0.005)


def reached(run_dir):
    """The last step that any line of metrics tells of."""
    lines = reading.metric_lines(run_dir)
    return max((line["step"] for line in lines), default=0)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, data_dir):
    """The uninterrupted run of two workers."""

    def make(folder):
        command = [sys.executable, str(ROOT / "launch/workers.py"), "--workers=2", "--", *LONG]
        command += [f"--run_dir={folder / 'run'}", f"--data_dir={data_dir}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return made_once(tmp_path_factory, "two-workers", make) / "run"


def assert_same_bits(run_dir, expected):
    one, other = weights(expected), weights(run_dir)
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []
    assert without_times(metrics(run_dir)) == without_times(metrics(expected))


def finish(gang, run_dir, expected):
    codes, outputs, _ = ends(gang(2, *LONG, f"--run_dir={run_dir}"))
    assert codes == [0, 0], "\n".join(outputs)
    assert_same_bits(run_dir, expected)


FAULTS = {
    "kill -9 of the chief": ("KILL", [0], {75, 134, -6}),
    "kill -9 of worker 1": ("KILL", [1], {75, 134, -6}),
    "worker 1 frozen (SIGSTOP)": ("STOP", [1], {75}),
    "SIGTERM to worker 1": ("TERM", [1], {143}),
    "SIGTERM to the chief": ("TERM", [0], {143}),
    "SIGTERM to all": ("TERM", [0, 1], {143}),
    "worker 1 stuck in Python": ("USR1", [1], {75}),
}
# A worker whose main thread a signal makes sleep, while TensorFlow's own threads go on: nobody else would notice.
STUCK = "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: time.sleep(1e6))\n"


@pytest.mark.parametrize(
    "event",
    short(FAULTS, ("kill -9 of the chief", "SIGTERM to worker 1")),
)
def test_a_fault_ends_all_within_a_bound_and_loses_nothing(gang, tmp_path, expected, event):
    name, targets, allowed = FAULTS[event]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STUCK)
    run_dir, number = tmp_path / "run", getattr(signal, f"SIG{name}")
    bound = ("--step_timeout=40",) if name in ("STOP", "USR1") else ()
    members = gang(2, *LONG, *bound, f"--run_dir={run_dir}", env={"PYTHONPATH": str(tmp_path / "site")})
    wait_for_step(run_dir, members, 100)
    began = time.monotonic()
    for target in targets:
        members[target].process.send_signal(number)
    others = [one for i, one in enumerate(members) if i not in targets or name not in ("KILL", "STOP")]
    codes, outputs, _ = ends(others)
    seconds = time.monotonic() - began
    assert set(codes) <= allowed, "\n".join(outputs)
    if name == "STOP":
        members[1].process.send_signal(signal.SIGCONT)
        codes += ends([members[1]])[0]
        assert set(codes) <= {75, 134, -6}
    if name == "USR1":
        assert any("nothing has moved for" in output and "Thread 0x" in output for output in outputs)
    lost = reached(run_dir) - newest_step(run_dir)
    if name == "TERM":
        assert lost <= 0
        assert any("the same command continues" in output for output in outputs)
    assert seconds < 120
    finish(gang, run_dir, expected)
    ROWS.append((event, ", ".join(map(str, codes)), f"{seconds:.1f}", str(max(lost, 0)), "yes"))


@pytest.mark.parametrize("count", short((2, 4), (2,)))
def test_a_worker_reads_its_own_examples_alone(tmp_path, data_dir, count):
    """Of what one process reads, each of N workers reads an N-th, and all end with its weights."""
    flags = (*SGD, "--input=stream", "--augment=crop,mixup", "--train_steps=300")
    read = {}
    for number in (1, count):
        run_dir = tmp_path / str(number)
        strategy = () if number > 1 else ("--strategy=one_device",)
        if number > 1:
            code, output = workers(number, *flags, f"--run_dir={run_dir}", data_dir=data_dir)
        else:
            code, output = Trainer(*flags, *strategy, f"--run_dir={run_dir}", data_dir=data_dir).wait()
        assert code == 0, output
        facts = reading.read_run(run_dir)
        read[number] = facts["examples_read"]
        assert len(read[number]) == number and facts["input_bytes"] > 50 * read[number][0]
    assert abs(read[1][0] / (300 * 48) - 1) < 0.05
    for own in read[count]:
        assert abs(own * count / read[1][0] - 1) < 0.05
    assert largest_relative_difference(weights(tmp_path / "1"), weights(tmp_path / str(count))) < 1e-4


@pytest.mark.long
def test_killed_during_a_save_nothing_is_lost(gang, tmp_path, expected):
    run_dir = tmp_path / "run"
    members = gang(2, *LONG, f"--run_dir={run_dir}")
    wait_for_step(run_dir, members, 100)
    while not any((run_dir / "checkpoints").glob(".writing-step-*")) and members[0].process.poll() is None:
        pass
    began = time.monotonic()
    members[0].process.kill()
    codes, outputs, _ = ends(members[1:])
    assert set(codes) <= {75, 134, -6}, outputs
    seconds, lost = time.monotonic() - began, reached(run_dir) - newest_step(run_dir)
    finish(gang, run_dir, expected)
    ROWS.append(("kill -9 of the chief during a save", str(codes[0]), f"{seconds:.1f}", str(max(lost, 0)), "yes"))


@pytest.mark.long
def test_killed_during_start_the_others_end_and_a_worker_started_alone_waits_for_them(gang, tmp_path, expected):
    run_dir, ports = tmp_path / "run", free_ports(2)
    short = (*LONG, f"--run_dir={run_dir}", "--startup_timeout=15")
    chief, worker = gang(2, *short, ports=ports)
    time.sleep(1.0)
    began = time.monotonic()
    worker.process.kill()
    codes, outputs, _ = ends([chief])
    assert codes == [75], outputs
    assert "waited 15 s for worker 1" in outputs[0]
    ROWS.append(("kill -9 of worker 1 during start", "75", f"{time.monotonic() - began:.1f}", "0", "yes"))
    # Restarted alone, a worker waits for the chief, and trains when that one comes.
    run = (*LONG, f"--run_dir={run_dir}")
    chief, worker = gang(2, *run, ports=ports)
    wait_for_step(run_dir, [chief, worker], 100)
    worker.process.kill()
    began = time.monotonic()
    again = gang(2, *run, ports=ports, only=[1])[0]
    codes, outputs, _ = ends([chief])
    assert set(codes) <= {75, 134, -6}, outputs
    seconds = time.monotonic() - began
    lost = reached(run_dir) - newest_step(run_dir)
    chief = gang(2, *run, ports=ports, only=[0])[0]
    codes_after, outputs, _ = ends([chief, again])
    assert codes_after == [0, 0], "\n".join(outputs)
    assert_same_bits(run_dir, expected)
    ROWS.append(("worker 1 killed and restarted alone", str(codes[0]), f"{seconds:.1f}", str(max(lost, 0)), "yes"))


def test_lost_after_the_last_step_the_run_is_complete_and_nobody_waits_for_who_has_gone(gang, tmp_path):
    flags, run_dir = [*SGD, "--export", f"--run_dir={tmp_path / 'run'}"], tmp_path / "run"
    chief, worker = gang(2, *flags)
    wait_for_step(run_dir, [chief, worker], 50)
    # The chief exports now, and the worker waits for it, or both have ended already.
    worker.process.kill()
    began = time.monotonic()
    codes, outputs, _ = ends([chief])
    seconds = time.monotonic() - began
    if codes != [0]:
        # TensorFlow may end the chief before it could say that all was done: once more.
        assert set(codes) <= {75, 134, -6}, outputs
        assert ends(gang(2, *flags))[0] == [0, 0]
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["exit_code"] == 0 and (run_dir / "export").is_dir()
    for index in (1, 0):
        (code,), (output,), _ = ends(gang(2, *flags, only=[index]))
        assert code == 0 and "complete already: step 50" in output, output
    assert json.loads((run_dir / "run.json").read_text()) == facts
    # Asked for more, it meets the others again.
    (code,), (output,), _ = ends(gang(2, *flags, "--train_steps=60", "--startup_timeout=3", only=[1]))
    assert code == 75 and "waited 3 s" in output
    ROWS.append(("kill -9 of worker 1 after the last step", str(codes[0]), f"{seconds:.1f}", "0", "yes"))


# A worker that ends right after all have met, before TensorFlow connects to it.
LEAVES = """
import os, sys
sys.path.insert(0, os.getcwd())
from trainers.world import rendezvous
meet = rendezvous.meet
rendezvous.meet = lambda *arguments: (meet(*arguments), os._exit(1))
from trainers import custom_loop
from trainers.run.command import config_from
custom_loop.train(config_from(["worker", *sys.argv[1:]], ""))
"""


@pytest.mark.long
@pytest.mark.parametrize("leaving", [0, 1])
def test_a_worker_that_ends_right_after_the_meeting_ends_the_other(gang, tmp_path, data_dir, leaving):
    flags = (*SGD, f"--run_dir={tmp_path / 'run'}", "--startup_timeout=40", "--step_timeout=15")
    ports = free_ports(2)
    other = gang(2, *flags, ports=ports, only=[1 - leaving])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": leaving}})
    words = [sys.executable, "-c", LEAVES, "--strategy=multi_worker", f"--data_dir={data_dir}", *flags]
    left = subprocess.run(words, env=os.environ | {"TF_CONFIG": config}, cwd=ROOT, check=False, timeout=200)
    assert left.returncode == 1
    codes, outputs, seconds = ends(other)
    assert set(codes) <= {75, 134, -6}, outputs
    ROWS.append((f"worker {leaving} ended right after the meeting", str(codes[0]), f"{seconds:.1f}", "0", "–"))


@pytest.mark.long
def test_the_workers_own_traffic_does_not_go_through_a_proxy(tmp_path, data_dir, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    code, output = workers(2, *SGD, "--step_timeout=60", f"--run_dir={tmp_path / 'run'}", data_dir=data_dir)
    assert code == 0, output
    assert "retracing" not in output


@pytest.mark.long
def test_wrong_index_and_wrong_size_are_bad_configurations(gang, tmp_path):
    flags = (*LONG, f"--run_dir={tmp_path / 'run'}", "--startup_timeout=90")
    began = time.monotonic()
    codes, outputs, _ = ends(gang(2, *flags, indices=[1, 1]))
    assert 2 in codes and set(codes) <= {2, 75}, outputs
    assert any("is taken" in output and "second worker with this index" in output for output in outputs)
    ROWS.append(("two workers with index 1", ", ".join(map(str, codes)), f"{time.monotonic() - began:.1f}", "–", "–"))
    ports = free_ports(3)
    began = time.monotonic()
    two, three = gang(2, *flags, ports=ports[:2], only=[0])[0], gang(3, *flags, ports=ports, only=[1])[0]
    codes, outputs, _ = ends([two, three])
    assert codes == [2, 2], outputs
    assert all("has a list of 3 workers, the chief a list of 2" in output for output in outputs)
    ROWS.append(("sizes that disagree", "2, 2", f"{time.monotonic() - began:.1f}", "–", "–"))


def workers(count, *flags, data_dir, launch=()):
    command = [sys.executable, str(ROOT / "launch/workers.py"), f"--workers={count}", *launch, "--"]
    done = subprocess.run(
        [*command, *flags, f"--data_dir={data_dir}"], capture_output=True, text=True, timeout=600, check=False, cwd=ROOT
    )
    return done.returncode, done.stdout + done.stderr


def test_one_worker_reads_a_checkpoint_and_the_other_receives_it(gang, run, tmp_path):
    """The other has a folder of its own, in which there is nothing to read."""
    places = [f"--run_dir={tmp_path / name}" for name in ("chief", "other")]
    for steps in (20, 50):
        ports = free_ports(2)
        both = [gang(2, *SGD, f"--train_steps={steps}", places[i], only=[i], ports=ports)[0] for i in (0, 1)]
        codes, outputs, _ = ends(both)
        assert codes == [0, 0], outputs
    assert "resumed from the checkpoint of step 20, read and sent to 1 worker in " in outputs[0]
    assert not (tmp_path / "other/checkpoints").exists()
    flags = {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.05, "warmup_steps": 0, "batch_size": 48}
    run("process", replicas=1, log_every=0, eval_every=0, checkpoint_every=0, **flags, train_steps=50)
    assert largest_relative_difference(weights(tmp_path / "process"), weights(tmp_path / "chief")) <= 1e-5


def test_1_2_and_4_workers_end_with_the_same_weights_and_any_size_resumes(run, tmp_path, data_dir):
    flags = {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.05, "warmup_steps": 0, "batch_size": 48}
    flags |= {"log_every": 0, "eval_every": 0, "checkpoint_every": 0, "train_steps": 50}
    run("process", replicas=1, **flags)
    one = weights(tmp_path / "process")
    for count in (1, 2, 4):
        code, output = workers(count, *SGD, f"--run_dir={tmp_path / str(count)}", data_dir=data_dir)
        assert code == 0, output
        difference = largest_relative_difference(one, weights(tmp_path / str(count)))
        print(f"{count} workers: {difference:.1e}")
        assert difference <= 1e-5
    # 20 steps of 2 workers, then 3 workers, 1 process of 2 replicas, 4 workers.
    assert workers(2, *SGD, "--train_steps=20", f"--run_dir={tmp_path / 'sizes'}", data_dir=data_dir)[0] == 0
    code, output = workers(3, *SGD, "--train_steps=30", f"--run_dir={tmp_path / 'sizes'}", data_dir=data_dir)
    assert code == 0, output
    assert "resumed from the checkpoint of step 20" in output
    run("sizes", replicas=2, **(flags | {"train_steps": 40}))
    assert workers(4, *SGD, f"--run_dir={tmp_path / 'sizes'}", data_dir=data_dir)[0] == 0
    assert largest_relative_difference(one, weights(tmp_path / "sizes")) <= 1e-5


@pytest.mark.long
def test_streamed_input_and_batch_statistics_do_not_depend_on_the_workers(run, tmp_path, data_dir):
    for name, flags in (("stream", ("--input=stream",)), ("resnet", ("--model=resnet", "--learning_rate=0.01"))):
        common = [flag for flag in SGD if not (name == "resnet" and flag.startswith(("--model", "--learning_rate")))]
        common = [*common, *flags, "--train_steps=10", "--clip_norm=0.5"]
        code, output = workers(2, *common, f"--run_dir={tmp_path / name}-2", data_dir=data_dir)
        assert code == 0, output
        one = Trainer("--strategy=one_device", *common, f"--run_dir={tmp_path / name}-1", data_dir=data_dir)
        assert one.wait()[0] == 0
        difference = largest_relative_difference(weights(f"{tmp_path / name}-1"), weights(f"{tmp_path / name}-2"))
        assert difference <= 1e-5, name


def test_only_the_chief_writes_but_for_what_each_worker_says_of_itself(tmp_path, expected):
    names = {path.name for path in expected.iterdir()}
    assert names == {".lock", "flags.txt", "run.json", "metrics.jsonl", "checkpoints", "train", "eval", "workers"}
    assert {path.name for path in (expected / "workers").iterdir()} == {"worker-0.json", "worker-1.json"}
    assert len(list((expected / "train").glob("events*.v2"))) == 2  # the mark of the start, and the events
    assert json.loads((expected / "run.json").read_text())["replicas"] == 2


def test_the_launcher_prefixes_restarts_and_returns_the_code(tmp_path, data_dir):
    code, output = workers(2, "--model=nothing", data_dir=data_dir)
    assert code == 2
    assert "[0] " in output and "'nothing' is not known" in output
    code, output = workers(2, "--model=mlp", "--batch_size=49", f"--run_dir={tmp_path / 'a'}", data_dir=data_dir)
    assert code == 2
    assert "--batch_size 49 does not divide over 2 replicas; use 48 or 50" in output
    code, output = workers(2, "--batch_size=64", data_dir=data_dir, launch=["--dry_run"])
    assert code == 0
    assert "global batch 64 = 2 workers × 32 examples" in output
    assert '"index": 1' in output
    command = [sys.executable, str(ROOT / "launch/workers.py"), "--workers=2", "--", *LONG]
    command += [f"--data_dir={data_dir}", f"--run_dir={tmp_path / 'b'}"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while newest_step(tmp_path / "b") == 0:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 143, output
    assert "the same command continues" in output


@pytest.mark.long
def test_a_soak_of_kills_ends_with_the_bits_of_the_uninterrupted_run(gang, tmp_path, expected):
    """Kills at random moments of random workers, start-up included, then one start that is left alone."""
    kills, chance, run_dir = 10 if LONG_TESTS else 3, random.Random(0), tmp_path / "run"
    steps, began = [], time.monotonic()
    for _ in range(kills):
        members = gang(2, *LONG, f"--run_dir={run_dir}")
        before, deadline = newest_step(run_dir), time.monotonic() + chance.uniform(4, 14)
        while time.monotonic() < deadline and newest_step(run_dir) < min(before + chance.choice([50, 100]), 1400):
            time.sleep(0.01)
        victim = chance.randrange(2)
        members[victim].process.kill()
        # What a gang's manager does when one is gone: it ends the rest, here as roughly as it can.
        members[1 - victim].process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
        time.sleep(0.2)
        for one in members:
            one.process.kill()
            one.process.wait()
        steps.append(newest_step(run_dir))
    finish(gang, run_dir, expected)
    print(f"soak: {kills} kills in {time.monotonic() - began:.0f} s, steps reached: {steps}")
    ROWS.append((f"soak: {kills} random kills, start-up included", "–", "–", "–", "yes"))
