"""`--tracker`: what a real MLflow server and W&B's files hold of a run, and that neither stops, slows nor fails one."""

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import time
import urllib.request

import object_store
import pytest
from conftest import metrics

from launch import environment
from launch.workers import free_ports
from trainers.record import carriers, reading, trackers, tracking
from trainers.record.clock import Clock
from trainers.record.run_record import RunRecord
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve
from trainers.world.watchdog import Watchdog

VARIABLES = ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_IDENTITY_TOKEN_FILE")
FLAGS = ("--model=mlp", "--batch_size=32", "--log_every=20", "--eval_every=100", "--checkpoint_every=100")
# Other tests share the cores with the server: who is to get an answer waits for it, others do not.
PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}
QUICK = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@pytest.fixture(autouse=True)
def variables(monkeypatch, tmp_path):
    """None of this machine's own, and none that stays."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for library in trackers._LIBRARIES.values():
        for name, value in library.variables.items():
            monkeypatch.setenv(name, value)
    for name, value in PATIENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "END_SECONDS", 240.0)
    monkeypatch.setenv("HOME", str(tmp_path))


def with_mlflow():
    return pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (requirements/mlflow.txt)")


# Before a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_without_the_package_one_line_names_the_command_that_installs_it(monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check("")
    with pytest.raises(BadConfiguration) as raised:
        trackers.check(name)
    assert re.search(rf"is not installed; pip install .* -r requirements/{name}\.txt$", str(raised.value))


def test_where_to_is_the_trackers_own_variables_to_say(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(BadConfiguration, match="MLFLOW_TRACKING_URI names, which is not set; set it"):
        trackers.check("mlflow")
    with pytest.raises(BadConfiguration, match="needs WANDB_API_KEY, which is not set; set it, or WANDB_MODE=offline"):
        trackers.check("wandb")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    trackers.check("mlflow")
    (tmp_path / ".netrc").write_text("")
    trackers.check("wandb")
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check("wandb")


def test_lines_come_once_and_whole_and_from_the_begin_where_the_file_was_replaced(tmp_path, monkeypatch):
    path, line = tmp_path / "metrics.jsonl", '{"step": %d, "split": "train", "loss": null}\n'
    lines = tracking.Lines(path)
    steps = lambda: [line["step"] for line in lines.take()[0]]  # noqa: E731
    assert lines.take() == ([], False)
    path.write_text(line % 1 + "torn}\n" + line % 2 + '{"step": 3, "spl')
    assert steps() == [1, 2] and lines.take() == ([], False)
    with open(path, "a") as file:
        file.write('it": "train"}\n')
    assert steps() == [3]
    (tmp_path / "aside").write_text(line % 1 + line % 2)
    os.replace(tmp_path / "aside", path)
    assert steps() == [1, 2]
    lines.again()
    monkeypatch.setattr(tracking, "_MOST_BYTES", 50)
    assert lines.take()[1] and steps() == [2] and steps() == []


# A run that is told of, without its training ----------------------------------------------------------------------


@contextlib.contextmanager
def told_of(run_dir, code=0, **flags):
    """An attempt at a run: within the block a tracker is told of what its record is given."""
    config = resolve(Config(model="mlp", run_dir=str(run_dir), tracker="mlflow,experiment=digits", **flags))
    clock = Clock()
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(0))
        config = stack.enter_context(carriers.carried(config, chief=True))
        record = stack.enter_context(contextlib.closing(RunRecord(config, clock=clock)))
        record.goodput.begin(0)
        record.begin()
        with tracking.Tracking(record, watchdog):
            yield record
            record.end(code, "complete")


def train_lines(*steps, loss=1.0):
    return [{"step": step, "split": "train", "loss": loss / step, "lost": float("nan")} for step in steps]


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    """The address of a real server, which starts with the first test that asks."""
    program = environment.venv("trackers") / "bin/mlflow"
    if not program.exists():
        pytest.skip("no MLflow server is here: launch/environment.py trackers")
    folder, (port,) = tmp_path_factory.mktemp("mlflow"), free_ports(1)
    words = [program, "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    words += [f"--backend-store-uri=sqlite:///{folder / 'db'}", f"--default-artifact-root={folder / 'artifacts'}"]
    env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, cwd=folder, env=env, start_new_session=True)
    try:
        end = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def history(client, run_id, name):
    return [(one.step, one.value) for one in client.get_metric_history(run_id, name)]


def test_a_resumed_run_goes_on_with_its_tracked_run_and_nothing_is_told_twice(mlflow_server, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    client, run_dir = with_mlflow().MlflowClient(), tmp_path / "run"
    with told_of(run_dir, code=143, train_steps=100) as record:
        record.append_metrics(train_lines(10, 20, 30))
    noted = reading.read_json(run_dir / reading.TRACKER)
    assert client.get_run(noted["id"]).info.status == "KILLED"
    with told_of(run_dir, train_steps=200) as record:
        record.rewind_metrics(20)
        record.append_metrics(train_lines(30, 40))
        record.append_metrics([{"step": 40, "split": "eval", "loss": 0.5}])
    assert reading.read_json(run_dir / reading.TRACKER)["id"] == noted["id"]
    run = client.get_run(noted["id"])
    assert history(client, noted["id"], "train/loss") == [(step, 1 / step) for step in (10, 20, 30, 40)]
    assert history(client, noted["id"], "eval/loss") == [(40, 0.5)]
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["train_steps"] == "100" and run.data.tags["lockstep.flag.train_steps"] == "200"
    tags = {name: run.data.tags[f"lockstep.{name}"] for name in ("attempts", "exit_code", "exit_reason", "run_dir")}
    assert tags == {"attempts": "2", "exit_code": "0", "exit_reason": "complete", "run_dir": str(run_dir)}
    assert "goodput/updates" in run.data.metrics and "train/lost" in run.data.metrics
    # An attempt that was killed before it could note the id.
    (run_dir / reading.TRACKER).write_text(json.dumps(noted | {"id": None}))
    with told_of(run_dir):
        pass
    assert reading.read_json(run_dir / reading.TRACKER)["id"] == noted["id"]
    # After the run was deleted there, another one gets everything.
    client.delete_run(noted["id"])
    with told_of(run_dir):
        pass
    other = reading.read_json(run_dir / reading.TRACKER)["id"]
    assert other != noted["id"] and len(history(client, other, "train/loss")) == 4


def test_a_run_in_a_bucket_goes_on_with_its_tracked_run_on_another_machine(mlflow_server, monkeypatch, tmp_path):
    pytest.importorskip("obstore", reason="obstore is not installed: launch/environment.py storage")
    if object_store.interpreter() is None:
        pytest.skip("moto is not installed: launch/environment.py emulators")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    client = with_mlflow().MlflowClient()
    with object_store.s3_server() as port, object_store.environment_of(port):
        for number, steps in enumerate([(10, 20), (30,)]):
            with told_of("s3://bucket/runs/first", cache_dir=str(tmp_path / str(number))) as record:
                assert [line["step"] for line in reading.metric_lines(record.directory)] == [10, 20][: 2 * number]
                record.append_metrics(train_lines(*steps))
            noted = reading.read_json(record.directory / reading.TRACKER)
    told = history(client, noted["id"], "train/loss")
    assert told == [(step, 1 / step) for step in (10, 20, 30)]
    run = client.get_run(noted["id"])
    assert run.info.run_name == "first" and run.data.tags["lockstep.run_dir"] == "s3://bucket/runs/first"


def test_steps_that_a_run_goes_back_over_are_told_anew(mlflow_server, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    client, run_dir = with_mlflow().MlflowClient(), tmp_path / "run"
    with told_of(run_dir) as record:
        record.append_metrics(train_lines(10, 20, 30))
        while reading.read_json(run_dir / reading.TRACKER).get("sent") != {"train": 30}:
            time.sleep(0.05)
        record.rewind_metrics(10)
        record.write(rewinds=[{"at": 30, "to": 10, "ahead": 20}])
        record.append_metrics(train_lines(20, 30, 40, loss=2.0))
    told = history(client, reading.read_json(run_dir / reading.TRACKER)["id"], "train/loss")
    assert sorted(told) == sorted([(s, 1 / s) for s in (10, 20, 30)] + [(s, 2 / s) for s in (20, 30, 40)])


def test_what_a_server_that_was_down_has_missed_comes_later(mlflow_server, monkeypatch, tmp_path, capfd):
    run_dir, (port,) = tmp_path / "run", free_ports(1)
    client = with_mlflow().MlflowClient(mlflow_server)
    with monkeypatch.context() as down:
        for name, value in QUICK.items():
            down.setenv(name, value)
        down.setattr(tracking, "END_SECONDS", 3.0)
        down.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
        with told_of(run_dir) as record:
            record.append_metrics(train_lines(10, 20))
    said = capfd.readouterr().err
    assert said.count("; the run goes on, and what is not sent is tried again") == 1, said
    assert "not all was sent within 3 s of the end" in said and "secret" not in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    with told_of(run_dir) as record:
        record.append_metrics(train_lines(30))
    told = history(client, reading.read_json(run_dir / reading.TRACKER)["id"], "train/loss")
    assert [step for step, _ in told] == [10, 20, 30]
    assert "--tracker" not in capfd.readouterr().err


@contextlib.contextmanager
def hanging_server():
    """The port of a server that takes every connection and answers nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield server.getsockname()[1]


def test_neither_a_record_nor_its_end_waits_for_a_server_that_hangs(monkeypatch, tmp_path, capfd):
    with_mlflow()
    monkeypatch.setattr(tracking, "END_SECONDS", 2.0)
    with hanging_server() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with told_of(tmp_path / "run") as record:
            record.append_metrics(train_lines(10))
            began = time.monotonic()
        assert time.monotonic() - began < 8
    assert "not all was sent within 2 s of the end" in capfd.readouterr().err


# Real runs --------------------------------------------------------------------------------------------------------


def killed_and_resumed(trainer, run_dir, *flags, env):
    """A run that is killed after step 300, and started again: its last step, and what the second attempt prints."""
    flags = (*FLAGS, f"--run_dir={run_dir}", "--schedule=constant", *flags)
    one = trainer(*flags, "--train_steps=1000000", env=env)
    while not reading.read_json(run_dir / reading.TRACKER).get("sent", {}).get("train", 0) >= 300:
        assert one.process.poll() is None, one.wait()
        time.sleep(0.02)
    one.process.kill()
    one.wait()
    last = reading.last_line(run_dir, "train")["step"] // 100 * 100 + 1000
    code, output = trainer(*flags, f"--train_steps={last}", env=env).wait()
    assert code == 0 and "resumed from the checkpoint of step" in output, output
    for _ in range(5):
        if "--tracker" not in output:
            return last, output
        code, output = trainer(*flags, f"--train_steps={last}", env=env).wait()  # sends what a slow server has missed
        assert code == 0 and "complete already" in output, output
    raise AssertionError(output)


def test_mlflow_has_the_lines_of_a_run_that_was_killed_and_resumed(mlflow_server, trainer, tmp_path):
    run_dir, client = tmp_path / "run", with_mlflow().MlflowClient(mlflow_server)
    env = {"MLFLOW_TRACKING_URI": mlflow_server} | PATIENT
    last, output = killed_and_resumed(trainer, run_dir, "--tracker=mlflow,experiment=killed", "--export=keras", env=env)
    run_id = reading.read_json(run_dir / reading.TRACKER)["id"]
    assert f"tracker   mlflow, run run ({run_id})" in output
    (run,) = client.search_runs([client.get_experiment_by_name("killed").experiment_id])
    assert run.info.run_id == run_id and run.info.status == "FINISHED"
    for split in ("train", "eval"):
        told = dict(history(client, run_id, f"{split}/loss"))
        lines = {line["step"]: line["loss"] for line in metrics(run_dir) if line["split"] == split}
        assert max(lines) == last and told == pytest.approx(lines, rel=1e-4)
    assert run.data.tags["lockstep.export"] == f"{run_dir}/export" and run.data.tags["lockstep.formats"] == "keras"
    assert run.data.metrics["goodput/updates"] > 0


def wandb_records(path):
    """The records of a file that W&B writes: entries in blocks of 32 KiB, as LevelDB has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of it, or its last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_wandb_offline_has_the_lines_of_a_run_that_was_killed_and_resumed(trainer, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed (requirements/wandb.txt)")
    run_dir = tmp_path / "run"
    env = {"WANDB_MODE": "offline"}
    last, _ = killed_and_resumed(trainer, run_dir, "--tracker=wandb,project=digits", env=env)
    run_id = reading.read_json(run_dir / reading.TRACKER)["id"]
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) >= 2 and {path.name for path in files} == {f"run-{run_id}.wandb"}
    records = [record for path in files for record in wandb_records(path)]
    assert {(one.run.run_id, one.run.project) for one in records if one.run.run_id} == {(run_id, "digits")}
    told = {"train": {}, "eval": {}}
    for record in records:
        values = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
        for split, lines in told.items():
            if f"{split}/loss" in values:
                lines[int(values["step"])] = float(values[f"{split}/loss"])
    for split, known in told.items():
        lines = {line["step"]: line["loss"] for line in metrics(run_dir) if line["split"] == split}
        assert max(lines) == last and known == pytest.approx(lines, rel=1e-4)
    summary = {item.key: item.value_json for record in records for item in record.summary.update}
    assert summary["lockstep/exit_code"] == '"0"' and summary["lockstep/exit_reason"].startswith('"complete')


@pytest.mark.parametrize("fault", ["down", "hangs"])
def test_a_run_ends_as_always_whatever_its_tracker_does(trainer, tmp_path, fault):
    with_mlflow()
    with hanging_server() as port:
        env = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port if fault == 'hangs' else free_ports(1)[0]}"}
        flags = (*FLAGS, "--train_steps=400", "--step_timeout=8", "--tracker=mlflow")
        one = trainer(*flags, f"--run_dir={tmp_path / 'run'}", env=env)
        code, output = one.wait()
    assert code == 0 and "complete: step 400" in output, output
    lines = [line for line in output.splitlines() if line.startswith("--tracker mlflow: ")]
    assert 1 <= len(lines) <= 2 and "not all was sent within 10 s of the end" in lines[-1], output
