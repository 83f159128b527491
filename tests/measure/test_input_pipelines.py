"""The input pipeline measured alone: every contender runs, and ours decodes a record as the plain reading does."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from conftest import ROOT, made_once

from models import randomness
from trainers import benchmark
from trainers.input.indexed import IndexedBatches
from trainers.input.pictures import Pictures
from trainers.input.tfrecords import Shards, TFRecordImages
from trainers.measure import input_contenders, input_pipelines
from trainers.measure.input_pipelines import FIGURES, KINDS, InputResult, InputSettings
from trainers.settings.exit_codes import BadConfiguration, Preempted

COUNT, BATCH, SIZE = 40, 8, 32


def write_pictures(folder):
    chance = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / f"class{i % 2}" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        pixels = chance.integers(0, 256, (6, 8, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).resize((80, 60)).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return made_once(tmp_path_factory, "pictures_of_two_classes", write_pictures)


@pytest.fixture
def settings(pictures, tmp_path):
    return InputSettings(
        f"images:{pictures}",
        image_size=SIZE,
        batch_size=BATCH,
        seconds=0.05,
        repeats=1,
        data_dir=str(tmp_path / "data"),
    )


def test_every_contender_is_measured_in_a_process_and_every_figure_written(settings, tmp_path, capsys):
    input_pipelines.benchmark(settings, tmp_path)
    record = json.loads((tmp_path / "input.json").read_text())
    assert record["examples"] == COUNT * 4 // 5
    assert list(record["contenders"]) == list(KINDS)
    for contender in record["contenders"].values():
        assert set(contender["median"]) == set(FIGURES)
        assert all(value >= 0 for value in contender["median"].values())
        assert contender["median"]["images_per_second"] > 0
    assert (tmp_path / "input.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "images per CPU-second" in printed and (tmp_path / "input.md").read_text().strip() in printed


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_the_images_of_all_contenders_have_the_shape_that_was_asked_for(settings, tmp_path, kind, step):
    if kind == "png":
        for i in range(20):
            path = tmp_path / "png" / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            PIL.Image.new("RGB", (50, 40 + i)).save(path)
        settings = dataclasses.replace(settings, dataset=f"images:{tmp_path / 'png'}")
    split = input_contenders.training_split(settings)
    usual = input_contenders.Usual(split, settings)
    for elements in (
        input_contenders.sequential_elements(split, settings, step),
        usual.elements(step),
        usual.elements_decoded(step),
    ):
        batch = next(iter(elements))
        assert batch["image"].shape == (BATCH, SIZE, SIZE, 3) and batch["image"].dtype == tf.uint8
        assert batch["label"].shape == (BATCH,)
    for key in KINDS:
        advance = input_contenders.starter(key, split, settings)(step)
        advance(1)
        advance(2)


def test_ours_in_a_shuffle_and_in_the_order_of_the_files_decode_a_record_to_the_same_bytes(settings):
    split = input_contenders.training_split(settings)
    source = IndexedBatches(tf.distribute.OneDeviceStrategy("CPU:0"), split, BATCH, settings.seed)
    source.start(0)
    [(features, _)], _ = source.feed()
    in_order = list(split.records.in_order())
    for position in range(BATCH):
        place = tf.constant(0, tf.int64), tf.constant(position, tf.int64)
        stored = in_order[int(source._index(*place)[0])]
        with randomness.at(settings.seed, *place):
            example = split.augmentation.of_one(split.records.decode(stored, split.augmentation.crop))
        np.testing.assert_array_equal(features["image"][position], example["image"])
        assert features["label"][position] == example["label"]
    first = next(iter(input_contenders.sequential_elements(split, settings, 0)))
    with randomness.at(settings.seed, tf.constant(0, tf.int64), tf.constant(3, tf.int64)):
        example = split.augmentation.of_one(split.records.decode(in_order[3], split.augmentation.crop))
    np.testing.assert_array_equal(first["image"][3], example["image"])


def test_records_of_tfrecord_files_reach_the_peers(settings, pictures, tmp_path):
    images = sorted(pictures.rglob("*.jpg"))
    paths = [tmp_path / f"{i}.tfrecord" for i in range(2)]
    for number, path in enumerate(paths):
        with tf.io.TFRecordWriter(str(path)) as writer:
            for image in images[number * 8 : number * 8 + 8]:
                writer.write(image.read_bytes())
    shards = Shards(tuple(paths), (8, 8), tmp_path / "index.npz")

    def parse(record):
        return {"image": record, "label": tf.constant(1, tf.int64)}

    records = TFRecordImages(shards, parse, Pictures((SIZE, SIZE), 3, whole=False))
    split = dataclasses.replace(input_contenders.training_split(settings), size=16, records=records)
    for key in KINDS:
        input_contenders.starter(key, split, settings)(1)(2)


def test_a_contender_that_takes_too_long_is_ended_and_its_figures_are_missing(settings, tmp_path, capsys):
    slow = dataclasses.replace(settings, seconds=600.0)
    began = time.monotonic()
    facts = input_pipelines.in_a_process("lockstep", slow, 8)
    assert time.monotonic() - began < 60
    assert "images_per_second" not in facts
    figures = {key: {figure: [1.5, 2.5] for figure in FIGURES} for key in KINDS}
    figures["usual_decoded"]["middle_batch_seconds"] = [1.5, None]
    machine = {"cores": 2, "load_average": 0, "versions": {"tensorflow": ""}}
    result = InputResult(settings, {"machine": machine, "examples": 4}, figures)
    assert (
        input_pipelines.write(tmp_path, result)["contenders"]["usual_decoded"]["median"]["middle_batch_seconds"] is None
    )
    assert f"not within {settings.limit} s" in (tmp_path / "input.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input=images:x", "--augment=flip"], "the peers have inception and flip"),
        (["--input=images:x", "--augment=inception,mixup"], "the peers have inception and flip"),
        (["--input=images:x", "--rows=mlp:32:1"], "pass one of them"),
        (["--augment=inception"], "belongs to --input"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(flags, words):
    with pytest.raises(BadConfiguration, match=words):
        benchmark.settings_from(["benchmark.py", *flags])


def test_a_data_set_that_cannot_be_measured_is_one_line(settings):
    with pytest.raises(BadConfiguration, match=r"^--dataset images:/nowhere is not a folder; write images:DIR"):
        input_pipelines.in_a_process("prepare", dataclasses.replace(settings, dataset="images:/nowhere"), None)
    with pytest.raises(BadConfiguration, match="not images that can be read by index"):
        input_contenders.training_split(dataclasses.replace(settings, dataset="diabetes"))


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def started(*flags):
    command = [sys.executable, str(ROOT / "trainers/benchmark.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_contender_too_and_says_what_is_true(pictures, tmp_path, number):
    flags = f"--input=images:{pictures}", "--seconds=60", f"--out_dir={tmp_path}", f"--data_dir={tmp_path}"
    process = started(*flags)
    while not (children := children_of(process.pid)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 143
        assert said.strip().endswith(
            "stopped by a signal; nothing is written; the same command measures everything again"
        )
        assert len(said.splitlines()) == 1
    # The signal may come before the parent knows its child, which then ends by itself, at its first line.
    while any(is_alive(child) for child in children):
        time.sleep(0.05)


def test_a_signal_while_our_loop_trains_is_told_as_the_end_of_a_benchmark(tmp_path, data_dir, monkeypatch):
    settings = benchmark.settings_from(["benchmark.py", f"--out_dir={tmp_path / 'out'}"])
    monkeypatch.setattr(benchmark.signals, "unwind_on_signal", list)

    def stopped(settings):
        raise Preempted("SIGTERM came at step 7; nothing is saved; the same command continues")

    monkeypatch.setattr(benchmark, "measure_training", stopped)
    with pytest.raises(Preempted, match="the same command measures everything again") as error:
        benchmark.main(settings)
    assert "continues" not in str(error.value)
