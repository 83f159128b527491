"""What the wall time of a run went into: it adds up, and what is done twice counts once."""

import os
import random
import signal
import time

import pytest
from conftest import LONG_TESTS

from trainers import report
from trainers.record import goodput, reading
from trainers.record.clock import Clock
from trainers.settings.exit_codes import CRASHED, OK, PEER_LOST, PREEMPTED

RUN = ("--model=mlp", "--batch_size=32", "--checkpoint_every=1000", "--eval_every=1000", "--log_every=200")


def attempt(began, first, step, code=None, marks=(), **seconds):
    """An entry of seconds by part, with marks `(step, seconds of updates)`."""
    seconds = dict.fromkeys(goodput.PARTS, 0.0) | seconds
    empty = dict.fromkeys(goodput._REPEATED, 0.0)
    return {
        "began": began,
        "until": began + sum(seconds.values()),
        "first": first,
        "step": step,
        "seconds": seconds,
        "marks": {str(first): empty} | {str(at): empty | {"updates": value} for at, value in marks},
        "code": code,
        "reason": None,
    }


def test_what_came_after_the_checkpoint_that_the_next_attempt_takes_is_lost():
    killed = attempt(100.0, 0, 70, start_up=5.0, updates=7.0, saving=1.0, marks=[(20, 2.0), (60, 6.0)])
    ledger = goodput.Goodput(Clock(), [killed])
    ledger.begin(60)
    assert killed["seconds"]["updates"] == 6.0 and killed["seconds"]["lost"] == 2.0
    # That checkpoint turns out to be damaged: the one before it is taken by the attempt after.
    ledger = goodput.Goodput(Clock(), [killed, attempt(120.0, 60, 60, start_up=4.0)])
    ledger.begin(20)
    assert killed["seconds"]["updates"] == 2.0 and killed["seconds"]["lost"] == 6.0
    assert killed["seconds"]["start_up"] == 5.0


def test_nothing_is_lost_after_an_orderly_end_and_a_call_is_after_a_peer_was_lost():
    for code, lost in ((PREEMPTED, 0.0), (OK, 0.0), (PEER_LOST, 3.0), (CRASHED, 3.0), (None, 3.0)):
        entry = attempt(0.0, 0, 60, code, updates=9.0, marks=[(60, 6.0)])
        goodput.write_off(entry, 60)
        assert entry["seconds"]["lost"] == lost, code


def test_without_a_mark_as_much_is_lost_as_the_steps_say():
    entry = attempt(0.0, 0, 100, updates=10.0, input=2.0)
    goodput.write_off(entry, 75)
    assert entry["seconds"]["lost"] == pytest.approx(3.0) and entry["seconds"]["updates"] == pytest.approx(7.5)


def test_the_parts_add_up_to_the_wall_time_over_more_attempts_than_are_listed():
    attempts = [attempt(20.0 * i, 0, 1, CRASHED, updates=12.0) for i in range(goodput.MOST_LISTED + 50)]
    before = goodput.facts_of(attempts)
    after = goodput.facts_of(goodput.shortened(attempts))
    assert len(after["attempts"]) == goodput.MOST_LISTED and after["attempts"][0]["merged"] == 51
    assert after["seconds"] == pytest.approx(before["seconds"])
    assert sum(after["seconds"].values()) == pytest.approx(after["wall_seconds"]) == pytest.approx(20 * 149 + 12)
    assert goodput.line(after).endswith("; 150 attempts")


def test_time_after_the_end_of_a_run_that_is_made_longer_one_day_is_not_counted():
    attempts = [attempt(86400.0 * i, i, i + 1, OK, updates=10.0) for i in range(goodput.MOST_LISTED + 5)]
    for listed in (attempts, goodput.shortened(attempts)):
        facts = goodput.facts_of(listed)
        assert facts["wall_seconds"] == 1050.0 and facts["seconds"]["between"] == 0.0


def test_an_attempt_adds_up_while_it_goes_on_and_after_it_has_gone_back():
    clock = Clock()
    ledger = goodput.Goodput(clock)
    with clock.phase("build"):
        time.sleep(0.02)
    ledger.begin(0)
    ledger.open()
    with clock.phase("train"):
        time.sleep(0.05)
        open_phase = ledger.entry()
        assert open_phase["seconds"]["updates"] >= 0.05
    clock.move("train", "input_wait", 0.01)
    ledger.reach(10)
    ledger.mark(10)
    with clock.phase("train"):
        time.sleep(0.05)
    ledger.reach(20)
    ledger.go_back(10)
    entry = ledger.entry()
    assert entry["seconds"]["lost"] >= 0.05 and entry["step"] == 10
    assert entry["seconds"]["start_up"] >= 0.02 and entry["seconds"]["input"] == pytest.approx(0.01, abs=2e-3)
    assert min(entry["seconds"].values()) >= 0.0
    assert sum(entry["seconds"].values()) == pytest.approx(entry["until"] - entry["began"], abs=0.02)


def test_a_run_tells_it_where_people_look(run, tmp_path, capfd):
    run(train_steps=6)
    facts = reading.read_run(tmp_path / "run")["goodput"]
    assert facts["shares"]["updates"] > 0 and sum(facts["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert goodput.line(facts) in capfd.readouterr().err
    run(train_steps=6)  # complete already: nothing changes
    assert reading.read_run(tmp_path / "run")["goodput"] == facts
    run(train_steps=9)
    longer = reading.read_run(tmp_path / "run")["goodput"]
    assert [entry["first"] for entry in longer["attempts"]] == [0, 6]
    assert longer["seconds"]["updates"] > facts["seconds"]["updates"]
    page = report.page([report.load(tmp_path / "run")])
    assert "lost to restarts" in page and "since the first start" in page
    events = b"".join(path.read_bytes() for path in (tmp_path / "run/train").glob("events*"))
    assert b"goodput/between" in events


def told_since_the_last_checkpoint(run_dir):
    """Whether a worker's last word is of updates after the newest checkpoint: a kill loses them, and that is known."""
    told = reading.told_by(run_dir, 0).get(goodput.FACT)
    mark = told and told["marks"].get(str(reading.checkpoint_steps(run_dir)[-1]))
    return bool(mark) and told["seconds"]["updates"] - mark["updates"] > 0.01


@pytest.mark.parametrize("kills", [10 if LONG_TESTS else 2])
def test_killed_again_and_again_the_parts_add_up_to_the_wall_time(trainer, tmp_path, kills):
    """Times are taken here too, outside of the processes: when each began and when it was killed."""
    chance, run_dir, down, ended = random.Random(kills), tmp_path / "run", 0.0, None
    flags = (*RUN, f"--train_steps={20000 + kills * 6000}", f"--run_dir={run_dir}")
    first = time.time()
    for kill in range(kills + 1):
        one = trainer(*flags)
        began = time.time()
        down += began - ended if ended else 0.0
        if kill == kills:
            break
        newest = (reading.checkpoint_steps(run_dir) or [0])[-1]
        while (reading.checkpoint_steps(run_dir) or [0])[-1] <= newest:
            assert one.process.poll() is None, one.wait()
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.5))
        while kill < 2 and not told_since_the_last_checkpoint(run_dir):
            assert one.process.poll() is None, one.wait()
            time.sleep(0.002)
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait()
        ended = time.time()
        time.sleep(chance.uniform(0.0, 2.0))
    code, output = one.wait()
    wall = time.time() - first
    assert code == 0, output
    facts = goodput.of_run(run_dir)
    seconds = facts["seconds"]
    assert goodput.line(facts) in output and len(facts["attempts"]) == kills + 1
    # The end of the last process comes after its last word.
    assert sum(seconds.values()) == pytest.approx(facts["wall_seconds"], rel=0.01)
    assert facts["wall_seconds"] == pytest.approx(wall, rel=0.01, abs=0.5)
    # A killed attempt is heard of last within a second or two before its end.
    assert down - 0.5 <= seconds["between"] <= down + 2.0 * kills + 0.5
    assert min(seconds.values()) >= -0.01 and seconds["lost"] > 0.0
    assert seconds["updates"] > 0.0 and seconds["start_up"] > kills
