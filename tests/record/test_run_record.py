"""The files of a run, and the folder that they lie in."""

import contextlib
import shutil

import pytest

from trainers.record.run_record import RunRecord
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration, RunDirRemoved
from trainers.settings.rules import resolve


@pytest.fixture
def record(tmp_path):
    with contextlib.closing(RunRecord(resolve(Config(model="mlp", run_dir=str(tmp_path / "run"))))) as record:
        record.begin()
        yield record


def test_nothing_is_written_into_a_folder_that_was_removed(record):
    """Neither by the trainer nor by an evaluator, whose folder is one of the run."""
    shutil.rmtree(record.directory)
    for write in (record.check_there, record.write, lambda: record.append_metrics([{"step": 1}])):
        with pytest.raises(RunDirRemoved, match="--run_dir .*run was removed while the run wrote to it"):
            write()
    assert not record.directory.exists()
    record.make_again()
    assert (record.directory / "flags.txt").exists()
    with pytest.raises(BadConfiguration, match="in use by another run"):
        RunRecord(record.config)


def test_a_lock_that_was_removed_is_not_a_folder_that_was(record):
    (record.directory / ".lock").unlink()
    record.append_metrics([{"step": 1, "split": "train"}])
    assert record.last("train") == {"step": 1, "split": "train"}


def test_run_json_says_where_a_table_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(Config(model="mlp", dataset="csv:rows.csv", label="y", run_dir="run"))
    with contextlib.closing(RunRecord(config)) as record:
        assert record.facts["dataset_path"] == str(tmp_path / "rows.csv")
    monkeypatch.chdir("/")
