"""What a run writes, and that each promise about it holds on real runs."""

import json
import logging

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from conftest import ROOT, metrics, weights
from tensorboard.backend.event_processing import plugin_event_multiplexer as event_multiplexer

from models import mlp, tasks
from trainers.input import load, resident
from trainers.record import state
from trainers.run import driver
from trainers.run.cadence import due, next_due
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve


def test_the_default_run_reaches_the_accuracy_of_its_card(trainer, tmp_path):
    code, output = trainer("--strategy=mirrored", f"--run_dir={tmp_path / 'run'}", "--export").wait(600)
    assert code == 0, output
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    print(f"accuracy {facts['final']['eval']['accuracy']:.4f}, {facts['seconds']['train']:.0f} s of training")
    assert facts["final"]["eval"]["accuracy"] >= 0.97
    assert facts["replicas"] == 2
    assert facts["traces"] == 1
    assert facts["exit_code"] == 0
    assert facts["ended"] >= facts["started"]
    assert {"import", "build", "trace", "train", "evaluate", "checkpoint"} <= facts["seconds"].keys()
    assert facts["versions"]["tensorflow"] == tf.__version__
    assert {"flags.txt", "run.json", "metrics.jsonl", "checkpoints", "train", "eval", "export"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    # The exported model alone, without the project's code, gives the evaluation again.
    served = tf.saved_model.load(str(tmp_path / "run" / "export"))
    builder = tfds.builder_from_directory(str(next((trainer_data(output, facts)).glob("digits/[0-9]*"))))
    test = tfds.as_numpy(builder.as_dataset(split="test", batch_size=-1))
    answers = served.serve(tf.constant(test["image"]))
    accuracy = np.mean(answers["class"].numpy().astype(int) == test["label"])
    assert accuracy == pytest.approx(facts["final"]["eval"]["accuracy"], abs=1e-6)


def trainer_data(output, facts):
    from pathlib import Path

    return Path(facts["flags"]["data_dir"])


@pytest.mark.parametrize("strategy", ["one_device", "mirrored"])
def test_both_strategies_work_from_the_root(trainer, tmp_path, strategy):
    flags = ("--model=mlp", "--train_steps=20", f"--run_dir={tmp_path / 'run'}")
    code, output = trainer(f"--strategy={strategy}", *flags).wait()
    assert code == 0, output
    assert "step 20/20  eval" in output
    assert "WARNING" not in output and "Instructions" not in output


def test_dry_run_prints_the_plan_and_writes_nothing(run, tmp_path, capsys):
    run(dry_run=True, replicas=2, accumulate=2)
    out = capsys.readouterr().out
    assert "2 replicas: CPU:0" in out
    assert "32 examples = 2 × 16, each in 2 parts" in out
    assert "1438 train, 359 eval" in out
    assert not (tmp_path / "run").exists()


def test_metrics_come_at_their_cadences_and_agree_with_tensorboard(run, tmp_path):
    run(train_steps=7, log_every=2, eval_every=3, checkpoint_every=0)
    lines = metrics(tmp_path / "run")
    assert [(line["step"], line["split"]) for line in lines] == [
        (2, "train"),
        (3, "eval"),
        (4, "train"),
        (6, "train"),
        (6, "eval"),
        (7, "train"),
        (7, "eval"),
    ]
    for line in lines:
        wanted = {"loss", "accuracy"}
        if line["split"] == "eval":
            wanted |= {"f1", "calibration_error"}
        else:
            wanted |= {"learning_rate", "gradient_norm", "parameter_norm", "update_norm"}
            wanted |= {"steps_per_second", "examples_per_second", "model_flops_per_second"}
            wanted |= {f"share_{part}" for part in ("input", "peers", "compute", "evaluate", "checkpoint", "python")}
        assert line.keys() == wanted | {"step", "split"}
    events = event_multiplexer.EventMultiplexer(size_guidance={"tensors": 0}).AddRunsFromDirectory(
        str(tmp_path / "run")
    )
    events.Reload()
    for split in ("train", "eval"):
        expected = {line["step"]: line["loss"] for line in lines if line["split"] == split}
        found = {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors(split, "loss")}
        assert found == pytest.approx(expected)


def test_tensorboard_shows_no_step_twice_after_a_resume(run, tmp_path):
    run(train_steps=6, checkpoint_every=3, log_every=1)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*6"):
        path.rename(path.with_suffix(".damaged"))
    run(train_steps=6, checkpoint_every=3, log_every=1)
    events = event_multiplexer.EventMultiplexer(size_guidance={"tensors": 0}).AddRunsFromDirectory(
        str(tmp_path / "run")
    )
    events.Reload()
    assert [e.step for e in events.Tensors("train", "loss")] == [1, 2, 3, 4, 5, 6]


def test_the_graph_shows_the_layers_by_their_names(run, tmp_path):
    run(model="resnet", train_steps=1, replicas=2)
    events = event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "run"))
    events.Reload()
    graph = events.Graph("train")
    scopes = {"/".join(node.name.split("/")[:2]) for node in graph.node}
    assert {"resnet/stem", "resnet/stage_1_block_1", "resnet/stage_3_block_1", "resnet/logits"} <= scopes
    assert not [scope for scope in scopes if scope.endswith("_1_1")]
    names = {node.name for node in graph.node}
    assert all(source.split(":")[0] in names for node in graph.node for source in node.input)


def test_loss_and_metrics_are_those_of_the_examples(run, tmp_path):
    """The logged training loss at rate 0 is NumPy's mean over the very examples of the window."""
    run(train_steps=4, log_every=4, learning_rate=0.0, warmup_steps=0, eval_every=0, seed=2, replicas=2)
    state, lines = weights(tmp_path / "run"), metrics(tmp_path / "run")
    values = [state[name] for name in sorted(state) if name.startswith("model/")]
    config = resolve(
        Config(model="mlp", data_dir=json.loads((tmp_path / "run/run.json").read_text())["flags"]["data_dir"])
    )
    test = load.load("digits", config.data_dir).eval.arrays
    x = test["image"].reshape(len(test["label"]), -1).astype(np.float64) * (2 / 255) - 1
    for kernel, bias in ((values[0], values[1]), (values[2], values[3])):
        x = np.maximum(x @ kernel + bias, 0)
    logits = x @ values[4] + values[5]
    log_sum = np.log(np.exp(logits).sum(axis=1))
    loss = np.mean(log_sum - logits[np.arange(len(logits)), test["label"]])
    found = next(line for line in lines if line["split"] == "eval")
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == test["label"]), abs=1e-6)


def test_the_first_run_prepares_the_data_and_has_the_same_weights_as_the_second(run, tmp_path):
    for name in ("first", "second"):
        run(name, data_dir=str(tmp_path / "fresh"), train_steps=1)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_newest_checkpoints_and_the_best_are_kept(run, tmp_path):
    run(train_steps=20, checkpoint_every=1, eval_every=4, keep_checkpoints=2, learning_rate=0.02)
    evals = [(line["accuracy"], -line["step"]) for line in metrics(tmp_path / "run") if line["split"] == "eval"]
    best = -max(evals)[1]
    steps = {int(path.name[5:]) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert steps == {19, 20, best}


def test_a_checkpoint_is_readable_by_tensorflow_alone(run, tmp_path):
    run()
    names = dict(tf.train.list_variables(str(tmp_path / "run/checkpoints/step-0000000006/state")))
    assert names["model/0000/mlp/hidden_1/kernel"] == [64, 256]
    assert any(name.startswith("optimizer/") and name.endswith("/iteration") for name in names)


def test_a_variable_that_keras_does_not_track_is_refused(run, monkeypatch):
    class Forgetful(mlp.MLP):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            self.hidden_state = lambda: None
            self.hidden_state.count = tf.Variable(0.0, name="forgotten", trainable=False)

        def call(self, x, training=False):
            if training:
                self.hidden_state.count.assign_add(1.0)
            return super().call(x, training=training)

    monkeypatch.setattr(
        mlp, "build", lambda spec: (Forgetful(spec.num_classes, name="mlp"), tasks.classification(spec))
    )
    with pytest.raises(BadConfiguration, match="forgotten.*would be missing from checkpoints; make it with add_"):
        run(strategy="one_device")
    with pytest.raises(BadConfiguration, match="would be missing from checkpoints"):
        run(replicas=2)


def test_a_second_trace_is_logged_with_its_cause(run, monkeypatch, caplog):
    make, calls = driver.make_train_call, []

    def twice(*arguments):
        calls.append(make(*arguments))
        calls[-1].get_concrete_function()
        return make(*arguments)

    monkeypatch.setattr(driver, "make_train_call", twice)
    with caplog.at_level(logging.WARNING):
        summary = run()
    assert summary.traces == 2
    assert "traced again (trace 2)" in caplog.text
    assert "test_run.py" in caplog.text
    assert "self.train_call = train_call.get_concrete_function()" in caplog.text


def test_steps_per_call_does_not_change_a_bit(run, tmp_path):
    for name, steps in (("one", 1), ("five", 5), ("auto", 0)):
        run(name, deterministic=True, train_steps=12, steps_per_call=steps, log_every=0)
    one = weights(tmp_path / "one")
    for name in ("five", "auto"):
        other = weights(tmp_path / name)
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_how_many_steps_are_ordered_at_once_does_not_change_a_bit(run, tmp_path, monkeypatch):
    flags = {"deterministic": True, "train_steps": 23, "steps_per_call": 23, "log_every": 10, "batch_size": 24}
    for name, steps in (("all", 1000), ("three", 3), ("one", 1)):
        monkeypatch.setattr(resident, "_ORDERED", 24 * steps)
        run(name, replicas=2, accumulate=2, **flags)
    every, lines = weights(tmp_path / "all"), metrics(tmp_path / "all")
    for name in ("three", "one"):
        other = weights(tmp_path / name)
        assert all(np.array_equal(every[key], other[key]) for key in every)
        for line, expected in zip(metrics(tmp_path / name), lines, strict=True):
            keys = ("step", "loss", "update_norm") if line["split"] == "train" else ("step", "loss")
            assert [line[key] for key in keys] == [expected[key] for key in keys]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains(run, precision):
    summary = run(precision=precision, train_steps=150, batch_size=64, replicas=2, log_every=50, eval_every=0)
    assert summary.eval["accuracy"] > 0.85


def test_xla_ends_with_the_weights_of_the_graph(run, tmp_path):
    flags = {"optimizer": "sgd", "learning_rate": 0.05, "train_steps": 20, "replicas": 2}
    for jit in ("on", "off"):
        run(jit, jit=jit, **flags)
    on, off = weights(tmp_path / "on"), weights(tmp_path / "off")
    for name, value in off.items():
        np.testing.assert_allclose(on[name], value, rtol=1e-4, atol=1e-5)


def test_streamed_input_gives_the_same_weights_on_any_number_of_replicas(run, tmp_path):
    for replicas in (1, 2, 4):
        run(f"{replicas}", replicas=replicas, input="stream", accumulate=2, optimizer="sgd", train_steps=20)
    one = weights(tmp_path / "1")
    for replicas in (2, 4):
        other = weights(tmp_path / f"{replicas}")
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("step", "every", "last", "expected"),
    [(0, 5, 20, False), (5, 5, 20, True), (6, 5, 20, False), (20, 7, 20, True), (7, 0, 20, False), (20, 0, 20, True)],
)
def test_a_cadence_is_due(step, every, last, expected):
    assert due(step, every, last) is expected


def test_the_next_step_of_a_cadence_is_the_next_at_which_it_is_due():
    for every in (0, 1, 3, 7, 50):
        for step in range(20):
            following = next(s for s in range(step + 1, 21) if due(s, every, 20))
            assert next_due(step, every, 20) == following


def test_the_checkpoint_holds_every_variable_of_model_optimizer_and_loop(run, tmp_path):
    run(model="resnet", train_steps=1, optimizer="adamw", ema=0.9, precision="float16")
    names = weights(tmp_path / "run").keys()
    count = {group: sum(name.startswith(group) for name in names) for group in ("model/", "optimizer/", "ema/", "loss")}
    # stem 1 + 4; blocks of 10 variables, two of them with a projection of 5 more; head 2.
    assert count["model/"] == 5 + 3 * 10 + 2 * 5 + 2
    assert count["optimizer/"] >= 1 + 2 * count["ema/"]
    assert count["loss"] == 3
    assert "loop/sums" in names
    assert state.name_variables("a", []) == {}


def test_no_module_of_the_trainers_bears_a_name_of_the_standard_library():
    import sys

    names = {path.stem for path in (ROOT / "trainers").glob("*.py")} - {"__init__"}
    assert names.isdisjoint(sys.stdlib_module_names)


def test_a_profile_of_the_named_steps_is_written(run, tmp_path):
    run(train_steps=6, profile="2:4")
    assert list((tmp_path / "run/train/plugins/profile").glob("*/*.xplane.pb"))


def test_a_weight_that_the_loss_does_not_use_keeps_its_value(run, tmp_path, monkeypatch):
    class WithSpare(mlp.MLP):
        def build(self, input_shape):
            self.spare = self.add_weight(shape=(3,), initializer="ones", name="spare")

    monkeypatch.setattr(
        mlp, "build", lambda spec: (WithSpare(spec.num_classes, name="mlp"), tasks.classification(spec))
    )
    run(optimizer="sgd", weight_decay=0.0)
    spare = [value for name, value in weights(tmp_path / "run").items() if "spare" in name and name.startswith("model")]
    np.testing.assert_array_equal(spare, [np.ones(3)])


def test_waiting_for_input_is_told_once(trainer, tmp_path):
    """Large images that take far longer to decode than a small model takes to train on them."""
    for i in range(20):
        path = tmp_path / "photos" / ("a" if i % 2 else "b") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.effect_noise((900, 900), 60).convert("RGB").save(path, compress_level=1)
    flags = [f"--dataset=images:{tmp_path / 'photos'}", "--input=stream", "--image_size=8", "--batch_size=8"]
    flags += ["--train_steps=30", "--log_every=10", "--steps_per_call=10", "--eval_every=0", "--checkpoint_every=0"]
    code, output = trainer("--model=mlp", "--replicas=1", *flags, f"--run_dir={tmp_path / 'run'}").wait()
    assert code == 0, output
    told = [line for line in output.splitlines() if "of the time is spent waiting for input" in line]
    assert len(told) == 1 and "--input=resident" in told[0]
