"""Data sets: what is embedded, and files that users name; bad files are named to the cell."""

import numpy as np
import PIL.Image
import pytest

from trainers.input import load as data
from trainers.input.kinds import csv_table as tables
from trainers.settings.config import Config, resolve
from trainers.settings.exit_codes import BadConfiguration


@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "target"),
    [("digits", 1438, 359, (8, 8, 1), ()), ("diabetes", 354, 88, (10,), ()), ("linnerud", 16, 4, (3,), (3,))],
)
def test_embedded_sets_have_a_fixed_split(data_dir, name, train, test, shape, target):
    dataset = data.load(name, str(data_dir))
    again = data.load(name, str(data_dir))
    assert (dataset.train.size, dataset.eval.size) == (train, test)
    assert dataset.spec.input_shape == shape
    assert dataset.spec.target_shape == target
    assert dataset.fingerprint == again.fingerprint


def test_a_regression_set_is_standardized_by_its_training_split(data_dir):
    dataset = data.load("linnerud", str(data_dir))
    inputs, targets = dataset.prepare(dataset.train.arrays)
    for values in (inputs, targets):
        np.testing.assert_allclose(np.mean(values, axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(np.std(values, axis=0), 1, rtol=1e-5)


def test_text_is_the_standard_library_or_a_file_and_targets_follow_inputs(data_dir, tmp_path):
    standard = data.load("text", str(data_dir))
    assert standard.train.size > 1000
    content = bytes(range(256)) * 20
    (tmp_path / "text").write_bytes(content)
    dataset = data.load(f"text:{tmp_path / 'text'}", str(data_dir))
    inputs, targets = (np.asarray(part) for part in dataset.prepare(dataset.train.arrays))
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(inputs.ravel(), np.frombuffer(content, np.uint8)[: inputs.size])
    np.testing.assert_array_equal(inputs[1:, 0], targets[:-1, -1])
    (tmp_path / "short").write_bytes(b"too short")
    with pytest.raises(BadConfiguration, match="holds 9 bytes; at least"):
        data.load(f"text:{tmp_path / 'short'}", str(data_dir))
    with pytest.raises(BadConfiguration, match="cannot be read: No such file"):
        data.load("text:/nonexistent", str(data_dir))


HEADER = "size,colour,price\n"
ROWS = [f"{i},{'red' if i % 3 else 'blue'},{i * 1.5}\n" for i in range(30)]


def table(tmp_path, rows=ROWS, header=HEADER):
    path = tmp_path / "table.csv"
    path.write_text(header + "".join(rows))
    return path


def test_a_table_becomes_numbers_and_words_become_columns(tmp_path):
    found = tables.read(table(tmp_path), "price")
    assert found.columns == ("size", "colour=blue", "colour=red")
    np.testing.assert_array_equal(found.features[4], [4, 0, 1])
    assert found.target[4] == 6.0
    assert found.classes == ()
    found = tables.read(table(tmp_path), "colour")
    assert found.classes == ("blue", "red")
    assert found.target.tolist()[:4] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({4: "4,red,oops\n"}, r"table.csv, line 6, column 'price' holds 'oops'.*finite number"),
        ({4: "4,red,nan\n"}, r"line 6, column 'price' holds 'nan'"),
        ({4: ",red,6\n"}, r"line 6, column 'size' is empty; fill it in"),
        ({4: "4,,6\n"}, r"line 6, column 'colour' is empty"),
        ({4: "4,red\n"}, r"line 6: 2 cells, but 3 columns"),
        ({4: '4,"red,6\n'}, r"line \d+"),
    ],
)
def test_a_bad_cell_is_named_by_file_line_and_column(tmp_path, change, words):
    rows = [change.get(i, row) for i, row in enumerate(ROWS)]
    with pytest.raises(BadConfiguration, match=words):
        tables.read(table(tmp_path, rows), "price")


def test_a_bad_table_is_named(tmp_path):
    with pytest.raises(BadConfiguration, match="--label 'cost' is no column.*size, colour, price"):
        tables.read(table(tmp_path), "cost")
    with pytest.raises(BadConfiguration, match="has 3 rows"):
        tables.read(table(tmp_path, ROWS[:3]), "price")
    with pytest.raises(BadConfiguration, match="line 1: column names"):
        tables.read(table(tmp_path, header="a,a,b\n"), "a")
    with pytest.raises(BadConfiguration, match="cannot be read"):
        tables.read(tmp_path / "nothing.csv", "price")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadConfiguration, match="CSV file in UTF-8"):
        tables.read(tmp_path / "binary.csv", "price")


def test_a_model_trains_on_a_table(run, tmp_path):
    path = table(tmp_path, [f"{i},{'red' if i > 50 else 'blue'},{i % 7 + 0.5}\n" for i in range(100)])
    summary = run("price", model="residual_regressor", dataset=f"csv:{path}", label="price", batch_size=16)
    assert np.isfinite(summary.eval["r2"])
    summary = run("colour", model="mlp", dataset=f"csv:{path}", label="colour", batch_size=16, train_steps=60)
    assert summary.eval["accuracy"] > 0.8
    with pytest.raises(BadConfiguration, match="--model mlp does not take the regression data.*residual_regressor"):
        run("wrong", model="mlp", dataset=f"csv:{path}", label="price")


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
    with pytest.raises(BadConfiguration, match=r"dark/99.png is no usable image.*remove or replace"):
        data.load(f"images:{tmp_path / 'bad'}", str(data_dir))
    with pytest.raises(BadConfiguration, match="is no folder"):
        data.load("images:/nonexistent", str(data_dir))


def test_flags_that_do_not_fit_the_data_are_refused():
    with pytest.raises(BadConfiguration, match="needs --label=COLUMN"):
        resolve(Config(model="mlp", dataset="csv:x.csv"))
    with pytest.raises(BadConfiguration, match="takes no --label"):
        resolve(Config(model="mlp", label="x"))
    with pytest.raises(BadConfiguration, match="--model resnet does not take the regression data"):
        resolve(Config(model="resnet", dataset="diabetes"))
    with pytest.raises(BadConfiguration, match="--loss 'huber' is not known.*focal"):
        resolve(Config(model="mlp", loss="huber"))


def test_a_copy_that_is_not_complete_is_named(tmp_path):
    (tmp_path / "digits/1.0.0").mkdir(parents=True)
    with pytest.raises(BadConfiguration, match=r"digits/1\.0\.0 without its dataset_info\.json"):
        data.load("digits", str(tmp_path))


def test_preparing_for_the_first_time_warns_of_nothing(tmp_path, caplog):
    data.load("digits", str(tmp_path))
    assert caplog.records == []
