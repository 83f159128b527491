"""launch/prove.py: it passes what is right, and finds the cause of what is planted.

Each mutant is the project's own code, copied and edited in one place as a user might, and proved by the script.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL_MODELS, short

from launch.proof import inputs
from launch.proof.prover import Prover, Run
from launch.proof.rows import ROWS, scope_of
from launch.proof.verdicts import compare_graphs
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve


def prove(folder, data_dir, *flags, timeout=500):
    """Exit code, what was printed, and the verdicts by row."""
    facts = folder / "verdicts.json"
    command = [sys.executable, "launch/prove.py", f"--json={facts}", f"--data_dir={data_dir}", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, cwd=folder, env=os.environ
    )
    rows = {row["row"]: row for row in json.loads(facts.read_text())["rows"]} if facts.exists() else {}
    return done.returncode, done.stdout + done.stderr, rows


@pytest.fixture
def mutant(tmp_path):
    """`mutant({path: [(old, new), …]})`: a copy of the code, edited."""

    def make(edits):
        for part in ("trainers", "models", "launch"):
            # With what Python has compiled of it, but for what it is about to write.
            shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.pyc.*"))
        for path, changes in edits.items():
            (tmp_path / path).write_text(edited((tmp_path / path).read_text(), changes))
        (tmp_path / "noise.py").write_text(NOISE_IMAGES)
        return tmp_path

    return make


# Images that a process has at once; `test_what_is_right_holds_in_every_row` reads real ones.
NOISE_IMAGES = """
import numpy as np


def images():
    chance = np.random.default_rng(0)
    splits = [(chance.integers(0, 256, (size, 8, 8, 1)), chance.integers(0, 10, size)) for size in (264, 66)]
    return [(inputs.astype(np.uint8), targets) for inputs, targets in splits]
"""
OF_NOISE = ("--model=mlp", "--dataset=noise:images")
# Where it is not about clipping, which costs runs of its own.
UNCLIPPED = (*OF_NOISE, "--rows=replicas", "--clip_norm=0")

LOOP, OUTER, MLP = "trainers/custom_loop.py", "trainers/run/training.py", "models/mlp.py"
INDEXED, MODELS_LOOP = "trainers/input/indexed.py", "trainers/run/models_loop.py"
CLIPPED = """        with tf.name_scope("all_reduce"):
"""
NOISE = "the same noise on all replicas, or noise that depends on their number"
MUTANTS = {
    "loss divided by the local batch": (
        {LOOP: [("tf.reduce_sum(losses) / config.batch_size +", "tf.reduce_mean(losses) +")]},
        (*OF_NOISE, "--rows=replicas"),
        {"replicas, SGD": "the loss is divided by the local batch"},
    ),
    "gradients averaged over replicas": (
        {
            LOOP: [
                (
                    "*gradients, sums = summed([*gradients, sums])",
                    "*gradients, sums = summed([*gradients, sums])\n"
                    "            gradients = [gradient / self.world.replicas for gradient in gradients]",
                )
            ]
        },
        UNCLIPPED,
        {"replicas, SGD": "gradients are averaged over replicas, not summed"},
    ),
    "clipping before the sum": (
        {
            LOOP: [
                (
                    CLIPPED,
                    "        gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm or 1e9)\n" + CLIPPED,
                ),
                (
                    "            if config.clip_norm:\n                factor",
                    "            if False:\n                factor",
                ),
            ]
        },
        (*OF_NOISE, "--rows=replicas", "--clip_norm=0.05"),
        {"replicas, SGD": "gradients are clipped before they are summed"},
    ),
    "batch statistics per replica": (
        {
            MLP: [
                (
                    'self.flatten = keras.layers.Flatten(name="flatten")',
                    'self.flatten = keras.layers.Flatten(name="flatten")\n'
                    '        self.norm = keras.layers.BatchNormalization(name="norm")',
                ),
                ("x = self.flatten(x)", "x = self.norm(self.flatten(x), training=training)"),
            ]
        },
        UNCLIPPED,
        {"replicas, SGD": "batch statistics per replica (layer mlp/norm)"},
    ),
    "the same noise on all replicas": (
        {MLP: [("layers.Dropout(dropout, name=", "keras.layers.Dropout(dropout, name=")]},
        UNCLIPPED,
        {"replicas, SGD": NOISE + " (layer mlp/dropout_"},
    ),
    "an augmentation of Keras": (
        {
            MLP: [
                (
                    'self.flatten = keras.layers.Flatten(name="flatten")',
                    'self.flatten = keras.layers.Flatten(name="flatten")\n'
                    '        self.flip = keras.layers.RandomFlip(name="flip")',
                ),
                ("x = self.flatten(x)", "x = self.flatten(self.flip(x, training=training))"),
            ]
        },
        UNCLIPPED,
        {"replicas, SGD": NOISE + " (layer mlp/flip)"},
    ),
    "a recurrent layer of Keras with dropout": (
        {
            MLP: [
                (
                    'self.flatten = keras.layers.Flatten(name="flatten")',
                    'self.flatten = keras.layers.LSTM(16, dropout=0.2, recurrent_dropout=0.2, name="lstm")\n'
                    '        self.rows = keras.layers.Reshape((8, 8), name="rows")',
                ),
                ("x = self.flatten(x)", "x = self.flatten(self.rows(x), training=training)"),
            ]
        },
        UNCLIPPED,
        {"replicas, SGD": NOISE + " (layer mlp/lstm/lstm_cell)"},
    ),
    "a penalty for each replica": (
        {LOOP: [("tf.add_n(model.losses) / parts if", "tf.add_n(model.losses) if")]},
        ("--model=reconstructing_regressor", "--rows=replicas", "--clip_norm=0"),
        {"replicas, SGD": "a penalty counted once per replica"},
    ),
    "a metric averaged instead of summed": (
        {
            LOOP: [
                (
                    "*gradients, sums = summed([*gradients, sums])",
                    "*gradients, sums = summed([*gradients, sums])\n"
                    "            sums = tf.concat([sums[:2], sums[2:] / self.world.replicas], axis=0)",
                )
            ]
        },
        (*OF_NOISE, "--rows=replicas,metrics"),
        {"metrics": "a metric is averaged over replicas instead of summed: train accuracy"},
    ),
    "an average that no checkpoint holds": (
        {
            MODELS_LOOP: [("{**trained, **self.optimizers, **self.averages}", "{**trained, **self.optimizers}")],
            OUTER: [("            state.check_complete(", "            (lambda *_, **__: None)(")],
        },
        (*OF_NOISE, "--rows=resume", "--ema=0.999"),
        {"resume": "a variable is missing from the checkpoint: ema/"},
    ),
    "a checkpoint that is never restored": (
        {
            "trainers/record/checkpoints.py": [
                (
                    "            try:\n                return step, self.read(step, feed)",
                    "            break\n            try:\n                return step, self.read(step, feed)",
                )
            ]
        },
        (*OF_NOISE, "--rows=resume,resize"),
        {"resume": "no checkpoint is restored", "resize": "no checkpoint is restored"},
    ),
    "a variable that Keras does not see": (
        {
            MLP: [
                ("return self.head(x)", "self.calls[0].assign_add(1.0)\n        return self.head(x)"),
                (
                    "self.num_classes, self.units, self.dropout = num_classes, tuple(units), dropout",
                    "self.num_classes, self.units, self.dropout = num_classes, tuple(units), dropout\n"
                    "        once = tf.VariableAggregation.ONLY_FIRST_REPLICA\n"
                    '        self.calls = (tf.Variable(0.0, trainable=False, name="calls", aggregation=once),)',
                ),
            ]
        },
        (*OF_NOISE, "--rows=resume"),
        {"resume": "a variable is missing from the checkpoint"},
    ),
    "an order of the data that depends on the replicas": (
        {
            OUTER: [
                ("config.batch_size, config.seed, config", "config.batch_size, config.seed + world.replicas, config")
            ]
        },
        (*OF_NOISE, "--rows=replicas,input"),
        {
            "input": "the order of the data depends on the number of replicas",
            "replicas, SGD": "the order of the data depends on the number of replicas",
        },
    ),
    "a seed taken from the worker's index": (
        {INDEXED: [("with randomness.at(self.seed, step", "with randomness.at(self.seed + self._first_replica, step")]},
        ("--model=mlp", "--rows=augment", "--augment=crop"),
        {"augment": "what --augment does to an example depends on more than the seed and its position: crop"},
    ),
    "a shuffle after sharding": (
        {
            INDEXED: [
                (
                    "from trainers.input.records import num_bytes\n",
                    "from trainers.input.records import num_bytes\nfrom trainers.input.source import shuffled_index\n",
                ),
                (
                    "self.index((step * self.batch_size + first)[None])[0]",
                    "shuffled_index((step * self.batch_size + first)[None], self.size, "
                    "self.seed + self._first_replica)[0]",
                ),
            ]
        },
        ("--model=mlp", "--rows=input"),
        {"input": "the order of the data depends on the number of replicas or workers"},
    ),
    "a mixing partner that depends on the replica": (
        {
            "trainers/input/augment/mixing.py": [
                (
                    "return tf.reshape(tf.reverse(pairs, axis=[1]), tf.shape(values))",
                    "return tf.reverse(tf.reshape(pairs, tf.shape(values)), axis=[0])",
                )
            ]
        },
        ("--model=mlp", "--rows=augment", "--augment=flip,mixup"),
        {"augment": "what --augment does to an example depends on more than the seed and its position: mixup"},
    ),
    "an operation that is not deterministic": (
        {
            LOOP: [
                ("import keras\nimport tensorflow", "import keras\nimport numpy as np\nimport tensorflow"),
                (
                    "                losses = self.losses(inputs, targets, outputs)\n                penalty",
                    "                losses = self.losses(inputs, targets, outputs)\n"
                    "                import numpy as np\n"
                    "                drawn = lambda: np.float32(1 + 1e-3 * np.random.default_rng().normal())\n"
                    "                losses *= tf.ensure_shape(tf.numpy_function(drawn, [], tf.float32), [])\n"
                    "                penalty",
                ),
            ]
        },
        (*OF_NOISE, "--rows=resume"),
        {"resume": "a non-deterministic operation"},
    ),
}


# One for each way in which a row fails; the others are long.
SHORT = ("clipping before the sum", "an average that no checkpoint holds")
SHORT += ("an order of the data that depends on the replicas",)


def edited(text, changes):
    """A text with each (old, new) replaced, of which it holds the old once."""
    for old, new in changes:
        assert text.count(old) == 1, f"held {text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_can_be_planted(name):
    """Whoever changes the code sees at once that a planted mistake must follow; proving it takes minutes."""
    for path, changes in MUTANTS[name][0].items():
        compile(edited((ROOT / path).read_text(), changes), path, "exec")


@pytest.mark.parametrize("name", short(MUTANTS, SHORT))
def test_a_planted_mistake_is_found_and_named(mutant, data_dir, name):
    edits, flags, expected = MUTANTS[name]
    # A batch that two replicas divide and four do not: one size is enough to show it.
    few = ("--steps=20", "--optimizer=sgd", "--batch_size=68" if "--rows=augment" in str(flags) else "--batch_size=66")
    code, output, rows = prove(mutant(edits), data_dir, *few, *flags)
    assert code == 1, output
    for row, cause in expected.items():
        assert rows[row]["holds"] is False, output
        assert rows[row]["cause"].startswith(cause), output
        assert f"{row}: {cause}" in output


def test_what_is_right_holds_in_every_row(mutant, data_dir):
    # All words of --augment at every size: tests/input/test_augmentation.py.
    code, output, rows = prove(mutant({}), data_dir, "--model=mlp", "--steps=20", "--augment=flip,mixup")
    assert code == 0, output
    assert {"replicas, SGD", "replicas, adamw", "workers, SGD", "metrics", "resume", "resize", "graph"} <= rows.keys()
    assert all(row["holds"] for row in rows.values()), output
    assert "the same examples in 15 steps" in rows["input"]["found"]
    assert "the same examples in 8 steps however they are read" in rows["input"]["found"]
    assert "the same examples in 8 steps however they are read" in rows["augment"]["found"]
    assert "every row holds" in output


@pytest.mark.long
def test_statistics_of_each_replica_are_said_to_be_inexact_and_do_not_fail(mutant, data_dir):
    flags = (
        "--model=resnet",
        "--batch_norm=per_replica",
        "--batch_size=32",
        "--rows=replicas",
        "--steps=5",
        "--optimizer=sgd",
    )
    code, output, rows = prove(mutant({}), data_dir, *flags)
    assert code == 0, output
    assert rows["replicas, SGD"]["holds"] is None
    assert rows["replicas, SGD"]["cause"] == "inexact by --batch_norm=per_replica"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model=nothing",), "'nothing' is not known"),
        (("--rows=everything",), "--rows names 'everything'; choose among replicas, workers"),
        (("--batch_size=7",), "--batch_size 7 does not divide over 2 replicas"),
        (("--steps=1",), "--steps 1 is below 2"),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(tmp_path, flags, message):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/prove.py"), *flags], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_on_a_single_gpu_the_rows_of_one_size_are_judged(mutant, data_dir, monkeypatch):
    """The script counts the GPUs by the variable; TensorFlow takes what there is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code, output, rows = prove(mutant({}), data_dir, "--model=mlp", "--steps=20", "--optimizer=sgd")
    assert code == 0, output
    assert {name for name, row in rows.items() if row["holds"]} == {"resume", "graph", "retrace", "export"}
    for name in ("replicas", "workers", "metrics", "resize", "input", "augment"):
        assert rows[name]["holds"] is None
        assert "needs two devices, and one GPU is visible" in rows[name]["found"]
    assert "every row that was judged holds" in output


def test_without_augment_a_proof_looks_at_all_words_that_the_batch_allows():
    def words(**flags):
        return inputs.words_of(resolve(Config(model="mlp", **flags)), "augment")

    assert words(batch_size=64) == "crop,flip,randaugment,erase,mixup,cutmix"
    assert words(batch_size=33) == "crop,flip,randaugment,erase"
    assert words(batch_size=64, augment="flip,mixup") == "flip,mixup"


def test_rows_that_need_two_devices_are_refused_where_they_are_named():
    config = resolve(Config(model="mlp", batch_size=64))
    assert scope_of(config, ROWS, gpus=0).sizes == (2, 4)
    assert scope_of(config, ROWS, gpus=2).sizes == (2,) and not scope_of(config, ROWS, gpus=2).skipped
    single = scope_of(config, ROWS, gpus=1)
    assert single.rows == ("resume", "graph", "retrace", "export") and set(single.skipped) == set(ROWS) - set(
        single.rows
    )
    assert not scope_of(config, ("resume", "graph"), gpus=1).skipped
    words = resolve(Config(model="transformer", batch_size=64))
    assert set(scope_of(words, ROWS, gpus=0).skipped) == {"augment"}
    with pytest.raises(BadConfiguration, match="--rows names 'augment', which is for images"):
        scope_of(words, ("augment",), gpus=0)
    with pytest.raises(BadConfiguration, match="--rows names 'input', which needs two devices, and one GPU is visible"):
        scope_of(config, ("resume", "input"), gpus=1)
    # Rows of one size ask nothing of the batch.
    odd = resolve(Config(model="mlp", batch_size=7))
    assert scope_of(odd, ("resume",), gpus=0).sizes == ()
    with pytest.raises(BadConfiguration, match="--batch_size 7 does not divide over 2 replicas"):
        scope_of(odd, ROWS, gpus=0)


@pytest.mark.parametrize(
    ("values", "holds", "text"),
    [
        ([1.5e-6], True, "XLA 1.5e-06 from eager;"),
        ([6e-4, 1.5e-6], True, "XLA 1.5e-06 from eager (6.0e-04 where the gradient jumps);"),
        ([6e-4, 5e-4, 7e-4], False, "XLA 5.0e-04 from eager;"),
        ([None, None], False, "XLA inf from eager;"),
    ],
)
def test_a_gradient_that_jumps_where_it_stands_is_judged_nearby(tmp_path, values, holds, text):
    prover = Prover([], 3, lambda line: None)
    prover.runs["SGD, 1 replica"] = Run({"exit_code": 0, "gradients": {"graph": [0.0], "XLA": values}}, {}, {})
    verdict = compare_graphs(prover)
    assert verdict.holds is holds and text in verdict.text and bool(verdict.cause) is not holds
    prover.folder.rmdir()


def test_the_gradients_of_resnet_agree_where_a_relu_flips(tmp_path, data_dir):
    """After 3 updates rounding under XLA switches one ReLU of 65,536 on this batch."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    flags = ("--model=resnet", "--rows=graph", "--steps=3", "--optimizer=sgd")
    code, output, _ = prove(tmp_path, data_dir, *flags)
    assert code == 0, output


def test_a_signal_ends_it_with_its_children_and_leaves_nothing(mutant, data_dir, tmp_path):
    folder = mutant({})
    (tmp_path / "tmp").mkdir()
    env = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "launch/prove.py", "--model=mlp", f"--data_dir={data_dir}"]
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(children_of(process.pid)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    time.sleep(0.5)
    assert not any(os.path.exists(f"/proc/{child}/exe") for child in children)
    assert not list((tmp_path / "tmp").glob("prove-*"))


def children_of(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


@pytest.mark.parametrize("model", short(SMALL_MODELS, {"mlp"}))
def test_an_export_without_the_project_answers_what_evaluation_computes(tmp_path, data_dir, model):
    flags = ("--rows=export", "--steps=2", "--batch_size=16")
    command = [sys.executable, str(ROOT / "launch/prove.py"), f"--model={model}", *flags, f"--data_dir={data_dir}"]
    done = subprocess.run(
        [*command, f"--json={tmp_path / 'verdicts.json'}"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "verdicts.json").read_text())["rows"][0]["found"]
    assert "serve " in found and "at batch 1 and 64" in found
