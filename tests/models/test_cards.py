"""The registry, and the layering of `models`: it stands alone, and its registry needs no TensorFlow."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from models import cards, optimizers, tasks

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "models").glob("*.py"))

SPECS = {
    "classification": tasks.DataSpec("classification", (8, 8, 1), num_classes=3),
    "regression": tasks.DataSpec("regression", (6,)),
    "language": tasks.DataSpec("language", (4,), "int32", num_classes=5, target_shape=(4,)),
    "segmentation": tasks.DataSpec("segmentation", (8, 8, 1), num_classes=3, target_shape=(8, 8)),
}
# Two examples of each kind of data: targets and outputs.
RANDOM = np.random.default_rng(0)
EXAMPLES = {
    "classification": (np.array([0, 2]), RANDOM.normal(size=(2, 3))),
    "regression": (RANDOM.normal(size=2), RANDOM.normal(size=(2, 1))),
    "language": (RANDOM.integers(0, 5, (2, 4)), RANDOM.normal(size=(2, 4, 5))),
    "segmentation": (RANDOM.integers(0, 3, (2, 8, 8)), RANDOM.normal(size=(2, 8, 8, 3))),
}


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in cards.LOSSES for name in cards.LOSSES[task]])
def test_a_loss_of_the_registry_gives_one_value_for_each_example(task, name):
    loss = cards.load(cards.LOSSES[task][name])()
    assert isinstance(loss, keras.losses.Loss)
    targets, outputs = EXAMPLES[task]
    values = loss.call(targets, outputs)
    assert values.shape == (2,)
    named = tasks.named_loss(dataclasses.replace(SPECS[task], loss=name))
    np.testing.assert_array_equal(named(targets, outputs), values)


@pytest.mark.parametrize("task", cards.LOSSES)
def test_the_first_loss_of_a_task_is_its_default(task):
    first = cards.load(next(iter(cards.LOSSES[task].values())))()
    np.testing.assert_array_equal(tasks.named_loss(SPECS[task])(*EXAMPLES[task]), first.call(*EXAMPLES[task]))


@pytest.mark.parametrize("name", cards.OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_optimizer_of_the_registry_has_its_rate_and_its_weight_decay(name, decay):
    optimizer = optimizers.build(name, 0.25, decay)
    assert isinstance(optimizer, keras.optimizers.Optimizer)
    assert float(optimizer.learning_rate) == 0.25
    assert (optimizer.weight_decay or 0.0) == decay


@pytest.mark.parametrize("name", cards.SCHEDULES)
def test_a_schedule_of_the_registry_has_its_peak_and_its_steps(name):
    schedule = optimizers.schedule(name, 0.25, 3, 20)
    assert isinstance(schedule, optimizers.Schedule)
    assert schedule.get_config().items() >= {"peak": 0.25, "warmup_steps": 3, "total_steps": 20}.items()
    assert float(schedule(3 if name in ("one_cycle", "cyclic") else 2)) == pytest.approx(0.25)


@pytest.mark.parametrize("name", cards.MODELS)
def test_a_model_of_the_registry_is_built_with_its_task(name):
    card = cards.MODELS[name]
    build = card.builder()
    assert inspect.isfunction(build)
    model, task = build(SPECS[card.task])
    assert isinstance(model, keras.Model)
    assert isinstance(task, tasks.Task)
    assert task.pictures in tasks.PICTURES
    assert card.quality[0] in {"loss", *task.metrics, *task.eval_metrics}


def test_options_reach_what_is_built():
    optimizer = optimizers.build("adamw,beta_2=0.95", 0.25, 0.1)
    assert (optimizer.beta_2, optimizer.weight_decay) == (0.95, 0.1)
    assert optimizers.build("keras.optimizers:Lion,beta_1=0.5", 0.25, 0.0).beta_1 == 0.5
    loss = tasks.named_loss(dataclasses.replace(SPECS["regression"], loss="huber,threshold=2")).__self__
    assert loss.threshold == 2.0
    model, _ = tasks.model_of("vit,depth=2,width=16", SPECS["classification"])
    assert (model.depth, model.features) == (2, 16)


@pytest.mark.parametrize("name", cards.MODELS)
def test_a_recipe_names_what_is_in_the_registry(name):
    card = cards.MODELS[name]
    assert card.task in cards.LOSSES
    assert card.recipe.optimizer in cards.OPTIMIZERS
    assert card.recipe.schedule in cards.SCHEDULES


def imported(path):
    """Names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_models_imports_nothing_of_the_rest_of_the_project(path):
    rooms = {folder.name for folder in ROOT.iterdir() if folder.is_dir()} - {"models"}
    assert "trainers" in rooms
    assert not rooms & {name.partition(".")[0] for name in imported(path)}


def modules_after(statement):
    """Names of the modules that a new interpreter has loaded after a statement."""
    program = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_the_registry_is_free_of_tensorflow():
    loaded = modules_after("import models.cards")
    assert "models" in loaded
    assert not loaded & {"tensorflow", "keras", "numpy"}


def test_all_of_models_loads_without_the_trainers():
    names = ", ".join(f"models.{path.stem}" for path in MODULES if path.stem != "__init__")
    loaded = modules_after(f"import {names}")
    assert {"models", "tensorflow"} <= loaded
    assert not loaded & {"trainers", "launch"}
