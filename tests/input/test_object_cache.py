"""Data in object stores: brought to a folder of this machine, from a real S3 server behind a proxy that fails."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import object_store
import pytest

object_store.skip_where_missing()

from conftest import ROOT

from trainers.input import object_cache
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration, StoreLost
from trainers.world import stores


@pytest.fixture(autouse=True)
def nothing_is_used_after_a_test():
    yield
    object_cache._USED.clear()


def put(address, names):
    store = stores.Store(address)
    for name in names:
        store.write(name, name.encode() * 50)
    return store


def again():
    """As in the next process."""
    object_cache._USED.clear()


def used_by_nobody(folder):
    for key, (path, lock) in list(object_cache._USED.items()):
        if path == folder:
            lock.close()
            del object_cache._USED[key]


def reads(proxy):
    return [path for method, path in proxy.log if method == "GET" and "list-type" not in path]


IMAGES = [f"train/{kind}/{n}.png" for kind in ("cat", "dog") for n in range(6)]


def test_a_folder_is_brought_once_and_then_looked_at_alone(proxy, address, tmp_path):
    put(address, [*IMAGES, ".hidden/x"])
    folder = object_cache.brought("images", address, str(tmp_path))
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*IMAGES, ".index.json"}
    assert all((folder / name).read_bytes() == name.encode() * 50 for name in IMAGES)
    again()
    del proxy.log[:]
    assert object_cache.brought("images", address, str(tmp_path)) == folder
    assert reads(proxy) == []


def test_what_changes_in_the_store_comes_anew_and_what_goes_goes(proxy, address, tmp_path):
    store = put(address, IMAGES)
    object_cache.brought("images", address, str(tmp_path))
    store.write(IMAGES[0], b"another")
    store.remove([IMAGES[1]])
    again()
    del proxy.log[:]
    folder = object_cache.brought("images", address, str(tmp_path))
    assert (folder / IMAGES[0]).read_bytes() == b"another" and not (folder / IMAGES[1]).exists()
    assert len(reads(proxy)) == 1, "what is as it was is not read again"


def test_who_runs_keeps_the_data_that_it_began_with(proxy, address, tmp_path):
    """Another that starts when they have changed has a version of its own; the old one goes with its last user."""
    store = put(address, IMAGES)
    folder = object_cache.brought("images", address, str(tmp_path))
    store.write(IMAGES[0], b"another")
    one = reader(address, tmp_path)
    other = paths.Path(one.communicate(timeout=60)[0].strip())
    assert (other / IMAGES[0]).read_bytes() == b"another"
    assert (folder / IMAGES[0]).read_bytes() == IMAGES[0].encode() * 50
    assert os.path.samefile(folder / IMAGES[1], other / IMAGES[1]), "the disk holds what is alike once"
    assert object_cache.brought("images", address, str(tmp_path)) == folder, "asked again, this process has its own"
    used_by_nobody(folder)
    assert object_cache.brought("images", address, str(tmp_path)) == other
    assert not folder.exists() and (other / IMAGES[1]).read_bytes() == IMAGES[1].encode() * 50


@pytest.mark.parametrize("damage", ["size", "content", "gone", "index"])
def test_a_file_that_is_not_what_it_was_comes_anew(proxy, address, tmp_path, damage):
    put(address, IMAGES)
    folder = object_cache.brought("images", address, str(tmp_path))
    place = folder / IMAGES[3]
    content = place.read_bytes()
    if damage == "gone":
        place.unlink()
    elif damage == "index":
        (folder / ".index.json").write_text("torn {")
    else:
        place.write_bytes(content[:-1] + (b"" if damage == "size" else b"?"))
    again()
    object_cache.brought("images", address, str(tmp_path))
    assert place.read_bytes() == content


def test_a_file_that_was_only_touched_is_compared_and_kept(proxy, address, tmp_path):
    put(address, IMAGES)
    folder = object_cache.brought("images", address, str(tmp_path))
    os.utime(folder / IMAGES[3])
    again()
    del proxy.log[:]
    object_cache.brought("images", address, str(tmp_path))
    assert reads(proxy) == []


@pytest.mark.parametrize("fault", object_store.FAULTS)
def test_faults_delay_and_no_more(proxy, address, tmp_path, fault):
    put(address, IMAGES)
    chance = random.Random(1)
    proxy.fault = lambda method, path: fault if chance.random() < 0.3 else None
    folder = object_cache.brought("images", address, str(tmp_path))
    assert all((folder / name).read_bytes() == name.encode() * 50 for name in IMAGES)


def test_what_moves_may_take_longer_than_the_time_out_and_what_stands_still_ends(proxy, address, tmp_path):
    """Also while another process of the machine reads the same: it is told all the time that this one waits."""
    stores.Store(address).write("train/cat/0.png", bytes(2 << 20))
    fed, seconds = [], 1.0
    proxy.rate, began = 1 << 20, time.monotonic()
    one = reader(address, tmp_path)
    while not any(tmp_path.glob("data/.*.bring")):
        time.sleep(0.02)
    folder = object_cache.brought("images", address, str(tmp_path), feed=fed.append, patience=seconds)
    assert time.monotonic() - began > 2 * seconds and len(fed) > 5
    assert one.communicate(timeout=60)[0].strip() == str(folder)
    proxy.rate = lambda method, path: -1 if "cat/0" in path else 0
    with pytest.raises(StoreLost, match=f"^reading {address}: nothing has moved for 1 s .--step_timeout.; start again"):
        object_cache.brought("images", address, str(tmp_path / "other"), patience=seconds)
    proxy.rate = 0


def test_a_file_of_tokens_comes_with_what_describes_it(proxy, address, tmp_path):
    put(address, ["books", "books.json", "books.tokenizer.json", "other"])
    place = object_cache.brought("tokens", f"{address}/books", str(tmp_path))
    names = {path.name for path in place.parent.iterdir() if not path.name.startswith(".")}
    assert place.name == "books" and names == {"books", "books.json", "books.tokenizer.json"}


def test_what_is_not_there_is_one_line(proxy, address, tmp_path):
    for what in ("csv", "images"):
        with pytest.raises(BadConfiguration, match=f"^{address}/none is not there; name what is$"):
            object_cache.brought(what, f"{address}/none", str(tmp_path))


_READER = """
import sys
sys.path.insert(0, {root!r})
from trainers.input import object_cache
print(object_cache.brought("images", {address!r}, {cache!r}))
"""


def reader(address, cache):
    code = _READER.format(root=str(ROOT), address=address, cache=str(cache))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_of_a_machine_read_each_object_once(proxy, address, tmp_path):
    put(address, IMAGES)
    del proxy.log[:]
    processes = [reader(address, tmp_path) for _ in range(3)]
    assert [one.communicate(timeout=60)[1] for one in processes] == ["", "", ""]
    assert len(reads(proxy)) == len(set(reads(proxy))) == len(IMAGES)


def test_killed_while_it_reads_nothing_half_is_taken_for_whole(proxy, address, tmp_path):
    put(address, IMAGES)
    for at in (1, 5, 12):
        count, one = 0, reader(address, tmp_path)

        def fault(method, path, at=at, one=one):
            nonlocal count
            count += method == "GET" and "list-type" not in path
            if count == at:
                one.kill()
                return "cut answer"
            return None

        proxy.fault = fault
        one.communicate(timeout=60)
        assert one.returncode == -signal.SIGKILL
    proxy.fault = lambda method, path: None
    folder = object_cache.brought("images", address, str(tmp_path))
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert found.keys() == {*IMAGES, ".index.json"}
    assert all(found[name].read_bytes() == name.encode() * 50 for name in IMAGES)


def test_the_longest_unused_makes_room_and_what_is_used_stays(proxy, address, tmp_path, monkeypatch):
    folders = {}
    for name in ("old", "used", "new"):
        put(f"{address}/{name}", IMAGES[:2])
    for name in ("used", "old"):
        folders[name] = object_cache.brought("images", f"{address}/{name}", str(tmp_path))
    os.utime(folders["used"] / ".index.json", (0, 0))
    used_by_nobody(folders["old"])
    disk = os.statvfs(tmp_path)

    class Usage:
        total = disk.f_blocks * disk.f_frsize

        @property
        def free(self):
            return 0 if folders["old"].exists() else self.total

    monkeypatch.setattr(object_cache.shutil, "disk_usage", lambda path: Usage())
    object_cache.brought("images", f"{address}/new", str(tmp_path))
    assert not folders["old"].exists() and folders["used"].exists()
    Usage.free = 0
    again()
    put(f"{address}/more", IMAGES[:1])
    with pytest.raises(
        BadConfiguration, match="GiB in .*a tenth of that disk stays free, at most 10 GiB; free space, or name"
    ):
        object_cache.brought("images", f"{address}/more", str(tmp_path))


def test_prepared_data_of_one_set_is_brought(proxy, address, tmp_path):
    put(address, ["mnist/3.0.1/train", "cifar10/3.0.2/train"])
    folder = object_cache.data_dir(address, "mnist", str(tmp_path), prepared=True)
    found = {path.name for path in paths.Path(folder).iterdir() if path.is_dir()}
    assert found == {"mnist"}
    folder = object_cache.data_dir(address, "digits", str(tmp_path), prepared=True)
    made = paths.Path(folder, "digits/1.0.0/made here")
    made.parent.mkdir(parents=True)
    made.write_text("x")
    again()
    assert object_cache.data_dir(address, "digits", str(tmp_path), prepared=True) == folder
    assert made.exists(), "what is not in the store is prepared on this machine, and stays"
    assert object_cache.data_dir("/local", "digits", "", prepared=True) == "/local"


def test_the_place_of_data_is_its_address():
    assert paths.location("csv:s3://bucket/rows.csv") == "s3://bucket/rows.csv"
    assert paths.same_dataset(
        {"dataset": "csv:s3://b/rows.csv", "dataset_path": "s3://b/rows.csv"}, "csv:s3://b/rows.csv"
    )
    assert not paths.same_dataset(json.loads('{"dataset": "csv:/rows.csv"}'), "csv:s3://b/rows.csv")
