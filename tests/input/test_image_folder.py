"""Folders of images as people have them: both layouts alike, every file used or named."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tensorflow as tf

from trainers.input import load as data
from trainers.input.dataset import ImageOptions
from trainers.settings.exit_codes import BadConfiguration


def images(folder, sizes=((9, 7),), count=20, suffix=".png"):
    chance = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("dark" if i % 2 else "light") / f"{i:02d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = sizes[i % len(sizes)]
        base = 30 if i % 2 else 200
        PIL.Image.fromarray((base + chance.integers(0, 30, (height, width, 3))).astype(np.uint8)).save(path)


def load(folder, data_dir, placement="auto", **options):
    return data.load(f"images:{folder}", str(data_dir), placement, images=ImageOptions(**options))


def one_image(image, folder, data_dir, name, **save):
    """A folder of plain images, and of one more; returns how that one is decoded, and the path."""
    images(folder, sizes=((8, 6),))
    path = folder / "dark" / name
    image.save(path, **save)
    dataset = load(folder, data_dir, "stream")
    for records in (dataset.train.records, dataset.eval.records):
        for index, file in enumerate(records.names):
            if file == f"dark/{name}":
                return dataset, records.decode(records.read(tf.constant(index, tf.int64)))["image"].numpy(), path
    raise AssertionError(f"{name} is not listed")


def test_a_folder_is_split_or_comes_split(run, tmp_path, data_dir):
    images(tmp_path / "flat")
    dataset = load(tmp_path / "flat", data_dir)
    assert (dataset.train.size, dataset.eval.size) == (16, 4)
    assert dataset.spec.input_shape == (9, 7, 3)
    assert dataset.train.arrays is not None
    summary = run(dataset=f"images:{tmp_path / 'flat'}", batch_size=8, train_steps=40)
    assert summary.eval["accuracy"] == 1.0
    for split in ("train", "test"):
        images(tmp_path / "split" / split)
    dataset = load(tmp_path / "split", data_dir)
    assert (dataset.train.size, dataset.eval.size) == (20, 20)
    assert dataset.spec.num_classes == 2


@pytest.mark.parametrize("placement", ["auto", "stream"])
def test_the_same_pictures_in_both_layouts_train_alike(tmp_path, data_dir, placement):
    images(tmp_path / "flat")
    images(tmp_path / "split/train")
    flat, split = (load(tmp_path / name, data_dir, placement) for name in ("flat", "split"))
    assert flat.spec == split.spec
    assert (flat.train.arrays is None) == (split.train.arrays is None) == (placement == "stream")
    for one, other in zip(flat.train.examples(), split.train.examples(), strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        assert one["label"] == other["label"]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_what_is_held_out_may_have_any_of_its_usual_names(tmp_path, data_dir, name):
    images(tmp_path / "train")
    images(tmp_path / name, count=6)
    images(tmp_path / "test", count=6)
    assert load(tmp_path, data_dir).eval.size == 6


def test_a_validation_split_goes_before_a_test_split(tmp_path, data_dir):
    images(tmp_path / "train")
    images(tmp_path / "test", count=6)
    images(tmp_path / "val", count=8)
    assert load(tmp_path, data_dir).eval.size == 8


def test_a_class_may_be_named_train(tmp_path, data_dir):
    images(tmp_path)
    os.rename(tmp_path / "dark", tmp_path / "train")
    dataset = load(tmp_path, data_dir)
    assert (dataset.spec.num_classes, dataset.train.size) == (2, 16)


def test_images_may_lie_deeper(tmp_path, data_dir):
    images(tmp_path)
    (tmp_path / "dark/2024/may").mkdir(parents=True)
    os.rename(tmp_path / "dark/01.png", tmp_path / "dark/2024/may/01.png")
    assert load(tmp_path, data_dir).train.size == 16


def test_what_is_no_image_is_left_out_with_a_count_and_names(tmp_path, data_dir, caplog):
    images(tmp_path)
    for name in (".DS_Store", "._00.png", "Thumbs.db", "notes.txt"):
        (tmp_path / "dark" / name).write_bytes(b"something")
    (tmp_path / "dark/gone.png").symlink_to(tmp_path / "nowhere.png")
    assert load(tmp_path, data_dir).train.size == 16
    [line] = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert line.startswith("5 files in ") and ".DS_Store" in line and "…" in line


def test_images_of_several_sizes_are_resized(tmp_path, data_dir):
    images(tmp_path, sizes=((9, 7), (12, 20)))
    assert load(tmp_path, data_dir).spec.input_shape == (224, 224, 3)
    assert load(tmp_path, data_dir, size=16).spec.input_shape == (16, 16, 3)


def test_resident_and_streamed_images_are_the_same(tmp_path, data_dir):
    images(tmp_path, sizes=((30, 40), (50, 20)), suffix=".jpg")
    held = load(tmp_path, data_dir, "resident", size=16).train.arrays["image"]
    read = [example["image"] for example in load(tmp_path, data_dir, "stream", size=16).train.examples()]
    np.testing.assert_array_equal(held, read)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("99.png", b"no image", "its content is not an image"),
        ("99.jpg", b"", "it is empty"),
        ("99.tif", None, "TIFF is not one of JPEG"),
    ],
)
def test_a_file_that_is_no_usable_image_is_named(tmp_path, data_dir, name, content, reason):
    images(tmp_path)
    path = tmp_path / "dark" / name
    path.write_bytes(content) if content is not None else PIL.Image.new("RGB", (7, 9)).save(path)
    with pytest.raises(BadConfiguration, match=rf"1 of 21 files are not usable.*dark/{name} \({reason}.*remove or"):
        load(tmp_path, data_dir)
    for split in ("train", "val"):
        images(tmp_path / "split" / split)
    (tmp_path / "split/val/dark" / name).write_bytes(path.read_bytes())
    with pytest.raises(BadConfiguration, match=rf"val/dark/{name} \({reason}"):
        load(tmp_path / "split", data_dir)


def truncated(path):
    """A JPEG whose header is whole, and half of whose content is missing."""
    PIL.Image.effect_noise((70, 90), 50).convert("RGB").save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("layout", ["", "train"])
def test_an_image_that_opens_and_cannot_be_decoded_is_named(tmp_path, data_dir, layout):
    images(tmp_path / layout, sizes=((90, 70),))
    truncated(tmp_path / layout / "dark/99.jpg")
    with pytest.raises(
        BadConfiguration, match=r"dark/99.jpg cannot be read \(.*replace it, and begin another run"
    ) as error:
        load(tmp_path, data_dir, "resident")
    message = str(error.value)
    assert "delete" not in message and str(data_dir) not in message and "{{" not in message and "[Op" not in message


def test_an_unreadable_image_ends_a_streamed_run_with_its_name_and_a_checkpoint(run, tmp_path):
    images(tmp_path / "photos", sizes=((20, 30),), count=400)
    flags = {"dataset": f"images:{tmp_path / 'photos'}", "input": "stream", "batch_size": 16, "checkpoint_every": 1}
    flags |= {"steps_per_call": 1, "eval_every": 0, "warmup_steps": 0}
    run("one", train_steps=3, **flags)
    names = sorted((tmp_path / "photos/light").iterdir())
    for path in names[::9]:  # 22 of 400: one of them within the next steps
        path.write_bytes(path.read_bytes()[:-30] + bytes(30))
    with pytest.raises(BadConfiguration, match=r"photos/light/\d+.png cannot be read \(.*replace it, and"):
        run("one", train_steps=60, **flags)
    assert list((tmp_path / "one/checkpoints").iterdir())


def test_an_image_that_grew_or_vanished_while_the_run_goes_on_is_named(tmp_path, data_dir):
    images(tmp_path)
    records = load(tmp_path, data_dir, "stream").train.records
    path = tmp_path / records.names[3]
    before = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"more")
    assert f"{path} has changed ({before} bytes when the run began, now {before + 4}); restore it" in str(
        records.fault(3)
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        records.read(tf.constant(3, tf.int64))
    path.unlink()
    assert f"{path} has changed (No such file or directory); restore it, or begin another run" in str(records.fault(3))
    assert records.fault(2) is None


def test_a_class_without_images_is_named(tmp_path, data_dir):
    images(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.DS_Store").write_bytes(b"x")
    with pytest.raises(BadConfiguration, match=r"empty holds no images; add some, or remove the folder"):
        load(tmp_path, data_dir)


def test_a_held_out_class_that_training_does_not_have_is_named(tmp_path, data_dir):
    images(tmp_path / "train")
    images(tmp_path / "val")
    os.rename(tmp_path / "val/dark", tmp_path / "val/black")
    with pytest.raises(BadConfiguration, match=r"val/black is a class that .*train does not have"):
        load(tmp_path, data_dir)


def test_an_image_is_turned_as_its_camera_says(tmp_path, data_dir):
    """Orientation 6: a quarter turn clockwise. A black corner tells where up is."""
    image = PIL.Image.new("RGB", (80, 60), "white")
    image.paste((0, 0, 0), (0, 0, 40, 30))
    exif = PIL.Image.Exif()
    exif[274] = 6
    images(tmp_path, sizes=((80, 60),))
    dataset, pixels, path = one_image(image, tmp_path / "more", data_dir, "turned.jpg", exif=exif, quality=95)
    assert dataset.train.records.look.common_size is None  # 8×6, and one of 80×60 upright
    upright = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("L"))
    assert upright.shape == (80, 60) and upright[:10, -10:].max() < 30
    assert pixels[:80, 150:].max() < 60 and pixels[:, :50].min() > 200 and pixels[130:].min() > 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation):
    from trainers.input.pictures import upright

    image = np.random.default_rng(orientation).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    exif = PIL.Image.Exif()
    exif[274] = orientation
    picture = PIL.Image.fromarray(image)
    picture.getexif()[274] = orientation
    expected = np.asarray(PIL.ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(upright(tf.constant(image), tf.constant(orientation)), expected)


def test_what_phones_write_and_animations_are_images(tmp_path, data_dir):
    frames = [PIL.Image.new("RGB", (6, 8), colour) for colour in ("white", "black")]
    for name, save in (
        ("phone.jpg", {"format": "MPO", "save_all": True, "append_images": frames[1:]}),
        ("moving.gif", {"save_all": True, "append_images": frames[1:]}),
        ("page.webp", {"lossless": True}),
    ):
        _, pixels, path = one_image(frames[0], tmp_path / name, data_dir, name, **save)
        assert pixels.shape == (8, 6, 3) and pixels.min() > 240
        assert PIL.Image.open(path).format in ("MPO", "GIF", "WEBP")


def test_a_picture_over_pillows_limit_is_taken(tmp_path, data_dir):
    large = PIL.Image.new("L", (20_000, 10_000))
    _, pixels, _ = one_image(large, tmp_path, data_dir, "large.jpg", quality=10)
    assert pixels.shape == (224, 224, 3) and pixels.max() < 10


def test_headers_are_read_once(tmp_path, monkeypatch):
    from trainers.input import image_files

    images(tmp_path / "photos")
    first = load(tmp_path / "photos", tmp_path / "data", "stream")
    seen = []
    real = image_files.header
    monkeypatch.setattr(image_files, "header", lambda path: seen.append(path.name) or real(path))
    again = load(tmp_path / "photos", tmp_path / "data", "stream")
    assert seen == [] and again.fingerprint == first.fingerprint
    path = tmp_path / "photos/dark/01.png"
    PIL.Image.new("RGB", (7, 9)).save(path)
    changed = load(tmp_path / "photos", tmp_path / "data", "stream")
    assert seen == ["01.png"] and changed.fingerprint != first.fingerprint


def test_a_folder_that_cannot_be_listed_is_named_and_not_data_dir(tmp_path, data_dir, monkeypatch):
    images(tmp_path / "closed")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(BadConfiguration, match="cannot be read: .*Permission denied: '.*closed'") as error:
        load(tmp_path / "closed", data_dir)
    assert "data_dir" not in str(error.value) and str(data_dir) not in str(error.value)
    with pytest.raises(BadConfiguration, match="is not a folder"):
        load("/nonexistent", data_dir)


def test_a_link_that_leads_back_counts_nothing_twice(tmp_path, data_dir):
    images(tmp_path)
    (tmp_path / "dark/again").symlink_to(tmp_path / "dark")
    (tmp_path / "dark/all").symlink_to(tmp_path)
    dataset = load(tmp_path, data_dir)
    assert dataset.train.size + dataset.eval.size == 30  # light/ once more, as images of dark/: it is linked there


def test_folders_beside_train_are_named(tmp_path, data_dir, caplog):
    images(tmp_path / "train")
    images(tmp_path / "more")
    load(tmp_path, data_dir)
    assert any("left out: more" in record.getMessage() for record in caplog.records)


def test_a_file_without_a_suffix_is_used_if_it_is_an_image(tmp_path, data_dir, caplog):
    images(tmp_path)
    (tmp_path / "dark/README").write_text("about these")
    os.rename(tmp_path / "dark/01.png", tmp_path / "dark/01")
    dataset = load(tmp_path, data_dir)
    assert dataset.train.size + dataset.eval.size == 20
    assert any("README" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_names_need_not_be_unicode(tmp_path, data_dir, placement):
    images(tmp_path)
    os.rename(tmp_path / "dark", os.fsencode(tmp_path) + b"/caf\xe9")
    assert load(tmp_path, data_dir, placement).train.size == 16


def test_a_cut_off_edge_that_evaluation_does_not_see_is_found(tmp_path, data_dir):
    images(tmp_path, sizes=((40, 30),))
    path = tmp_path / "dark/99.jpg"
    PIL.Image.effect_noise((300, 900), 60).convert("RGB").save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-9000])
    dataset = load(tmp_path, data_dir, "stream", augment={"inception": 0.08})
    faults = [
        records.fault(i) for records in (dataset.train.records, dataset.eval.records) for i in range(records.size)
    ]
    assert [str(fault).startswith(f"{path} cannot be read") for fault in faults if fault] == [True]


def test_a_look_that_was_torn_is_made_again(tmp_path):
    images(tmp_path / "photos")
    load(tmp_path / "photos", tmp_path / "data")
    [kept] = (tmp_path / "data/lockstep").glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    assert load(tmp_path / "photos", tmp_path / "data").train.size == 16
