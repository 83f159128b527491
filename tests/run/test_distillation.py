"""A student listens to a teacher that a run has left, at every size, and keeps the teacher that it began with."""

import json
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import largest_relative_difference, metrics, weights, without_times

from trainers import distillation_loop
from trainers.distillation_loop import Distilled, Settings
from trainers.input import load
from trainers.run import trained
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve
from trainers.world import devices


@pytest.fixture
def teacher(made, tmp_path):
    """The run_dir of a teacher."""
    made("teacher", train_steps=6, seed=5, warmup_steps=0)
    return tmp_path / "teacher"


@pytest.fixture
def settings(data_dir, tmp_path, teacher):
    """`settings(name, **flags)`: those of a student."""

    def make(name, **flags):
        given = {"model": "mlp", "train_steps": 6, "batch_size": 32, "data_dir": str(data_dir), "teacher": str(teacher)}
        given |= {"log_every": 2, "eval_every": 3, "checkpoint_every": 3, "run_dir": str(tmp_path / name)}
        return resolve(Settings(**(given | {"deterministic": True} | flags)))

    return make


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def test_the_loss_is_that_of_the_paper(settings):
    config = settings("loss", replicas=1, temperature=3.0, teacher_share=0.75)
    loop = Distilled(config, devices.set_up(config), load.load_for(config))
    chance = np.random.default_rng(0)
    inputs, labels = chance.normal(size=[5, 8, 8, 1]).astype(np.float32), np.array([0, 3, 9, 1, 1])
    outputs = chance.normal(size=[5, 10]).astype(np.float32)
    said, own = softmax(loop.teacher.model(inputs).numpy() / 3), softmax(outputs / 3)
    divergence = (said * (np.log(said) - np.log(own))).sum(axis=1)
    hard = -np.log(softmax(outputs)[np.arange(5), labels])
    found = loop.losses(tf.constant(inputs), tf.constant(labels), tf.constant(outputs))
    np.testing.assert_allclose(found, 0.75 * 9 * divergence + 0.25 * hard, rtol=2e-5)


def test_every_number_of_replicas_gives_the_same_student(settings, tmp_path):
    for replicas in (1, 2, 4):
        distillation_loop.train(settings(str(replicas), replicas=replicas, train_steps=4))
    one = weights(tmp_path / "1")
    for replicas in (2, 4):
        assert largest_relative_difference(one, weights(tmp_path / str(replicas))) < 1e-4


def test_a_student_resumes_with_its_bits_and_the_teacher_that_it_began_with(settings, run, tmp_path):
    exact = {"warmup_steps": 0, "schedule": "constant"}
    distillation_loop.train(settings("whole", **exact))
    distillation_loop.train(settings("halves", train_steps=3, **exact))
    assert json.loads((tmp_path / "halves/run.json").read_text())["loop"] == "distillation"
    run("teacher", train_steps=12, seed=5, warmup_steps=0)  # it is trained on, and its best checkpoint is another
    distillation_loop.train(settings("halves", **exact))
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert whole.keys() == halves.keys() and any(name.startswith("teacher/") for name in whole)
    for name in whole:
        np.testing.assert_array_equal(whole[name], halves[name], err_msg=name)
    lines = [without_times(metrics(tmp_path / name)) for name in ("whole", "halves")]
    assert lines[0][-1] == lines[1][-1]


def test_the_teacher_is_the_average_of_the_best_checkpoint(run, settings, tmp_path):
    run("averaged", train_steps=6, ema=0.5)
    config = settings("student", replicas=1, teacher=str(tmp_path / "averaged"))
    world = devices.set_up(config)
    with world.strategy.scope():
        found = trained.model_of("--teacher", tmp_path / "averaged", config, load.load_for(config))
    step = int(found.checkpoint.name.removeprefix("step-"))
    evaluations = [line for line in metrics(tmp_path / "averaged") if line["split"] == "eval"]
    assert step == max(evaluations, key=lambda line: line["accuracy"])["step"]
    held = weights(tmp_path / "averaged", step)
    averages = [held[name] for name in sorted(held) if name.startswith("ema/")]
    assert len(averages) == 6
    model = found.model
    assert model.trainable_variables == []
    for variable, value in zip([v for v in model.variables if len(v.shape)], averages, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_a_teacher_with_frozen_weights_has_averages_of_the_others_alone(run, settings, tmp_path):
    run("frozen", train_steps=3, ema=0.5, freeze="hidden_1|bias")
    config = settings("student", replicas=1, teacher=str(tmp_path / "frozen"))
    with devices.set_up(config).strategy.scope():
        found = trained.model_of("--teacher", tmp_path / "frozen", config, load.load_for(config))
    held = weights(tmp_path / "frozen", 3)
    for variable in [variable for variable in found.model.variables if len(variable.shape)]:
        end = variable.path.split("/", 1)[1]
        average = [name for name in held if name.startswith("ema/") and f"{end}/average" in name]
        assert bool(average) == (end in ("hidden_2/kernel", "logits/kernel"))
        name = average[0] if average else next(n for n in held if n.startswith("model/") and n.endswith(end))
        np.testing.assert_array_equal(variable.numpy(), held[name], err_msg=name)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"teacher": ""}, "--teacher is not given; name the run_dir"),
        ({"teacher_share": 1.5}, "--teacher_share 1.5 is above 1; pass 1 or less"),
        ({"temperature": 0.0}, "--temperature 0.0 is below 0.01"),
        ({"model": "residual_regressor", "dataset": "diabetes"}, "--model residual_regressor has targets without"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(settings, flags, says):
    with pytest.raises(BadConfiguration, match=says):
        settings("bad", **flags)


def test_a_teacher_that_does_not_fit_is_one_line(run, settings, tmp_path):
    with pytest.raises(BadConfiguration, match="holds no run with a checkpoint; train it first"):
        settings("none", teacher=str(tmp_path / "nobody")).check_files()
    run("numbers", model="residual_regressor", dataset="diabetes")
    config = settings("student", teacher=str(tmp_path / "numbers"))
    with pytest.raises(BadConfiguration, match=r"its model residual_regressor .*; name a run on such data"):
        distillation_loop.train(config)


def test_a_teacher_of_code_that_no_flag_names_is_not_imported(teacher, settings, tmp_path, monkeypatch):
    facts = json.loads((teacher / "run.json").read_text())
    facts["flags"]["model"] = "foreign_net:build"
    (teacher / "run.json").write_text(json.dumps(facts))
    source = "from models import mlp\n\n\ndef build(spec):\n    return mlp.build(spec)\n"
    (tmp_path / "foreign_net.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadConfiguration, match="its model is foreign_net:build, and no flag names the module") as fault:
        distillation_loop.train(settings("student", dataset="digits"))
    assert "\n" not in str(fault.value) and "foreign_net" not in sys.modules
    named = settings("named", model="foreign_net:build", dataset="digits", train_steps=1, warmup_steps=0)
    assert distillation_loop.train(named).step == 1
    sys.modules.pop("foreign_net")


def test_a_damaged_checkpoint_of_the_teacher_gives_way_to_another(run, settings, teacher, caplog):
    run("teacher", train_steps=9, seed=5, warmup_steps=0)
    config = settings("student", replicas=1, train_steps=1)
    dataset, steps = load.load_for(config), trained.best_of(teacher)[0].steps()
    best = trained.best_of(teacher)[1]
    state = teacher / f"checkpoints/step-{best:010d}/state.data-00000-of-00001"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    found = trained.model_of("--teacher", teacher, config, dataset)
    assert int(found.checkpoint.name.removeprefix("step-")) == max(step for step in steps if step != best)
    assert "is damaged and skipped" in caplog.text
    for step in steps:
        (teacher / f"checkpoints/step-{step:010d}/state.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(BadConfiguration, match="every checkpoint is damaged"):
        trained.model_of("--teacher", teacher, config, dataset)


def test_a_run_without_a_model_is_no_teacher(settings, tmp_path):
    folder = tmp_path / "gan"
    (folder / "checkpoints/step-0000000001").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"loop": "another", "flags": {"dataset": "digits"}}))
    with pytest.raises(BadConfiguration, match="is a run of the loop 'another' without --model; name another"):
        distillation_loop.train(settings("student", teacher=str(folder)))
