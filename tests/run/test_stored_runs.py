"""Runs at an address of an object store: a real S3 server on loopback, behind a proxy that fails."""

import dataclasses
import hashlib
import json
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import object_store
import pytest

object_store.skip_where_missing()

from conftest import metrics, weights, without_times

from launch.workers import free_ports
from trainers import custom_loop, distillation_loop, predict
from trainers.record import copies, reading, store_lock
from trainers.run import command
from trainers.run.hooks import Hooks
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration, Diverged, PeerLost, Preempted, StoreLost
from trainers.settings.rules import resolve
from trainers.use import predictions
from trainers.world import stores

EXACT = {"deterministic": True, "seed": 3}
LONG = ("--model=mlp", "--train_steps=600", "--batch_size=48", "--checkpoint_every=50", "--eval_every=100")
LONG += ("--log_every=50", "--deterministic", "--seed=3", "--keep_checkpoints=2", "--step_timeout=120")


@pytest.fixture
def download(tmp_path):
    """`download(address)` is a folder with everything that is in the store, by the plainest means."""

    def get(address):
        store, folder = stores.Store(address), tmp_path / "downloaded" / str(random.random())
        for name in store.tags():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(store.read(name))
        return folder

    return get


def check_same(one, other, newest=None):
    """Two folders of runs hold the same bits: weights, which checkpoints there are, metrics.

    `newest`: so many checkpoints alone. The best one may have been on its way when its machine was lost.
    """
    steps, others = ([*reading.checkpoint_steps(place)] for place in (one, other))
    if newest:
        steps, others = steps[-newest:], others[-newest:]
    assert steps == others
    for step in steps:
        a, b = weights(one, step), weights(other, step)
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a), step
    assert without_times(metrics(one)) == without_times(metrics(other))


def cut_every(proxy, n):
    """From now on every n-th request meets a fault."""
    chance, count = random.Random(n), 0

    def fault(method, path):
        nonlocal count
        count += 1
        return chance.choice(object_store.FAULTS) if count % n == 0 else None

    proxy.fault = fault


@object_store.every_store
def test_a_run_in_a_store_has_the_bits_and_files_of_one_in_a_folder(run, proxy, address, download, tmp_path):
    flags = {
        **EXACT,
        "train_steps": 12,
        "eval_every": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 2,
        "export": "true",
    }
    local = run("local", **flags)
    cut_every(proxy, 4)
    run(run_dir=address, cache_dir=str(tmp_path / "cache"), **flags)
    proxy.fault = lambda method, path: None
    stored = download(address)
    check_same(local.run_dir, stored)
    names = [
        {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "tfevents" not in p.name}
        for folder in (local.run_dir, stored)
    ]
    assert names[0] - {".lock"} == names[1] - {".writer"}
    facts = reading.read_run(stored)
    assert facts["exit_code"] == 0 and facts["flags"]["run_dir"] == address
    assert len(list(stored.glob("train/*tfevents*"))) == len(list(Path(local.run_dir).glob("train/*tfevents*")))


@object_store.every_store
def test_a_run_goes_on_elsewhere_with_the_bits_of_one_that_was_left_alone(run, proxy, address, download, tmp_path):
    """On another machine, at another size, with its best checkpoint and its metrics; and it is complete there too."""
    flags = {**EXACT, "eval_every": 3, "checkpoint_every": 3, "keep_checkpoints": 1, "schedule": "constant"}
    flags |= {"warmup_steps": 0}
    local = run("local", train_steps=12, **flags)
    run(run_dir=address, cache_dir=str(tmp_path / "one"), train_steps=6, **flags)
    other = run(run_dir=address, cache_dir=str(tmp_path / "other"), train_steps=12, **flags)
    check_same(local.run_dir, download(address))
    assert reading.read_run(download(address))["resumed_from"] == 6
    again = run(run_dir=address, cache_dir=str(tmp_path / "third"), train_steps=12, **flags)
    assert again.eval == other.eval and again.step == 12
    with pytest.raises(BadConfiguration, match=f"--seed 4 differs from 3, with which --run_dir {address} was begun"):
        run(run_dir=address, cache_dir=str(tmp_path / "third"), train_steps=12, **(flags | {"seed": 4}))
    with pytest.raises(BadConfiguration, match="--resume=never and --run_dir"):
        run(run_dir=address, cache_dir=str(tmp_path / "fourth"), train_steps=15, resume="never", **flags)


def test_a_run_in_a_store_answers(run, proxy, address, tmp_path, monkeypatch, data_dir):
    """Another machine has nothing of it: the best checkpoint is fetched, and the answers are those of a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    local = run("local", **EXACT)
    run(run_dir=address, cache_dir=str(tmp_path / "cache"), **EXACT)
    answers = []
    for place, name in ((str(local.run_dir), "a.csv"), (address, "b.csv")):
        words = ["predict", place, "--input=eval", f"--output={tmp_path / name}", f"--data_dir={data_dir}"]
        assert predictions.predict(predict.settings_from(words)) == 0
        answers.append((tmp_path / name).read_text())
    assert answers[0] == answers[1] and len(answers[0].splitlines()) > 300


def test_data_of_a_store_are_those_of_a_folder(run, proxy, address, tmp_path):
    rows = "\n".join(f"{n % 7},{n % 5},{'yes' if n % 7 > n % 5 else 'no'}" for n in range(400))
    (tmp_path / "rows.csv").write_text(f"a,b,label\n{rows}\n")
    stores.Store(address).write("rows.csv", tmp_path / "rows.csv")
    flags = {**EXACT, "label": "label", "dataset": f"csv:{tmp_path / 'rows.csv'}"}
    stored = flags | {"dataset": f"csv:{address}/rows.csv", "cache_dir": str(tmp_path / "cache")}
    local = run("local", **flags)
    other = run("other", **stored)
    check_same(local.run_dir, other.run_dir)
    facts = [reading.read_run(one.run_dir)["data_fingerprint"] for one in (local, other)]
    assert facts[0] == facts[1]


def test_damage_in_the_store_is_skipped_and_the_checkpoint_before_is_used(run, proxy, address, download, tmp_path):
    flags = {**EXACT, "eval_every": 0, "schedule": "constant", "warmup_steps": 0}
    local = run("local", train_steps=9, **flags)
    run(run_dir=address, cache_dir=str(tmp_path / "one"), train_steps=6, **flags)
    stores.Store(address).write("checkpoints/step-0000000006/state.index", b"not what it was")
    run(run_dir=address, cache_dir=str(tmp_path / "other"), train_steps=9, **flags)
    assert reading.read_run(download(address))["resumed_from"] == 3
    check_same(local.run_dir, download(address))


def test_what_cannot_be_written_at_the_end_is_code_75(run, proxy, address, tmp_path, monkeypatch):
    def fault(method, path):
        if "step-0000000006" in path:
            proxy.down = True

    proxy.fault = fault
    with pytest.raises(StoreLost, match=r"could not be brought to s3://.*\(--step_timeout\)") as raised:
        run(run_dir=address, cache_dir=str(tmp_path / "cache"), step_timeout=3.0, **EXACT)
    assert raised.value.exit_code == 75
    proxy.down, proxy.fault = False, lambda method, path: None
    done = run(run_dir=address, cache_dir=str(tmp_path / "cache"), **EXACT)
    assert done.step == 6 and copies.manifests(stores.Store(address)).keys() == {3, 6}


class Ends(Hooks):
    """Ends the run before its first step, when the store has gone."""

    def __init__(self, proxy, error):
        self.proxy, self.error = proxy, error

    def traced(self, loop, concrete):
        self.proxy.down = True
        raise self.error


@pytest.mark.parametrize("error", [Preempted("SIGTERM came"), Diverged("the loss is not finite")])
def test_an_end_that_the_store_does_not_learn_of_is_code_75_unless_it_is_final(
    proxy, address, tmp_path, data_dir, error
):
    config = Config(model="mlp", train_steps=6, run_dir=address, cache_dir=str(tmp_path), data_dir=str(data_dir))
    config = resolve(dataclasses.replace(config, step_timeout=2.0))
    with pytest.raises(StoreLost if isinstance(error, Preempted) else Diverged) as raised:
        custom_loop.train(config, Ends(proxy, error))
    assert raised.value.exit_code == (75 if isinstance(error, Preempted) else error.exit_code)


def test_an_evaluators_end_that_the_store_does_not_learn_of_is_code_75(run, proxy, address, tmp_path):
    flags = {"cache_dir": str(tmp_path / "cache")}
    run(run_dir=address, **flags, **EXACT)
    facts = json.loads(stores.Store(address).read("run.json"))
    stores.Store(address).write("run.json", json.dumps(facts | {"ended": None}).encode())
    proxy.fault = lambda method, path: "503" if method == "PUT" and "/evaluator/run.json" in path else None
    words = ["custom_loop", "--mode=evaluate", f"--run_dir={address}", f"--cache_dir={tmp_path / 'other'}"]
    words += [f"--data_dir={facts['flags']['data_dir']}", "--startup_timeout=1", "--step_timeout=5"]
    with pytest.raises(StoreLost, match="/evaluator: nothing has moved for 5 s") as raised:
        custom_loop.train(command.config_from(words, ""))
    assert isinstance(raised.value.__cause__, PeerLost) and "no checkpoint after step 6" in str(raised.value.__cause__)


@pytest.mark.parametrize("words", [("s3://bucket",), ("s3:///first",), ("s3://bucket/a/../b",), ("http://host/first",)])
def test_an_address_that_names_no_folder_is_one_line(words):
    with pytest.raises(BadConfiguration, match=r"--run_dir '.*(names no folder in a bucket; write|nor an address)"):
        resolve(Config(run_dir=words[0]))
    assert resolve(Config(run_dir="gs://bucket/runs/first/")).run_dir == "gs://bucket/runs/first"


def test_killed_at_random_moments_a_stored_run_ends_with_the_same_bits(trainer, proxy, address, download, tmp_path):
    """`kill -9` while it trains and uploads; each time it goes on on a machine that has nothing of it."""
    # Steps that take long enough for no attempt to be near the end when its second upload begins.
    flags = (*LONG, "--train_steps=3000", "--batch_size=960")
    code, output = trainer(*flags, f"--run_dir={tmp_path / 'local'}").wait()
    assert code == 0, output
    cut_every(proxy, 7)
    for attempt, (phase, nth) in enumerate((("state.data", 1), ("manifest", 2), ("metrics", 2))):
        one = trainer(*flags, f"--run_dir={address}", f"--cache_dir={tmp_path / f'machine {attempt}'}")
        left = [nth]

        def fault(method, path, phase=phase, left=left, process=one.process, random_fault=proxy.fault):
            if method == "PUT" and phase in path and process.poll() is None:
                left[0] -= 1
                if left[0] == 0:
                    process.kill()
                    return "cut request"
            return random_fault(method, path)

        proxy.fault = fault
        code, output = one.wait()
        assert code == -signal.SIGKILL, (attempt, output)
        cut_every(proxy, 7)
        # Else a minute is waited for: only on its own machine is one that was killed known at once.
        stores.Store(address).remove([store_lock.NAME])
    code, output = trainer(*flags, f"--run_dir={address}", f"--cache_dir={tmp_path / 'last machine'}").wait()
    assert code == 0 and f"in {address}" in output, output
    proxy.fault = lambda method, path: None
    (working,) = (path for path in (tmp_path / "last machine/runs").iterdir() if path.is_dir())
    assert reading.checkpoint_steps(working) == reading.checkpoint_steps(download(address))
    check_same(tmp_path / "local", working, newest=2)


@pytest.mark.long
def test_a_soak_of_two_hundred_faults_ends_with_the_same_bits(run, proxy, server, address, download, tmp_path):
    """Attempt after attempt on other machines, while another looks all the time for a checkpoint that is half there."""
    flags = {**EXACT, "eval_every": 2, "checkpoint_every": 1, "keep_checkpoints": 2, "schedule": "constant"}
    flags |= {"warmup_steps": 0, "log_every": 1}
    chance, faults, torn, end = random.Random(5), 0, [], threading.Event()
    with object_store.environment_of(server[0]):
        store = stores.Store(address)

    def fault(method, path):
        nonlocal faults
        if chance.random() < 0.25:
            faults += 1
            return chance.choice(object_store.FAULTS)
        return None

    def look():
        while not end.wait(0.05):
            for step in copies.manifests(store):
                folder = copies.manifest_name(step).rpartition("/")[0]
                try:
                    named = json.loads(store.read(copies.manifest_name(step)))["files"]
                    content = {name: store.read(f"{folder}/{name}") for name in named}
                except FileNotFoundError:
                    if copies.manifest_name(step) in store.tags(folder):
                        torn.append(step)
                    continue
                if any(hashlib.sha256(content[name]).hexdigest() != named[name] for name in named):
                    torn.append(step)

    watcher = threading.Thread(target=look)
    watcher.start()
    steps = 0
    try:
        proxy.fault = fault
        while faults < 200:
            steps += 10
            run(run_dir=address, cache_dir=str(tmp_path / str(steps)), train_steps=steps, **flags)
    finally:
        end.set()
        watcher.join()
        proxy.fault = lambda method, path: None
    assert torn == [] and faults >= 200
    check_same(run("local", train_steps=steps, **flags).run_dir, download(address))


def test_a_second_run_is_refused_and_sigterm_leaves_a_checkpoint(trainer, proxy, address, tmp_path):
    long = ("--model=mlp", "--train_steps=1000000", "--checkpoint_every=0", "--eval_every=0", f"--run_dir={address}")
    one = trainer(*long, f"--cache_dir={tmp_path / 'one'}")
    until = time.monotonic() + 120
    while not stores.Store(address).tags("train") and time.monotonic() < until:
        time.sleep(0.3)
    other = trainer(*long, f"--cache_dir={tmp_path / 'other'}")
    code, output = other.wait()
    assert code == 2 and f"--run_dir {address} is in use by another run, process {one.process.pid} of" in output, output
    one.process.send_signal(signal.SIGTERM)
    code, output = one.wait()
    assert code == 143, output
    (step,) = copies.manifests(stores.Store(address))
    facts = json.loads(stores.Store(address).read("run.json"))
    assert facts["exit_code"] == 143 and step > 0
    assert store_lock.NAME not in stores.Store(address).tags()


@pytest.fixture
def gang(trainer, tmp_path):
    """`gang(run_dir, name, *flags)`: two workers, each on a machine of its own, of which nothing but that is shared."""

    def start(run_dir, name, *flags):
        addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        members = []
        for index in range(2):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            own = (f"--run_dir={run_dir}", f"--cache_dir={tmp_path / name / str(index)}")
            flags_of_two = (*flags, "--strategy=multi_worker", "--replicas=1")
            members.append(trainer(*flags_of_two, *own, env={"TF_CONFIG": json.dumps(config)}))
        return members

    return start


def kill_chief(members, address):
    """`kill -9` when there is a checkpoint."""
    until = time.monotonic() + 200
    while not copies.manifests(stores.Store(address)) and time.monotonic() < until:
        time.sleep(0.2)
    members[0].process.kill()
    codes = [one.wait()[0] for one in members]
    assert codes[0] == -signal.SIGKILL and codes[1] in (75, -signal.SIGKILL), codes
    stores.Store(address).remove([store_lock.NAME])  # else a minute is waited for


def test_two_workers_share_a_run_through_the_store_alone(gang, proxy, address, download, tmp_path):
    """They are stopped, go on on other machines, and end with the bits of a folder."""
    for one in gang(tmp_path / "local", "none", *LONG):
        code, output = one.wait()
        assert code == 0, output
    kill_chief(gang(address, "first", *LONG), address)
    results = [one.wait() for one in gang(address, "second", *LONG)]
    assert [code for code, _ in results] == [0, 0], results
    check_same(tmp_path / "local", download(address))
    assert [one.wait()[0] for one in gang(address, "third", *LONG)] == [0, 0], "complete already"


def test_what_moves_slowly_ends_no_worker(gang, proxy, address):
    """The checkpoint comes to the chief, and what is written last to the store, in more than `--step_timeout`."""
    flags = ("--model=mlp,width=512", "--batch_size=48", "--checkpoint_every=10", "--eval_every=0")
    flags += ("--log_every=10", "--schedule=constant", "--warmup_steps=0", "--keep_checkpoints=1")
    results = [one.wait() for one in gang(address, "first", *flags, "--train_steps=10")]
    assert [code for code, _ in results] == [0, 0], results
    slow = 12.0
    store = stores.Store(address)
    size = max(size for name, (_, size) in store.entries("checkpoints").items() if "state.data" in name)
    paused = 0.0

    def rate(method, path):
        return size / (2 * slow) if method == "GET" and "state.data" in path else 0

    def pause(method, path):
        nonlocal paused
        if method != "PUT" or store_lock.NAME in path:
            return 0
        paused += slow / 3
        return slow / 3

    proxy.rate, proxy.pause = rate, pause
    members = gang(address, "second", *flags, "--train_steps=20", f"--step_timeout={slow}")
    results = [one.wait() for one in members]
    assert [code for code, _ in results] == [0, 0], results
    assert paused > 3 * slow and "resumed from the checkpoint of step 10" in results[0][1]


@object_store.every_store
def test_a_run_of_two_workers_that_was_killed_goes_on_at_any_size(gang, run, proxy, address, download, tmp_path):
    """Its chief is killed; it goes on in one process, at 1 replica and at 4, with the weights of one process."""
    flags = {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "constant", "warmup_steps": 0, "batch_size": 32}
    flags |= {"checkpoint_every": 1, "eval_every": 0, "log_every": 2}
    words = [f"--{name}={value}" for name, value in flags.items()]
    kill_chief(gang(address, "first", "--model=mlp", "--train_steps=10000", *words), address)
    last = max(copies.manifests(stores.Store(address)))
    sizes = {1: last + 4, 4: last + 8}
    run("whole", replicas=2, train_steps=sizes[4], **flags)
    for replicas, step in sizes.items():
        cache = str(tmp_path / f"of {replicas}")
        done = run(run_dir=address, cache_dir=cache, replicas=replicas, train_steps=step, **flags)
        assert done.step == step
    stored = download(address)
    facts = reading.read_run(stored)
    assert facts["resumed_from"] == sizes[1] and facts["replicas"] == 4
    whole, resized = weights(tmp_path / "whole"), weights(stored)
    for name, value in whole.items():
        np.testing.assert_allclose(resized[name], value, rtol=1e-5, atol=1e-7)


@object_store.every_store
def test_an_evaluator_follows_a_run_in_the_store(trainer, run, proxy, address, download, tmp_path):
    flags = {**EXACT, "eval_every": 3, "checkpoint_every": 3}
    run(run_dir=address, cache_dir=str(tmp_path / "cache"), train_steps=9, **flags)
    follower = ("--mode=evaluate", f"--run_dir={address}", f"--cache_dir={tmp_path / 'other'}")
    code, output = trainer(*follower).wait()
    assert code == 0, output
    stored = download(address)
    of_run = {line["step"]: line["loss"] for line in metrics(stored) if line["split"] == "eval"}
    lines = {line["step"]: line["loss"] for line in metrics(stored / "evaluator")}
    assert lines.keys() == {3, 6, 9} and all(abs(lines[step] - of_run[step]) < 1e-5 for step in lines)
    assert reading.read_run(stored / "evaluator")["follows"] == address
    if address.startswith("s3"):
        code, output = trainer(*follower).wait()
        assert code == 0, output
        assert len(metrics(download(address) / "evaluator")) == 3, "it goes on after its last line"


def write_safetensors(place, values):
    """The format: the length of a header of JSON, that, and the bytes of all arrays. Here all are float32."""
    header, at = {}, 0
    for name, value in values.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    place.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(value.tobytes() for value in values.values()))


def test_weights_to_begin_with_and_a_teacher_come_from_a_store(run, proxy, address, tmp_path, data_dir):
    """A run, and a file of weights: with the bits of one that names a folder, and the same line where there is none."""
    flags = {**EXACT, "train_steps": 3, "cache_dir": str(tmp_path / "cache")}
    source = run("source", **flags)
    run(run_dir=address, **flags)
    local = run("local", init_from=str(source.run_dir), **flags | {"seed": 4})
    stored = run("stored", init_from=address, **flags | {"seed": 4})
    check_same(local.run_dir, stored.run_dir)
    facts = reading.read_run(stored.run_dir)
    assert facts["flags"]["init_from"] == address and facts["initial"]["from"] == address
    assert facts["initial"]["sha256"] == reading.read_run(local.run_dir)["initial"]["sha256"]
    with pytest.raises(BadConfiguration, match=f"^--init_from {address}/none holds no run; name a run_dir"):
        run("none", init_from=f"{address}/none", **flags)

    values = {name.split("/", 2)[2]: value for name, value in weights(source.run_dir).items() if "model/" in name}
    place = tmp_path / "values.safetensors"
    write_safetensors(place, values)
    stores.Store(f"{address}/files").write(place.name, place)
    local = run("local file", init_from=str(place), **flags | {"seed": 4})
    stored = run("stored file", init_from=f"{address}/files/{place.name}", **flags | {"seed": 4})
    check_same(local.run_dir, stored.run_dir)
    with pytest.raises(BadConfiguration, match=r"files/none\.safetensors is not there; name what is$"):
        run("none", init_from=f"{address}/files/none.safetensors", **flags)

    students = []
    for name, teacher in (("of a folder", str(source.run_dir)), ("of a store", address)):
        own = {"model": "mlp,width=8", "data_dir": str(data_dir), "run_dir": str(tmp_path / name)}
        config = distillation_loop.Settings(**flags | own | {"teacher": teacher, "batch_size": 32})
        students.append(distillation_loop.train(resolve(config)))
    check_same(students[0].run_dir, students[1].run_dir)


def test_rows_of_a_store_are_answered_as_those_of_a_folder(run, proxy, address, tmp_path):
    rows = "\n".join(f"{n % 7},{n % 5},{'yes' if n % 7 > n % 5 else 'no'}" for n in range(60))
    (tmp_path / "rows.csv").write_text(f"a,b,label\n{rows}\n")
    stores.Store(address).write("rows.csv", tmp_path / "rows.csv")
    trained = run(dataset=f"csv:{tmp_path / 'rows.csv'}", label="label", **EXACT)
    answers = []
    for place, name in ((str(tmp_path), "a.jsonl"), (address, "b.jsonl")):
        words = ["predict", str(trained.run_dir), f"--input=csv:{place}/rows.csv", f"--output={tmp_path / name}"]
        assert predictions.predict(predict.settings_from(words)) == 0
        answers.append((tmp_path / name).read_text())
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 60
    words = ["predict", str(trained.run_dir), f"--input=csv:{address}/none.csv", f"--output={tmp_path / 'c.csv'}"]
    with pytest.raises(BadConfiguration, match=f"^{address}/none.csv is not there; name what is$"):
        predictions.predict(predict.settings_from(words))
