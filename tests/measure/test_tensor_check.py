"""The check of the machine: operations agree with NumPy, and one that does not is named and decides the exit code."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

from trainers import tensor_check
from trainers.measure.comparison import compare, compare_all_reduce
from trainers.measure.operations import OPERATIONS
from trainers.settings.config import Config
from trainers.tensor_check import Settings
from trainers.world import devices


def script(*arguments):
    """The finished process of the script."""
    command = [sys.executable, str(ROOT / "trainers/tensor_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.group}: {operation.name}")
def test_operation_agrees_with_numpy(operation, size):
    for result in compare([operation], size=size, repeats=1):
        assert result.agrees, result.complaint


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_every_replica_holds_the_sum_of_the_all_reduce(replicas):
    world = devices.set_up(Config(strategy="mirrored", replicas=replicas))
    result = compare_all_reduce(world.strategy, size=16, repeats=1)
    assert result.agrees, result.complaint
    assert (result.tensorflow_rate is None) == (replicas == 1)


def test_a_wrong_sum_on_one_replica_is_found(monkeypatch):
    strategy = devices.set_up(Config(strategy="mirrored", replicas=2)).strategy
    gathered = strategy.experimental_local_results
    monkeypatch.setattr(strategy, "experimental_local_results", lambda x: (gathered(x)[0], gathered(x)[1] + 1))
    assert not compare_all_reduce(strategy, size=16, repeats=1).agrees


ADD = OPERATIONS[0]
WRONG = [
    (lambda x, y: x + y + 0.5, "above its tolerance"),
    (lambda x, y: tf.where(tf.range(16) == 3, np.nan, x + y), "above its tolerance"),
    (lambda x, y: (x + y)[:-1], "shape (15, 16) instead of (16, 16)"),
    (lambda x, y: tf.matmul(x, y[:-1]), "InvalidArgumentError"),
    (lambda x, y: tf.strings.as_string(x + y), "type object instead of float32"),
]


@pytest.mark.parametrize(("operation", "words"), WRONG, ids=["value", "nan", "shape", "error", "type"])
def test_a_wrong_operation_is_named_and_exits_1(operation, words, capsys, tmp_path):
    wrong = dataclasses.replace(ADD, name="wrong add", tensorflow=operation)
    path = tmp_path / "check.json"
    code = tensor_check.run(Settings(size=16, repeats=1, replicas=2, json=str(path)), [ADD, wrong])
    out, error = capsys.readouterr()
    assert code == 1
    assert len(error.splitlines()) == 1
    assert "wrong add" in error and words in error, error
    assert "2 of 3 agree" in out and out.count("WRONG") == 1
    results = json.loads(path.read_text())["results"]
    assert [result["agrees"] for result in results] == [True, False, True]


def test_the_line_of_a_wrong_value_holds_difference_and_tolerance():
    wrong = dataclasses.replace(ADD, numpy=lambda x, y: np.full_like(x, 2.0), tensorflow=lambda x, y: 0 * x + 2.5)
    (result,) = compare([dataclasses.replace(wrong, tolerance=1e-3)], size=8, repeats=1)
    assert result.difference == 0.25
    assert "2.5e-01" in result.complaint and "1.0e-03" in result.complaint
    (result,) = compare([dataclasses.replace(wrong, tolerance=0.25)], size=8, repeats=1)
    assert result.agrees


def test_unequal_strings_are_counted():
    join = next(operation for operation in OPERATIONS if operation.name == "join")
    wrong = dataclasses.replace(join, tensorflow=lambda x, y: tf.concat([["?"], join.tensorflow(x, y)[1:]], 0))
    (result,) = compare([wrong], size=8, repeats=1)
    assert result.difference == 1 and not result.agrees


def test_tensor_float_32_is_as_it_was_after_a_check():
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    compare([ADD], size=8, repeats=1)
    assert tf.config.experimental.tensor_float_32_execution_enabled() == before


def test_the_script_prints_each_group_and_writes_json(tmp_path):
    path = tmp_path / "check.json"
    done = script("--size=64", "--repeats=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    groups = [*dict.fromkeys(operation.group for operation in OPERATIONS), "all-reduce"]
    assert [line for line in done.stdout.splitlines() if line in groups] == groups
    assert max(len(line) for line in done.stdout.splitlines()) <= 120
    record = json.loads(path.read_text())
    assert record["flags"]["size"] == 64
    assert len(record["results"]) >= len(OPERATIONS) + 1
    assert all(result["agrees"] for result in record["results"])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--size=4", ["--size 4", "below 8", "8 or more"]),
        ("--size=100000", ["--size 100000", "or less"]),
        ("--size=big", ["big"]),
        ("--repeats=0", ["--repeats 0", "1 or more"]),
        ("--replicas=-1", ["--replicas -1", "0 or more"]),
        ("--json=/nonexistent/check.json", ["/nonexistent/check.json", "does not exist; name a file in another"]),
        ("--json=/", ["--json /", "directory"]),
        ("--sise=64", ["sise", "size"]),
        ("stray", ["'stray'", "--name=value"]),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(flag, words):
    done = script(flag)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_help_answers_before_tensorflow_is_imported_and_names_every_flag(monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    done = script("--help")
    assert done.returncode == 0
    assert "absl" in done.stderr and "tensorflow" not in done.stderr
    for field in dataclasses.fields(Settings):
        assert f"--{field.name}" in done.stdout
