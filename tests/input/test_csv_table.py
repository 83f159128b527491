"""Tables: words become columns or classes, and a bad cell is named by file, line and column."""

import numpy as np
import pytest

from trainers.input import load as data
from trainers.input.kinds import csv_table
from trainers.input.raw.rows import RawRows, Scale
from trainers.settings.exit_codes import BadConfiguration

HEADER = "size,colour,price\n"
ROWS = [f"{i},{'red' if i % 3 else 'blue'},{i * 1.5}\n" for i in range(30)]


def table(tmp_path, rows=ROWS, header=HEADER):
    path = tmp_path / "table.csv"
    path.write_text(header + "".join(rows))
    return path


def test_a_table_becomes_numbers_and_words_become_columns(tmp_path):
    values = csv_table.read(table(tmp_path), "price")
    assert values.columns == ("size", "colour=blue", "colour=red")
    np.testing.assert_array_equal(values.features[4], [4, 0, 1])
    assert values.target[4] == 6.0
    assert values.classes == ()
    values = csv_table.read(table(tmp_path), "colour")
    assert values.classes == ("blue", "red")
    assert values.target.tolist()[:4] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({4: "4,red,oops\n"}, r"table.csv, line 6, column 'price' holds 'oops'.*finite number"),
        ({4: "4,red,nan\n"}, r"line 6, column 'price' holds 'nan'"),
        ({4: ",red,6\n"}, r"line 6, column 'size' is empty; fill it in"),
        ({4: "4,,6\n"}, r"line 6, column 'colour' is empty"),
        ({4: "4,red\n"}, r"line 6: 2 cells, but 3 columns"),
        ({4: '4,"red,6\n'}, r"line \d+"),
    ],
)
def test_a_bad_cell_is_named_by_file_line_and_column(tmp_path, change, words):
    rows = [change.get(i, row) for i, row in enumerate(ROWS)]
    with pytest.raises(BadConfiguration, match=words):
        csv_table.read(table(tmp_path, rows), "price")


def test_a_bad_table_is_named(tmp_path):
    with pytest.raises(BadConfiguration, match="--label 'cost' is not a column.*size, colour, price"):
        csv_table.read(table(tmp_path), "cost")
    with pytest.raises(BadConfiguration, match="has 3 rows"):
        csv_table.read(table(tmp_path, ROWS[:3]), "price")
    with pytest.raises(BadConfiguration, match="line 1: column names"):
        csv_table.read(table(tmp_path, header="a,a,b\n"), "a")
    with pytest.raises(BadConfiguration, match="cannot be read"):
        csv_table.read(tmp_path / "nothing.csv", "price")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadConfiguration, match="CSV file in UTF-8"):
        csv_table.read(tmp_path / "binary.csv", "price")


def test_a_model_trains_on_a_table(run, tmp_path):
    path = table(tmp_path, [f"{i},{'red' if i > 50 else 'blue'},{i % 7 + 0.5}\n" for i in range(100)])
    summary = run("price", model="residual_regressor", dataset=f"csv:{path}", label="price", batch_size=16)
    assert np.isfinite(summary.eval["r2"])
    summary = run("colour", model="mlp", dataset=f"csv:{path}", label="colour", batch_size=16, train_steps=60)
    assert summary.eval["accuracy"] > 0.8
    with pytest.raises(BadConfiguration, match="--model mlp does not take the regression data.*residual_regressor"):
        run("wrong", model="mlp", dataset=f"csv:{path}", label="price")


def test_every_fifth_row_is_for_evaluation(tmp_path):
    path = table(tmp_path)
    dataset = data.load(f"csv:{path}", "", label="price")
    assert dataset.eval.arrays["target"].tolist() == [i * 1.5 for i in range(4, 30, 5)]
    assert dataset.train.size == 24
    with pytest.raises(BadConfiguration, match="csv does not name a file; write csv:PATH"):
        data.load("csv", "", label="price")


def doubled(text):
    """A table of 30 rows whose label `y` is a number, from a header and two rows."""
    header, *rows = text.splitlines(keepends=True)
    return header + "".join(rows) * 15


def read_text(tmp_path, text, label="y"):
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return csv_table.read(path, label)


@pytest.mark.parametrize(
    "text",
    [
        "a,b,y\n1.5,2,0.5\n-3,4e1,1.5\n",
        " a , b , y\n 1.5 , 2 , 0.5\n-3, 4e1, 1.5\n",
        '"a", "b", "y"\n1.5, 2, "0.5"\n"-3", 4e1, 1.5\n',
        "\ufeffa,b,y\r\n1.5,2,0.5\r\n-3,4e1,1.5\r\n",
        "a;b;y\n1.5;2;0.5\n-3;4e1;1.5\n",
        "a;b;y\n1,5;2;0,5\n-3;4e1;1,5\n",
        "a\tb\ty\n1,5\t2\t,5\n-3\t4e1\t1,5\n",
    ],
    ids=["plain", "blanks", "quotes", "BOM", "semicolons", "decimal commas", "tabs"],
)
def test_the_usual_ways_to_write_a_table_are_read_alike(tmp_path, text):
    values = read_text(tmp_path, doubled(text))
    assert values.columns == ("a", "b")
    np.testing.assert_array_equal(values.features[:2], [[1.5, 2], [-3, 40]])
    np.testing.assert_array_equal(values.target[:2], [0.5, 1.5])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a,y\n"1,200",0.5\n"3,400",1.5\n', r"line 2, column 'a' holds '1,200', which may be read as two numbers"),
        (
            "a;y\n1.200;0,5\n3.400;1,5\n",
            r"line 2, column 'a' holds '1.200', which may be read as two.*like 1234 or 0,5",
        ),
        ("a;y\n1.200,5;0,5\n3;1,5\n", r"column 'a' holds '1.200,5', which may be read as two numbers"),
        ("a, a ,y\n1,2,0.5\n3,4,1.5\n", r"line 1: column names \['a', 'a', 'y'\] are empty or repeated"),
        ("a, ,y\n1,2,0.5\n3,4,1.5\n", r"line 1: column names .* are empty or repeated"),
    ],
)
def test_what_may_be_read_in_two_ways_is_refused(tmp_path, text, words):
    with pytest.raises(BadConfiguration, match=words):
        read_text(tmp_path, doubled(text))


@pytest.mark.parametrize("cell", ["1_0", "١٢", "0x10"])
def test_what_python_alone_calls_a_number_is_none(tmp_path, cell):
    rows = [f"{i},{i}\n" for i in range(20)]
    rows[7] = f"{cell},7\n"
    with pytest.raises(BadConfiguration, match=f"line 9, column 'a' holds '{cell}', which is not a finite number"):
        read_text(tmp_path, "a,y\n" + "".join(rows))


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("1e39", "holds '1e39', which is beyond ±3.4e38, the range of float32; correct it"),
        ("-1e400", "holds '-1e400', which is beyond"),
        ("inf", "holds 'inf', which is not a finite number"),
        ("-Infinity", "holds '-Infinity', which is not a finite number"),
        ("NaN", "holds 'NaN', which is not a finite number"),
    ],
)
@pytest.mark.parametrize("label", ["a", "b"])
def test_a_number_that_models_cannot_hold_is_named_by_line_and_column(tmp_path, cell, words, label):
    rows = [f"{i / 2},{i / 3}\n" for i in range(30)]
    rows[7] = f"{cell},1\n"
    with pytest.raises(BadConfiguration, match=f"line 9, column 'a' {words}"):
        read_text(tmp_path, "a,b\n" + "".join(rows), label)


@pytest.mark.parametrize("value", ["red", "1", "0.5"])
def test_a_label_of_one_value_is_refused(tmp_path, value):
    with pytest.raises(BadConfiguration, match=f"column 'y', the label, holds '{value}' in every row.*--label"):
        read_text(tmp_path, "a,y\n" + "".join(f"{i},{value}\n" for i in range(20)))


def test_a_label_of_too_many_words_is_refused_with_what_to_do_about_a_label(tmp_path):
    with pytest.raises(BadConfiguration, match="column 'y' holds 300 different words, more than 100; name another"):
        read_text(tmp_path, "a,y\n" + "".join(f"{i},w{i}\n" for i in range(300)))


LOSING = {
    "a time in milliseconds": lambda i: 1.7e12 + 10 * i,
    "a coordinate": lambda i: 48.1371234 + i * 1e-7,
    "tiny": lambda i: i * 1e-50,
    "huge": lambda i: (-1) ** i * (3.4e38 - i * 1e35),
    "whole numbers beyond 2**24": lambda i: 1e8 + i,
}


@pytest.mark.parametrize("kind", LOSING)
@pytest.mark.parametrize("where", ["features", "target"])
def test_numbers_that_float32_ruins_are_prepared_as_in_float64(tmp_path, kind, where):
    values = np.array([LOSING[kind](i) for i in range(300)])
    other = np.arange(300) / 10
    pairs = zip(values, other, strict=True) if where == "features" else zip(other, values, strict=True)
    (tmp_path / "table.csv").write_text("t,y\n" + "".join(f"{float(t)!r},{float(y)!r}\n" for t, y in pairs))
    dataset = data.load(f"csv:{tmp_path / 'table.csv'}", "", label="y")
    train = values[np.arange(300) % 5 != 4]
    for split, rows in ((dataset.train, train), (dataset.eval, values[4::5])):
        prepared = dict(zip(("features", "target"), dataset.prepare(split.arrays), strict=True))[where]
        np.testing.assert_allclose(np.ravel(prepared), (rows - train.mean()) / train.std(), rtol=1e-6, atol=1e-6)
        assert np.asarray(prepared).dtype == np.float32


def test_numbers_that_float32_holds_are_kept_as_they_are(tmp_path):
    (tmp_path / "table.csv").write_text("t,c,y\n" + "".join(f"{1990 + i % 40},0.1,{i / 10}\n" for i in range(300)))
    dataset = data.load(f"csv:{tmp_path / 'table.csv'}", "", label="y")
    assert dataset.train.arrays["features"][:2].tolist() == [[1990, np.float32(0.1)], [1991, np.float32(0.1)]]
    inputs, _ = dataset.prepare(dataset.train.arrays)
    assert not np.any(inputs[:, 1]), "a constant column is 0"


def test_the_fingerprint_tells_columns_apart_that_are_held_standardized(tmp_path):
    fingerprints = set()
    for scale, offset in ((1, 1.7e12), (1, 1.8e12), (2, 1.7e12)):
        rows = "".join(f"{offset + scale * i},{i / 10}\n" for i in range(50))
        (tmp_path / "table.csv").write_text("t,y\n" + rows)
        fingerprints.add(data.load(f"csv:{tmp_path / 'table.csv'}", "", label="y").fingerprint)
    assert len(fingerprints) == 3


def test_classes_of_large_numbers_stay_apart_and_keep_their_names(tmp_path):
    values = ["1000001", "1000002", "999999", "123456789012", "7"]
    read = csv_table.read(table(tmp_path, [f"{i},red,{values[i % 5]}\n" for i in range(30)]), "price")
    assert read.classes == ("7", "999999", "1000001", "1000002", "123456789012")
    raw = RawRows(read.layout, Scale((0.0,), (1.0,), (False,)))
    assert [raw.target_of({"price": f"{name}.0"}) for name in read.classes] == [0, 1, 2, 3, 4]
    for other in ("1000001.5", "7.0000001", "inf"):
        with pytest.raises(ValueError, match=f"'{other}' is not one of the 5 classes"):
            raw.target_of({"price": other})
