"""Folders of images: split or already split, of one size or several; a bad file is named."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from trainers.input import load as data
from trainers.settings.exit_codes import BadConfiguration


def images(folder, sizes=((9, 7),), count=20):
    chance = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("dark" if i % 2 else "light") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = sizes[i % len(sizes)]
        base = 30 if i % 2 else 200
        PIL.Image.fromarray((base + chance.integers(0, 30, (height, width, 3))).astype(np.uint8)).save(path)


def test_a_folder_of_images_is_split_or_comes_split(run, tmp_path, data_dir):
    images(tmp_path / "flat")
    dataset = data.load(f"images:{tmp_path / 'flat'}", str(data_dir))
    assert (dataset.train.size, dataset.eval.size) == (16, 4)
    assert dataset.spec.input_shape == (9, 7, 3)
    assert dataset.train.arrays is not None
    summary = run(dataset=f"images:{tmp_path / 'flat'}", batch_size=8, train_steps=40)
    assert summary.eval["accuracy"] == 1.0
    for split in ("train", "test"):
        images(tmp_path / "split" / split)
    dataset = data.load(f"images:{tmp_path / 'split'}", str(data_dir))
    assert (dataset.train.size, dataset.eval.size) == (20, 20)
    assert dataset.spec.num_classes == 2


def test_images_of_several_sizes_are_resized(tmp_path, data_dir):
    images(tmp_path / "mixed", sizes=((9, 7), (12, 20)))
    dataset = data.load(f"images:{tmp_path / 'mixed'}", str(data_dir))
    assert dataset.spec.input_shape == (224, 224, 3)


def test_a_bad_image_is_named(tmp_path, data_dir):
    images(tmp_path / "bad")
    (tmp_path / "bad/dark/99.png").write_bytes(b"no image")
    with pytest.raises(
        BadConfiguration,
        match=r"1 of 21 files are not usable images: .*dark/99.png \(its content is not an image\).*remove or replace",
    ):
        data.load(f"images:{tmp_path / 'bad'}", str(data_dir))
    with pytest.raises(BadConfiguration, match="is not a folder"):
        data.load("images:/nonexistent", str(data_dir))


@pytest.mark.parametrize("placement", ["resident"])
def test_an_image_that_opens_and_cannot_be_decoded_is_named(tmp_path, data_dir, placement):
    images(tmp_path / "bad", sizes=((90, 70),))
    PIL.Image.effect_noise((70, 90), 50).convert("RGB").save(tmp_path / "bad/dark/99.jpg")
    content = (tmp_path / "bad/dark/99.jpg").read_bytes()
    (tmp_path / "bad/dark/99.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadConfiguration, match=r"dark/99.jpg cannot be read \(.*remove or replace") as error:
        data.load(f"images:{tmp_path / 'bad'}", str(data_dir), placement)
    message = str(error.value)
    assert "delete" not in message and str(data_dir) not in message and "{{" not in message and "[Op" not in message


def test_a_folder_that_cannot_be_listed_is_named_and_not_data_dir(tmp_path, data_dir, monkeypatch):
    images(tmp_path / "closed")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(BadConfiguration, match="cannot be read: .*Permission denied: '.*closed'") as error:
        data.load(f"images:{tmp_path / 'closed'}", str(data_dir))
    assert "data_dir" not in str(error.value) and str(data_dir) not in str(error.value)
