"""Perplexity by document: each token of a document is predicted once, from its own document alone."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
import tensorflow as tf

from trainers import predict
from trainers.input.dataset import Split
from trainers.input.token_windows import windows_of
from trainers.settings.exit_codes import OK, ROWS_UNUSABLE, BadConfiguration
from trainers.use import documents, predictor

SMALL = {"train_steps": 2, "eval_every": 0, "log_every": 0, "checkpoint_every": 0, "replicas": 2, "batch_size": 4}
LENGTH, VOCABULARY, SEPARATOR = 16, 30, 7


def tokens():
    """A separator at every twentieth token in the mean; in the last tenth a long document, and two in a row."""
    chance = np.random.default_rng(0)
    values = chance.integers(8, VOCABULARY, 1200)
    values[chance.integers(0, 1200, 60)] = SEPARATOR
    values[1085:1140] = chance.integers(8, VOCABULARY, 55)
    values[1150:1152] = SEPARATOR
    return values


@pytest.fixture
def packed(tmp_path):
    tokens().astype("uint16").tofile(tmp_path / "packed")
    facts = {"dtype": "uint16", "vocabulary": VOCABULARY, "length": LENGTH, "separator": SEPARATOR}
    (tmp_path / "packed.json").write_text(json.dumps(facts))
    return tmp_path / "packed"


def measured(model, output, *more):
    return predict.main(
        predict.settings_from(["predict", str(model), "--input=documents", f"--output={output}", *more])
    )


def rows_in(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def nats_by_hand(model, document):
    """Of each token but the first, from those before it, of which there are more than half a context."""
    found, seen = [], 0
    for place in range(1, len(document)):
        if place - seen > LENGTH:
            seen = place - 1 - LENGTH // 2
        logits = model(tf.constant([document[seen:place]], tf.int32))[0, -1]
        found.append(-float(tf.nn.log_softmax(logits)[document[place]]))
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_each_document_of_the_evaluation_has_its_perplexity(run, packed, tmp_path, capsys, monkeypatch, masked):
    summary = run(
        model="transformer,depth=1,width=16",
        dataset=f"tokens:{packed}",
        document_mask=masked,
        learning_rate=0.1,
        **SMALL,
    )
    assert measured(summary.run_dir, tmp_path / "out.csv") == OK
    told = capsys.readouterr()
    rows = rows_in(tmp_path / "out.csv")
    source = predictor.of(summary.run_dir, predict.settings_from(["x", "run", "--input=eval", "--output=x.csv"]))
    windows = np.stack([each["tokens"] for each in source.dataset.eval.examples().as_numpy_iterator()])
    split = np.append(windows[:, :-1].ravel(), windows[-1, -1])
    ends = np.flatnonzero(split == SEPARATOR) + 1
    expected = [each for each in np.split(split, ends) if len(each) > 1]
    assert len(rows) == len(expected) and max(map(len, expected)) > 2 * LENGTH
    nats = []
    for row, document in zip(rows, expected, strict=True):
        first, last = map(int, row["input"].removeprefix("tokens ").split(" to "))
        np.testing.assert_array_equal(split[first : last + 1], document)
        nats.append(nats_by_hand(source.model, document))
        assert int(row["tokens"]) == len(document) - 1 and not row["error"]
        assert float(row["perplexity"]) == pytest.approx(math.exp(np.mean(nats[-1])), rel=1e-4)
        assert float(row["bits_per_token"]) == pytest.approx(np.mean(nats[-1]) / math.log(2), rel=1e-4)
    by_token = math.exp(np.mean(np.concatenate(nats)))
    by_document = math.exp(np.mean([np.mean(each) for each in nats]))
    assert told.out == f"perplexity {by_token:.4g}  document_perplexity {by_document:.4g}\n"
    if masked:
        return
    # A call that was killed goes on, and ends with the same bytes.
    chunks = documents._chunks

    def dies(*arguments):
        yield next(chunks(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(documents, "_KEEP_EVERY", 0)
    monkeypatch.setattr(documents, "_chunks", dies)
    with pytest.raises(KeyboardInterrupt):
        measured(summary.run_dir, tmp_path / "again.csv")
    monkeypatch.undo()
    assert measured(summary.run_dir, tmp_path / "again.csv") == OK
    again = capsys.readouterr()
    assert ", from row " in again.err and again.out == told.out
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()


def test_a_document_without_a_finite_perplexity_is_named_and_left_out(run, packed, tmp_path, capsys, monkeypatch):
    summary = run(model="transformer,depth=1,width=16", dataset=f"tokens:{packed}", **SMALL)
    computing = documents._computing

    def broken(source):
        nats_of, calls = computing(source), itertools.count()
        return lambda pieces: nats_of(pieces) * (np.nan if next(calls) == 0 else 1)

    monkeypatch.setattr(documents, "_computing", broken)
    assert measured(summary.run_dir, tmp_path / "out.csv") == ROWS_UNUSABLE
    rows, told = rows_in(tmp_path / "out.csv"), capsys.readouterr()
    spoiled = [row for row in rows if row["error"]]
    assert 0 < len(spoiled) < len(rows) and all(row["perplexity"] == "" for row in spoiled)
    mean = np.mean([math.log(float(row["perplexity"])) for row in rows if not row["error"]])
    assert f"document_perplexity {math.exp(mean):.4g}" in told.out
    assert f"{len(spoiled)} of {len(rows)} documents have no perplexity" in told.err
    assert documents.perplexity(800.0) == math.inf


def test_documents_are_those_of_the_whole_split_wherever_it_is_read(monkeypatch):
    values = tokens()
    split = Split(75, arrays={"tokens": windows_of(values.astype(np.uint16), LENGTH)})
    whole = values[: len(split.arrays["tokens"]) * LENGTH + 1]
    for at_once in (1, 3, 256):
        monkeypatch.setattr(documents, "_READ_AT_ONCE", at_once)
        found = list(documents.documents_of(split, SEPARATOR))
        for document in found:
            np.testing.assert_array_equal(document.tokens, whole[document.first :][: len(document.tokens)])
            assert SEPARATOR not in document.tokens[:-1] and len(document.tokens) > 1
        assert sum(len(document.tokens) for document in found) > 1100


@pytest.mark.parametrize("length", [1, 2, 5, 16])
@pytest.mark.parametrize("size", [2, 3, 6, 17, 18, 50])
def test_each_token_but_the_first_is_predicted_once_in_sight_of_half_a_context(length, size):
    document, predicted = np.arange(100, 100 + size), []
    for piece in documents.pieces_of(document, length):
        for place in np.flatnonzero(piece.targets >= 0):
            predicted.append(piece.targets[place])
            seen = piece.inputs[: place + 1]
            np.testing.assert_array_equal(seen, np.arange(piece.targets[place] - len(seen), piece.targets[place]))
            assert len(seen) > length // 2 or seen[0] == 100
    assert predicted == document[1:].tolist()


def test_an_export_and_data_without_a_separator_have_no_documents(run, packed, tmp_path):
    facts = json.loads((tmp_path / "packed.json").read_text())
    del facts["separator"]
    (tmp_path / "packed.json").write_text(json.dumps(facts))
    summary = run(model="transformer,depth=1,width=16", dataset=f"tokens:{packed}", export=True, **SMALL)
    for source, message in {
        summary.run_dir: "has no separator that ends a document; name a run on tokens:PATH",
        summary.run_dir / "export": "those of a run's evaluation split; name the run, not its export",
    }.items():
        with pytest.raises(BadConfiguration, match=message):
            measured(source, tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()
