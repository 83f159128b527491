"""`trainers/predict.py`: rows in, answers out, in their order; and metrics where labels are."""

import contextlib
import csv
import io
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import types

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from conftest import SMALL_MODELS, short

from trainers import predict
from trainers.input.raw.texts import RawText
from trainers.settings.exit_codes import OK, ROWS_UNUSABLE, BadConfiguration
from trainers.show.progress import words
from trainers.use import answers, predictions, predictor, row_sources

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


@pytest.mark.parametrize("model", short(SMALL_MODELS, {"mlp", "wide_deep", "unet,depth=1,width=4"}))
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


def test_a_run_on_tokens_is_measured_and_its_numbers_are_continued(run, tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(0, 30, 60 * 16 + 1).astype(np.uint16)
    (tmp_path / "packed").write_bytes(tokens.tobytes())
    (tmp_path / "packed.json").write_text(json.dumps({"dtype": "uint16", "vocabulary": 30, "length": 16}))
    model = "transformer,depth=1,heads=2,width=16"
    summary = run(model=model, dataset=f"tokens:{tmp_path / 'packed'}", batch_size=4, **SMALL)
    assert answer(summary.run_dir, "eval", tmp_path / "out.jsonl") == OK
    assert capsys.readouterr().out.splitlines()[-1] == told(summary)
    (tmp_path / "lines.txt").write_text("1 2 3\n1 2 30\n")
    assert answer(summary.run_dir, f"text:{tmp_path / 'lines.txt'}", tmp_path / "more.jsonl") == ROWS_UNUSABLE
    first, second = rows_in(tmp_path / "more.jsonl")
    assert not first["error"] and "30" in second["error"]


def test_a_call_that_was_killed_goes_on_and_ends_with_the_same_bytes_and_metrics(made, tmp_path, monkeypatch, capsys):
    summary = made(**SMALL)
    capsys.readouterr()
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


def test_another_checkpoint_can_be_named(made, tmp_path, capsys):
    summary = made()
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
def test_what_cannot_be_read_or_written_is_one_line(made, tmp_path, source, output, message):
    summary = made(**SMALL)
    with pytest.raises(BadConfiguration, match=message):
        answer(summary.run_dir, source, tmp_path / output)
    assert not (tmp_path / output).exists()


def test_an_export_without_the_checkout_answers(made, tmp_path):
    summary = made(export=True, **SMALL)
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
def test_saved_model_cli_answers(made, tmp_path):
    summary = made(export=True, **SMALL)
    words = ["run", "--dir", str(summary.run_dir / "export"), "--tag_set", "serve", "--signature_def", "serve"]
    command = [f"{sys.prefix}/bin/saved_model_cli", *words, "--inputs", "images=images.npy"]
    np.save(tmp_path / "images.npy", np.zeros([1, 8, 8, 1], np.uint8))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Result for output key probability" in done.stdout, done.stderr


@pytest.mark.parametrize(("model", "label"), [("residual_regressor", "price"), ("mlp", "grade")])
def test_a_row_whose_answer_is_no_number_is_told_and_spoils_no_metric(run, table, tmp_path, capsys, model, label):
    def small(i):  # so that the largest numbers of float32 are not finite in deviations
        return [f"{0.001 * i:g}" if at == 2 else cell for at, cell in enumerate(cells_of(i))]

    table.write_text("\n".join([HEADER, *(",".join(small(i)) for i in range(60))]) + "\n")
    summary = run(model=model, dataset=f"csv:{table}", label=label, export=True, **SMALL)
    target = HEADER.split(",").index(label)
    rows = [small(i) for i in range(8)]
    usable = [row for i, row in enumerate(rows) if i not in (3, 5)]
    rows[3][2] = rows[5][2] = "3e38"
    rows[5][target] = ""
    for name, chosen in (("all", rows), ("usable", usable)):
        (tmp_path / f"{name}.csv").write_text("\n".join([HEADER, *map(",".join, chosen)]) + "\n")
    for source in (summary.run_dir, summary.run_dir / "export"):
        output = tmp_path / f"{source.name}.csv"
        assert answer(source, f"csv:{tmp_path / 'all.csv'}", output) == ROWS_UNUSABLE
        found = rows_in(output)
        assert [row["error"] for row in found] == ["" if i not in (3, 5) else answers.NOT_FINITE for i in range(8)]
        metrics = capsys.readouterr().out
        assert "nan" not in metrics and "nan" not in output.read_text()
        assert answer(source, f"csv:{tmp_path / 'usable.csv'}", tmp_path / f"usable_{source.name}.csv") == OK
        assert capsys.readouterr().out == metrics
    served = tf.saved_model.load(str(summary.run_dir / "export"))
    columns = dict(zip(HEADER.split(","), zip(*rows, strict=True), strict=True))
    numbers = ("when", "size", "price")
    batch = {
        name: tf.constant([float(cell) for cell in cells] if name in numbers else cells)
        for name, cells in columns.items()
        if name != label
    }
    batch = {key: tf.cast(value, tf.float64) if value.dtype != tf.string else value for key, value in batch.items()}
    errors = served.serve(batch)["error"].numpy().tolist()
    assert [bool(error) for error in errors] == [i in (3, 5) for i in range(8)]


def photos(folder, count=10):
    chance = np.random.default_rng(0)
    for name, level in (("day", 200), ("night", 30)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = chance.integers(level - 20, level + 20, [12, 16, 3]).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_other_photos_in_the_folder_are_not_taken_for_those_that_were_answered(run, tmp_path, capsys):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out.csv"
    summary = run(dataset=f"images:{folder}", batch_size=8, **SMALL)
    new = photos(tmp_path / "new", 3)
    answer(summary.run_dir, f"images:{new}", output)
    assert answer(summary.run_dir, f"images:{new}", output) == OK  # the same again
    (new / "day" / "0.png").rename(new / "day" / "00.png")
    with pytest.raises(BadConfiguration, match="does not hold the begin of these answers"):
        answer(summary.run_dir, f"images:{new}", output)
    (new / "day" / "00.png").rename(new / "day" / "0.png")
    assert answer(summary.run_dir, f"images:{new}", output) == OK
    PIL.Image.new("RGB", (16, 12)).save(new / "day" / "0.png")
    with pytest.raises(BadConfiguration, match="does not hold the begin of these answers"):
        answer(summary.run_dir, f"images:{new}", output)


def test_a_stray_image_takes_no_labels_from_the_others(run, tmp_path, capsys):
    summary = run(dataset=f"images:{photos(tmp_path / 'photos')}", batch_size=8, **SMALL)
    folder = photos(tmp_path / "new")
    capsys.readouterr()
    assert answer(summary.run_dir, f"images:{folder}", tmp_path / "whole.csv") == OK
    metrics = capsys.readouterr().out
    (folder / "other").mkdir()
    for name in ("other/x.png", "stray.png"):
        PIL.Image.new("RGB", (16, 12)).save(folder / name)
    assert answer(summary.run_dir, f"images:{folder}", tmp_path / "all.csv") == OK
    captured = capsys.readouterr()
    assert captured.out == metrics and "accuracy" in metrics
    assert "2 labels could not be used and are not measured, the first: other/x.png: it lies in no" in captured.err
    assert "measured on 20 of 22 rows" in captured.err


def test_only_columns_of_numbers_that_are_needed_tell_how_numbers_are_written(run, table, tmp_path):
    summary = run(model="residual_regressor", dataset=f"csv:{table}", label="price", **SMALL)
    rows = [[*cells_of(i), f"{i},5", "1,2"] for i in range(8)]
    lines = [";".join([*HEADER.split(","), "note", "7,5"]), *map(";".join, rows)]
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "commas.csv").write_text("\n".join([lines[0], *(line.replace(".", ",") for line in lines[1:])]) + "\n")
    found = []
    for name in ("points", "commas"):
        assert answer(summary.run_dir, f"csv:{tmp_path / name}.csv", tmp_path / f"{name}_out.csv") == OK
        found.append([row["price"] for row in rows_in(tmp_path / f"{name}_out.csv")])
    assert found[0] == found[1]


def test_what_is_not_utf8_is_told_and_a_reason_is_one_short_line(run, table, tmp_path):
    summary = run(model="residual_regressor", dataset=f"csv:{table}", label="price", **SMALL)
    new, rows = tmp_path / "new.csv", [cells_of(i) for i in range(3)]
    rows[0][1], rows[1][1], rows[2][2] = "café", '"two\nlines"', "x" * 100_000
    text = "\n".join([HEADER, *map(",".join, rows)]) + "\n"
    new.write_bytes(text.encode("windows-1252"))
    assert answer(summary.run_dir, f"csv:{new}", tmp_path / "out.jsonl") == ROWS_UNUSABLE
    errors = [row["error"] for row in rows_in(tmp_path / "out.jsonl")]
    assert errors[0] == "column 'colour' is not UTF-8; save the file as UTF-8"
    assert errors[1] == "column 'colour' holds 'two lines', a word that training has not seen"
    assert len(errors[2]) <= 200 and errors[2].endswith("x', which is not a number")
    for content, message in (
        (text.encode("utf-16"), "line 1, is not UTF-8; save the file as UTF-8"),
        (text.encode("utf-16-le"), "line 1, is not UTF-8; save the file as UTF-8"),
        (HEADER.replace("colour", "coleur é").encode("latin-1"), "line 1, is not UTF-8"),
        (b"", "is empty"),
    ):
        new.write_bytes(content)
        with pytest.raises(BadConfiguration, match=message):
            answer(summary.run_dir, f"csv:{new}", tmp_path / "none.csv")


def test_inputs_that_cannot_be_read_are_one_line(made, tmp_path, data_dir):
    summary = made(export=True, **SMALL)
    with pytest.raises(BadConfiguration, match="File name too long|is not there"):
        answer(summary.run_dir, "images:" + "x" * 300, tmp_path / "none.csv")
    # A record of a prepared set that is damaged.
    copy = tmp_path / "data"
    shutil.copytree(data_dir / "digits", copy / "digits")
    for path in (copy / "digits").rglob("*test*tfrecord*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2 :] = b"\0" * (len(content) - len(content) // 2)
        path.write_bytes(content)
    with pytest.raises(BadConfiguration, match=r"--input tfds:digits/test cannot be read: .*; delete .*digits"):
        answer(summary.run_dir / "export", "tfds:digits/test", tmp_path / "none.csv", f"--data_dir={copy}")


def test_a_file_and_a_folder_that_are_there_and_cannot_be_read_are_one_line(tmp_path):
    taking = types.SimpleNamespace(raw=RawText(8), size=4)
    with pytest.raises(BadConfiguration, match=r"/proc/self/mem cannot be read: Input/output error; name a text file"):
        next(row_sources._lines(pathlib.Path("/proc/self/mem"), taking).rows(0))
    (tmp_path / "photos/private").mkdir(parents=True)
    (tmp_path / "photos/private").chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root reads everything
    try:
        with pytest.raises(BadConfiguration, match=r"cannot be read: Permission denied; make it readable"):
            row_sources._images(tmp_path / "photos", taking)
    finally:
        os.seteuid(user)
        (tmp_path / "photos/private").chmod(0o700)


def test_numbers_of_thousands_of_digits_are_no_tokens():
    assert row_sources._is_token(b"0") and row_sources._is_token(b"2147483647")
    assert not any(map(row_sources._is_token, (b"2147483648", b"1" * 5000, b"-1", b"1.", b"")))


def test_the_ends_of_lines_are_those_of_the_whole_lines(monkeypatch):
    monkeypatch.setattr(row_sources, "_BLOCK", 7)
    for lines in (b"", b"a", b"abcdefg\n", b"\n\nabcdefghijklmnop\r\nx\n", b"abcdefgh\r", b"abcdef\r\nabcde\r\n" * 3):
        whole = [line.rstrip(b"\r\n") for line in io.BytesIO(lines)]
        assert list(row_sources._ends(io.BytesIO(lines), None)) == whole
        for most in (1, 5, 12):
            assert list(row_sources._ends(io.BytesIO(lines), most)) == [line[-most:] for line in whole]


def test_a_half_copied_export_is_one_line(made, tmp_path):
    summary = made(export=True, **SMALL)
    for name in ("variables/variables.index", "variables", "saved_model.pb"):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(summary.run_dir / "export", copy)
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).write_bytes(b"\x0a\xff\xff")
        with pytest.raises(BadConfiguration, match="cannot be loaded: .*; copy it again"):
            answer(copy, f"images:{photos(tmp_path / name)}", tmp_path / "out.csv")


def test_a_run_is_answered_from_another_directory_than_it_was_trained_in(run, table, tmp_path, monkeypatch):
    monkeypatch.chdir(table.parent)
    summary = run(dataset=f"csv:{table.name}", label="grade", **SMALL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert answer(summary.run_dir, "eval", tmp_path / "out.csv") == OK
    (tmp_path / "elsewhere" / table.name).write_text("another file of the same name\n")
    assert answer(summary.run_dir, "eval", tmp_path / "again.csv") == OK


def test_a_file_that_was_begun_before_anything_was_noted_goes_on(made, tmp_path):
    summary = made(**SMALL)
    answer(summary.run_dir, "eval", tmp_path / "whole.csv")
    whole = (tmp_path / "whole.csv").read_bytes()
    header = whole.splitlines(keepends=True)[0]
    for begun in (b"", header[:9], header):
        output = tmp_path / "out.csv"
        output.write_bytes(begun)
        output.with_name("out.csv.progress.json").unlink(missing_ok=True)
        assert answer(summary.run_dir, "eval", output) == OK
        assert output.read_bytes() == whole


def test_a_damaged_file_of_progress_and_a_folder_that_takes_no_files_are_one_line(made, tmp_path):
    summary = made(**SMALL)
    for content in ('{"rows": 1}', "[1]", "{", '{"rows": "x", "bytes": 0, "complete": 0, "counted": 0, "identity": 0}'):
        (tmp_path / "out.csv.progress.json").write_text(content)
        with pytest.raises(BadConfiguration, match=r"progress.json cannot be read: .*; remove it"):
            answer(summary.run_dir, "eval", tmp_path / "out.csv")
    long = "x" * 230 + ".csv"  # the file of progress can be made, but not the one beside it that becomes it
    with pytest.raises(BadConfiguration, match="cannot be written: File name too long; name another"):
        answer(summary.run_dir, "eval", tmp_path / long)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most[1]))
    try:
        with pytest.raises(BadConfiguration, match=r"big.csv cannot be written: File too large; name another"):
            answer(summary.run_dir, "eval", tmp_path / "big.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


def test_nobody_who_reads_the_metrics_costs_no_answers(made, tmp_path, monkeypatch):
    summary = made(**SMALL)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert answer(summary.run_dir, "eval", tmp_path / "out.csv") == OK
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            closed.close()


def test_the_loss_of_a_run_with_one_of_its_own_is_not_told_as_another(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_losses.py").write_text(
        "import keras\nfrom models.losses import Loss\nclass Twice(Loss):\n    def call(self, targets, outputs):\n"
        "        return 2 * keras.losses.sparse_categorical_crossentropy(targets, outputs, from_logits=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    summary = run(loss="own_losses:Twice", export=True, **SMALL)
    for source in (summary.run_dir, summary.run_dir / "export"):
        capsys.readouterr()
        assert answer(source, "tfds:digits/test", tmp_path / f"{source.name}.csv") == OK
        out = capsys.readouterr().out
        assert "accuracy" in out and "loss" not in out


def test_a_replica_has_no_more_rows_at_once_than_one_of_the_run(run, tmp_path, capsys):
    summary = run(batch_size=32, train_steps=2, replicas=4)
    options = predict.settings_from(["predict", str(summary.run_dir), "--input=eval", "--output=x.csv", "--replicas=1"])
    assert predictor.of(summary.run_dir, options).size == 8
