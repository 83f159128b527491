"""A run of a published recipe: what it prints and records."""

import json

from conftest import metrics

from trainers import custom_loop
from trainers.settings.flags import config_from

SMALL = ("--model=resnet,width=8", "--dataset=digits", "--image_size=0", "--batch_size=32", "--train_steps=4")


def test_a_run_prints_and_records_its_recipe_and_what_it_has_in_place_of_it(data_dir, tmp_path, capsys):
    flags = ("program", "--recipe=resnet50", *SMALL, f"--data_dir={data_dir}", f"--run_dir={tmp_path / 'run'}")
    flags += ("--eval_every=0", "--log_every=1")
    custom_loop.train(config_from([*flags, "--dry_run"], ""))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe "))
    assert "resnet50: dataset digits (not imagenet2012)" in row
    assert "batch_size 32 (not 4096); train_steps 4 (not train_epochs 90.0)" in row
    assert "optimizer momentum,coupled=true,nesterov=false; learning_rate 1.6; " in row
    custom_loop.train(config_from(flags, ""))
    recorded = json.loads((tmp_path / "run/run.json").read_text())["flags"]
    wanted = {"recipe": "resnet50", "learning_rate": 1.6, "weight_decay": 1e-4, "augment": "inception,flip"}
    wanted |= {"train_steps": 4, "warmup_epochs": 5.0, "warmup_steps": 0, "train_epochs": None}
    assert {name: recorded[name] for name in wanted} == wanted
    first = next(line for line in metrics(tmp_path / "run") if line["split"] == "train")
    assert first["learning_rate"] > 1.5
    written = config_from(["program", f"--flagfile={tmp_path / 'run/flags.txt'}"], "")
    assert written.values(wanted) == wanted | {"warmup_steps": None}
