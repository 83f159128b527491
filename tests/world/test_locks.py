"""The lock of a file, on file systems that have locks and on those that have none."""

import errno
import fcntl

import pytest

from trainers.input import load as data
from trainers.record.run_record import RunRecord
from trainers.settings.config import Config
from trainers.settings.rules import resolve
from trainers.world import locks


@pytest.fixture
def no_locks(monkeypatch):
    """As NFS answers without a lock daemon."""

    def refused(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)


def test_a_lock_is_held_by_one_until_it_is_closed(tmp_path):
    first, second = open(tmp_path / "lock", "w"), open(tmp_path / "lock", "w")  # noqa: SIM115
    with second:
        with first:
            assert locks.hold(first, wait=True) == ""
            with pytest.raises(BlockingIOError):
                locks.hold(second, wait=False)
        assert locks.hold(second, wait=False) == ""


def test_data_are_prepared_where_the_file_system_has_no_locks(tmp_path, no_locks, caplog):
    assert data.load("digits", str(tmp_path)).train.size == 1438
    assert "cannot be locked (No locks available): prepare a data set in one process alone" in caplog.text


def test_a_run_begins_where_the_file_system_has_no_locks(tmp_path, no_locks, caplog):
    RunRecord(resolve(Config(model="mlp", run_dir=str(tmp_path / "run")))).close()
    assert "cannot be locked (No locks available): see to it that no other run writes there" in caplog.text
