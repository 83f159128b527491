"""Sets of TensorFlow Datasets in several files: read by index as in order, by name, with what is damaged named."""

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from conftest import weights

from trainers.input import load as data
from trainers.input import tfrecords
from trainers.input.dataset import ImageOptions
from trainers.settings.exit_codes import BadConfiguration


class Stripes(tfds.core.GeneratorBasedBuilder):
    """Images that carry their number, in three files; their sizes vary. `test` has no labels, as competitions do."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=3),
                "file_name": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description="stripes", features=features)

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(30, 0),
            "validation": self._generate_examples(9, 0),
            "test": self._generate_examples(3, -1),
        }

    def _generate_examples(self, count, label):
        for i in range(count):
            image = np.full((20 + i % 3, 30, 3), 5 * i, np.uint8)
            yield i, {"image": image, "label": label or i % 3, "file_name": f"{i}.png"}


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """A folder in which the set lies prepared: nothing but its name is known of it afterwards."""
    folder = tmp_path_factory.mktemp("prepared")
    Stripes(data_dir=str(folder)).download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    return folder


def copy_of(folder, place):
    """The prepared set in a folder of its own, to be damaged there."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.endswith(".npz"):
            target = place / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return place


def streamed(folder, **options):
    return data.load("stripes", str(folder), "stream", images=ImageOptions(size=16, **options))


def test_a_set_is_loaded_by_its_name_and_evaluated_on_the_split_that_has_labels(stripes):
    dataset = data.load("stripes", str(stripes))
    assert (dataset.name, dataset.train.size, dataset.eval.size) == ("stripes", 30, 9)
    assert (dataset.spec.input_shape, dataset.spec.num_classes) == ((224, 224, 3), 3)
    assert dataset.train.arrays["image"].shape == (30, 224, 224, 3)


class Moods(Stripes):
    """Images with a class that is not named `label`."""

    def _info(self):
        image, kind = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(num_classes=3)
        features = tfds.features.FeaturesDict({"image": image, "kind": kind})
        return tfds.core.DatasetInfo(builder=self, description="moods", features=features)

    def _generate_examples(self, count, label):
        yield 0, {"image": np.zeros([4, 4, 3], np.uint8), "kind": 0}


def test_a_set_without_labelled_images_is_refused(tmp_path):
    with pytest.raises(BadConfiguration, match=r"'moods' has features \['image', 'kind'\]; image and label are needed"):
        data.load("moods", str(tmp_path))


def test_reading_by_index_gives_what_reading_in_order_gives(stripes):
    records = streamed(stripes).train.records
    assert len(records.shards.paths) == 3
    ordered = list(records.examples().as_numpy_iterator())
    assert len(ordered) == 30
    for index in (0, 7, 29, 11, 10):
        one = records.decode(records.read(tf.constant(index, tf.int64)))
        np.testing.assert_array_equal(one["image"], ordered[index]["image"])
        assert one["label"] == ordered[index]["label"]


def test_resident_and_streamed_images_are_the_same_in_the_same_order(stripes):
    held = data.load("stripes", str(stripes), "resident", images=ImageOptions(size=16)).train
    images = [example["image"] for example in streamed(stripes).train.examples().as_numpy_iterator()]
    np.testing.assert_array_equal(held.arrays["image"], images)


def test_offsets_are_found_once_and_kept_beside_the_data(stripes, monkeypatch):
    expected = streamed(stripes).train.records.shards.offsets
    assert (stripes / "stripes/1.0.0/train.index.npz").exists()
    monkeypatch.setattr(tfrecords, "offsets_in", None)
    np.testing.assert_array_equal(streamed(stripes).train.records.shards.offsets, expected)


def test_offsets_in_a_folder_that_cannot_be_written_are_found_again(stripes, tmp_path, monkeypatch):
    folder = copy_of(stripes, tmp_path)

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tfrecords.files, "aside", refused)
    assert len(streamed(folder).train.records.shards.offsets) == 30
    assert not list(folder.rglob("*.npz"))


def first_file(folder):
    return min(Path(folder).rglob("stripes-train*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda content: content[:-50],
            r"stripes-train.*00000-of-00003 is cut off or damaged: record 9 of 10, at byte",
        ),
        (lambda content: content + b"more", r"has 4 bytes after its 10 records"),
        (lambda content: b"", r"is cut off or damaged: record 0 of 10, at byte 0, ends after the file's 0 bytes"),
    ],
    ids=["truncated", "grown", "empty"],
)
def test_a_file_that_is_not_whole_is_named_at_the_start(stripes, tmp_path, damage, words):
    file = first_file(copy_of(stripes, tmp_path))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BadConfiguration, match=words):
        streamed(tmp_path)


def test_a_file_that_changed_since_it_was_indexed_is_named(stripes, tmp_path):
    streamed(copy_of(stripes, tmp_path))
    file = first_file(tmp_path)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(BadConfiguration, match=r"have changed since they were indexed.*or remove .*train\.index\.npz"):
        streamed(tmp_path)


@pytest.mark.parametrize(("content", "words"), [(b"nothing", "cannot be read"), (None, "is of version 0, not 1")])
def test_an_index_that_cannot_be_used_is_named(stripes, tmp_path, content, words):
    folder = copy_of(stripes, tmp_path)
    index = first_file(folder).parent / "train.index.npz"
    if content:
        index.write_bytes(content)
    else:
        np.savez(index, version=0, identity="", offsets=np.zeros(30, np.int64))
    with pytest.raises(BadConfiguration, match=rf"train\.index\.npz {words}.*; remove .* made again"):
        streamed(folder)


def test_a_damaged_record_is_named_by_file_number_and_offset(stripes, tmp_path):
    records = streamed(copy_of(stripes, tmp_path)).train.records
    file, number, offset = records.shards.place(12)
    content = bytearray(file.read_bytes())
    content[offset + 40] ^= 255
    file.write_bytes(bytes(content))
    fault = records.fault(12)
    assert str(fault).startswith(f"{file}, record {number} at byte {offset}, cannot be read (") and number == 2
    assert "corrupted record" in str(fault)
    assert records.fault(13) is None


def test_a_file_that_vanished_is_named(stripes, tmp_path):
    records = streamed(copy_of(stripes, tmp_path)).train.records
    file, _, _ = records.shards.place(0)
    os.rename(file, f"{file}.away")
    assert f"{file}, record 0 at byte 0, has changed (No such file" in str(records.fault(0))


def test_a_run_on_a_set_by_its_name_is_the_same_held_or_streamed(run, stripes, tmp_path):
    flags = {"dataset": "stripes", "data_dir": str(stripes), "image_size": 8, "batch_size": 6, "train_steps": 7}
    for placement in ("resident", "stream"):
        run(placement, input=placement, replicas=2, augment="crop,flip", **flags)
    held, streamed = weights(tmp_path / "resident"), weights(tmp_path / "stream")
    assert all(np.array_equal(held[name], streamed[name]) for name in held)
