"""--train_epochs and --warmup_epochs: how many updates they are, and what they go with."""

import dataclasses
import json

import pytest

from launch.proof.prover import Prover
from trainers.record import reading
from trainers.run import command
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.flags import read, without
from trainers.settings.rules import resolve, with_epochs

IMAGENET = 1_281_167


def steps(examples=IMAGENET, **flags):
    config = with_epochs(resolve(Config(model="mlp", **flags)), examples)
    return config.train_steps, config.warmup_steps


def test_epochs_are_the_nearest_number_of_updates():
    assert steps(batch_size=4096, train_epochs=90, warmup_epochs=5) == (28151, 1564)
    assert steps(batch_size=1024, train_epochs=90, warmup_steps=10_000) == (112_603, 10_000)
    assert steps(1000, batch_size=100, train_steps=50, warmup_epochs=1.5) == (50, 15)
    assert steps(10, batch_size=100, train_epochs=0.01, warmup_epochs=0) == (1, 0)


def test_a_recipe_gives_its_warm_up_in_steps_to_a_run_in_epochs():
    assert steps(1000, batch_size=100, train_epochs=30) == (300, 50)  # that of mlp
    assert steps(1000, batch_size=100, train_epochs=2) == (20, 2)  # which a short run shortens


def test_epochs_that_cannot_be_are_one_line(tmp_path):
    with pytest.raises(BadConfiguration, match="--train_epochs 0 is no training"):
        resolve(Config(model="mlp", train_epochs=0.0))
    with pytest.raises(BadConfiguration, match="--train_epochs -1.0 is below 0"):
        resolve(Config(model="mlp", train_epochs=-1.0))
    with pytest.raises(BadConfiguration, match="--warmup_steps 30 is above --train_steps 20.*warmup_epochs 3 of 1000"):
        steps(1000, batch_size=100, train_epochs=2, warmup_epochs=3)
    with pytest.raises(BadConfiguration, match="--train_epochs 1e\\+09 are 1281167000000000 steps, above 2147483647"):
        steps(batch_size=1, train_epochs=1e9)
    for flag in ("--train_steps=3", "--train_epochs=1"), ("--warmup_steps=3", "--warmup_epochs=1"):
        with pytest.raises(BadConfiguration, match="both say how many updates; pass one of them"):
            read(["program", *flag], "")


def test_a_run_in_epochs_records_both_and_goes_on(run, tmp_path):
    flags = {"train_steps": None, "train_epochs": 0.2, "warmup_epochs": 0.1, "eval_every": 0, "log_every": 0}
    assert run("epochs", **flags).step == 9  # of 1438 examples in batches of 32
    facts = json.loads((tmp_path / "epochs/run.json").read_text())["flags"]
    names = ("train_steps", "train_epochs", "warmup_steps", "warmup_epochs")
    assert [facts[name] for name in names] == [9, 0.2, 4, 0.1]
    asked = resolve(Config(model="mlp", batch_size=32, run_dir=str(tmp_path / "epochs"), **flags))
    assert asked.train_steps is None and reading.completed(asked)["step"] == 9
    assert not reading.completed(dataclasses.replace(asked, train_epochs=0.3))
    assert not reading.completed(dataclasses.replace(asked, run_dir=str(tmp_path / "none")))
    written = (tmp_path / "epochs/flags.txt").read_text().splitlines()
    assert "--train_epochs=0.2" in written and "--warmup_epochs=0.1" in written
    assert not [line for line in written if line.startswith(("--train_steps", "--warmup_steps"))]
    again = command.config_from(["program", f"--flagfile={tmp_path / 'epochs/flags.txt'}"], "")
    assert with_epochs(again, 1438).values(names) == {name: facts[name] for name in names}
    assert run("epochs", **(flags | {"train_epochs": 0.3})).step == 13
    with pytest.raises(BadConfiguration, match="--warmup_steps 2 differs from 4"):
        run("epochs", **(flags | {"train_epochs": 0.3, "warmup_epochs": 0.05}))
    followed = command.config_from(["program", "--mode=evaluate", f"--run_dir={tmp_path / 'epochs'}"], "")
    assert (followed.train_steps, followed.warmup_steps) == (13, 4)


def test_what_is_typed_replaces_its_counterpart_of_a_file(tmp_path):
    flagfile = tmp_path / "flags.txt"
    flagfile.write_text("--model=mlp\n--train_epochs=90\n--warmup_steps=7\n")
    config, given = read(["program", f"--flagfile={flagfile}", "--train_steps=50", "--warmup_epochs=1"], "")
    assert (config.train_steps, config.train_epochs) == (50, None)
    assert (config.warmup_steps, config.warmup_epochs) == (None, 1)
    assert not {"train_epochs", "warmup_steps"} & set(given)


def test_who_counts_steps_leaves_out_epochs_however_they_are_written():
    words = ["--model=mlp", "--train_epochs=3", "--warmup_epochs", "1.5", "--nodeterministic", "--seed", "4"]
    assert without(words, ("train_epochs", "warmup_epochs")) == ["--model=mlp", "--nodeterministic", "--seed", "4"]
    assert Prover(["--train_epochs=3"], 3, print).flags == []


def test_a_recipes_warm_up_that_a_short_run_has_shortened_stays_when_the_run_goes_on():
    asked = {"model": "mlp", "recipe": "resnet50", "batch_size": 100, "warmup_epochs": 5.0}
    short = with_epochs(resolve(Config(**asked, train_steps=20)), 1000)
    assert (short.train_steps, short.warmup_steps) == (20, 2)
    longer = resolve(Config(**asked, train_steps=100))
    assert with_epochs(longer, 1000).warmup_steps == 50
    begun = {"warmup_steps": 2, "warmup_epochs": 5.0}
    assert with_epochs(longer, 1000, begun).warmup_steps == 2
    assert with_epochs(longer, 1000, begun | {"warmup_epochs": 4.0}).warmup_steps == 50


def test_a_profile_after_the_last_epoch_is_one_line():
    with pytest.raises(BadConfiguration, match="--profile 100:110 begins after --train_steps 20; begin sooner"):
        steps(1000, batch_size=100, train_epochs=2, profile="100:110")
