"""The grammar of `--tracker`."""

import pytest

from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve
from trainers.settings.tracker import canonical, parse


def test_equal_trackers_have_one_spelling(tmp_path):
    assert canonical(" mlflow , name=first,experiment=a b") == "mlflow,experiment=a b,name=first"
    assert parse("wandb,project=digits") == ("wandb", {"project": "digits"})
    assert parse("") is None and canonical("") == ""
    config = resolve(Config(model="mlp", run_dir=str(tmp_path), tracker="wandb ,project=digits"))
    assert config.tracker == "wandb,project=digits" and "--tracker=wandb,project=digits" in config.flag_lines()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mlflo", "'mlflo' is not known"),
        ("mlflow,project=x", "'project=x' is no option; mlflow takes experiment=… and name=…"),
        ("wandb,project=", "'project=' is no option"),
        ("wandb,project", "'project' is no option"),
        ("wandb,name=a,name=b", "'name=b' is no option; wandb takes project=… and name=…, each once"),
        ("mlflow,", "'' is no option"),
    ],
)
def test_what_is_no_tracker_is_one_line(text, words):
    with pytest.raises(BadConfiguration) as raised:
        parse(text)
    assert words in str(raised.value) and str(raised.value).startswith("--tracker ") and "\n" not in str(raised.value)


def test_an_evaluator_tells_no_tracker(tmp_path):
    with pytest.raises(BadConfiguration, match="--tracker mlflow with --mode=evaluate: the trainer tells; leave it"):
        resolve(Config(model="mlp", mode="evaluate", run_dir=str(tmp_path), tracker="mlflow"))
