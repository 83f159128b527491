"""Event files as TensorBoard reads them: in the order in which attempts were made, whatever the clock did."""

import time

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from trainers.show import summaries
from trainers.show.summaries import Summaries


def attempt(folder, first, last, value):
    """The scalars of steps `first … last`, of an attempt that goes on after step `first - 1`."""
    written = Summaries(folder, first - 1, splits=("train",))
    for step in range(first, last + 1):
        written.scalars("train", step, {"loss": value})
    written.close()


def set_clock_back(folder, seconds):
    """As if all that was written had been written later by so much."""
    for path in (folder / "train").iterdir():
        words = path.name.split(".")
        words[3] = str(int(words[3]) + seconds)
        path.rename(path.with_name(".".join(words)))


def shown(folder):
    reader = EventAccumulator(str(folder / "train"))
    reader.Reload()
    return [(event.step, event.tensor_proto.float_val[0]) for event in reader.Tensors("loss")]


@pytest.mark.parametrize("seconds", [0, 1, 3600])
def test_a_later_attempt_is_read_after_the_earlier_one_when_the_clock_was_set_back(tmp_path, seconds):
    attempt(tmp_path, 1, 6, 1.0)
    set_clock_back(tmp_path, seconds)
    attempt(tmp_path, 4, 8, 2.0)
    assert shown(tmp_path) == [(i, 1.0) for i in (1, 2, 3)] + [(i, 2.0) for i in range(4, 9)]
    set_clock_back(tmp_path, seconds)
    attempt(tmp_path, 6, 7, 3.0)
    set_clock_back(tmp_path, 2 * seconds)
    attempt(tmp_path, 7, 9, 4.0)
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 3.0), (7, 4.0), (8, 4.0), (9, 4.0)]
    assert shown(tmp_path) == expected


def test_files_of_earlier_seconds_keep_their_names(tmp_path):
    attempt(tmp_path, 1, 2, 1.0)
    set_clock_back(tmp_path, -10)
    before = {path.name for path in (tmp_path / "train").iterdir()}
    attempt(tmp_path, 3, 4, 2.0)
    assert before < {path.name for path in (tmp_path / "train").iterdir()}
    assert all(int(name.split(".")[3]) < time.time() - 5 for name in before)


def test_large_files_are_left_and_read_in_their_order(tmp_path, monkeypatch):
    """Also those of one second; a run in a folder has one file."""
    monkeypatch.setattr(summaries, "LARGEST_FILE", 2000)
    for name, bounded in (("stored", True), ("local", False)):
        (tmp_path / name).mkdir()
        written = Summaries(tmp_path / name, 0, bounded=bounded, splits=("train",))
        for step in range(1, 101):
            written.scalars("train", step, {"loss": float(step)})
            written.flush()
            written.rotate()
        written.close()
        assert shown(tmp_path / name) == [(step, float(step)) for step in range(1, 101)]
        files = [path for path in (tmp_path / name / "train").iterdir() if "-start" not in path.name]
        assert len(files) > 3 and max(path.stat().st_size for path in files) < 2500 if bounded else len(files) == 1
