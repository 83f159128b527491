"""Paths that users name: what they are on this machine, and when two of them are one."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from trainers.settings import paths
from trainers.settings.config import Config
from trainers.settings.rules import default_run_dir, resolve

SCRIPTS = {
    "trainers/report.py": ["hdfs://bucket/run"],
    "trainers/report.py --out": ["runs", "--out=gs://bucket/report.html"],
    "trainers/predict.py": ["hdfs://bucket/run", "--input=eval", "--output=out.csv"],
    "trainers/predict.py --output": ["runs/first", "--input=eval", "--output=gs://bucket/out.csv"],
    "trainers/predict.py --input": ["runs/first", "--input=csv:hdfs://bucket/rows.csv", "--output=out.csv"],
    "trainers/generate.py": ["hdfs://bucket/run", "--prompt=x"],
    "trainers/sweep.py": ["--sweep_dir=hdfs://bucket/sweep"],
    "trainers/sweep.py --spec": ["--spec=gs://bucket/sweep.json"],
    "trainers/sweep.py --data_dir": ["--data_dir=hdfs://bucket/data"],
    "trainers/benchmark.py": ["--out_dir=gs://bucket/out"],
    "trainers/graph_benchmark.py": ["--out_dir=gs://bucket/out"],
    "trainers/tensor_check.py": ["--json=gs://bucket/check.json"],
    "launch/prove.py": ["--json=hdfs://bucket/prove.json"],
    "launch/prove.py --data_dir": ["--data_dir=hdfs://bucket/data"],
    "launch/scaling.py": ["--out_dir=gs://bucket/out"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_takes_an_address_for_a_path(script, tmp_path):
    command = [sys.executable, str(ROOT / script.split()[0]), *SCRIPTS[script]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "s://bucket" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["prove", "workers"])
def test_a_number_that_no_machine_can_serve_is_refused(script, tmp_path):
    flag = {"prove": "--steps=9223372036854775808", "workers": "--workers=9223372036854775808"}[script]
    command = [sys.executable, str(ROOT / f"launch/{script}.py"), flag]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and "9223372036854775808 is above" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_of_one_second_have_folders_of_their_own():
    assert len({resolve(Config(model="mlp")).run_dir for _ in range(50)}) == 50


@pytest.mark.parametrize("dataset", ["csv:" + "/very_long" * 30, "text:" + "字" * 300, "text:a\udcffb"])
def test_the_default_folder_of_a_long_name_can_be_made(tmp_path, dataset):
    path = tmp_path / default_run_dir(Config(model="mlp", dataset=dataset))
    path.mkdir(parents=True)
    assert path.parent.name == "runs"


def test_spellings_of_one_path_are_one_data_set(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("")
    (tmp_path / "link.csv").symlink_to("rows.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("rows.csv", "./rows.csv", "~/rows.csv", "link.csv", str(tmp_path / "rows.csv")):
        assert not paths.differs({"dataset": "csv:rows.csv"}, "dataset", f"csv:{text}"), text
        assert paths.differs({"dataset": "csv:rows.csv"}, "dataset", f"text:{text}"), text
    assert paths.differs({"dataset": "csv:rows.csv"}, "dataset", "csv:other.csv")
    assert paths.differs({"dataset": "digits"}, "dataset", "diabetes")
    began = {"dataset": "images:photos", paths.DATASET_PATH: str(tmp_path / "photos")}
    monkeypatch.chdir("/")
    assert not paths.differs(began, "dataset", f"images:{tmp_path}/photos/")
    assert not paths.differs(began, "dataset", "images:~/photos")


def without_home(folder, *words):
    """A user of a container: no HOME, and a number that passwd does not know, who may read the interpreter."""
    if os.geteuid() or shutil.which("setpriv") is None:
        pytest.skip("another user needs root and setpriv")
    capabilities = "+dac_override,+dac_read_search"
    command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", f"--inh-caps={capabilities}"]
    command += [f"--ambient-caps={capabilities}", "env", "-u", "HOME", f"PYTHONPATH={ROOT}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_a_user_without_a_home_trains_beside_the_runs_and_is_told(tmp_path):
    script = str(ROOT / "trainers/custom_loop.py")
    done = without_home(tmp_path, sys.executable, script, "--model=mlp", "--train_steps=2", "--run_dir=run")
    assert done.returncode == 0, done.stderr
    assert f"no home directory is known: --data_dir is {tmp_path / 'tensorflow_datasets'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run", "tensorflow_datasets"}


def test_without_a_home_a_path_below_it_is_one_line(tmp_path):
    done = without_home(tmp_path, sys.executable, str(ROOT / "trainers/custom_loop.py"), "--run_dir=~/run")
    assert done.returncode == 2
    assert done.stderr.endswith("the home directory is not known; set HOME, or write the path without ~\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_record_that_is_older_than_a_flag_has_its_default():
    before = paths.completed({"model": "mlp", "dataset": "digits"}, Config)
    assert before["loop"] == "supervised"
    assert not paths.differs(before, "augment", "") and paths.differs(before, "augment", "flip")
    assert not paths.differs(before, "document_mask", False) and paths.differs(before, "document_mask", True)
    assert not paths.differs({}, "augment", "flip")
