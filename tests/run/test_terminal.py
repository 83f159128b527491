"""What only shows cannot end a run: terminals that close, pipes that break, streams that are not there."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, short

TRAINER = f"{sys.executable} {ROOT / 'trainers/custom_loop.py'}"
SHELLS = {
    "a reader that leaves": "{} 2>&1 | head -3 >/dev/null; exit ${{PIPESTATUS[0]}}",
    "a full device": "{} 2>/dev/full",
    "closed streams": "{} >&- 2>&- <&-",
}


@pytest.mark.parametrize("case", short(SHELLS, ("a reader that leaves", "closed streams")))
def test_a_run_completes_whoever_reads_what_it_prints(case, data_dir, tmp_path):
    flags = f"--model=mlp --train_steps=60 --log_every=5 --run_dir={tmp_path / 'run'} --data_dir={data_dir}"
    done = subprocess.run(["bash", "-c", SHELLS[case].format(f"{TRAINER} {flags}")], check=False, timeout=300)
    assert done.returncode == 0
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["exit_reason"] == "complete" and facts["step"] == 60
    assert (tmp_path / "run/checkpoints/step-0000000060/manifest.json").exists()


def test_a_terminal_that_closes_costs_no_step(trainer, tmp_path):
    flags = ("--model=mlp", "--train_steps=100000", "--checkpoint_every=50", f"--run_dir={tmp_path / 'run'}")
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, as it should
    started = trainer(*flags)
    signal.signal(signal.SIGHUP, inherited)
    while not list((tmp_path / "run").glob("checkpoints/step-*/manifest.json")):
        assert started.process.poll() is None
    started.process.stdout.close()
    started.process.send_signal(signal.SIGHUP)
    assert started.process.wait(120) == 143
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["exit_code"] == 143 and "SIGHUP came at step" in facts["exit_reason"]
    last = max(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step-*") if path.suffix == "")
    assert f"at step {last};" in facts["exit_reason"]


@pytest.mark.parametrize("arguments", [["--help"], ["--help", "-OO"], ["--model=nothing"]])
@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_every_terminal_shows_help_and_errors(arguments, encoding):
    switches = [word for word in arguments if word == "-OO"]
    words = [sys.executable, *switches, str(ROOT / "trainers/custom_loop.py"), arguments[0]]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(words, capture_output=True, check=False, env=environment)
    assert done.returncode == (0 if "--help" in arguments else 2)
    assert b"Traceback" not in done.stderr and b"resnet" in done.stdout + done.stderr


@pytest.mark.long
def test_workers_go_on_when_nobody_reads_the_launcher(data_dir, tmp_path):
    flags = f"--model=mlp --train_steps=60 --log_every=1 --run_dir={tmp_path / 'run'} --data_dir={data_dir}"
    command = f"{sys.executable} {ROOT / 'launch/workers.py'} --workers=2 -- {flags} 2>&1 | head -3 >/dev/null"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], check=False, timeout=300)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["step"] == 60
