"""The ranking of a sweep: by the metric and in the direction that each run says."""

import pytest

from trainers import sweep
from trainers.settings.config import Config


def outcome(name, metric, mode, score, code=0):
    facts = {"best_metric": metric, "best_mode": mode, "final": {"eval": {metric: score}}}
    return sweep.Outcome(name, code, facts)


@pytest.mark.parametrize(("mode", "names"), [("min", ["a", "c", "b"]), ("max", ["b", "c", "a"])])
def test_the_runs_say_which_direction_is_better(mode, names):
    outcomes = [outcome("a", "loss", mode, 0.1), outcome("b", "loss", mode, 0.3), outcome("c", "loss", mode, 0.2)]
    assert [(rank, ranked.name) for rank, ranked in sweep.ranked(outcomes)] == list(enumerate(names, 1))
    assert sweep.ranking(outcomes, []).splitlines()[0].split(" | ")[1].strip() == "loss"


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("none", [None, float("nan")])
def test_a_score_that_is_no_number_is_the_last(mode, none):
    outcomes = [outcome("a", "loss", mode, none), outcome("b", "loss", mode, 0.3), outcome("c", "loss", mode, none)]
    assert [ranked.name for _, ranked in sweep.ranked(outcomes)] == ["b", "a", "c"]
    assert "nan" in sweep.ranking(outcomes, [])


def test_runs_of_different_metrics_are_ranked_apart():
    outcomes = [
        outcome("a", "accuracy", "max", 0.8),
        outcome("b", "loss", "min", 2.0),
        outcome("c", "accuracy", "max", 0.9),
        outcome("d", "loss", "min", 1.0),
    ]
    assert [(rank, ranked.name) for rank, ranked in sweep.ranked(outcomes)] == [(1, "c"), (2, "a"), (1, "d"), (2, "b")]
    lines = sweep.ranking(outcomes, []).splitlines()
    assert "metric" in lines[0] and "accuracy 0.9" in lines[2] and "loss 1" in lines[4]


def test_a_run_without_a_score_comes_last_and_has_no_rank():
    failed = outcome("a", "loss", "min", 0.0, code=65)
    old = sweep.Outcome("b", 0, {"final": {"eval": {"loss": 0.0}}})
    lines = sweep.ranking([failed, old, outcome("c", "loss", "min", 1.0)], []).splitlines()[2:]
    assert [line.strip("| ").split()[0] for line in lines] == ["1", "–", "–"]
    assert "code 65" in lines[1]
    assert str(failed) == "ended with code 65"
    assert "does not say how to rank it" in str(old) and "--sweep_dir" in str(old)


def test_flags_that_make_no_run_differ_are_not_compared():
    flags = Config().__dict__ | {"run_dir": "elsewhere", "data_dir": "elsewhere"}
    assert sweep.has_flags({"flags": flags}, Config())
    assert not sweep.has_flags({"flags": flags | {"seed": 1}}, Config())
    assert not sweep.has_flags({}, Config())


def test_the_folder_of_a_long_combination_can_be_made_and_is_its_own(tmp_path):
    swept = tuple(f"flag_{i}" for i in range(30))
    names = {sweep.name_of({name: str(value) * 10 for name in swept}, swept) for value in range(5)}
    assert len(names) == 5
    for name in names:
        (tmp_path / name).mkdir()


def test_options_belong_to_the_name_before_them(tmp_path):
    words = ["--model=mlp,vit,depth=2,width=16,vit,depth=3", "--optimizer=sgd,momentum=0.5,adamw", "--batch_size=8,16"]
    settings = sweep.settings_from(["sweep", *words, f"--sweep_dir={tmp_path}"])
    found = {(run.config.model, run.config.optimizer, run.config.batch_size) for run in settings.runs}
    models, optimizers = ("mlp", "vit,depth=2,width=16", "vit,depth=3"), ("sgd,momentum=0.5", "adamw")
    assert found == {(m, o, b) for m in models for o in optimizers for b in (8, 16)}
    assert len({run.name for run in settings.runs}) == 12
