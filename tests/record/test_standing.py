"""How a run stands, from its files alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from trainers.record import goodput, reading, standing
from trainers.settings.exit_codes import PEER_LOST, BadConfiguration
from trainers.world import files, host


def entry(first, step, code=None, reason=None, **seconds):
    known = {"began": time.time() - 100, "until": time.time(), "first": first, "step": step, "marks": {}}
    return known | {"seconds": dict.fromkeys(goodput.PARTS, 0.0) | seconds, "code": code, "reason": reason}


@pytest.fixture
def going(tmp_path):
    """A run that goes on after two restarts, at step 300 of 1000, with a worker that is slow."""
    attempts = [
        entry(0, 100, updates=10.0),
        entry(100, 200, PEER_LOST, "PeerLost: a worker was lost: reset; start all workers again", updates=10.0),
        entry(200, 200, start_up=1.0),
    ]
    facts = {"flags": {"train_steps": 1000}, "ended": None, "exit_reason": None, "attempts": 3}
    (tmp_path / "workers").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(facts | {"goodput": {"attempts": attempts}}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 250, "split": "eval", "loss": 0.25, "accuracy": 0.5}\n')
    for worker in range(3):
        told = {"worker": worker, "workers": 2, "host": "here", "pid": os.getpid(), "time": time.time()}
        told |= {
            "processes": host.processes(),
            "every": 1.0,
            "doing": "steps 300 to 400",
            "for_seconds": 1.0,
            "met": 1,
            "meeting": True,
        }
        told |= {"pace": {"steps": 100, "compute": 0.01 * (1 + worker), "input": 0.0, "peers": 0.0}}
        told |= {"attempt": 3, "goodput": entry(200, 300, updates=9.0, start_up=5.0, saving=1.0)}
        reading.worker_file(tmp_path, worker).write_text(json.dumps(told))
    return tmp_path


def test_a_run_that_goes_on(going):
    facts = standing.facts_of(going)
    assert facts["step"] == 300 and facts["steps"] == 1000 and not facts["ended"]
    assert facts["seconds_left"] == pytest.approx(70.0)
    text = "\n".join(standing.lines(going, facts))
    assert "steps 300 to 400 (for 1 s), 2 workers" in text
    assert "300/1000, 70 s left" in text
    assert "restarts  2: 1 × killed, 1 × code 75 (PeerLost); the last: PeerLost: a worker was lost" in text
    assert "worker 1 (" in text and "20 ms of compute and 0 ms of input a step, +100%" in text
    assert "worker 2" not in text, "it is of an earlier, larger world"
    assert "step 250: loss 0.25  accuracy 0.5" in text


def test_a_run_that_was_killed_and_one_whose_worker_does_not_come(going):
    process = subprocess.Popen(["sleep", "60"])
    told = reading.told_by(going, 0) | {"pid": process.pid}
    reading.worker_file(going, 0).write_text(json.dumps(told))
    hang = {"id": "x", "time": time.time(), "line": "worker 1 (b) did not come: it is in: steps 1 to 2"}
    (going / "workers/hang.json").write_text(json.dumps(hang))
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert standing.facts_of(going)["state"].startswith("stopped (SIGSTOP): last heard of 0 s ago in: steps 300")
    process.kill()
    process.wait()
    facts = standing.facts_of(going)
    assert facts["state"].startswith("killed: last heard of") and facts["hang"] == hang["line"]
    attempts = goodput.of_run(going)["attempts"]
    assert attempts[-1]["code"] == PEER_LOST and attempts[-1]["reason"] == hang["line"], "its watchdog ended it"


@pytest.mark.parametrize("script", ["launch/status.py", "trainers/record/standing.py"])
def test_the_script_draws_runs_until_all_have_ended_for_good(going, script):
    words = [sys.executable, "-S", script, str(going)]  # without any package
    once = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert once.returncode == 0 and once.stdout.startswith(f"{going}\n  state     "), once.stderr
    watching = subprocess.Popen([*words, "--watch"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert watching.stdout.readline() == f"{going}\n"
    facts = json.loads((going / "run.json").read_text())
    ends = {143: "Preempted: SIGTERM came", 75: "PeerLost: a worker was lost", 1: "ValueError: x", 0: "complete"}
    for code, reason in ends.items():
        files.write_text(
            going / "run.json", json.dumps(facts | {"ended": "2026", "exit_code": code, "exit_reason": reason})
        )
        while code and f"{reason} (code {code}: it may be started again)\n" not in (line := watching.stdout.readline()):
            assert line, "it has ended"
    rest, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0 and "  state     complete\n" in rest


def test_a_run_of_another_machine_is_heard_by_the_clock_of_who_looks(going, capfd):
    """Its own clock may be an hour before; a run of here is looked for among the processes, at once."""
    told = reading.told_by(going, 0) | {"processes": "others", "time": time.time() + 3600}
    reading.worker_file(going, 0).write_text(json.dumps(told))
    settings = standing.settings_from(["status.py", str(going)])
    began = time.monotonic()
    assert standing.main(settings) == 0 and time.monotonic() - began > 4
    assert "  state     not heard of: last heard of 5 s ago in: steps 300" in capfd.readouterr().out
    again = threading.Timer(
        0.5, files.write_text, [reading.worker_file(going, 0), json.dumps(told | {"time": time.time() + 3601})]
    )
    again.start()
    began = time.monotonic()
    assert standing.main(settings) == 0 and time.monotonic() - began < 4
    assert "  state     steps 300 to 400 (for 1 s), 2 workers" in capfd.readouterr().out


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(BadConfiguration, match="holds no run.json"):
        standing.facts_of(tmp_path)


def test_a_run_of_a_version_that_told_less_is_read(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"ended": None, "flags": {"train_steps": 5}, "attempts": 1}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "split": "train", "loss": 1.0}\n')
    text = "\n".join(standing.lines(tmp_path, standing.facts_of(tmp_path)))
    assert "it has not begun to tell" in text and "3/5" in text
    (tmp_path / "run.json").write_text(json.dumps({"ended": "2026", "exit_reason": "complete", "attempts": 1}))
    assert standing.facts_of(tmp_path)["final"], "no code says that it may go on"


@pytest.mark.parametrize("code", [2, 65])
def test_an_end_after_which_nobody_starts_a_run_again_is_the_end_of_watching(tmp_path, code):
    facts = {"ended": "2026", "exit_code": code, "exit_reason": "Diverged: x", "attempts": 1}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    known = standing.facts_of(tmp_path)
    assert known["final"] and known["state"] == "Diverged: x"
