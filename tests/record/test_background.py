"""What is done beside the training, and when the training waits for it."""

import threading

import pytest

from trainers.record.background import Background


def test_actions_begin_when_the_caller_lets_them_and_are_done_in_their_order():
    background, done = Background(), []
    numbers = [background.do(done.append, number) for number in range(3)]
    assert numbers == [1, 2, 3] and done == []
    background.wait(0)  # for none
    assert done == []
    background.start()
    background.wait()
    assert done == [0, 1, 2]
    background.do(done.append, 3)
    background.close()
    assert done == [0, 1, 2, 3]


def test_who_waits_for_an_action_does_not_wait_for_later_ones():
    background, done, later = Background(), [], threading.Event()
    first = background.do(done.append, 1)
    background.do(later.wait)
    background.wait(first)
    assert done == [1]
    held = background.do(done.append, 2)
    background.wait(first)
    later.set()
    background.wait(held)
    assert done == [1, 2]
    background.close()


def test_a_failure_is_raised_once_and_nothing_is_done_after_it():
    background, done = Background(), []
    number = background.do(int, "none")
    background.do(done.append, 1)
    with pytest.raises(ValueError, match="none"):
        background.wait(number)
    background.do(done.append, 2)
    background.wait()
    background.close()
    assert done == []
