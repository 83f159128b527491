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
from trainers.settings.config import Config
from trainers.tensor_check import CHECKS, Options
from trainers.world import devices


def script(*arguments):
    """The finished process of the script."""
    command = [sys.executable, str(ROOT / "trainers/tensor_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("one", CHECKS, ids=lambda one: f"{one.group}: {one.name}")
def test_operation_agrees_with_numpy(one, size):
    for result in tensor_check.check([one], size=size, repeats=1):
        assert result.agrees, result.complaint


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_every_replica_holds_the_sum_of_the_all_reduce(replicas):
    strategy = devices.set_up(Config(strategy="mirrored", replicas=replicas))
    result = tensor_check.check_all_reduce(strategy, size=16, repeats=1)
    assert result.agrees, result.complaint
    assert (result.tensorflow_rate is None) == (replicas == 1)


def test_a_wrong_sum_on_one_replica_is_found(monkeypatch):
    strategy = devices.set_up(Config(strategy="mirrored", replicas=2))
    gathered = strategy.experimental_local_results
    monkeypatch.setattr(strategy, "experimental_local_results", lambda x: (gathered(x)[0], gathered(x)[1] + 1))
    assert not tensor_check.check_all_reduce(strategy, size=16, repeats=1).agrees


ADD = CHECKS[0]
WRONG = [
    (lambda x, y: x + y + 0.5, "above its tolerance"),
    (lambda x, y: tf.where(tf.range(16) == 3, np.nan, x + y), "above its tolerance"),
    (lambda x, y: (x + y)[:-1], "shape (15, 16) instead of (16, 16)"),
    (lambda x, y: tf.matmul(x, y[:-1]), "InvalidArgumentError"),
    (lambda x, y: tf.strings.as_string(x + y), "type object instead of float32"),
]


@pytest.mark.parametrize(("operation", "words"), WRONG, ids=["value", "nan", "shape", "error", "type"])
def test_a_wrong_operation_is_named_and_exits_1(operation, words, capsys, tmp_path):
    wrong = dataclasses.replace(ADD, name="crooked add", tensorflow=operation)
    path = tmp_path / "check.json"
    code = tensor_check.run(Options(size=16, repeats=1, replicas=2, json=str(path)), [ADD, wrong])
    out, error = capsys.readouterr()
    assert code == 1
    assert len(error.splitlines()) == 1
    assert "crooked add" in error and words in error, error
    assert "2 of 3 agree" in out and out.count("WRONG") == 1
    results = json.loads(path.read_text())["results"]
    assert [result["agrees"] for result in results] == [True, False, True]


def test_the_line_of_a_wrong_value_holds_difference_and_tolerance():
    wrong = dataclasses.replace(ADD, numpy=lambda x, y: np.full_like(x, 2.0), tensorflow=lambda x, y: 0 * x + 2.5)
    (result,) = tensor_check.check([dataclasses.replace(wrong, tolerance=1e-3)], size=8, repeats=1)
    assert result.difference == 0.25
    assert "2.5e-01" in result.complaint and "1.0e-03" in result.complaint
    (result,) = tensor_check.check([dataclasses.replace(wrong, tolerance=0.25)], size=8, repeats=1)
    assert result.agrees


def test_unequal_words_are_counted():
    join = next(one for one in CHECKS if one.name == "join")
    wrong = dataclasses.replace(join, tensorflow=lambda x, y: tf.concat([["?"], join.tensorflow(x, y)[1:]], 0))
    (result,) = tensor_check.check([wrong], size=8, repeats=1)
    assert result.difference == 1 and not result.agrees


def test_tensor_float_32_is_as_it_was_after_a_check():
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tensor_check.check([ADD], size=8, repeats=1)
    assert tf.config.experimental.tensor_float_32_execution_enabled() == before


def test_the_script_prints_each_group_and_writes_json(tmp_path):
    path = tmp_path / "check.json"
    done = script("--size=64", "--repeats=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    groups = [*dict.fromkeys(one.group for one in CHECKS), "all-reduce"]
    assert [line for line in done.stdout.splitlines() if line in groups] == groups
    assert max(len(line) for line in done.stdout.splitlines()) <= 120
    record = json.loads(path.read_text())
    assert record["flags"]["size"] == 64
    assert len(record["results"]) >= len(CHECKS) + 1
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
        ("--json=/nonexistent/check.json", ["/nonexistent/check.json", "name one that can"]),
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
    for field in dataclasses.fields(Options):
        assert f"--{field.name}" in done.stdout
