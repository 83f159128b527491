"""Scripts that read runs take addresses: the report, a sweep's ranking, TensorBoard's copy."""

import json
import os
import signal
import subprocess
import sys
import time

import object_store
import pytest

object_store.skip_where_missing()

from conftest import ROOT

from launch import prove
from trainers import report, sweep
from trainers.record import carriers, copies, reading
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import stores

FACTS = {"exit_code": 0, "ended": "now", "step": 3, "final": {"eval": {"loss": 0.5}}, "flags": {"model": "mlp"}}
FACTS |= {"best_metric": "loss", "best_mode": "min", "seconds": {"train": 1.0}, "versions": {}}


def put_run(address, loss=0.5):
    store = stores.Store(address)
    store.write("run.json", json.dumps(FACTS | {"final": {"eval": {"loss": loss}}}).encode())
    store.write("metrics.jsonl", b'{"step": 3, "split": "eval", "loss": 0.5}\n')


def test_the_report_shows_runs_of_a_store_beside_those_of_folders(proxy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_run("s3://bucket/report/first")
    (tmp_path / "local").mkdir()
    (tmp_path / "local/run.json").write_text(json.dumps(FACTS))
    report.main(report.settings_from(["report", "s3://bucket/report/first", "local"]))
    page = (tmp_path / "report.html").read_text()
    assert "first" in page and "local" in page
    assert not any((tmp_path / "users cache/lockstep/copies").iterdir()), "nothing is left"
    with pytest.raises(
        BadConfiguration, match="^s3://bucket/report/none holds no run.json; name the --run_dir of a run"
    ):
        report.main(report.settings_from(["report", "s3://bucket/report/none"]))


def test_a_sweep_ranks_the_runs_of_a_store(proxy, tmp_path, capsys):
    """They are complete already, so none is started."""
    settings = sweep.settings_from(["sweep", "--sweep_dir=s3://bucket/sweep", "--model=mlp", "--seed=1,2"])
    for run, loss in zip(settings.runs, (0.7, 0.4), strict=True):
        put_run(f"s3://bucket/sweep/{run.name}", loss)
        store, facts = stores.Store(f"s3://bucket/sweep/{run.name}"), reading.run_at(f"s3://bucket/sweep/{run.name}")
        store.write("run.json", json.dumps(facts | {"flags": run.config.values()}).encode())
    assert sweep.main(settings) == 0
    ranking = json.loads(stores.Store("s3://bucket/sweep").read("ranking.json"))
    assert [row["loss"] for row in ranking] == [0.7, 0.4]
    assert "complete already, loss 0.4" in capsys.readouterr().out


def test_an_export_is_brought_whole_and_a_folder_of_runs_is_not(proxy, tmp_path):
    store = stores.Store("s3://bucket/made/export")
    store.write("metadata.json", b"{}")
    store.write("variables/data", b"x" * 100)
    with carriers.readable("s3://bucket/made/export") as folder:
        assert (folder / "variables/data").read_bytes() == b"x" * 100
        assert carriers.shown(folder) == carriers.identity(folder) == "s3://bucket/made/export"
    with carriers.readable("s3://bucket/made") as folder:
        assert not (folder / "export/variables").exists()
    with carriers.readable(tmp_path) as folder:
        assert folder == tmp_path and carriers.identity(folder) == str(tmp_path.resolve())


def test_what_tensorboard_reads_grows_in_place(proxy, tmp_path):
    """Who has an event file open sees what comes; checkpoints and hidden files do not come."""
    store, seen = stores.Store("s3://bucket/board"), {}
    events = "first/train/events.out.tfevents.1.host"
    for name in (events, "first/checkpoints/step-0000000001/state.index", "first/.lock", "first/run.json"):
        store.write(name, b"one")
    assert copies.follow(store, tmp_path, seen) == 2
    with open(tmp_path / events, "rb") as reader:
        assert reader.read() == b"one"
        store.write(events, b"one, two")
        assert copies.follow(store, tmp_path, seen) == 1
        assert reader.read() == b", two"
    assert copies.follow(store, tmp_path, seen) == 0
    assert not (tmp_path / "first/checkpoints").exists() and not (tmp_path / "first/.lock").exists()


def test_tensorboard_is_started_on_a_copy_and_ended_with_it(proxy, tmp_path):
    stores.Store("s3://bucket/shown").write("first/train/events.out.tfevents.1.host", b"")
    board = tmp_path / "tensorboard"
    board.mkdir()
    (board / "__init__.py").write_text("")
    (board / "main.py").write_text("import sys, time; print(sys.argv, flush=True); time.sleep(60)")
    command = [sys.executable, str(ROOT / "launch/follow_store.py"), "s3://bucket/shown", "--port=1"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    one = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    words = one.stdout.readline()
    assert "--logdir=" in words and "--port=1" in words
    folder = words.partition("--logdir=")[2].partition("'")[0]
    assert os.path.exists(f"{folder}/first/train")
    one.send_signal(signal.SIGTERM)
    assert one.wait(20) != 0
    until = time.monotonic() + 10
    while os.path.exists(folder) and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(folder)


def test_where_files_are_kept_follows_the_users_folder_for_such(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_dir("") == str(tmp_path / "lockstep")
    assert paths.cache_dir("~/x") == os.path.expanduser("~/x")
    with pytest.raises(BadConfiguration, match="--cache_dir 's3://b/c' is an address, not a path"):
        paths.cache_dir("s3://b/c")


def test_the_verdicts_of_a_proof_may_go_to_a_store(proxy, tmp_path):
    for place in ("s3://bucket/proofs/first.json", str(tmp_path / "new/first.json")):
        settings = prove.settings_from(["prove", "--model=mlp", "--rows=replicas", f"--json={place}"])
        prove.write(settings.options.json, settings, True, [])
    stored = stores.Store("s3://bucket/proofs").read("first.json")
    assert json.loads(stored)["holds"] is True and stored == (tmp_path / "new/first.json").read_bytes()
