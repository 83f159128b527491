"""Data sets by name: their splits, fingerprints and preparation, and errors in one line."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from trainers.input import load as data
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve


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


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("digits", "98b7b3be0ce349443540174aaa8203a12a73e18e5519aa141c0766b6debd1821"),
        ("diabetes", "4065f24014e6ea115007dccecb755cfa7773f457d4d131877d2e3ec325d87c6c"),
        ("linnerud", "dc5a5ae81160b61e75aa33e5d6f74715b41b9384832ff3a7db5065923c171708"),
        ("text:{}", "849353333e0ba9fe6ceb7af893422baeb751fc5cb6ae79ff919a3365441c1c8d"),
        ("csv:{}", "e3919de4075b1fc082329c89d3767f0e2cc5d38239d4230f3e4ccd0929097c10"),
    ],
)
def test_a_fingerprint_never_changes(data_dir, tmp_path, name, fingerprint):
    """A run goes on from its checkpoint only where the fingerprint is that of its start."""
    path = tmp_path / "file"
    if name.startswith("text"):
        path.write_bytes(bytes(range(256)) * 20)
    elif name.startswith("csv"):
        rows = [f"{i},{'red' if i % 3 else 'blue'},{i * 1.5}\n" for i in range(30)]
        path.write_text("size,colour,price\n" + "".join(rows))
    dataset = data.load(name.format(path), str(data_dir), label="price")
    assert dataset.fingerprint == fingerprint
    assert dataset.name == name.format(path)


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


def test_a_kind_of_data_that_is_not_used_is_not_imported(tmp_path):
    (tmp_path / "text").write_bytes(bytes(5000))
    code = f"""
import sys
from trainers.input import load
load.load("text:{tmp_path / "text"}", "")
print(*(name for name in sys.modules if name.startswith(("tensorflow_datasets", "trainers.input.kinds."))))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["trainers.input.kinds.text"]
