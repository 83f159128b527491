"""Tables: words become columns or classes, and a bad cell is named by file, line and column."""

import numpy as np
import pytest

from trainers.input import load as data
from trainers.input.kinds import csv_table
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
