"""What `--export` writes: it answers in the terms of whoever has the data."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

from models.tasks import DataSpec
from trainers.input import load
from trainers.input.raw import described
from trainers.input.raw.rows import RawRows
from trainers.record import reading
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.flags import config_from
from trainers.settings.rules import resolve

ROWS = [
    f"{1e12 + 7 * i},{['red', 'green', 'blue'][i % 3]},{0.1 * i},{['low', 'high'][i % 2]},{100 + 3.5 * i}"
    for i in range(60)
]
HEADER = "time (ms),colour,size,grade,price"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([HEADER, *ROWS]) + "\n")
    return path


def exported(summary):
    return tf.saved_model.load(str(summary.run_dir / "export"))


def metadata(summary):
    return json.loads((summary.run_dir / "export/metadata.json").read_text())


def test_images_of_any_size_and_mode_are_answered_by_the_names_of_classes(made):
    summary = made(export=True, replicas=1)
    served = exported(summary)
    answer = served.serve(tf.zeros([2, 8, 8, 1], tf.uint8))
    assert set(answer) == {"class", "probability", "probabilities", "error"}
    assert answer["class"].numpy()[0].decode() in metadata(summary)["data"]["classes"]
    np.testing.assert_allclose(tf.reduce_sum(answer["probabilities"], axis=1), 1, rtol=1e-5)
    grey = tf.constant(np.random.default_rng(0).integers(0, 256, [3, 20, 28, 1]), tf.uint8)
    whole, opaque = served.serve(grey)["probabilities"], tf.fill([3, 20, 28, 1], tf.constant(255, tf.uint8))
    coloured = tf.repeat(grey, 3, axis=-1)
    for other in (tf.concat([grey, opaque], -1), coloured, tf.concat([coloured, opaque], -1)):
        np.testing.assert_allclose(served.serve(other)["probabilities"], whole, atol=0.02)
    files = tf.stack([tf.io.encode_png(image) for image in grey])
    np.testing.assert_allclose(served.serve_encoded(files)["probabilities"], whole, atol=1e-5)


def test_a_table_is_answered_by_column_in_the_units_of_its_target(run, table, data_dir):
    summary = run(model="residual_regressor", dataset=f"csv:{table}", label="price", export=True, replicas=1)
    served, told = exported(summary), metadata(summary)
    columns = {"time__ms_": 1e12 + 35.0, "colour": "blue", "size": 0.5, "grade": "high"}
    assert {each["name"]: each["tensor"] for each in told["data"]["columns"]}["time (ms)"] == "time__ms_"
    one = {
        key: tf.constant([value], tf.float64 if key in ("size", "time__ms_") else tf.string)
        for key, value in columns.items()
    }
    price = served.serve(one)["price"].numpy()[0]
    # By hand, from what the metadata tell.
    scale = told["data"]["features"]
    raw = np.array([columns["time__ms_"], 1, 0, 0, 0.5, 1, 0])
    prepared = (raw - scale["mean"]) / scale["deviation"]
    output = served.serve_prepared(tf.constant(prepared[None], tf.float32)).numpy()[0]
    target = told["data"]["target"]
    assert price == pytest.approx(output * target["deviation"][0] + target["mean"][0], rel=1e-5)
    bad = {**one, "colour": tf.constant(["purple"]), "size": tf.constant([np.nan], tf.float64)}
    answer = served.serve(bad)
    assert np.isnan(answer["price"].numpy()[0])
    assert answer["error"].numpy()[0].decode() == "column 'colour' holds 'purple', a word that training has not seen"
    empty = served.serve({**one, "grade": tf.constant([" "]), "colour": tf.constant([" blue "])})
    assert empty["error"].numpy()[0].decode() == "column 'grade' is empty"
    many = served.serve({key: tf.repeat(value, 3) for key, value in one.items()})
    np.testing.assert_allclose(many["price"], price, rtol=1e-6)


def test_a_text_is_answered_by_its_next_bytes(run):
    summary = run(model="transformer", batch_size=4, export=True, replicas=1)
    served = exported(summary)
    answer = served.serve(tf.constant(["import os", "x", "", "y" * 500]))
    assert answer["token"].shape == (4, 5) and answer["text"].numpy()[0, 0] == bytes([answer["token"].numpy()[0, 0]])
    assert answer["error"].numpy().tolist() == [b"", b"", b"the text is empty", b""]
    assert answer["token"].numpy()[2].tolist() == [-1] * 5
    tokens = np.zeros([1, 128], np.int32)
    tokens[0, :9] = list(b"import os")
    logits = served.serve_prepared(tf.constant(tokens))[0, 8]
    np.testing.assert_allclose(answer["probability"][0], np.sort(tf.nn.softmax(logits))[::-1][:5], rtol=1e-4)


def test_a_mask_is_as_large_as_its_image(run):
    summary = run(model="unet", batch_size=4, train_steps=1, export=True, replicas=1)
    served = exported(summary)
    answer = served.serve(tf.zeros([2, 48, 64, 3], tf.uint8))
    assert answer["class"].shape == (2, 48, 64) and answer["probability"].shape == (2, 48, 64)
    assert metadata(summary)["data"]["classes"] == ["background", "digit"]


def test_metadata_tell_what_the_run_was_and_how_it_was_evaluated(run):
    summary = run(export="keras,saved_model", replicas=1)
    told, facts = metadata(summary), reading.read_run(summary.run_dir)
    final = {name: value for name, value in facts["final"]["eval"].items() if name != "step"}
    assert told["evaluation"] == final and told["step"] == 6 and told["formats"] == ["saved_model", "keras"]
    for name in ("commit", "versions", "flags", "data_fingerprint"):
        assert told[name] == facts[name]


def test_what_is_asked_for_later_is_added_and_what_is_trained_further_is_written_again(run, made):
    first = made(export=True, replicas=1)
    run(export="keras", replicas=1)
    folder = first.run_dir / "export"
    assert {"saved_model.pb", "model.keras", "metadata.json"} <= {path.name for path in folder.iterdir()}
    assert set(metadata(first)["formats"]) == {"saved_model", "keras"}
    before = (folder / "metadata.json").stat().st_mtime_ns
    run(export="keras,saved_model", replicas=1)
    assert (folder / "metadata.json").stat().st_mtime_ns == before
    run(export=True, replicas=1, train_steps=8)
    assert metadata(first)["step"] == 8 and metadata(first)["formats"] == ["saved_model"]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--export"], "saved_model"),
        (["--export=true"], "saved_model"),
        (["--export=false"], ""),
        (["--noexport"], ""),
        ([], ""),
        (["--export=keras, saved_model"], "saved_model,keras"),
        (["--export", "--train_steps=3"], "saved_model"),
    ],
)
def test_the_flag_is_a_switch_or_a_list(words, value):
    assert config_from(["x", *words], "").export == value


def test_an_unknown_format_is_refused():
    with pytest.raises(BadConfiguration, match="--export 'onnx' is not known"):
        resolve(Config(export="onnx"))


@pytest.mark.parametrize(
    ("dataset", "label"),
    [
        ("digits", ""),
        ("digit_masks", ""),
        ("diabetes", ""),
        ("linnerud", ""),
        ("text", ""),
        ("csv", "grade"),
        ("csv", "price"),
    ],
)
def test_a_description_gives_the_preparation_again(dataset, label, table, data_dir):
    data = load.load(f"csv:{table}" if dataset == "csv" else dataset, str(data_dir), label=label)
    again = described.raw_of(json.loads(json.dumps(data.raw.facts())))
    assert again == data.raw
    stored = {key: array[:4] for key, array in data.eval.arrays.items()}
    inputs, targets = data.prepare({key: tf.constant(value) for key, value in stored.items()})
    batch = again.of_stored(stored)
    np.testing.assert_allclose(again.inputs(again.features(*_tensors(batch))), inputs, rtol=1e-5, atol=1e-5)
    assert again.errors(*_tensors(batch)).numpy().tolist() == [b""] * 4
    if isinstance(again, RawRows) and again.targets:
        own = np.reshape(again.target_scale.own(targets), [4, -1])
        cells = dict(zip(again.targets, map(repr, own[2].tolist()), strict=True))
        np.testing.assert_allclose(again.target_of(cells), targets[2], rtol=1e-5, atol=1e-6)


def _tensors(batch):
    return tf.nest.map_structure(lambda x: tf.constant(x.tolist() if x.dtype == object else x), batch)


def test_a_keras_file_loads_with_the_models_alone(run, tmp_path):
    summary = run(export="keras", model="residual_regressor", replicas=1)
    assert not (summary.run_dir / "export/saved_model.pb").exists()
    code = (
        "import sys, numpy, models\n"
        f"model = models.load({str(summary.run_dir / 'export/model.keras')!r})\n"
        "x = numpy.ones([2, 10], 'float32')\n"
        "print(numpy.asarray(model(x)).shape, 'trainers' in sys.modules)\n"
    )
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/models").symlink_to(ROOT / "models")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "alone", capture_output=True, text=True, check=False
    )
    assert done.stdout == "(2, 1) False\n", done.stderr


def test_data_of_ones_own_are_served_prepared_alone(run, tmp_path, monkeypatch, caplog):
    (tmp_path / "own_rows.py").write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    x = np.random.default_rng(0).normal(size=(64, 3)).astype('float32')\n"
        "    return ((x[:48], (x[:48, 0] > 0).astype('int64')), (x[48:], (x[48:, 0] > 0).astype('int64')))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    summary = run(dataset="own_rows:rows", export=True, replicas=1)
    served = exported(summary)
    assert "only you know what the data mean" in caplog.text and not hasattr(served, "serve")
    assert served.serve_prepared(tf.zeros([2, 3])).shape == (2, 2)
    assert metadata(summary)["data"] is None


def test_a_spec_is_told(made):
    told = metadata(made(export=True, replicas=1))["spec"]
    assert DataSpec(**told).num_classes == 10
