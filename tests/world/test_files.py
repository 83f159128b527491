"""Files are whole or not there, whatever happens while they are written."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from models import metrics
from trainers import report, sweep
from trainers.record import reading
from trainers.run import start
from trainers.settings.config import Config
from trainers.world import files


def test_a_reader_sees_the_old_text_or_the_new(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.aside(path) as place:
        place.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.aside(path) as place:
        place.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder_whole(tmp_path):
    path = tmp_path / "folder"
    for name in ("first", "second"):
        with files.aside(path) as place:
            place.mkdir()
            (place / name).write_text("")
    assert [file.name for file in path.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError), files.aside(path) as place:
        place.mkdir()
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [path]


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom trainers.world import files\n"
        "with files.aside(Path(sys.argv[1])) as place:\n"
        "    place.write_text('new')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL and path.read_text() == "old"
    assert os.listdir(tmp_path) != []


@pytest.mark.parametrize("dies_in", ["shutil.rmtree", "os.replace"])
def test_a_process_that_is_killed_while_it_replaces_a_folder_leaves_no_half_of_one(tmp_path, dies_in):
    path = tmp_path / "folder"
    path.mkdir()
    for name in ("one", "two"):
        (path / name).write_text("old")
    code = (
        "import os, shutil, signal, sys\nfrom pathlib import Path\nfrom trainers.world import files\n"
        "def dies(place, *_, **__):\n"
        "    if sys.argv[2] == 'shutil.rmtree':\n        os.unlink(Path(place) / 'one')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "module, name = sys.argv[2].split('.')\nsetattr(sys.modules[module], name, dies)\n"
        "with files.aside(Path(sys.argv[1])) as place:\n"
        "    place.mkdir()\n    (place / 'one').write_text('new')\n    (place / 'two').write_text('new')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), dies_in], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    found = {file.name: file.read_text() for file in path.iterdir()} if path.exists() else {}
    assert found in ({}, {"one": "new", "two": "new"}, {"one": "old", "two": "old"})


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("")

    def refuses(*arguments):
        raise OSError("refused")

    monkeypatch.setattr(files.os, "replace", refuses)
    with pytest.raises(OSError, match="refused"), files.aside(path) as place:
        place.mkdir()
    assert [file.name for file in path.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_folder_is_replaced_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/old").write_text("")
    path = tmp_path / "link"
    path.symlink_to("elsewhere")
    with files.aside(path) as place:
        place.mkdir()
    assert path.is_dir() and not path.is_symlink() and (tmp_path / "elsewhere/old").exists()
    assert {each.name for each in tmp_path.iterdir()} == {"elsewhere", "link"}


def test_what_is_not_finite_is_null_in_json_and_no_number_when_it_is_read():
    facts = {"loss": math.nan, "final": {"eval": {"r2": -math.inf}, "all": (1.5, np.float64("inf"), True, None, "NaN")}}
    text = files.to_json(facts)
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"loss": None, "final": {"eval": {"r2": None}, "all": [1.5, None, True, None, "NaN"]}}
    assert math.isnan(reading.numbers(found)["loss"])


def test_every_file_of_json_is_written_by_the_one_function():
    """The others write what no metric is in: messages between processes, digests, and what Kubernetes is given."""
    messages = {"world/cluster.py", "world/rendezvous.py", "record/checkpoints.py", "world/files.py"}
    messages |= {"run/workers.py", "record/store_lock.py"}
    messages |= {"measure/input_contenders.py", "measure/input_pipelines.py", "doctor.py"}
    messages |= {"measure/jax_peers.py", "measure/jax_process.py", "input/object_cache.py"}
    messages |= {"input/receiving.py", "kube/sending.py", "kube/data_jobs.py"}
    messages |= {"health/probe.py", "health/libraries.py", "pack_tokens.py"}
    messages |= {"workers.py", "environment.py", "proof/prover.py", "proof/served.py", "kube/submission.py"}
    writers = {
        str(path.relative_to(ROOT / room))
        for room in ("trainers", "launch", "models")
        for path in (ROOT / room).rglob("*.py")
        if "json.dump" in path.read_text()
    }
    assert writers <= messages


def test_a_run_whose_metrics_are_no_numbers_is_read_by_everybody(run, monkeypatch):
    monkeypatch.setattr(metrics.Accuracy, "result_of", lambda self, total, count: total[0] * np.nan)
    summary = run("first", train_steps=4, eval_every=2, log_every=1)
    texts = [(summary.run_dir / "run.json").read_text()]
    for text in (*texts, *(summary.run_dir / "metrics.jsonl").read_text().splitlines()):
        json.loads(text, parse_constant=pytest.fail)
    facts = reading.read_run(summary.run_dir)
    assert facts["final"]["eval"]["accuracy"] is None
    for again in (run("first", train_steps=4, eval_every=2), start.complete_already(Config(**facts["flags"]))):
        assert math.isnan(again.eval["accuracy"]) and again.eval["loss"] == summary.eval["loss"]
    assert "accuracy nan" in str(sweep.Outcome("first", 0, facts))
    page = report.page([report.load(summary.run_dir)])
    assert "<td>nan</td>" in page and "<svg" in page
