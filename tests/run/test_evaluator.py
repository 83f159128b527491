"""`--mode=evaluate`: a process of its own that follows a run's checkpoints."""

import json
import signal
import time

import pytest
from conftest import metrics

from trainers.record.reading import RUN_AFTER

FLAGS = ("--model=mlp", "--train_steps=60", "--batch_size=32", "--ema=0.9", "--eval_every=20", "--checkpoint_every=20")


def evaluations(lines):
    return {line["step"]: line for line in lines if line["split"] == "eval"}


def test_it_follows_a_run_from_before_its_beginning_to_its_end(trainer, tmp_path):
    run_dir = tmp_path / "run"
    # Replicas over which the batch of 32 does not divide: an evaluation does not depend on it.
    follower = trainer("--mode=evaluate", f"--run_dir={run_dir}", "--replicas=3")
    code, output = trainer(*FLAGS, f"--run_dir={run_dir}").wait()
    assert code == 0, output
    code, output = follower.wait()
    assert code == 0, output
    found, expected = (evaluations(metrics(folder)) for folder in (run_dir / "evaluator", run_dir))
    assert list(found) == [20, 40, 60]
    for step, line in found.items():
        assert line.keys() == expected[step].keys()
        assert line["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)
        assert line["accuracy"] == expected[step]["accuracy"]
    facts = json.loads((run_dir / "evaluator/run.json").read_text())
    assert facts["exit_code"] == 0 and facts["exit_reason"] == "the run has ended with code 0: complete"
    assert list((run_dir / "evaluator/eval").glob("*tfevents*"))
    # Done already: nothing is evaluated twice, and the run's own files are as they were.
    assert trainer("--mode=evaluate", f"--run_dir={run_dir}").wait()[0] == 0
    assert evaluations(metrics(run_dir / "evaluator")) == found


def test_it_stops_at_a_signal_and_continues_where_it_was(trainer, made, tmp_path):
    run_dir = tmp_path / "run"
    made("run", train_steps=60, ema=0.9, eval_every=20, checkpoint_every=20)
    # A run that was told to stop, and has not been started again.
    facts = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(facts | {"exit_code": 143}))
    (run_dir / "checkpoints/step-0000000040/state.index").write_bytes(b"damaged")
    follower = trainer("--mode=evaluate", f"--run_dir={run_dir}")
    deadline = time.monotonic() + 240
    path = run_dir / "evaluator/metrics.jsonl"
    while not path.exists() or len(metrics(run_dir / "evaluator")) < 2:
        assert time.monotonic() < deadline and follower.process.poll() is None
        time.sleep(0.1)
    follower.process.send_signal(signal.SIGTERM)
    code, output = follower.wait(240)
    assert code == 143, output
    assert "cannot be read and is skipped" in output
    assert list(evaluations(metrics(run_dir / "evaluator"))) == [20, 60]
    code, output = trainer("--mode=evaluate", f"--run_dir={run_dir}", "--startup_timeout=1").wait()
    assert code == 75
    assert "no checkpoint after step 60 came" in output
    (run_dir / "run.json").write_text(json.dumps(facts | {"exit_code": 65}))
    assert trainer("--mode=evaluate", f"--run_dir={run_dir}").wait()[0] == 0


def test_an_end_before_the_run_was_submitted_again_does_not_count(trainer, made, tmp_path):
    made("run", train_steps=2)
    flags = ("--mode=evaluate", f"--run_dir={tmp_path / 'run'}", "--startup_timeout=1")
    code, output = trainer(*flags, env={RUN_AFTER: "2999-01-01T00:00:00+00:00"}).wait()
    assert code == 75 and "no checkpoint after step 2 came" in output
    assert trainer(*flags, env={RUN_AFTER: "2020-01-01T00:00:00+00:00"}).wait()[0] == 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ((), 2, "--mode=evaluate needs --run_dir"),
        (("--run_dir=absent", "--startup_timeout=1"), 75, "no run began in --run_dir absent"),
        (("--run_dir={run}", "--model=resnet"), 2, "--model resnet differs from mlp of --run_dir"),
        (("--run_dir={run}", "--strategy=multi_worker"), 2, "--mode=evaluate runs in one process"),
    ],
)
def test_what_cannot_be_followed_is_one_line(trainer, made, tmp_path, flags, code, said):
    if any("{run}" in flag for flag in flags):
        made("run", train_steps=2)
    one = trainer("--mode=evaluate", *(flag.format(run=tmp_path / "run") for flag in flags))
    found, output = one.wait()
    assert found == code, output
    assert said in output and len(output.strip().splitlines()) == 1
