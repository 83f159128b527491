"""A run begins with weights of another run or of a file; every variable is accounted for."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from conftest import largest_relative_difference, metrics, weights, without_times

from models import tasks
from trainers.run import initial
from trainers.settings.config import Config
from trainers.settings.exit_codes import BAD_CONFIGURATION, BadConfiguration
from trainers.settings.rules import resolve
from trainers.world.devices import World

IMAGES = tasks.DataSpec("classification", (8, 8, 1), num_classes=10)
SHORT = {"train_steps": 2, "warmup_steps": 0, "deterministic": True}
STILL = SHORT | {"train_steps": 1, "learning_rate": 0.0, "replicas": 1}
PATHS = ["hidden_1/kernel", "hidden_1/bias", "hidden_2/kernel", "hidden_2/bias", "logits/kernel", "logits/bias"]


def built(name, spec=IMAGES):
    model, _ = tasks.model_of(name, spec)
    model(tf.zeros([1, *spec.input_shape], spec.input_dtype))
    return model


def different(name, spec=IMAGES):
    """A model with weights that no initializer gives."""
    model = built(name, spec)
    chance = np.random.default_rng(7)
    for variable in model.weights:
        variable.assign(chance.normal(size=variable.shape).astype(np.float32) ** 2)
    return model


def facts(run_dir):
    return json.loads((run_dir / "run.json").read_text())["initial"]


def write_safetensors(path, arrays):
    header, content = {}, b""
    for name, array in arrays.items():
        span = [len(content), len(content) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        content += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def test_a_run_begins_with_the_best_average_of_another(run, tmp_path):
    run("trunk", **SHORT, ema=0.5, seed=3)
    run("begun", **STILL, init_from=str(tmp_path / "trunk"), ema=0.9)
    found = facts(tmp_path / "begun")
    step = found["step"]
    assert (found["from"], found["average"], found["left"], found["resized"]) == (str(tmp_path / "trunk"), True, [], {})
    manifest = json.loads((tmp_path / f"trunk/checkpoints/step-{step:010d}/manifest.json").read_text())
    assert found["sha256"] == manifest["digest"]
    assert found["taken"] == [f"mlp/{path}" for path in PATHS]
    averages = [v for n, v in sorted(weights(tmp_path / "trunk", step).items()) if n.startswith("ema/")]
    begun = weights(tmp_path / "begun")
    for group in ("model/", "ema/"):
        own = [v for n, v in sorted(begun.items()) if n.startswith(group) and v.shape]
        for value, expected in zip(own, averages, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert [int(value) for name, value in begun.items() if "iteration" in name] == [1]


@pytest.mark.parametrize("kind", ["a.keras", "a.weights.h5", "a.safetensors"])
@pytest.mark.parametrize("name", ["mlp", "resnet,width=8", "vit,depth=1,width=8,heads=2"])
def test_files_give_every_variable_its_value(tmp_path, kind, name):
    source, model, path = different(name), built(name), tmp_path / kind
    if kind == "a.keras":
        source.save(path)
    elif kind == "a.weights.h5":
        source.save_weights(path)
    else:
        write_safetensors(path, {v.path.split("/", 1)[1].replace("/", "."): v.numpy() for v in source.weights})
    named = Config(init_from=str(path))
    table, chosen = initial.fit(model, initial.source_of(named, World(tf.distribute.get_strategy())), "")
    assert table.taken == [variable.path for variable in model.weights]
    assert (table.lacking, table.left, table.resized) == ([], [], {})
    values = {id(variable): value for variable, value in chosen}
    for variable, other in zip(model.weights, source.weights, strict=True):
        np.testing.assert_array_equal(values[id(variable)], other.numpy(), err_msg=variable.path)


def test_a_head_of_another_size_begins_anew_where_a_pattern_says_so(run, tmp_path):
    different("mlp", tasks.DataSpec("classification", (8, 8, 1), num_classes=4)).save(tmp_path / "four.keras")
    path = str(tmp_path / "four.keras")
    with pytest.raises(BadConfiguration) as error:
        run("whole", **STILL, init_from=path)
    assert str(error.value) == (
        f"--init_from {path} has no value that fits: mlp/logits/kernel 128×10, there 128×4 float32; mlp/logits/bias "
        "10, there 4 float32. It has, and nothing takes: head/vars/0 128×4; head/vars/1 4. Name what is to begin anew "
        "with --init_skip, or another source"
    )
    assert error.value.exit_code == BAD_CONFIGURATION
    run("skipped", **STILL, init_from=path, init_skip="logits")
    run("none", **STILL)
    found = facts(tmp_path / "skipped")
    assert found["left"] == ["mlp/logits/kernel", "mlp/logits/bias"]
    assert found["unused"] == ["head/vars/0 128×4", "head/vars/1 4"]
    assert found["taken"] == [f"mlp/{path}" for path in PATHS[:4]]
    skipped, none = weights(tmp_path / "skipped"), weights(tmp_path / "none")
    for name in (name for name in none if name.startswith("model/")):
        assert np.array_equal(skipped[name], none[name]) == ("logits" in name), name


def test_positions_of_another_grid_are_interpolated():
    small, large = (tasks.DataSpec("classification", (n, n, 1), num_classes=10) for n in (8, 12))
    source, model = different("vit,depth=1,width=8,heads=2", small), built("vit,depth=1,width=8,heads=2", large)
    plane = np.linspace(0, 1, 4)[:, None] + np.zeros([4, 4])
    grid = np.repeat(plane.reshape(1, 16, 1), 8, axis=2)
    source.positions.assign(np.concatenate([np.full([1, 1, 8], 5.0), grid], axis=1))
    table, chosen = initial.fit(model, initial.Source({v.path: v.numpy() for v in source.weights}, {}), "")
    assert table.resized == {"vit/positions": "1×17×8 → 1×37×8"} and not table.lacking
    value = next(value for variable, value in chosen if variable is model.positions)
    assert (value[0, 0] == 5.0).all()
    rows = value[0, 1:].reshape(6, 6, 8)
    assert (np.diff(rows[:, 0, 0]) > 0).all() and np.allclose(rows[:, :1], rows, atol=1e-5)
    back, _ = initial.fit(source, initial.Source({v.path: v.numpy() for v in model.weights}, {}), "")
    assert back.resized == {"vit/positions": "1×37×8 → 1×17×8"}


def test_a_language_model_takes_the_first_positions_and_invents_none():
    short, long = (tasks.DataSpec("language", (n,), "int32", num_classes=16) for n in (8, 12))
    one, other = (different("transformer,depth=1,width=8,heads=2", spec) for spec in (short, long))
    table, chosen = initial.fit(one, initial.Source({v.path: v.numpy() for v in other.weights}, {}), "")
    assert table.resized == {"transformer/positions": "12×8 → 8×8"}
    np.testing.assert_array_equal(
        next(value for variable, value in chosen if variable is one.positions), other.positions.numpy()[:8]
    )
    table, _ = initial.fit(other, initial.Source({v.path: v.numpy() for v in one.weights}, {}), "")
    assert table.lacking == ["transformer/positions 12×8, there 8×8 float32"]


def test_an_encoder_without_labels_fits_below_its_own_name():
    source, model = different("resnet,width=8"), built("resnet,width=8")
    held = {f"contrastive/{v.path}": v.numpy() for v in source.weights}
    table, _ = initial.fit(model, initial.Source(held, {}), "logits")
    assert not table.lacking and len(table.left) == 2 and len(table.unused) == 2
    renamed = {v.path.replace("resnet/", "mine/"): v.numpy() for v in source.weights}
    assert not initial.fit(model, initial.Source(renamed, {}), "")[0].lacking
    whole = {v.path: np.zeros(v.shape, np.int32) for v in source.weights}
    assert len(initial.fit(model, initial.Source(whole, {}), "")[0].lacking) == len(model.weights)


def test_the_optimizer_is_taken_on_demand_and_counts_from_zero(run, tmp_path):
    run("trunk", **SHORT, optimizer="momentum")
    taken = SHORT | {
        "train_steps": 1,
        "learning_rate": 0.0,
        "optimizer": "momentum",
        "init_from": str(tmp_path / "trunk"),
    }
    run("with", **taken, init_optimizer=True)
    run("without", **taken)
    assert len(facts(tmp_path / "with")["optimizer"]) == 6 and facts(tmp_path / "without")["optimizer"] == []
    trunk = weights(tmp_path / "trunk", facts(tmp_path / "with")["step"])
    one, other = weights(tmp_path / "with"), weights(tmp_path / "without")
    for name in (name for name in one if name.startswith("optimizer/") and one[name].shape):
        np.testing.assert_allclose(one[name], 0.9 * trunk[name], rtol=1e-6)
        assert not other[name].any()
    assert all(v == 1 for n, v in one.items() if "iteration" in n)
    with pytest.raises(BadConfiguration, match="has no value that fits: optimizer/.*velocity"):
        run("adam", **(taken | {"optimizer": "adam"}), init_optimizer=True)


def test_a_resume_does_not_need_the_source_any_more_and_is_bit_for_bit(run, tmp_path):
    run("trunk", **SHORT, seed=3)
    flags = SHORT | {"train_steps": 4, "schedule": "constant", "init_from": str(tmp_path / "trunk")}
    flags |= {
        "init_skip": "logits",
        "freeze": "hidden_1",
        "layer_decay": 0.5,
        "learning_rate_for": "logits=10",
        "ema": 0.9,
    }
    for replicas in (1, 2, 4):
        run(f"of {replicas}", **flags, replicas=replicas)
    one = weights(tmp_path / "of 1")
    for replicas in (2, 4):
        assert largest_relative_difference(one, weights(tmp_path / f"of {replicas}")) < 1e-4
    trunk = weights(tmp_path / "trunk", facts(tmp_path / "of 1")["step"])
    for name in (name for name in one if name.startswith("model/") and "hidden_1" in name):
        np.testing.assert_array_equal(one[name], trunk[name])
    run("halves", **(flags | {"train_steps": 2}), replicas=2)
    before = facts(tmp_path / "halves")
    shutil.rmtree(tmp_path / "trunk")
    config = resolve(Config(model="mlp", run_dir=str(tmp_path / "halves"), init_from=flags["init_from"]))
    config.check_files()
    run("halves", **flags, replicas=2)
    assert facts(tmp_path / "halves") == before
    whole, halves = weights(tmp_path / "of 2"), weights(tmp_path / "halves")
    for name in whole:
        np.testing.assert_array_equal(whole[name], halves[name], err_msg=name)
    lines = [without_times(metrics(tmp_path / name)) for name in ("of 2", "halves")]
    assert lines[0][-1] == lines[1][-1]
    with pytest.raises(BadConfiguration, match="--init_skip +differs from logits"):
        run("halves", **(flags | {"init_skip": ""}), replicas=2)


def test_patterns_that_match_nothing_or_everything_are_one_line(run, tmp_path):
    different("mlp").save_weights(tmp_path / "a.weights.h5")
    path = str(tmp_path / "a.weights.h5")
    with pytest.raises(
        BadConfiguration, match="--init_skip: 'head' is found in the path of no weight; there are: mlp/hid"
    ):
        run("bad", **STILL, init_from=path, init_skip="head")
    with pytest.raises(BadConfiguration, match="--init_skip: 'mlp' leaves nothing to take from --init_from"):
        run("bad", **STILL, init_from=path, init_skip="mlp")
    with pytest.raises(BadConfiguration, match="--init_optimizer needs a run directory, and --init_from"):
        run("bad", **STILL, init_from=path, init_optimizer=True)
    os.mkdir(tmp_path / "empty")
    with pytest.raises(BadConfiguration, match="--init_from .*empty holds no run; name a run_dir"):
        run("bad", **STILL, init_from=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"init_from": "nowhere.keras"}, "--init_from .*/nowhere.keras does not exist; name a run directory or a file"),
        ({"init_from": __file__}, "is no run directory, and no .weights.h5, .keras or .safetensors"),
        ({"init_skip": "logits"}, "--init_skip is for --init_from, which is not given"),
        ({"init_optimizer": True}, "--init_optimizer is for --init_from, which is not given"),
        ({"init_from": "a.keras", "init_skip": "("}, r"--init_skip '\(' is no regular expression"),
        ({"init_from": "hdfs://host/a.keras"}, "--init_from 'hdfs://host/a.keras' is not a path, nor an address s3://"),
        ({"init_from": "gs://bucket"}, "--init_from 'gs://bucket' names no folder in a bucket"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(flags, says):
    with pytest.raises(BadConfiguration, match=says):
        resolve(Config(model="mlp", **flags)).check_files()
