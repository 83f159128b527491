"""Peers in JAX: they train our model as our loop does, answer line by line, and say what is missing in one line."""

import json
import os
import subprocess

import numpy as np
import pytest
from conftest import ROOT

from trainers import benchmark
from trainers.measure import jax_process, rounds
from trainers.settings.exit_codes import BadConfiguration, RunEnded

MLP = {"kind": "mlp", "units": [16, 8], "dropout": 0.2, "classes": 4}
RESNET = {"kind": "resnet", "widths": [4, 8], "num_blocks": [1, 2], "classes": 4}
RECIPE = {"batch_size": 32, "train_steps": 300, "learning_rate": 1e-2, "warmup_steps": 20, "weight_decay": 1e-2}
RECIPE |= {"clip_norm": 1.0, "log_every": 50}


def needs_jax():
    if not jax_process._PYTHON.exists():
        pytest.skip("JAX is not installed: python3 launch/environment.py jax")


def examples(count=256):
    """Points around a centre for each class, which are easily told apart: inputs `[count, 8, 8, 1]`, targets."""
    rng = np.random.default_rng(0)
    centres, targets = rng.random((4, 8, 8, 1)), rng.integers(0, 4, count)
    inputs = centres[targets] + 0.2 * rng.standard_normal((count, 8, 8, 1))
    return inputs.astype(np.float32), targets.astype(np.int32)


def parameters_of(model):
    if model is MLP:
        return 64 * 16 + 16 + 16 * 8 + 8 + 8 * 4 + 4
    convolutions = [(9, 1, 4), *[(9, 4, 4)] * 2, (9, 4, 8), (9, 8, 8), (1, 4, 8), *[(9, 8, 8)] * 2]
    return sum(size * inputs * outputs + 4 * outputs for size, inputs, outputs in convolutions) + 8 * 4 + 4


@pytest.mark.parametrize("model", [MLP, RESNET], ids=["mlp", "resnet"])
def test_each_peer_learns_and_says_its_seconds_again_and_again(model):
    needs_jax()
    with jax_process.peers(model, RECIPE, *examples(), parameters_of(model)) as process:
        assert process.facts["versions"].keys() == {"jax", "keras"} and process.facts["device"] == "cpu"
        for key, ways in process.facts["contenders"].items():
            assert next(iter(ways.values())) == 1, "the first way makes one update at once"
            for name in (next(iter(ways)), [name for name, updates in ways.items() if updates == 10][-1]):
                begun, trained = (process.ask(key=key, name=name, steps=steps) for steps in (10, 120))
                assert 0 < begun["seconds"] and 0 < trained["seconds"]
                assert trained["loss"] < begun["loss"] / 2 and trained["accuracy"] > 0.9, name
        again = process.ask(key=key, name=name, steps=120)
        assert again["loss"] == pytest.approx(trained["loss"]), "each measurement begins from the initial weights"


SAME = """
import json, sys
import jax, numpy as np
from trainers.measure import jax_peers
model, recipe, data = json.loads(sys.argv[1])
data = jax_peers.Data(data, recipe["batch_size"])
fit, hand = jax_peers.Fit(model, recipe, data), jax_peers.ByHand(model, recipe, data)
layers = [layer for layer in fit.model.layers if layer.weights]
dense = sorted((each for each in layers if each.name.startswith("dense")), key=lambda each: (len(each.name), each.name))
convolutions, norms = (
    sorted((each for each in layers if each.name.startswith(kind)), key=lambda each: (len(each.name), each.name))
    for kind in ("conv2d", "batch_normalization"))
def weights():
    pairs = [(conv.kernel.value, norm.gamma.value, norm.beta.value)
             for conv, norm in zip(convolutions, norms, strict=True)]
    return [*pairs, *((each.kernel.value, each.bias.value) for each in dense)]
step, _, statistics, moments, sums = hand.start
start = jax.tree.map(np.array, weights())
hand.start = step, jax.tree.map(jax.numpy.asarray, start), statistics, moments, sums
fit.compile(steps_per_execution=1)
fit.model.fit(data.batches(), steps_per_epoch=5, epochs=1, verbose=0)
state = hand.start
for _ in range(5):
    state = hand.update(state)
for a, b, c in zip(*map(jax.tree.leaves, (weights(), state[1], start)), strict=True):
    assert np.abs(a - c).max() > 1e-4, "it has moved"
    assert np.abs(a - b).max() < 1e-3 * np.abs(a - c).max() + 1e-5, (a.shape, np.abs(a - b).max())
moving = [(norm.moving_mean.value, norm.moving_variance.value) for norm in norms]
for a, b in zip(*map(jax.tree.leaves, (moving, state[2])), strict=True):
    assert np.abs(a - b).max() < 1e-4, "statistics"
"""


@pytest.mark.parametrize("model", [MLP | {"dropout": 0.0}, RESNET], ids=["mlp", "resnet"])
def test_both_peers_make_the_same_updates(model, tmp_path):
    """From the same weights, the hand-written loop and Keras come to the same weights: they do the same work."""
    needs_jax()
    inputs, targets = examples()
    np.savez(tmp_path / "examples.npz", inputs=inputs, targets=targets)
    recipe = RECIPE | {"learning_rate": 1e-3}
    words = [jax_process._PYTHON, "-P", "-c", SAME, json.dumps([model, recipe, str(tmp_path / "examples.npz")])]
    env = os.environ | {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr


def test_each_peer_is_measured_at_its_best_with_what_it_is_and_ends_when_nobody_asks():
    needs_jax()
    with jax_process.peers(MLP, RECIPE, *examples(), parameters_of(MLP)) as process:
        found = process.contenders(0.05)
        assert [contender.key for contender in found] == ["jax_fit", "jax_scan"]
        assert all("jax " in contender.name and "keras 3." in contender.name for contender in found)
        result = rounds.measure(rounds.Row("mlp", 32, 1), 1, found, 2, 0.05)
        process._child.stdin.close()
        assert process._child.wait(60) == 0, "it ends with the process that has started it"
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result.seconds.values())


def test_a_process_that_ends_and_a_contender_that_fails_are_told_in_one_line():
    needs_jax()
    with jax_process.peers(MLP, RECIPE, *examples(), parameters_of(MLP)) as process:
        with pytest.raises(RunEnded, match="KeyError"):
            process.ask(key="jax_scan", name="nothing", steps=1)
        process._child.kill()
        with pytest.raises(RunEnded, match="the process of JAX's peers has ended"):
            process.ask(key="jax_scan", name="nothing", steps=1)
    with pytest.raises(RunEnded, match="bring trainers/measure/jax_peers.py up to models/"):
        jax_process.peers(MLP, RECIPE, *examples(), 1).__enter__()


def test_without_its_environment_the_command_that_makes_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(jax_process, "_PYTHON", tmp_path / ".venv.jax/bin/python")
    with pytest.raises(BadConfiguration, match=r"\.venv\.jax; run `python3 launch/environment\.py jax`$"):
        benchmark.settings_from(["benchmark", "--peers=jax"])


def test_an_environment_without_jax_is_named_with_the_remedy(monkeypatch, tmp_path):
    python = tmp_path / ".venv.jax/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'No module named jax' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(jax_process, "_PYTHON", python)
    with pytest.raises(BadConfiguration, match=r"cannot be used \(.*No module named jax\); remove it and run") as found:
        jax_process.peers(MLP, RECIPE, *examples(), 1).__enter__()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--peers=torch"], "--peers 'torch' is not known; pass jax"),
        (["--peers=jax", "--rows=vit:128:1"], "--rows vit:128:1: JAX's peers train mlp and resnet on one replica"),
        (["--peers=jax", "--rows=mlp:32:2"], "--rows mlp:32:2: JAX's peers train mlp and resnet on one replica"),
        (["--peers=jax", "--input=images:x"], "--peers measures training and --input the input alone"),
    ],
)
def test_what_peers_in_jax_cannot_do_is_refused(flags, said):
    with pytest.raises(BadConfiguration) as found:
        benchmark.settings_from(["benchmark", *flags])
    assert said in str(found.value)


def test_rows_are_those_that_they_can_train_where_none_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(jax_process, "check_there", lambda: None)
    rows = benchmark.settings_from(["benchmark", "--peers=jax"]).rows
    assert [str(row) for row in rows] == ["mlp, batch 32, 1 replica", "resnet, batch 128, 1 replica"]
    assert len(benchmark.settings_from(["benchmark"]).rows) > 2


def test_no_way_to_run_a_contender_is_an_error_that_says_why():
    def fails(count):
        raise ValueError("no such thing")

    with pytest.raises(RunEnded, match="at all: no such thing"):
        rounds.best_of([rounds.Contender("jax_fit", "at all", fails)], 0.1)
