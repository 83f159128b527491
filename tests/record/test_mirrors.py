"""A run's folder and its place in an object store: a real S3 server on loopback, behind a proxy that fails."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import object_store
import pytest

object_store.skip_where_missing()

from conftest import ROOT
from object_store import each_server  # noqa: F401

from trainers.record import carriers, copies, mirror, reading, store_lock, uploads
from trainers.record.beats import Beats
from trainers.record.run_record import RunRecord
from trainers.settings import paths
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration, Diverged, PeerLost, StoreLost
from trainers.settings.rules import resolve
from trainers.world import stores
from trainers.world.watchdog import Watchdog

RUN = '{{"step": {step}, "ended": {ended}, "exit_code": 0}}'


def no_feed(what):
    pass


def save(folder, step, note=b""):
    """A checkpoint as `Checkpoints.save` leaves it: its folder appears whole."""
    place = reading.checkpoint_folder(folder, step)
    aside = place.with_name(f".writing-{place.name}")
    aside.mkdir(parents=True)
    data = {"state.index": b"%d" % step + note, "state.data-00000-of-00001": os.urandom(2000)}
    for name, content in data.items():
        (aside / name).write_bytes(content)
    named = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    (aside / "manifest.json").write_text(json.dumps({"step": step, "metrics": {}, "files": named}))
    shutil.rmtree(place, ignore_errors=True)
    aside.rename(place)


def advance(folder, step, ended="null", keep=2):
    """What a run writes on its way to a step, and what it removes."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "split": "train"}) + "\n")
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train/events").write_bytes(b"e" * step)
    save(folder, step)
    for old in reading.checkpoint_steps(folder)[:-keep]:
        shutil.rmtree(reading.checkpoint_folder(folder, old))
    (folder / "run.json").write_text(RUN.format(step=step, ended=ended))


def check_whole(address):
    """What any reader may see at any moment is whole: the steps of the checkpoints that are there."""
    store = stores.Store(address)
    tags = store.tags()
    manifests = copies.manifests(store)
    for step in manifests:
        name = copies.manifest_name(step)
        for file, digest in json.loads(store.read(name))["files"].items():
            content = store.read(f"{name.rpartition('/')[0]}/{file}")
            assert hashlib.sha256(content).hexdigest() == digest, (step, file)
        lines = store.read("metrics.jsonl").decode().splitlines()
        assert step in [json.loads(line)["step"] for line in lines], "metrics do not cover a checkpoint"
    if "run.json" in tags and (facts := json.loads(store.read("run.json")))["ended"]:
        assert facts["step"] in manifests, "a run has ended whose last checkpoint is not there"
    return sorted(manifests)


@pytest.fixture
def owner(tmp_path):
    """`owner(address, cache)` is a mirror with the patience of a test."""
    return lambda address, cache="cache", patience=60: mirror.Mirror(address, tmp_path / cache / "run", patience)


def test_a_manifest_comes_after_its_data_and_goes_before_it(proxy, address, owner):
    with owner(address) as one:
        for step in (10, 20, 30):
            advance(one.folder, step)
            one.settle(no_feed)
        (one.folder / "run.json").write_text(RUN.format(step=30, ended='"now"'))
        one.settle(no_feed)
    writes = [path.partition("/tests/")[2].partition("/")[2] for method, path in proxy.log if method == "PUT"]
    first = {name: writes.index(name) for name in writes}
    for step in (10, 20, 30):
        folder = f"checkpoints/step-{step:010d}"
        assert first[f"{folder}/manifest.json"] > max(n for name, n in first.items() if name.startswith(f"{folder}/s"))
    assert first["metrics.jsonl"] < first["checkpoints/step-0000000010/manifest.json"]
    assert writes[-1] == "run.json", "what says that the run has ended is written last"
    assert check_whole(address) == [20, 30]


@pytest.mark.parametrize("fault", object_store.FAULTS)
def test_faults_of_the_network_and_of_the_server_delay_and_no_more(proxy, address, owner, tmp_path, fault):
    count = 0

    def every_third(method, path):
        nonlocal count
        count += 1
        return fault if count % 3 == 0 else None

    proxy.fault = every_third
    with owner(address) as one:
        for step in (10, 20, 30):
            advance(one.folder, step)
        one.settle(no_feed)
        with copies.Copy(address, tmp_path / "copies", 60) as copy:
            assert reading.checkpoint_steps(copy.folder) == [20, 30]
            carriers.bring(copy.folder, 30)
            for path in reading.checkpoint_folder(one.folder, 30).iterdir():
                assert (reading.checkpoint_folder(copy.folder, 30) / path.name).read_bytes() == path.read_bytes()
    assert check_whole(address) == [20, 30]


_WRITER = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/record"]
import pathlib, types
sys.modules["conftest"] = types.SimpleNamespace(ROOT={root!r})
import test_mirrors as tests
from trainers.record import mirror, reading
with mirror.Mirror({address!r}, pathlib.Path({folder!r}), 60) as one:
    begin = max(reading.checkpoint_steps(one.folder), default=0)
    for step in range(begin + 10, 40, 10):
        tests.advance(one.folder, step, ended='"now"' if step == 30 else "null", keep=1)
        one.settle(tests.no_feed)
    one.settle(tests.no_feed)
"""


def start_writer(address, folder):
    code = _WRITER.format(root=str(ROOT), address=address, folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("phase", "stride"), [("drop before", 5), ("cut request", 2), ("drop after", 5)])
def test_killed_at_each_request_nothing_is_ever_half_there(proxy, address, tmp_path, phase, stride):
    """`kill -9` before, within and after each request that changes the store; the next one goes on from there."""
    kills, at = 0, 1
    while True:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        stores.Store(address).remove(stores.Store(address).tags())
        count = 0
        process = start_writer(address, tmp_path / "run")

        def fault(method, path, at=at, process=process):
            nonlocal count
            count += method in ("PUT", "POST", "DELETE")
            if count == at and method in ("PUT", "POST", "DELETE"):
                process.kill()
                return phase
            return None

        proxy.fault = fault
        _, errors = process.communicate(timeout=60)
        proxy.fault = lambda method, path: None
        time.sleep(0.05)  # the server finishes what it was sent
        check_whole(address)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
        again = start_writer(address, tmp_path / "run")
        _, errors = again.communicate(timeout=60)
        assert again.returncode == 0, errors
        assert check_whole(address) == [30]
        names = [name for name in stores.Store(address).tags() if "step-" in name]
        assert len(names) == 3, "what a killed process has left is cleared away"
        at += stride
    assert kills >= 4


def test_what_was_not_written_when_a_machine_died_is_not_missed_elsewhere(proxy, address, owner):
    with owner(address, "one machine") as one:
        advance(one.folder, 10)
        one.settle(no_feed)
    with owner(address, "another") as other:
        assert reading.checkpoint_steps(other.folder) == [10]
        assert not (reading.checkpoint_folder(other.folder, 10) / "state.index").exists()
        carriers.bring(other.folder, 10)
        assert (reading.checkpoint_folder(other.folder, 10) / "state.index").read_bytes() == b"10"
        advance(other.folder, 20)
        other.settle(no_feed)
    advance(one.folder, 15)  # which never came to the store
    with owner(address, "one machine") as one:
        assert reading.checkpoint_steps(one.folder) == [10, 20], "the store decides"
        assert [line["step"] for line in reading.metric_lines(one.folder)] == [10, 20]


def test_what_a_killed_attempt_has_told_last_is_there_elsewhere(proxy, address, owner):
    """By it the next attempt knows what the time of the killed one went into, see `goodput.attempts_of`."""
    told = {reading.worker_file(Path(), 0): b'{"worker": 0}', Path(reading.WORKERS, reading.HANG): b'{"id": "x"}'}
    with owner(address, "one machine") as one:
        advance(one.folder, 10)
        (one.folder / reading.WORKERS).mkdir()
        for name, content in told.items():
            (one.folder / name).write_bytes(content)
        one.settle(no_feed)
    with owner(address, "another") as other:
        assert {name: (other.folder / name).read_bytes() for name in told} == told
        advance(other.folder, 20)
        other.settle(no_feed)
    assert {name.as_posix() for name in told} <= stores.Store(address).tags(reading.WORKERS).keys()


def test_of_two_workers_with_a_folder_each_nobody_is_accused(proxy, address, owner, tmp_path, capsys):
    """The other one's beats lie on its own machine. In a folder that both have, the one who is missing is named."""
    lines = {}
    with owner(address) as one:
        for name, folder in (("stored", one.folder), ("shared", tmp_path / "shared")):
            with contextlib.closing(RunRecord(resolve(Config(model="mlp", run_dir=str(folder))))) as record:
                record.begin()
                beats = Beats(record, Watchdog(0), worker=0, workers=2)
                lines[name] = beats.before_end("a sum that does not end", others=False)
    assert lines["shared"].startswith("worker 1 did not come") and lines["stored"] == ""
    assert "worker 1" not in capsys.readouterr().out.replace(lines["shared"], "")


@pytest.mark.parametrize(
    ("error", "is_told"),
    [(PeerLost("a worker was lost"), False), (Diverged("not finite"), True), (RuntimeError("a crash"), True)],
)
def test_an_end_that_cannot_be_written_is_told_or_is_the_reason_to_start_again(
    proxy, address, owner, caplog, error, is_told
):
    with owner(address, patience=1.0) as one:
        record = RunRecord(resolve(Config(model="mlp", run_dir=str(one.folder))))
        with contextlib.closing(record):
            record.begin()
            one.settle(no_feed)
            proxy.down = True
            with contextlib.nullcontext() if is_told else pytest.raises(StoreLost, match="start again") as raised:
                record.end_by(error, {})
            assert is_told or raised.value.__cause__ is error
            assert ("could not be brought to" in caplog.text) == is_told
            assert reading.read_run(one.folder)["exit_reason"] == f"{type(error).__name__}: {error}"


def test_what_an_outage_kept_from_the_store_is_brought_there_by_the_next_attempt(proxy, address, owner, monkeypatch):
    monkeypatch.setattr(mirror, "_PATIENCE", 1.0)
    with owner(address, patience=3) as one:
        advance(one.folder, 10)
        one.settle(no_feed)
        proxy.down = True
        advance(one.folder, 20)
        with pytest.raises(
            StoreLost, match=r"could not be brought to .*: nothing has moved for 3 s .*is kept in .*start again"
        ):
            one.settle(no_feed)
    proxy.down = False
    assert check_whole(address) == [10]
    with owner(address) as one:
        assert reading.checkpoint_steps(one.folder) == [10, 20]
        one.settle(no_feed)
    assert check_whole(address) == [10, 20]


MIB = 1 << 20


def save_large(folder, step, mib):
    """A checkpoint whose data are so large."""
    save(folder, step)
    place, content = reading.checkpoint_folder(folder, step), os.urandom(mib * MIB)
    (place / "state.data-00000-of-00001").write_bytes(content)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"]["state.data-00000-of-00001"] = hashlib.sha256(content).hexdigest()
    (place / "manifest.json").write_text(json.dumps(manifest))


def test_what_moves_may_take_longer_than_the_time_out(proxy, address, owner):
    """There and back: only a transfer in which nothing moves for so long is given up."""
    fed = []
    with owner(address, patience=4.0) as one:
        advance(one.folder, 10)
        one.settle(no_feed)
        save_large(one.folder, 20, 30)
        proxy.rate, began = 5 * MIB, time.monotonic()
        one.settle(fed.append)
        assert time.monotonic() - began > 5.0 and fed.count(f"writing to {address}") > 10
        proxy.rate = 0
    with owner(address, "another", patience=4.0) as other:
        del fed[:]
        proxy.rate, began = 5 * MIB, time.monotonic()
        carriers.bring(other.folder, 20, fed.append)
        assert time.monotonic() - began > 5.0 and len(fed) > 10
        proxy.rate = 0
        for path in reading.checkpoint_folder(one.folder, 20).iterdir():
            assert (reading.checkpoint_folder(other.folder, 20) / path.name).read_bytes() == path.read_bytes()


def test_what_stands_still_is_given_up_after_the_time_out(proxy, address, owner, tmp_path):
    with owner(address, patience=2.0) as one:
        save_large(one.folder, 20, 12)
        one.settle(no_feed)
        proxy.rate = -1
        advance(one.folder, 30)
        with pytest.raises(StoreLost, match=r"moved for 2 s \(--step_timeout\); it is kept in .*; start again"):
            one.settle(no_feed)
        proxy.rate = 0
        one.settle(no_feed)
    with copies.Copy(address, tmp_path / "copies", 1.0) as copy:

        def fault(method, path):
            proxy.rate = -1 if "state.data" in path else 0

        proxy.fault = fault
        with pytest.raises(StoreLost, match=r"^reading the checkpoint of step 20 from .*: nothing has moved for 1 s"):
            carriers.bring(copy.folder, 20)
        proxy.rate, proxy.fault = 0, lambda method, path: None


def test_what_is_refused_each_time_does_not_count_as_moving(proxy, address, owner, monkeypatch):
    """Other requests are answered, and the lock is kept alive."""
    monkeypatch.setattr(mirror, "_PATIENCE", 0.5)
    monkeypatch.setattr(store_lock, "BEAT_SECONDS", 0.2)
    with owner(address, patience=3.0) as one:
        advance(one.folder, 10)
        proxy.fault = lambda method, path: "503" if "state.index" in path and method == "PUT" else None
        began = time.monotonic()
        with pytest.raises(StoreLost, match="nothing has moved for 3 s"):
            one.settle(no_feed)
        assert time.monotonic() - began < 15


def manifests_written(proxy):
    return [int(path.split("step-")[1][:10]) for method, path in proxy.log if method == "PUT" and "manifest" in path]


def test_after_an_outage_the_newest_checkpoint_goes_first(proxy, address, owner):
    """Also before older ones that wait, if it comes while they do."""
    with owner(address) as one:
        proxy.down = True
        for step in (10, 20, 30):
            advance(one.folder, step, keep=9)

        def fault(method, path):
            if (
                method == "PUT"
                and "step-0000000030/manifest" in path
                and 40 not in reading.checkpoint_steps(one.folder)
            ):
                advance(one.folder, 40, keep=9)

        proxy.fault, proxy.down = fault, False
        one.settle(no_feed)
        assert manifests_written(proxy) == [30, 40, 20, 10]
        assert check_whole(address) == [10, 20, 30, 40], "what was waited for is there"


def test_a_large_file_that_grows_goes_the_more_rarely_and_with_each_checkpoint(proxy, address, owner, monkeypatch):
    monkeypatch.setattr(carriers, "EVERY_SECONDS", 0.1)
    monkeypatch.setattr(uploads, "BYTES_A_SECOND", 20.0)
    sent = lambda name: sum(method == "PUT" and path.endswith(name) for method, path in proxy.log)  # noqa: E731
    with owner(address) as one:
        advance(one.folder, 100)
        one.settle(no_feed)
        del proxy.log[:]
        began = time.monotonic()
        while (passed := time.monotonic() - began) < 4.0:
            for name in ("metrics.jsonl", "train/events", "flags.txt"):
                with open(one.folder / name, "a") as file:
                    file.write('{"step": 0}\n' if name != "flags.txt" else "x")
            time.sleep(0.1)
        assert sent("train/events") <= passed / (100 / 20) + 1, "100 bytes, of which 20 may go a second"
        assert 1 <= sent("metrics.jsonl") < sent("flags.txt"), "the small one goes more often"
        before = sent("metrics.jsonl")
        advance(one.folder, 200)
        one.settle(no_feed)
        assert sent("metrics.jsonl") > before
    assert check_whole(address) == [100, 200]


def test_an_outage_only_delays(proxy, address, owner, monkeypatch):
    monkeypatch.setattr(mirror, "_PATIENCE", 0.5)
    with owner(address) as one:
        proxy.down = True
        advance(one.folder, 10)
        time.sleep(1.5)
        one.check()
        proxy.down = False
        one.settle(no_feed)
        assert check_whole(address) == [10]


def test_a_second_run_at_an_address_is_refused(proxy, address, owner, monkeypatch):
    monkeypatch.setattr(store_lock, "BEAT_SECONDS", 0.5)
    with owner(address):
        with pytest.raises(BadConfiguration, match="in use by another run on this machine"), owner(address):
            pass
        began = time.monotonic()
        living = f"in use by another run, process {os.getpid()} of "
        with pytest.raises(BadConfiguration, match=living), owner(address, "another machine"):
            pass
        assert time.monotonic() - began < 20
    with owner(address, "another machine"):
        pass


def test_a_dead_owner_is_recognized_and_told(proxy, address, owner, tmp_path, monkeypatch, caplog):
    code = _WRITER.replace("    begin", "    import os; os.kill(os.getpid(), 9)\n    begin")
    code = code.format(root=str(ROOT), address=address, folder=str(tmp_path / "dead/run"))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    began = time.monotonic()
    shutil.copytree(tmp_path / "dead", tmp_path / "elsewhere")
    with owner(address, "dead"):
        assert time.monotonic() - began < 20, "on its own machine it is known at once"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    monkeypatch.setattr(store_lock, "DEAD_AFTER", 2.0)
    with owner(address, "elsewhere"):
        assert "has given no sign of life for 2 s; taken over" in caplog.text


def test_who_was_taken_for_dead_writes_no_more_and_is_told(proxy, address, owner, monkeypatch):
    monkeypatch.setattr(store_lock, "BEAT_SECONDS", 1e6)
    with owner(address, "frozen") as frozen:
        advance(frozen.folder, 10)
        frozen.settle(no_feed)
        monkeypatch.setattr(store_lock, "DEAD_AFTER", 1.0)
        with owner(address, "another") as other:
            monkeypatch.setattr(store_lock, "BEAT_SECONDS", 0.1)
            advance(frozen.folder, 20)
            with pytest.raises(StoreLost, match="has taken over "):
                frozen.settle(no_feed)
            with pytest.raises(StoreLost, match="has taken over "):
                frozen.check()
            assert check_whole(address) == [10]
            advance(other.folder, 30)
            other.settle(no_feed)
        assert check_whole(address) == [10, 30]


def test_what_the_mirror_does_not_know_of_goes_too(proxy, address, owner):
    """A checkpoint whose manifest came although its answer was lost, and files of one that was given up."""
    with owner(address) as one:
        advance(one.folder, 20)
        one.settle(no_feed)
        manifest = stores.Store(address).read("checkpoints/step-0000000020/manifest.json")
        stores.Store(address).write("checkpoints/step-0000000010/manifest.json", manifest)
        stores.Store(address).write("checkpoints/step-0000000015/state.index", b"begun")
        advance(one.folder, 30)
        one.settle(no_feed)
    names = {name.split("/")[1] for name in stores.Store(address).tags("checkpoints")}
    assert names == {"step-0000000020", "step-0000000030"}
    assert check_whole(address) == [20, 30]


def test_a_run_that_was_removed_from_the_store_is_written_again(proxy, address, owner, monkeypatch):
    monkeypatch.setattr(store_lock, "BEAT_SECONDS", 0.2)
    with owner(address) as one:
        advance(one.folder, 10)
        one.settle(no_feed)
        stores.Store(address).remove(stores.Store(address).tags())
        until = time.monotonic() + 20
        while ".lock" not in stores.Store(address).tags() and time.monotonic() < until:
            time.sleep(0.1)
        advance(one.folder, 20)
        one.settle(no_feed)
        assert check_whole(address) == [10, 20]


def test_a_folder_that_was_removed_takes_nothing_from_the_store(proxy, address, owner):
    with owner(address) as one:
        advance(one.folder, 10)
        advance(one.folder, 20)
        one.settle(no_feed)
        shutil.rmtree(one.folder)
        with pytest.raises(StoreLost, match="was removed; start again"):
            one.settle(no_feed)
    assert check_whole(address) == [10, 20]
    with owner(address) as one:
        assert reading.checkpoint_steps(one.folder) == [10, 20]


def test_a_checkpoint_that_is_written_again_is_never_half_the_old_one(proxy, address, owner):
    with owner(address) as one:
        advance(one.folder, 10)
        one.settle(no_feed)
        save(one.folder, 10, b"again")
        del proxy.log[:]
        one.settle(no_feed)
        changes = [method for method, path in proxy.log if method in ("PUT", "POST")]
        assert changes[0] == "POST", "its manifest is removed first"
    assert check_whole(address) == [10]
    assert stores.Store(address).read("checkpoints/step-0000000010/state.index") == b"10again"


def test_a_damaged_checkpoint_is_set_aside_in_the_store_too(proxy, address, owner):
    with owner(address) as one:
        advance(one.folder, 10)
        advance(one.folder, 20)
        one.settle(no_feed)
        place = reading.checkpoint_folder(one.folder, 20)
        place.rename(place.with_suffix(".damaged"))
        one.settle(no_feed)
    assert check_whole(address) == [10]
    assert "checkpoints/step-0000000020.damaged/state.index" in stores.Store(address).tags()


def test_events_of_a_machine_whose_clock_is_ahead_come_along_and_get_another_name(proxy, address, owner):
    """TensorBoard reads them in the order of their names; those of now must stand last."""
    with owner(address) as one:
        advance(one.folder, 10)
        for stamp in (1000, 9999999999):
            (one.folder / f"train/events.out.tfevents.{stamp}.host").write_bytes(b"events")
        one.settle(no_feed)
    with owner(address, "another") as other:
        names = sorted(path.name for path in other.folder.glob("train/*"))
        assert names == ["events.out.tfevents.9999999999.host"]
        (other.folder / "train" / names[0]).rename(other.folder / "train/events.out.tfevents.2000.~000000.host")
        other.settle(no_feed)
    names = {name for name in stores.Store(address).tags("train") if "tfevents" in name}
    assert names == {"train/events.out.tfevents.1000.host", "train/events.out.tfevents.2000.~000000.host"}


def test_an_export_is_there_when_what_is_told_of_it_is(proxy, address, owner):
    with owner(address) as one:
        advance(one.folder, 10)
        for text in ("first", "second"):
            (one.folder / "export/variables").mkdir(parents=True, exist_ok=True)
            (one.folder / "export/variables/data").write_text(text)
            (one.folder / "export/metadata.json").write_text(json.dumps({"of": text}))
            del proxy.log[:]
            one.settle(no_feed)
            writes = [path for method, path in proxy.log if method == "PUT" and "/export/" in path]
            assert writes[-1].endswith("/export/metadata.json")
    with owner(address, "another") as other:
        assert (other.folder / "export/variables/data").read_text() == "second"


def test_a_reader_sees_what_comes_and_what_goes(proxy, address, owner, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "LOOK_SECONDS", 0.0)
    with owner(address) as one, copies.Copy(address, tmp_path / "copies", 5) as copy:
        assert reading.read_run(copy.folder) == {}
        for step in (10, 20, 30):
            advance(one.folder, step)
        one.settle(no_feed)
        assert reading.read_run(copy.folder)["step"] == 30
        assert reading.checkpoint_steps(copy.folder) == [20, 30]
        advance(one.folder, 40)
        one.settle(no_feed)
        assert reading.has_checkpoint(copy.folder, 40)
        carriers.bring(copy.folder, 20)
        assert reading.checkpoint_steps(copy.folder) == [30, 40]
        assert [line["step"] for line in reading.metric_lines(copy.folder)] == [10, 20, 30, 40]
    assert not any((tmp_path / "copies").iterdir()), "a copy goes with its reader"


@pytest.mark.parametrize(
    ("without", "bucket", "message"),
    [
        ("", "nothere", "there is no such bucket; make it, or name another"),
        ("AWS_ACCESS_KEY_ID", object_store.BUCKET, "cannot be opened: .*; set the credentials and the endpoint"),
    ],
)
def test_a_store_that_refuses_is_one_line(server, proxy, owner, monkeypatch, without, bucket, message):
    if without:
        monkeypatch.delenv(without)
    kind = "s3" if without else server[1]
    with pytest.raises(BadConfiguration, match=message) as raised, owner(f"{kind}://{bucket}/run"):
        pass
    assert "\n" not in str(raised.value) and "Debug source" not in str(raised.value)


def test_a_store_that_is_not_there_is_a_code_that_is_tried_again(owner, monkeypatch):
    for name, value in object_store.variables(9).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mirror, "_PATIENCE", 1.0)
    with pytest.raises(StoreLost, match="start again when the store can be reached") as raised, owner("s3://a/run"):
        pass
    assert raised.value.exit_code == 75 and "\n" not in str(raised.value)


def test_a_local_run_does_not_import_the_library():
    code = "import sys; import trainers.run.start, trainers.report; print('obstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


def test_without_the_library_an_address_is_one_line(tmp_path):
    code = "import sys; sys.modules['obstore'] = None; from trainers.world import stores; stores.Store('s3://a/b')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "need the package obstore, which is not installed" in done.stderr and "environment.py storage" in done.stderr


def test_names_of_folders_tell_addresses_apart():
    names = {paths.name_of(address) for address in ("s3://a/b", "s3://a-b/c", "s3://a/b-c", "gs://a/b")}
    assert len(names) == 4 and all(Path(name).name == name for name in names)
