"""The check of a machine: all parts run whatever becomes of the others, and a page tells of each."""

import re
import subprocess
import sys
import time

import faults
import pytest
from conftest import ROOT

from launch import gpu_check
from launch.gpu_check import Part
from trainers.settings.exit_codes import BadConfiguration


def python(code):
    """The words of a part that runs a program."""
    return ("-c", code)


@pytest.fixture
def parts(monkeypatch):
    """`parts(part, …)` makes the check run these."""
    return lambda *chosen: monkeypatch.setattr(gpu_check, "parts", lambda folder, gpus: list(chosen))


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.2)
    ended = tmp_path / "ended"
    child = f"import subprocess; subprocess.Popen('sleep 60; touch {ended}', shell=True); print('begun', flush=True)"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parts(
        Part("first", "fails", python("raise SystemExit('no such thing')"), 30),
        Part("second", "hangs", python(f"{child}; {deaf}"), 1.0),
        Part("third", "works", python(f"open(r'{tmp_path}/third.json', 'w').close(); print('done')"), 30),
    )
    assert gpu_check.main(tmp_path) == 1 and not ended.exists()
    text = (tmp_path / "index.md").read_text()
    assert "1 of 3 parts are fine" in text
    assert re.search(r"\| first: fails \| FAILED \| 1 \| 0 \| \[first.txt\]\(first.txt\) \|", text), text
    assert re.search(r"\| second: hangs \| not done after 1 s \| – \|", text)
    assert re.search(
        r"\| third: works \| fine \| 0 \| 0 \| \[third.txt\]\(third.txt\) \| \[third.json\]\(third.json\) \|", text
    )
    assert "no such thing" in text and "begun" in text and "done" in text


def test_the_pages_and_pictures_of_a_part_are_linked(parts, tmp_path):
    parts(
        Part("only", "writes", python(f"import os; os.mkdir(r'{tmp_path}/out'); open(r'{tmp_path}/out/a.md', 'w')"), 30)
    )
    assert gpu_check.main(tmp_path) == 0 and "[out/a.md](out/a.md)" in (tmp_path / "index.md").read_text()


def test_all_parts_that_work_end_with_0(parts, tmp_path):
    parts(Part("only", "works", python("print('done')"), 30))
    assert gpu_check.main(tmp_path) == 0


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_the_parts_take_ten_minutes_at_most_and_have_flags_that_exist(gpus, tmp_path):
    planned = gpu_check.parts(tmp_path, gpus)
    assert sum(part.seconds for part in planned) <= gpu_check.MOST_SECONDS == 600
    assert [part.name for part in planned] == ["doctor", "tensor_check", "prove", "benchmark", "profile"]
    from launch import doctor, prove
    from trainers import benchmark, tensor_check
    from trainers.run.command import config_from

    read = (doctor.options_from, tensor_check.settings_from, prove.settings_from, benchmark.settings_from, config_from)
    for part, settings_from in zip(planned, read, strict=True):
        settings = (
            settings_from(list(part.words), "") if settings_from is config_from else settings_from(list(part.words))
        )
        assert str(tmp_path) in str(settings) + str(part.words)


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "run.json").touch()
    with pytest.raises(BadConfiguration, match="holds something"):
        gpu_check.folder_from(["gpu_check", str(tmp_path)])
    with pytest.raises(BadConfiguration, match="cannot be made"):
        gpu_check.folder_from(["gpu_check", str(tmp_path / "run.json/check")])
    assert gpu_check.folder_from(["gpu_check", str(tmp_path / "a/b")]).is_dir()


def test_a_check_that_is_stopped_ends_its_part(tmp_path):
    code = f"""
import sys
from pathlib import Path
from launch import gpu_check
from trainers.world import process
text = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
gpu_check.parts = lambda *_: [gpu_check.Part("only", "hangs", ("-c", text), 50)]
process.main(lambda argv: Path({str(tmp_path)!r}), gpu_check.main)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as check:
        output = tmp_path / "only.txt"
        while not output.exists() or "\n" not in output.read_text():
            assert check.poll() is None
            time.sleep(0.02)
        check.terminate()
        assert check.wait(30) == 143
    assert faults.has_ended(output.read_text().strip())
