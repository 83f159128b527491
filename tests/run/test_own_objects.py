"""Models, losses, optimizers, schedules and data of the user's own, outside of the repository, through a whole run."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, weights

from launch.proof.prover import updates_of
from trainers.record import reading
from trainers.settings.config import Config
from trainers.settings.exit_codes import BAD_CONFIGURATION, BadConfiguration
from trainers.settings.rules import resolve

NET = """
import keras
import numpy as np
import tensorflow as tf

from models import optimizers, tasks


class Net(keras.Model):
    def __init__(self, outputs, width):
        super().__init__(name="net")
        self.hidden = keras.layers.Dense(width, "relu", name="hidden")
        self.head = keras.layers.Dense(outputs, name="head")

    def call(self, x, training=False):
        return self.head(self.hidden(tf.reshape(x, [tf.shape(x)[0], int(np.prod(x.shape[1:]))])))


def build(spec, *, width: int = 8, made: str = "pair"):
    if width > 100:
        raise ValueError(f"width {width} is above 100; pass fewer")
    if spec.task == "regression":
        return Net(spec.num_outputs, width), tasks.regression(spec)
    net = Net(spec.num_classes, width)
    return (net, tasks.classification(spec)) if made == "pair" else net


class Cubed(keras.losses.Loss):
    def __init__(self, power: float = 3.0):
        super().__init__(name="cubed")
        self.power = power

    def call(self, targets, outputs):
        return tf.reduce_mean(tf.abs(outputs - tf.one_hot(targets, outputs.shape[-1])) ** self.power, axis=-1)


class Reduced(Cubed):
    def call(self, targets, outputs):
        return tf.reduce_mean(super().call(targets, outputs))


class Slow(keras.optimizers.SGD):
    def __init__(self, learning_rate, weight_decay=None, factor: float = 0.5, **kwargs):
        super().__init__(learning_rate, weight_decay=weight_decay, **kwargs)
        self.factor = factor

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * self.factor, variable, learning_rate)


class Half(optimizers.Schedule):
    def __init__(self, peak, warmup_steps, total_steps, share: float = 0.5):
        super().__init__(peak, warmup_steps, total_steps)
        self.share = share

    def __call__(self, step):
        return tf.constant(self.peak * self.share)


def data(*, size: int = 40, kind: str = "rows"):
    chance = np.random.default_rng(0)
    if kind == "images":
        images = chance.integers(0, 256, (size, 6, 6, 1)).astype(np.uint8)
        return (images, np.arange(size) % 3), (images[:9], np.arange(9) % 3)
    rows = chance.normal(size=(size, 5))
    if kind == "regression":
        return (rows, rows @ np.arange(5.0)), (rows[:9], rows[:9] @ np.arange(5.0))
    if kind == "tokens":
        tokens = chance.integers(0, 7, (size, 12))
        return (tokens[:, :-1], tokens[:, 1:]), (tokens[:9, :-1], tokens[:9, 1:])
    targets = {"rows": np.arange(size) % 3, "short": np.arange(size - 1), "below": -np.arange(size)}.get(kind)
    if targets is None:
        return {"nothing": 3, "one": (rows, rows), "words": [(["a"], ["b"])] * 2}[kind]
    return (rows, targets), (rows[:9], targets[:9])
"""
OWN = {"batch_size": 8, "train_steps": 4, "learning_rate": 0.1}


@pytest.fixture
def net(tmp_path, monkeypatch):
    """The name of a module in the current directory, which no other test has imported."""
    name = "own_" + "".join(c if c.isalnum() else "_" for c in tmp_path.parent.name + tmp_path.name)
    (tmp_path / f"{name}.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield name
    sys.modules.pop(name, None)


def test_everything_can_be_of_the_users_own(run, tmp_path, net, caplog):
    flags = OWN | {
        "model": f"{net}:build,width=016",
        "loss": f"{net}:Cubed,power=2",
        "optimizer": f"{net}:Slow,factor=1",
        "schedule": f"{net}:Half,share=.25",
        "dataset": f"{net}:data,size=32",
    }
    summary = run(**flags)
    assert summary.step == 4 and np.isfinite(summary.eval["loss"])
    facts = reading.read_run(tmp_path / "run")
    assert facts["flags"]["model"] == f"{net}:build,width=16"
    assert facts["flags"]["schedule"] == f"{net}:Half,share=0.25"
    assert set(facts["sources"]) == {"model", "loss", "optimizer", "schedule", "dataset"}
    assert all(source["file"] == str(tmp_path / f"{net}.py") for source in facts["sources"].values())
    shapes = {name: value.shape for name, value in weights(tmp_path / "run").items() if name.startswith("model/")}
    assert (5, 16) in shapes.values()

    # The same choices in another order and spelling are the same run; another width is not.
    assert run(**(flags | {"model": f"{net}:build,width=16", "train_steps": 6})).step == 6
    assert "has changed" not in caplog.text
    with pytest.raises(BadConfiguration, match=r"--model .*width=8 differs from .*width=16"):
        run(**(flags | {"model": f"{net}:build,width=8", "train_steps": 8}))

    with open(tmp_path / f"{net}.py", "a") as file:
        file.write("# changed\n")
    run(**(flags | {"train_steps": 8}))
    lines = [record.getMessage() for record in caplog.records if "has changed" in record.getMessage()]
    assert len(lines) == 5 and all("\n" not in line and f"{net}.py" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"model": "NET:build"}, "without a recipe for its data; name --dataset"),
        ({"model": "NET:build,width=200", "dataset": "digits"}, "--model NET:build,width=200: width 200 is above 100"),
        ({"model": "NET:build,made=net", "dataset": "digits"}, "give a pair of a keras.Model and its Task"),
        ({"model": "vit,patch=3"}, "--model vit,patch=3: .*do not divide into patches of 3"),
        ({"model": "vit,heads=5"}, "--model vit,heads=5: width 64 does not divide over 5 heads"),
        ({"model": "mlp,width=0x3"}, r"--model mlp,width=0x3: width \(0, 3\) is below 1"),
        ({"optimizer": "sam,rho=-1"}, "--optimizer sam,rho=-1.0: rho -1.0 is not above 0"),
        ({"loss": "NET:Reduced"}, r"--loss NET:Reduced gives values of shape \(\) for 2 examples"),
        ({"loss": "NET:Net,outputs=x"}, "outputs cannot be written as text"),
        ({"loss": "keras.losses:Poisson", "dataset": "digits"}, "--loss keras.losses:Poisson"),
        ({"model": "residual_regressor", "dataset": "NET:data"}, "does not take the classification data"),
        ({"model": "vit", "dataset": "NET:data"}, r"--model vit takes images .*\(5,\); choose one of: mlp, or other"),
        ({"model": "NET:build", "dataset": "NET:data,kind=nothing"}, r"return \(train, eval\)"),
        (
            {"model": "NET:build", "dataset": "NET:data,kind=one"},
            r"returns 2 parts of \[40, 40\]",
        ),
        ({"model": "NET:build", "dataset": "NET:data,kind=words"}, r"the inputs of train are <U1"),
        ({"model": "NET:build", "dataset": "NET:data,kind=short"}, "40 inputs and 39 targets"),
        ({"model": "NET:build", "dataset": "NET:data,kind=below"}, "a target is below 0"),
        ({"model": "NET:build", "dataset": "NET:data", "augment": "flip"}, "is for images"),
        ({"model": "NET:build", "dataset": "NET:data", "image_size": 8}, "is for images"),
        ({"model": "NET:build", "dataset": "NET:data", "label": "x"}, "takes no --label"),
    ],
)
def test_what_does_not_fit_is_answered_in_one_line(run, net, flags, part):
    values = {name: value.replace("NET", net) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(BadConfiguration, match=part.replace("NET", net)) as failure:
        run(**(OWN | values))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("kind", ["images", "rows", "regression"])
def test_own_data_trains_alike_on_two_replicas_and_streamed(run, tmp_path, net, kind):
    flags = OWN | {"model": f"{net}:build", "dataset": f"{net}:data,kind={kind}", "optimizer": "sgd", "augment": ""}
    if kind == "images":
        flags |= {"augment": "flip"}
    for replicas in (1, 2):
        run(f"{replicas}", replicas=replicas, **flags)
    one, two = (weights(tmp_path / name) for name in ("1", "2"))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert run("streamed", input="stream", **flags).step == 4


def test_images_of_the_users_own_are_resized(run, net):
    flags = OWN | {"model": "resnet,width=4", "dataset": f"{net}:data,kind=images", "image_size": 12}
    assert run(**flags).step == 4


def test_tokens_of_the_users_own_train_a_language_model(run, net):
    flags = OWN | {"model": "transformer,width=8,depth=1,heads=2", "dataset": f"{net}:data,kind=tokens"}
    assert "bits_per_token" in run(**flags).eval


def test_the_data_of_a_run_are_known_by_their_bytes(run, tmp_path, net):
    flags = OWN | {"model": f"{net}:build", "dataset": f"{net}:data"}
    run(**flags)
    source = tmp_path / f"{net}.py"
    source.write_text(source.read_text().replace("default_rng(0)", "default_rng(1)"))
    sys.modules.pop(net)
    with pytest.raises(BadConfiguration, match="data"):
        run(**(flags | {"train_steps": 6}))


def test_an_evaluation_of_its_own_names_a_changed_source_too(run, tmp_path, net, caplog):
    flags = OWN | {"model": f"{net}:build", "dataset": f"{net}:data"}
    run(**flags)
    run(mode="evaluate", **flags)
    assert "has changed" not in caplog.text
    with open(tmp_path / f"{net}.py", "a") as file:
        file.write("# changed\n")
    run(mode="evaluate", **flags)
    assert f"{net}.py has changed" in caplog.text


def test_names_of_folders_hold_no_options_and_no_colon(net):
    config = resolve(Config(model=f"{net}:build,width=4", dataset=f"{net}:data,size=20"))
    assert config.title == f"{net}:build"
    assert set(config.run_dir) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=")
    assert resolve(Config(model="vit,depth=2")).run_dir.startswith("runs/vit-digits-")


def test_a_proof_compares_the_chosen_optimizer_with_its_options():
    assert list(updates_of(resolve(Config(optimizer="adamw,beta_2=0.95")))) == ["SGD", "adamw,beta_2=0.95"]
    assert list(updates_of(resolve(Config(optimizer="sgd,momentum=0.5")))) == ["SGD", "sgd,momentum=0.5"]
    assert list(updates_of(resolve(Config(optimizer="sgd")))) == ["SGD"]


def started(folder, *flags, script="trainers/custom_loop.py", env=None):
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_a_module_that_raises_ends_the_trainer_with_the_users_lines_and_code_2(tmp_path):
    (tmp_path / "broken_net.py").write_text("import keras\n\nkeras.layers.Dense(-3)\n\n\ndef build(spec):\n    pass\n")
    ended = started(tmp_path, "--model=broken_net:build", "--dataset=digits", "--run_dir=run")
    assert ended.returncode == BAD_CONFIGURATION, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line]
    begin = next(i for i, line in enumerate(lines) if "broken_net:build raised while it was imported" in line)
    assert lines[begin + 1].endswith('broken_net.py", line 3, in <module>')
    assert lines[begin + 2].strip() == "keras.layers.Dense(-3)"
    assert lines[begin + 3].startswith("ValueError")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_of_somebody_elses_run_imports_nothing_that_its_record_names(tmp_path):
    (tmp_path / "foreign.py").write_text("open('imported', 'w')\n\n\ndef data():\n    pass\n")
    facts = {"loop": "supervised", "flags": Config(model="mlp", dataset="foreign:data", train_steps=1).values()}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(facts))
    ended = started(tmp_path, "--mode=evaluate", "--run_dir=run")
    assert ended.returncode == BAD_CONFIGURATION
    assert ended.stderr.count("\n") == 1 and ended.stderr.endswith("if you trust it, add --dataset=foreign:data\n")
    assert not (tmp_path / "imported").exists()


def test_workers_find_modules_in_the_current_directory(tmp_path, data_dir):
    (tmp_path / "worker_net.py").write_text(NET)
    flags = ["--model=worker_net:build,width=4", "--dataset=worker_net:data", "--batch_size=8", "--train_steps=2"]
    ended = started(
        tmp_path, "--workers=2", "--", *flags, "--run_dir=run", f"--data_dir={data_dir}", script="launch/workers.py"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["flags"]["model"] == "worker_net:build,width=4" and facts["exit_code"] == 0
