"""Which checkpoint is the best, and what a manifest can hold."""

import json
import math

import numpy as np
import pytest

from trainers.record.checkpoints import Checkpoints

STATE = {"model/0000/w": np.ones([2], np.float32)}


def store(folder, mode, keep=1):
    return Checkpoints(folder, keep, {"model": "m"}, "loss", mode)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_never_the_best(tmp_path, mode, bad):
    one = store(tmp_path, mode)
    assert not one.improves({"loss": bad})
    one.save(1, STATE, {"loss": bad})
    assert one.best() is None
    for again in (one, store(tmp_path, mode)):  # the second as after a restart
        assert again.improves({"loss": 3.0}) and not again.improves({"loss": bad})
    one.save(2, STATE, {"loss": 3.0})
    one.save(3, STATE, {"loss": bad})
    assert store(tmp_path, mode).best() == (2, 3.0)
    assert one.steps() == [2, 3] and not one.improves({"loss": bad})
    assert one.improves({"loss": 2.0 if mode == "min" else 4.0})


def test_a_manifest_is_json_and_one_with_nan_of_before_is_still_read(tmp_path):
    one = store(tmp_path, "min")
    path = one.save(1, STATE, {"loss": math.nan}) / "manifest.json"
    manifest = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert manifest["metrics"] == {"loss": None}
    one.read(1)
    from trainers.record import checkpoints

    old = {key: value for key, value in manifest.items() if key != "digest"} | {"metrics": {"loss": math.nan}}
    path.write_text(json.dumps(old | {"digest": checkpoints._own_digest(old)}))
    np.testing.assert_array_equal(one.read(1)["model/0000/w"], STATE["model/0000/w"])
    assert one.best() is None


def test_what_is_on_the_disk_is_kept_until_a_later_one_is(tmp_path, monkeypatch):
    from trainers.record import checkpoints

    synced = []
    monkeypatch.setattr(checkpoints.files, "sync", synced.append)
    one = store(tmp_path, "min")
    assert one.is_time_to_sync()
    one.save(1, STATE)
    assert not one.is_time_to_sync() and synced[-1] == one.directory and len(synced) == 4  # 3 files before it
    for step in (2, 3):
        one.save(step, STATE, to_disk=False)
    assert one.steps() == [1, 3] and len(synced) == 4
    # As after a loss of power: names are there, and contents are not.
    for path in one.path(3).iterdir():
        path.write_bytes(b"")
    step, values = store(tmp_path, "min").restore_newest()
    assert step == 1
    np.testing.assert_array_equal(values["model/0000/w"], STATE["model/0000/w"])
    one.save(4, STATE)
    assert one.steps() == [4] and len(synced) == 8
    one.save(4, STATE, to_disk=False)  # in place of the one on the disk
    assert len(synced) == 12


def test_the_best_is_known_of_a_checkpoint_that_was_written_again(tmp_path):
    one = store(tmp_path, "min", keep=3)
    one.save(1, STATE, {"loss": 1.0})
    one.save(2, STATE, {"loss": 2.0})
    assert one.best() == (1, 1.0)
    one.save(1, STATE, {"loss": 3.0})
    assert one.best() == (2, 2.0)
