"""Contenders take turns, until a signal ends them, whatever has become of its exception."""

import signal

import pytest

from trainers.measure.rounds import Contender, Row, best_of, measure
from trainers.world import signals


@pytest.mark.parametrize("silent", [False, True], ids=["as another error", "without a word"])
def test_a_signal_that_got_lost_ends_the_trials(silent, monkeypatch):
    monkeypatch.setattr(signals, "_came", [])
    asked = []

    def loses(count):
        signals._came.append(signal.SIGTERM)
        if not silent:
            raise RuntimeError("what a library has made of it")
        return 1e-9

    def later(count):
        asked.append(count)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        best_of([Contender("call", "first", loses), Contender("call", "second", later)], 0.1)
    assert not asked


def test_a_signal_that_got_lost_ends_the_rounds(monkeypatch):
    monkeypatch.setattr(signals, "_came", [])
    asked = []

    def loses(count):
        asked.append(count)
        if len(asked) == 4:  # in the first round: twice to find the count before
            signals._came.append(signal.SIGTERM)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        measure(Row("mlp", 32, 1), 1, [Contender(key, "", loses) for key in ("ours", "call")], 5, 0.1)
    assert len(asked) < 10
