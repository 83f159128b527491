"""Data that are brought to object stores: whole, or not there for who reads them; a real S3 server behind a proxy."""

import itertools
import os
import subprocess
import sys
import time

import object_store
import pytest

object_store.skip_where_missing()

from conftest import ROOT

from trainers.input import manifests, object_cache, preparing, uploads
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import stores

WRITES = ("PUT", "POST", "DELETE")


@pytest.fixture(scope="module")
def server():
    with object_store.s3_server() as port:
        yield port


@pytest.fixture
def proxy(server):
    with object_store.Proxy(server) as proxy, object_store.environment_of(proxy.port):
        yield proxy
    object_cache._USED.clear()


@pytest.fixture
def folder(request):
    """The address of a folder for data, each test's own."""
    return f"s3://{object_store.BUCKET}/{''.join(c if c.isalnum() else '-' for c in request.node.name)}/data"


@pytest.fixture
def photos(tmp_path):
    place = tmp_path / "photos"
    for i in range(12):
        path = place / f"train/{'ab'[i % 2]}/{i} ü.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(1000 * i))
    (place / ".hidden").write_text("x")
    (place / "train.index.npz").write_text("made where they are read")
    return place


def brought(address, tmp_path, what="images"):
    """What a run finds at an address, as in a process of its own."""
    object_cache._USED.clear()
    return object_cache.brought(what, address, str(tmp_path / "cache"))


def upload(folder, path):
    return uploads.upload(folder, manifests.source_of("--from", path), lambda line: None)


def writes(proxy):
    return [path for method, path in proxy.log if method in WRITES]


def names_of(path):
    return [name for name in manifests.names_in(path)]


def test_a_folder_is_found_by_a_run_and_uploaded_once(proxy, folder, photos, tmp_path):
    assert upload(folder, photos)
    place = brought(f"{folder}/photos", tmp_path)
    assert names_of(place) == names_of(photos) and len(names_of(place)) == 12
    assert all((place / name).read_bytes() == (photos / name).read_bytes() for name in names_of(photos))
    del proxy.log[:]
    assert not upload(folder, photos) and writes(proxy) == []


@pytest.mark.parametrize("change", ["content", "more", "less"])
def test_other_data_are_not_overwritten(proxy, folder, photos, change):
    upload(folder, photos)
    path = photos / "train/a/2 ü.png"
    if change == "less":
        path.unlink()
    else:
        (path if change == "content" else path.with_name("new.png")).write_bytes(b"x" * 2000)
    del proxy.log[:]
    with pytest.raises(BadConfiguration, match=r"holds other data \(train/a/.*bring this under another name"):
        upload(folder, photos)
    assert writes(proxy) == []


def test_what_another_tool_has_put_there_is_not_overwritten(proxy, folder, photos):
    stores.Store(f"{folder}/photos").write("train/a/x.png", b"somebody's")
    with pytest.raises(BadConfiguration, match="no manifest says what they are"):
        upload(folder, photos)


def test_a_run_takes_nothing_of_an_upload_that_has_not_ended(proxy, folder, photos, tmp_path):
    """Killed at each request that writes: until the last one a run is refused; repeated, it is whole."""
    upload(folder, photos)
    expected = stores.Store(f"{folder}/photos").read(uploads.WHOLE)
    total = len(writes(proxy))
    assert total == 15  # the begin, 12 files, the manifest, the end
    for last in (1, 5, 13, 14):
        store = stores.Store(f"{folder}/photos")
        store.remove(list(store.tags()))
        script = (
            "import sys; from trainers.input import manifests, uploads\n"
            "uploads.upload(sys.argv[1], manifests.source_of('--from', sys.argv[2]), print)"
        )
        count = 0

        def fault(method, path, last=last):
            nonlocal count
            count += method in WRITES
            return "drop before" if method in WRITES and count > last else None

        proxy.fault = fault
        with subprocess.Popen([sys.executable, "-c", script, folder, photos], cwd=ROOT) as child:
            while count <= last and child.poll() is None:
                time.sleep(0.01)
            child.kill()
        proxy.fault = lambda method, path: None
        with pytest.raises(BadConfiguration, match="is not whole: an upload to it has not ended; repeat that"):
            brought(f"{folder}/photos", tmp_path)
        there = len(list(store.tags()))
        assert last <= there < total  # what the killed process had sent may come after it
        del proxy.log[:]
        assert upload(folder, photos)
        assert len(writes(proxy)) == max(total - there + 1, 3)  # the begin, what had not come, the end
        assert store.read(uploads.WHOLE) == expected
        assert names_of(brought(f"{folder}/photos", tmp_path)) == names_of(photos)


def test_an_upload_goes_on_after_what_networks_do(proxy, folder, photos):
    faults, count = (
        iter(["500", "cut request", "drop after", "503", "drop before", "cut answer", "429"]),
        itertools.count(),
    )
    proxy.fault = lambda method, path: next(faults, None) if method in WRITES and next(count) % 3 == 0 else None
    assert upload(folder, photos)
    assert next(faults, None) is None
    proxy.fault = lambda method, path: None
    assert not upload(folder, photos)


def test_an_upload_of_other_data_that_has_not_ended_is_refused_and_replaced_by_who_is_alone(proxy, folder, photos):
    store = stores.Store(f"{folder}/photos")
    store.write("train/a/2 ü.png", b"x" * 2000)  # of the same size
    store.write("old.png", b"x")
    before = manifests.Manifest({"train/a/2 ü.png": (2000, "0" * 64), "old.png": (1, "0" * 64)})
    store.write(uploads.INCOMING, before.text().encode())
    with pytest.raises(BadConfiguration, match=r"of other data has not ended there \(old.png is there alone\)"):
        upload(folder, photos)
    source = manifests.source_of("--from", photos)
    assert uploads.upload(folder, source, lambda line: None, alone=True)
    assert {name for name in store.tags() if not name.startswith(".")} == set(source.manifest.files)
    assert store.read("train/a/2 ü.png") == (photos / "train/a/2 ü.png").read_bytes()


def test_a_file_comes_with_what_describes_it_and_without_its_neighbours(proxy, folder, tmp_path):
    (tmp_path / "t.bin").write_bytes(b"\0\1" * 100)
    (tmp_path / "t.bin.json").write_text("{}")
    (tmp_path / "other.bin").write_text("x")
    assert upload(folder, tmp_path / "other.bin") and upload(folder, tmp_path / "t.bin")
    assert not upload(folder, tmp_path / "t.bin")
    found = brought(f"{folder}/t.bin", tmp_path, "tokens")
    assert found.read_bytes() == b"\0\1" * 100 and found.with_name("t.bin.json").read_text() == "{}"
    assert not found.with_name("other.bin").exists()
    stores.Store(folder).write(".t.bin.incoming.json", b"{}")
    with pytest.raises(BadConfiguration, match="is not whole"):
        brought(f"{folder}/t.bin", tmp_path, "tokens")
    brought(f"{folder}/other.bin", tmp_path, "text")
    (tmp_path / "other.bin").write_text("y")
    with pytest.raises(BadConfiguration, match=r"holds other data \(other.bin differs\)"):
        upload(folder, tmp_path / "other.bin")


def test_a_source_that_changes_meanwhile_does_not_become_whole(proxy, folder, photos, tmp_path):
    source = manifests.source_of("--from", photos)
    (photos / "train/a/2 ü.png").write_bytes(b"y" * 2000)
    with pytest.raises(BadConfiguration, match="has changed while it was read; repeat it"):
        uploads.upload(folder, source, lambda line: None)
    with pytest.raises(BadConfiguration, match="is not whole"):
        brought(f"{folder}/photos", tmp_path)


def test_a_data_set_is_prepared_in_a_bucket_once_and_found_by_its_name(proxy, folder, tmp_path):
    line = preparing.prepare("linnerud", folder, str(tmp_path / "one"))
    assert line.startswith(f"linnerud is prepared at {folder}/linnerud/1.0.0: ")
    del proxy.log[:]
    again = preparing.prepare("linnerud", folder, str(tmp_path / "two"))
    assert again == f"linnerud is at {folder}/linnerud/1.0.0 already" and writes(proxy) == []
    place = object_cache.data_dir(folder, "linnerud", str(tmp_path / "cache"), prepared=True)
    assert os.path.exists(f"{place}/linnerud/1.0.0/dataset_info.json")


def test_a_prepared_set_that_is_not_whole_counts_as_not_there_and_is_prepared_again(proxy, folder, tmp_path, caplog):
    store = stores.Store(f"{folder}/linnerud/1.0.0")
    store.write("dataset_info.json", b"{}")
    store.write(uploads.INCOMING, manifests.Manifest({"dataset_info.json": (2, "0" * 64)}).text().encode())
    place = object_cache.data_dir(folder, "linnerud", str(tmp_path / "cache"), prepared=True)
    assert not os.path.exists(f"{place}/linnerud/1.0.0")
    object_cache._USED.clear()
    assert "is prepared at" in preparing.prepare("linnerud", folder, str(tmp_path / "one"))
    place = object_cache.data_dir(folder, "linnerud", str(tmp_path / "cache"), prepared=True)
    assert os.path.getsize(f"{place}/linnerud/1.0.0/dataset_info.json") > 2


def test_preparing_twice_gives_the_same_bits(proxy, folder, tmp_path):
    """So an upload that was interrupted goes on in another pod."""
    from trainers.input import load

    digests = []
    for name in ("one", "two"):
        load.load("diabetes", str(tmp_path / name), placement="stream")
        place = load.prepared_folder("diabetes", str(tmp_path / name))
        digests.append(manifests.source_of("--data_dir", place).manifest.digest)
    assert digests[0] == digests[1]


def test_a_source_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / ".x.csv").write_text("x")
    for path, message in (("empty", "holds no files but hidden"), (".x.csv", "is hidden"), ("none", "does not exist")):
        with pytest.raises(BadConfiguration, match=message):
            manifests.source_of("--from", tmp_path / path)
