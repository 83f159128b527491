"""--optimizer_for: parts of a model have optimizers of their own, whatever the number of replicas."""

import numpy as np
import pytest
from conftest import as_after, largest_relative_difference, metrics, weights

from trainers.run.weight_groups import places_of
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.optimizer_for import Request, parse
from trainers.settings.rules import resolve

WIDE_DEEP = {
    "model": "wide_deep",
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "schedule": "constant",
}
PATHS = ["net/wide/kernel", "net/wide/bias", "net/deep/kernel"]


def test_requests_are_read():
    assert parse("wide/.*=sgd,learning_rate=0.1; a{1,2}=b=adam") == [
        Request("wide/.*", "sgd", learning_rate=0.1),
        Request("a{1,2}=b", "adam"),
    ]
    assert parse("x=adamw,weight_decay=0") == [Request("x", "adamw", weight_decay=0.0)]
    assert parse("") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wide", "is no request; write PATTERN=NAME,key=value"),
        ("w(=sgd", "is no regular expression"),
        ("wide=sdg", "did you mean sgd"),
        ("wide=sgd,learning_rate=fast", "learning_rate=fast is not a number of 0 or more"),
        ("wide=sgd,learning_rate=-1", "learning_rate=-1 is not a number of 0 or more"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(text, says):
    with pytest.raises(BadConfiguration, match=says.replace("(", r"\(")):
        resolve(Config(model="wide_deep", optimizer_for=text))


def test_each_weight_goes_to_the_first_pattern_that_is_found_in_its_path():
    assert places_of(PATHS, ["wide/kernel", "wide"]) == [[0], [1], [2]]
    assert places_of(PATHS, []) == [[0, 1, 2]]
    with pytest.raises(BadConfiguration, match="'dep' is found in the path of no weight; there are: net/wide/kernel, "):
        places_of(PATHS, ["dep"])
    with pytest.raises(BadConfiguration, match="'bias' is found only in paths that an earlier pattern has"):
        places_of(PATHS, ["wide", "bias"])
    with pytest.raises(BadConfiguration, match="'net' leaves no weight to --optimizer"):
        places_of(PATHS, ["net"])


def test_a_group_moves_by_its_own_optimizer_and_rate(run, tmp_path):
    flags = WIDE_DEEP | {"train_steps": 1, "replicas": 1, "weight_decay": 0.0, "checkpoint_every": 1, "log_every": 1}
    run("start", **(flags | {"learning_rate": 0.0}))
    run("sgd", **(flags | {"optimizer": "sgd", "learning_rate": 0.5}))
    run("adamw", **flags)
    run("both", **flags, optimizer_for="wide/.*=sgd,learning_rate=0.5")
    start, sgd, adamw, both = (weights(tmp_path / name) for name in ("start", "sgd", "adamw", "both"))
    for name in start:
        if name.startswith("model/"):
            expected = sgd if "/wide/" in name else adamw
            np.testing.assert_array_equal(both[name], expected[name], err_msg=name)
            assert not np.array_equal(sgd[name], adamw[name])
    assert {name.split("/")[0] for name in both} == {"model", "optimizer", "optimizer_for_1", "loop"}
    line = metrics(tmp_path / "both")[0]
    assert (line["learning_rate"], line["learning_rate_for_1"]) == (pytest.approx(1e-3), pytest.approx(0.5))


def test_groups_are_the_same_at_every_size_and_resume_bit_for_bit(run, tmp_path):
    flags = WIDE_DEEP | {"optimizer_for": "wide/.*=momentum,learning_rate=0.05;main=sgd", "deterministic": True}
    for replicas in (1, 2, 4):
        run(f"of {replicas}", **flags, replicas=replicas)
    one = weights(tmp_path / "of 1")
    for replicas in (2, 4):
        assert largest_relative_difference(one, weights(tmp_path / f"of {replicas}")) < 1e-4
    as_after(3, tmp_path / "of 2", "halves")
    run("halves", **flags, replicas=2)
    whole, halves = weights(tmp_path / "of 2"), weights(tmp_path / "halves")
    for name in whole:
        np.testing.assert_array_equal(whole[name], halves[name], err_msg=name)
    with pytest.raises(BadConfiguration, match="--optimizer_for main=sgd differs from wide"):
        run("halves", **(flags | {"optimizer_for": "main=sgd"}), replicas=2)


def test_an_optimizer_of_two_gradients_has_no_part(run):
    with pytest.raises(BadConfiguration, match="--optimizer_for does not go with an optimizer of two gradients"):
        run("sam", **WIDE_DEEP, optimizer_for="wide/.*=sam")


FREE = {"model": "mlp", "optimizer": "schedule_free", "schedule": "constant", "learning_rate": 1e-2, "warmup_steps": 2}


def test_an_optimizer_that_averages_is_evaluated_exported_and_taken_on_at_its_average(run, tmp_path):
    flags = FREE | {"train_steps": 6, "log_every": 0, "eval_every": 0, "weight_decay": 0.1}
    summary = run("free", **flags)
    found = weights(tmp_path / "free")
    averages = [found[name] for name in sorted(found) if name.startswith("ema/")]
    trained = [found[name] for name in sorted(found) if name.startswith("model/")]
    bases = [found[name] for name in sorted(found) if name.startswith("optimizer/") and name.endswith("_base")]
    assert len(averages) == len(trained) == len(bases)
    for average, weight, base in zip(averages, trained, bases, strict=True):
        np.testing.assert_allclose(average, (weight - 0.1 * base) / 0.9, rtol=1e-4, atol=1e-6)
        assert not np.array_equal(average, weight)
    still = FREE | {"optimizer": "sgd", "learning_rate": 0.0, "train_steps": 1, "init_from": str(tmp_path / "free")}
    assert run("again", **(still | {"warmup_steps": 0})).eval["loss"] == pytest.approx(summary.eval["loss"], rel=1e-5)


def test_weights_that_another_optimizer_has_are_their_own_average(run, tmp_path):
    run("both", **FREE, optimizer_for="logits=sgd,learning_rate=0.1")
    found = weights(tmp_path / "both")
    pairs = {
        (a, b)
        for a in found
        for b in found
        if a.startswith("ema/") and b.startswith("model/") and a.split("/", 2)[1] == b.split("/", 2)[1]
    }
    assert len(pairs) == 6
    for average, weight in pairs:
        assert np.array_equal(found[average], found[weight]) == ("/logits/" in weight), weight


def test_two_averages_of_one_weight_are_refused(run):
    with pytest.raises(BadConfiguration, match="--ema 0.9 averages weights that --optimizer schedule_free averages"):
        run("two", **FREE, ema=0.9)
