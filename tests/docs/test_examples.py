"""The docs' commands for several machines and their worked examples, run as they stand there."""

import os
import re
import subprocess
import sys
import types

import numpy as np
import tensorflow as tf
from conftest import ROOT, as_after, largest_relative_difference, metrics, weights

from models import cards, losses
from models.tasks import DataSpec
from trainers.input.dataset import Request
from trainers.settings.data_cards import DataCard


def blocks(page, language):
    """The code blocks of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def block_with(page, text):
    """The one code block of Python that holds a text."""
    (found,) = (block for block in blocks(page, "python") if text in block)
    return found


SEVERAL_MACHINES = blocks("docs/several-machines.md", "bash")


def shell(commands, data_dir, tmp_path):
    """Bash that runs commands of a page from a folder of its own, with this Python first on the path."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    python = tmp_path / "bin" / "python"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    for folder in ("launch", "trainers", "models"):
        if not (tmp_path / folder).exists():
            (tmp_path / folder).symlink_to(ROOT / folder)
    more = f" --model=mlp --train_steps=40 --data_dir={data_dir}"
    commands = commands.replace("--run_dir=runs/two", f"--run_dir=runs/two{more}")
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", "-ec", commands], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=tmp_path
    )


def test_the_rehearsal_on_one_machine(tmp_path, data_dir):
    process = shell(SEVERAL_MACHINES[0], data_dir, tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "[0] complete: step 40" in output
    assert "global batch 128 = 2 workers × 64 examples" in output
    assert (tmp_path / "runs/two/run.json").exists()


def test_two_terminals(tmp_path, data_dir):
    first = shell(SEVERAL_MACHINES[1], data_dir, tmp_path)
    second = shell(SEVERAL_MACHINES[1].replace('"index": 0', '"index": 1'), data_dir, tmp_path)
    outputs = [process.communicate(timeout=600)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert "complete: step 40" in outputs[0]
    assert "worker 1 of 2 (TF_CONFIG): 127.0.0.1:2222, 127.0.0.1:2223" in outputs[1]


def test_the_model_that_is_added():
    code, entry = (block_with("docs/models.md", text) for text in ("class SmallCNN", '"small_cnn": ModelCard('))
    module = types.ModuleType("models.small_cnn")
    exec(code, vars(module))
    card = eval(f"{{{entry}}}", vars(cards))["small_cnn"]
    assert card.build == "models.small_cnn:build"
    model, task = module.build(DataSpec(card.task, (8, 8, 1), num_classes=10))
    outputs = model(tf.zeros([4, 8, 8, 1]), training=True)
    assert outputs.shape == (4, 10)
    assert task.loss(tf.zeros([4], tf.int64), outputs).shape == (4,)
    assert card.quality[0] in task.metrics
    assert type(model).from_config(model.get_config()).filters == model.filters


def test_the_loss_that_is_added():
    code, entry = (block_with("docs/models.md", text) for text in ("class Quantile", '"quantile": '))
    names = dict(vars(losses))
    exec(code, names)
    assert eval(f"{{{entry}}}") == {"quantile": "models.losses:Quantile"}
    loss = names["Quantile"](0.9)
    values = loss.call(tf.constant([1.0, -1.0]), tf.constant([[0.0], [0.0]]))
    np.testing.assert_allclose(values, [0.9, 0.1], rtol=1e-6)
    assert loss.get_config()["quantile"] == 0.9


def test_the_data_set_that_is_added():
    code, entry = (block_with("docs/data.md", text) for text in ("half circles, from scikit", '"moons": DataCard('))
    module = types.ModuleType("trainers.input.kinds.moons")
    exec(code, vars(module))
    card = eval(f"{{{entry}}}", {"DataCard": DataCard})["moons"]
    assert card.load == "trainers.input.kinds.moons:load"
    dataset = module.load(Request("moons"))
    assert (dataset.spec.task, dataset.spec.num_classes, dataset.spec.input_shape) == (card.task, 2, (2,))
    assert (dataset.train.size, dataset.eval.size) == (1600, 400)


def test_the_package_that_stays_outside_of_the_repository(tmp_path, monkeypatch, run):
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg/net.py").write_text(block_with("docs/models.md", "A small network for rows or images"))
    (tmp_path / "my_pkg/losses.py").write_text(block_with("docs/models.md", "class Brier"))
    (tmp_path / "my_pkg/data.py").write_text(block_with("docs/data.md", "on which side of a circle"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:  # of another test
        monkeypatch.delitem(sys.modules, name)
    flags = {
        "model": "my_pkg.net:build,width=128",
        "loss": "my_pkg.losses:Brier,scale=2",
        "train_steps": 100,
        "learning_rate": 0.01,
    }
    assert (
        run(dataset="my_pkg.data:load,size=5000", eval_every=0, checkpoint_every=0, log_every=0, **flags).eval[
            "accuracy"
        ]
        > 0.7
    )


def test_the_task_of_its_own_is_found_through_the_model(tmp_path, monkeypatch, run):
    (tmp_path / "tags_of_page.py").write_text(
        block_with("docs/models.md", "Any number of labels for each example")
        + """

def load():
    rows = np.random.default_rng(0).normal(size=(64, 5))
    return (rows, np.int64(rows[:, :3] > 0)), (rows[:9], np.int64(rows[:9, :3] > 0))
"""
    )
    monkeypatch.chdir(tmp_path)
    flags = {"train_steps": 40, "learning_rate": 0.05, "batch_size": 16, "checkpoint_every": 0}
    summary = run(model="tags_of_page:build", dataset="tags_of_page:load", **flags)
    assert summary.eval["right"] > 0.7


def test_the_lines_that_own_loops_changes_are_in_the_trainer():
    trainer = (ROOT / "trainers/custom_loop.py").read_text()
    page = (ROOT / "docs/own-loops.md").read_text()
    *changes, _ = blocks("docs/own-loops.md", "python")
    assert len(changes) == 2
    for block in changes:
        assert block.splitlines()[0] in trainer.splitlines()
    steps = page.partition("## The loops that are here")[0]
    for method in re.findall(r"^\| `(\w+)` \|", steps, re.MULTILINE):
        assert f"def {method}(" in trainer, method


def test_the_loop_of_ones_own_runs_from_a_folder_elsewhere(tmp_path, data_dir):
    page = blocks("docs/own-loops.md", "python")[-1]
    assert len(page.splitlines()) <= 120
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg/denoising.py").write_text(page)

    def train(run_dir, steps, *flags):
        command = [sys.executable, str(ROOT / "trainers/run_loop.py"), "my_pkg.denoising", f"--run_dir={run_dir}"]
        command += [
            f"--train_steps={steps}",
            "--checkpoint_every=3",
            "--eval_every=3",
            "--log_every=1",
            "--deterministic",
        ]
        command += ["--schedule=constant", "--batch_size=64", f"--data_dir={data_dir}", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return tmp_path / run_dir

    whole = train("whole", 6, "--replicas=2", "--export")
    assert (whole / "export/saved_model.pb").exists()
    as_after(3, whole, "halves")
    expected, halves, single = (
        weights(whole),
        weights(train("halves", 6, "--replicas=2")),
        weights(train("one", 6, "--replicas=1")),
    )
    assert expected.keys() == halves.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, halves[name], err_msg=name)
    assert largest_relative_difference(expected, single) < 1e-4
    losses = [line["loss"] for line in metrics(whole) if line["split"] == "train"]
    assert losses[-1] < losses[0]
