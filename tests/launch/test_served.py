"""The row `export` of the proof: what an export answers, against what evaluation computes."""

import json
import types

import numpy as np
import pytest
import tensorflow as tf

from launch.proof import expected, served, verdicts
from trainers.settings.config import Config
from trainers.settings.exit_codes import OK

ROWS = expected.ROWS
PROBABILITY = np.linspace(0.1, 0.9, ROWS).astype(np.float32)
TOKENS = np.arange(ROWS, dtype=np.int32)[:, None]


class Exported(tf.Module):
    """An export whose answers are those given, by the number of the row."""

    def __init__(self, probability, tokens, errors):
        super().__init__()
        answer = {"probability": probability, "token": tokens, "error": errors}
        held = {name: tf.constant(value) for name, value in answer.items()}
        rows = tf.TensorSpec([None], tf.int32, name="rows")
        self.serve = tf.function(lambda rows: {name: tf.gather(v, rows) for name, v in held.items()}, [rows])
        inputs = tf.TensorSpec([None, 1], tf.float32, name="inputs")
        self.prepared = tf.function(lambda inputs: {"output_0": inputs * 2}, [inputs])


def verdict(tmp_path, probability=PROBABILITY, tokens=TOKENS, errors=("",) * ROWS, wanted=PROBABILITY):
    model = Exported(np.array(probability, np.float32), np.array(tokens, np.int32), list(errors))
    signatures = {"serve": model.serve.get_concrete_function()}
    signatures["serve_prepared"] = model.prepared.get_concrete_function()
    tf.saved_model.save(model, str(tmp_path / "export"), signatures)
    (tmp_path / "export/metadata.json").write_text("{}")
    inputs = np.ones([ROWS, 1], np.float32)
    sure = np.ones([ROWS, 1], bool)
    sure[5] = False
    arrays = {"raw/rows": np.arange(ROWS, dtype=np.int32), "inputs": inputs, "output/0": 2 * inputs}
    arrays |= {"answer/probability": wanted, "answer/token": TOKENS, "sure/token": sure}
    np.savez(tmp_path / "expected.npz", **arrays)
    served.main(str(tmp_path / "export"), str(tmp_path / "expected.npz"), str(tmp_path / "result.json"))
    found = json.loads((tmp_path / "result.json").read_text()) | {"project": []}
    run = types.SimpleNamespace(facts={"exit_code": OK, "export": True})
    prover = types.SimpleNamespace(runs={"SGD, 1 replica": run}, served=lambda name: found)
    return verdicts.compare_export(prover, Config())


def changed(values, row, value):
    values = np.array(values)
    values[row] = value
    return values


def test_equal_answers_hold_and_a_token_that_rounding_may_change_may_differ(tmp_path):
    assert verdict(tmp_path).holds
    assert verdict(tmp_path, tokens=changed(TOKENS, 5, 60)).holds


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"probability": changed(PROBABILITY, 9, np.nan)}, "serve inf"),
        ({"probability": np.full(ROWS, np.nan)}, "serve inf"),
        ({"wanted": changed(PROBABILITY, 9, np.nan)}, "serve inf"),
        ({"tokens": changed(TOKENS, 9, 60)}, "serve inf"),
        ({"errors": ["it is too large" if i == 9 else "" for i in range(ROWS)]}, "1 rows refused, the first: it is"),
    ],
)
def test_answers_that_are_no_numbers_or_other_tokens_or_refused_do_not_hold(tmp_path, changes, text):
    found = verdict(tmp_path, **changes)
    assert found.holds is False and text in found.text and found.cause == verdicts.NOT_SERVED


def test_numbers_that_are_not_finite_in_both_hold(tmp_path):
    with_nan = changed(PROBABILITY, 9, np.nan)
    assert verdict(tmp_path, probability=with_nan, wanted=with_nan).holds
