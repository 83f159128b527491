"""`trainers/predict.py`: rows in, answers out, in their order; and metrics where labels are."""

import csv
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from conftest import short

from models.cards import MODELS
from trainers import predict
from trainers.settings.exit_codes import OK, ROWS_UNUSABLE, BadConfiguration
from trainers.show.progress import words
from trainers.use import predictions

SMALL = {"train_steps": 2, "eval_every": 0, "log_every": 0, "checkpoint_every": 0, "replicas": 2}
HEADER = "when,colour,size,grade,price"


def cells_of(i):
    return [
        str(10**12 + 7 * i),
        ["red", "green", "blue"][i % 3],
        f"{0.1 * i:g}",
        ["low", "high"][i % 2],
        f"{100 + 3.5 * i:g}",
    ]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([HEADER, *(",".join(cells_of(i)) for i in range(60))]) + "\n")
    return path


def answer(model, source, output, *more):
    return predict.main(
        predict.settings_from(["predict", str(model), f"--input={source}", f"--output={output}", *more])
    )


def rows_in(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def told(summary):
    return words({name: value for name, value in summary.eval.items() if name != "step"})


@pytest.mark.parametrize("model", short(MODELS, {"mlp", "wide_deep", "transformer", "unet"}))
def test_the_metrics_on_the_evaluation_split_are_those_of_the_run(run, tmp_path, capsys, model):
    summary = run(model=model, batch_size=16, **SMALL)
    assert answer(summary.run_dir, "eval", tmp_path / "out.jsonl") == OK
    assert capsys.readouterr().out.splitlines()[-1] == told(summary)
    rows = rows_in(tmp_path / "out.jsonl")
    assert [row["row"] for row in rows] == list(range(1, len(rows) + 1)) and not any(row["error"] for row in rows)


@pytest.mark.parametrize(("model", "split"), [("mlp", "digits/test"), ("residual_regressor", "diabetes/test")])
def test_a_run_and_its_export_answer_a_named_split_alike_and_as_it_was_evaluated(run, tmp_path, capsys, model, split):
    summary = run(model=model, export=True, ema=0.5, **SMALL)
    for name, source in (("run", summary.run_dir), ("export", summary.run_dir / "export")):
        assert answer(source, f"tfds:{split}", tmp_path / f"{name}.csv") == OK
        assert capsys.readouterr().out.splitlines()[-1] == told(summary)
    for one, other in zip(rows_in(tmp_path / "run.csv"), rows_in(tmp_path / "export.csv"), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"input", "class", "error"}:
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-5)


def test_a_table_is_answered_as_its_user_expects(run, table, tmp_path, capsys):
    summary = run(model="residual_regressor", dataset=f"csv:{table}", label="price", export=True, **SMALL)
    other = tmp_path / "new.csv"
    order = [3, 0, 2, 1]
    rows = [[cells_of(i)[at] for at in order] + [f"note {i}"] for i in range(8)]
    rows[2][3], rows[3][2], rows[4][0], rows[5][1], rows[6] = "purple", "", " ", "1e", rows[6][:2]
    other.write_text("\n".join([";".join([*(HEADER.split(",")[at] for at in order), "note"]), *map(";".join, rows)]))
    for source in (summary.run_dir, summary.run_dir / "export"):
        output = tmp_path / f"{source.name}.csv"
        assert answer(source, f"csv:{other}", output) == ROWS_UNUSABLE
        found = rows_in(output)
        assert [row["error"] for row in found] == [
            "",
            "",
            "column 'colour' holds 'purple', a word that training has not seen",
            "column 'size' is empty",
            "column 'grade' is empty",
            "column 'when' holds '1e', which is not a number",
            "2 cells, but 5 columns",
            "",
        ]
        assert [row["input"] for row in found] == [f"line {i}" for i in range(2, 10)]
        assert [bool(row["price"]) for row in found] == [True, True, False, False, False, False, False, True]
        assert "5 of 8 rows could not be used, the first: line 4: column 'colour'" in capsys.readouterr().err
    answer(summary.run_dir, f"csv:{table}", tmp_path / "all.csv")
    whole = rows_in(tmp_path / "all.csv")
    for i in (0, 1, 7):
        assert float(found[i]["price"]) == pytest.approx(float(whole[i]["price"]), rel=1e-5)
    assert "r2" in capsys.readouterr().out
    other.write_text("when,size,price\n1,2,3\n")
    with pytest.raises(BadConfiguration, match="has no column 'colour', 'grade', which the model needs"):
        answer(summary.run_dir, f"csv:{other}", tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


def test_the_held_out_rows_of_a_table_measure_as_the_evaluation(run, table, tmp_path, capsys):
    summary = run(dataset=f"csv:{table}", label="grade", **SMALL)
    held_out = tmp_path / "held_out.csv"
    held_out.write_text("\n".join([HEADER, *(",".join(cells_of(i)) for i in range(60) if i % 5 == 4)]) + "\n")
    for source in (f"csv:{held_out}", "eval"):
        output = tmp_path / f"{source[:3]}.csv"
        assert answer(summary.run_dir, source, output) == OK
        assert capsys.readouterr().out.splitlines()[-1] == told(summary)
        assert {row["class"] for row in rows_in(output)} <= {"low", "high"}


def test_images_of_another_size_and_mode_are_answered_and_a_damaged_one_is_told(run, tmp_path, capsys):
    chance, folder = np.random.default_rng(0), tmp_path / "photos"
    for name, level in (("day", 200), ("night", 30)):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = chance.integers(level - 20, level + 20, [12, 16, 3]).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
    summary = run(dataset=f"images:{folder}", batch_size=8, **SMALL)
    assert answer(summary.run_dir, "eval", tmp_path / "eval.csv") == OK
    assert capsys.readouterr().out.splitlines()[-1] == told(summary)
    new = tmp_path / "new"
    new.mkdir()
    grey = PIL.Image.fromarray(np.full([40, 30], 210, np.uint8))
    grey.save(new / "a.jpg")
    grey.convert("LA").save(new / "b.png")
    grey.convert("P").save(new / "c.png")
    (new / "d.png").write_bytes(b"no image")
    (new / "e.png").write_bytes((new / "b.png").read_bytes()[:60])
    (new / "f.txt").write_text("left out")
    assert answer(summary.run_dir, f"images:{new}", tmp_path / "new.csv") == ROWS_UNUSABLE
    rows = rows_in(tmp_path / "new.csv")
    assert [row["input"] for row in rows] == ["a.jpg", "b.png", "c.png", "d.png", "e.png"]
    assert [bool(row["class"]) for row in rows] == [True, True, True, False, False]
    assert rows[3]["error"] == "its content is not an image" and rows[4]["error"]
    assert capsys.readouterr().out == ""


def test_lines_of_text_are_continued(run, tmp_path):
    summary = run(model="transformer", batch_size=4, **SMALL)
    (tmp_path / "lines.txt").write_bytes("import os\n\nä".encode() + b"\r\n" + b"z" * 300)
    assert answer(summary.run_dir, f"text:{tmp_path / 'lines.txt'}", tmp_path / "out.jsonl") == ROWS_UNUSABLE
    rows = rows_in(tmp_path / "out.jsonl")
    assert [row["error"] for row in rows] == ["", "the text is empty", "", ""]
    assert len(rows[0]["most likely"]) == 5 and rows[0]["token"] == rows[0]["most likely"][0]["token"]


def test_a_call_that_was_killed_goes_on_and_ends_with_the_same_bytes_and_metrics(run, tmp_path, monkeypatch, capsys):
    summary = run(batch_size=32, **SMALL)
    answer(summary.run_dir, "eval", tmp_path / "whole.csv")
    metrics = capsys.readouterr().out
    lines, calls = predictions._lines, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return lines(*arguments)

    monkeypatch.setattr(predictions, "_lines", dies)
    monkeypatch.setattr(predictions, "_KEEP_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        answer(summary.run_dir, "eval", tmp_path / "out.csv")
    monkeypatch.undo()
    with open(tmp_path / "out.csv", "a") as file:
        file.write("129,torn li")
    answer(summary.run_dir, "eval", tmp_path / "out.csv")
    captured = capsys.readouterr()
    assert "from row 129" in captured.err and captured.out == metrics
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    # Once more: nothing is left to do, and it says the same.
    assert answer(summary.run_dir, "eval", tmp_path / "out.csv") == OK
    assert capsys.readouterr().out == metrics
    with pytest.raises(BadConfiguration, match="does not hold the begin of these answers"):
        answer(summary.run_dir, "tfds:digits/test", tmp_path / "out.csv")


def test_another_checkpoint_can_be_named(run, tmp_path, capsys):
    summary = run(replicas=2)
    for step in ("3", "last"):
        answer(summary.run_dir, "eval", tmp_path / f"{step}.csv", f"--checkpoint={step}")
    err = capsys.readouterr().err
    assert "step-0000000003" in err and "step-0000000006" in err
    with pytest.raises(BadConfiguration, match="--checkpoint '5' is not there; choose best, last, or one of: 3, 6"):
        answer(summary.run_dir, "eval", tmp_path / "5.csv", "--checkpoint=5")


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        (f"csv:{__file__}", "out.csv", "the model takes images; pass images:… or tfds:…"),
        ("csv:nowhere", "out.csv", "is not there; name another"),
        ("images:nowhere", "out.csv", "is not there; name another"),
        ("parquet:x", "out.csv", "is not known; write eval, documents, csv:PATH"),
        ("tfds:digits", "out.csv", "names no split"),
        ("documents", "out.csv", "--input=documents: digits has no separator that ends a document"),
        ("eval", "out.txt", "is neither .csv nor .jsonl"),
    ],
)
def test_what_cannot_be_read_or_written_is_one_line(run, tmp_path, source, output, message):
    summary = run(**SMALL)
    with pytest.raises(BadConfiguration, match=message):
        answer(summary.run_dir, source, tmp_path / output)
    assert not (tmp_path / output).exists()


def test_an_export_without_the_checkout_answers(run, tmp_path):
    summary = run(export=True, **SMALL)
    code = (
        "import sys, json, tensorflow as tf, numpy as np\n"
        f"place = {str(summary.run_dir / 'export')!r}\n"
        "served = tf.saved_model.load(place)\n"
        "answer = served.serve(tf.zeros([1, 8, 8, 1], tf.uint8))\n"
        "assert not {'models', 'trainers'} & set(sys.modules)\n"
        "print(answer['class'].numpy()[0].decode() in json.load(open(place + '/metadata.json'))['data']['classes'])\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.long
def test_saved_model_cli_answers(run, tmp_path):
    summary = run(export=True, **SMALL)
    words = ["run", "--dir", str(summary.run_dir / "export"), "--tag_set", "serve", "--signature_def", "serve"]
    command = [f"{sys.prefix}/bin/saved_model_cli", *words, "--inputs", "images=images.npy"]
    np.save(tmp_path / "images.npy", np.zeros([1, 8, 8, 1], np.uint8))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Result for output key probability" in done.stdout, done.stderr
