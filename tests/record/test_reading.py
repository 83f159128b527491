"""The one reader of a run's files, on files as runs and kills leave them."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from trainers.record import reading
from trainers.record.run_record import RunRecord
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve


def test_a_line_that_a_killed_process_left_unfinished_is_left_out(tmp_path):
    lines = [{"step": 1, "split": "train", "loss": 2.0}, {"step": 1, "split": "eval", "loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "spl')
    assert reading.metric_lines(tmp_path) == lines
    assert reading.last_line(tmp_path, "train") == lines[0] and reading.last_line(tmp_path, "test") == {}
    assert reading.metric_lines(tmp_path / "nothing") == []


def test_checkpoints_are_found_by_their_names_alone(tmp_path):
    for name in ("step-0000000020", "step-0000000003", "step-0000000005.damaged", ".writing-step-0000000007-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert reading.checkpoint_steps(tmp_path) == [3, 20]
    assert not reading.has_checkpoint(tmp_path, 3)
    (reading.checkpoint_folder(tmp_path, 3) / "manifest.json").write_text('{"step": 3}')
    assert reading.has_checkpoint(tmp_path, 3) and reading.manifest(tmp_path, 3) == {"step": 3}
    assert reading.checkpoint_steps(tmp_path / "nothing") == []


def test_what_a_clock_decides_is_known_by_name():
    timed = ["steps_per_second", "examples_per_second", "model_flops_per_second", "utilization", "share_input"]
    assert all(reading.is_timing(name) for name in timed)
    assert not any(reading.is_timing(name) for name in ("loss", "accuracy", "gradient_norm", "step"))


def test_a_run_json_that_cannot_be_read_is_named(tmp_path):
    assert reading.read_run(tmp_path) == {}
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(BadConfiguration, match=r"run\.json cannot be read: .*; move it away or name another"):
        reading.read_run(tmp_path)


def test_an_evaluation_finds_the_table_of_a_run_that_began_in_another_directory(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("")
    monkeypatch.chdir(tmp_path)
    begun = resolve(Config(model="mlp", dataset="csv:rows.csv", label="y", run_dir=str(tmp_path / "run")))
    with contextlib.closing(RunRecord(begun)) as record:
        record.begin()
    follower = Config(mode="evaluate", run_dir=str(tmp_path / "run"))
    assert reading.config_of_run(follower, ()).dataset == "csv:rows.csv"
    monkeypatch.chdir("/")
    assert reading.config_of_run(follower, ()).dataset == f"csv:{tmp_path}/rows.csv"
    given = dataclasses.replace(follower, dataset=f"csv:{tmp_path}/./rows.csv")
    assert reading.config_of_run(given, ("dataset",)).dataset == given.dataset
    with pytest.raises(BadConfiguration, match="differs from csv:rows.csv of --run_dir"):
        reading.config_of_run(dataclasses.replace(follower, dataset="csv:/rows.csv"), ("dataset",))


@pytest.mark.parametrize(
    ("recorded", "added"),
    [
        ({"dataset": "http.server:test,port=8000"}, "--dataset=http.server:test,port=8000"),
        ({"model": "http.server:test"}, "--model=http.server:test"),
        ({"loss": "keras.losses:Poisson"}, "--loss=keras.losses:Poisson"),
        ({"optimizer": "keras.optimizers:Lion"}, "--optimizer=keras.optimizers:Lion"),
        ({"schedule": "http.server:test"}, "--schedule=http.server:test"),
        ({"optimizer_for": "a.*=keras.optimizers:Lion"}, "'--optimizer_for=a.*=keras.optimizers:Lion'"),
        ({"model": "http.server:test", "dataset": "a.b:c,x=1\n2"}, "--model=http.server:test '--dataset=a.b:c,x=1 2'"),
    ],
)
def test_what_a_record_alone_names_is_not_imported(tmp_path, recorded, added):
    flags = Config(model="mlp", dataset="digits").values() | recorded
    (tmp_path / "run.json").write_text(json.dumps({"loop": "supervised", "flags": flags}))
    follower = Config(mode="evaluate", run_dir=str(tmp_path))
    with pytest.raises(BadConfiguration) as failure:
        reading.config_of_run(follower, ())
    assert str(failure.value).endswith(f"if you trust it, add {added}") and "\n" not in str(failure.value)
    named = reading.config_of_run(dataclasses.replace(follower, **recorded), tuple(recorded))
    assert named.values(recorded) == recorded


def test_an_end_counts_when_it_is_final_and_late_enough():
    ended = {"ended": "2026-01-02T00:00:00+00:00", "exit_code": 0}
    assert reading.has_ended(ended) and reading.has_ended(ended | {"exit_code": 65})
    assert not reading.has_ended(ended | {"exit_code": 75}) and not reading.has_ended({"ended": None})
    assert not reading.has_ended(ended, after="2026-01-03T00:00:00+00:00")


def test_files_are_read_in_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "metadata.json").write_bytes('{"classes": ["café"]}'.encode())
    code = (
        "import sys\nfrom pathlib import Path\nfrom trainers.record import reading\n"
        "print(ascii(reading.read_json(Path(sys.argv[1]))['classes']))\n"
    )
    env = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "metadata.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "['caf\\xe9']\n", done.stderr


def test_an_export_without_metadata_is_not_written(tmp_path):
    folder = tmp_path / "export"
    assert not reading.is_exported(tmp_path, "saved_model", 3)
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"")
    assert not reading.is_exported(tmp_path, "saved_model", 3)
    (folder / "metadata.json").write_text('{"step": 3, "formats": ["saved_model"]}')
    assert reading.is_exported(tmp_path, "saved_model", 3) and not reading.is_exported(tmp_path, "keras", 3)


def test_the_last_line_of_a_split_is_found_at_the_end_of_a_long_file_and_at_its_begin(tmp_path):
    train = "".join(json.dumps({"step": step, "split": "train", "loss": 0.5}) + "\n" for step in range(9000))
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "split": "eval"}) + "\n" + train + '{"step": 9000, "s'
    )
    assert reading.last_line(tmp_path, "train")["step"] == 8999
    assert reading.last_line(tmp_path, "eval") == {"step": 1, "split": "eval"}
    assert reading.last_line(tmp_path, "test") == {} == reading.last_line(tmp_path / "none", "eval")
