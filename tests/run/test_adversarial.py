"""The adversarial loop: several critic steps and a second derivative in one update, and the promises about it."""

import subprocess
import sys

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from conftest import ROOT, as_after, largest_relative_difference, metrics, weights, without_times
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from models import adversarial, randomness
from models.batch_norm import BatchNormalization
from trainers import adversarial_loop
from trainers.adversarial_loop import Adversarial, Settings
from trainers.run.hooks import Hooks
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Networks that are traced and run in a moment."""
    for model in (adversarial.Generator, adversarial.Critic):
        made = model.__init__
        monkeypatch.setattr(
            model, "__init__", lambda self, *args, made=made, **kwargs: made(self, *args, **({"width": 4} | kwargs))
        )


@pytest.fixture
def run(data_dir, tmp_path):
    """`run(name, **flags)` trains for a few steps, in this process, in `tmp_path / name`: the summary."""

    def train(name="run", hooks=None, **flags):
        settings = {"train_steps": 6, "batch_size": 32, "critic_steps": 2, "replicas": 1, "data_dir": str(data_dir)}
        settings |= {"log_every": 2, "eval_every": 3, "checkpoint_every": 3, "run_dir": str(tmp_path / name)}
        return adversarial_loop.train(resolve(Settings(**(settings | flags))), hooks)

    return train


def lines(summary):
    """What a run measured: numbers by name, a line each."""
    lines = without_times(metrics(summary.run_dir))
    return [{name: value for name, value in line.items() if name != "split"} for line in lines]


def test_weights_and_evaluation_do_not_depend_on_the_number_of_replicas(run):
    # Adam divides by the gradient's size: where it is all rounding, so is the step. Plain descent shows the gradients.
    flags = {"optimizer": "sgd", "learning_rate": 1e-2, "schedule": "constant", "ema": 0.9}
    runs = {count: run(f"replicas-{count}", replicas=count, **flags) for count in (1, 2, 4)}
    one = weights(runs[1].run_dir)
    assert any(name.startswith("ema/") for name in one)
    # By these names a proof knows the weights of both models.
    assert {name.rpartition("/00")[0] for name in one if "model/" in name} == {"model/generator", "model/critic"}
    for count in (2, 4):
        assert largest_relative_difference(one, weights(runs[count].run_dir), "") <= 1e-5
        for mine, other in zip(lines(runs[count]), lines(runs[1]), strict=True):
            assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
        assert runs[count].traces == 1


def test_a_resumed_run_ends_with_the_same_bits(run):
    flags = {"deterministic": True, "replicas": 2, "schedule": "constant", "ema": 0.9}
    whole = run("whole", **flags)
    as_after(3, whole.run_dir, "parts")
    parts = run("parts", **flags)
    one, other = weights(whole.run_dir), weights(parts.run_dir)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert without_times(metrics(whole.run_dir))[-2:] == without_times(metrics(parts.run_dir))[-2:]


def test_the_critic_takes_its_steps_in_each_update_and_the_generator_one(run):
    state = weights(run(critic_steps=4).run_dir)
    counts = {name.partition("/")[0]: int(value) for name, value in state.items() if name.endswith("iteration")}
    assert counts == {"generator_optimizer": 6, "critic_optimizer": 24}


class Quadratic(keras.Model):
    """Scores `½ xᵀ A x`, whose slope and the gradients of all losses are known in closed form."""

    def __init__(self, image_shape, num_classes):
        super().__init__(name="critic")
        self.size = int(np.prod(image_shape))
        self.inputs_spec = adversarial.Critic(image_shape, num_classes).inputs_spec
        self.matrix = self.add_weight(shape=(self.size, self.size), initializer="glorot_normal", name="matrix")

    def call(self, inputs, training=False):
        x = tf.reshape(inputs[0], [-1, self.size])
        return tf.reduce_sum((x @ self.matrix) * x, axis=1) / 2


class Caught(Hooks):
    """Keeps the loop."""

    def built(self, loop):
        self.loop = loop


def test_loss_penalty_and_gradients_of_a_critic_step_are_those_of_the_closed_form(run, monkeypatch):
    monkeypatch.setattr(adversarial_loop, "Critic", Quadratic)
    hooks = Caught()
    run(hooks=hooks, train_steps=1, penalty=7.0)
    loop = hooks.loop
    count, at = 16, tf.constant(5, tf.int64)  # a critic step has half of the 32 examples
    features = {name: array[:count] for name, array in loop.dataset.train.arrays.items()}
    real, labels = (np.asarray(value) for value in loop.dataset.prepare(features))
    with randomness.at(loop.config.seed, at, at):
        noise = randomness.normal([count, loop.generator.latent], "critic/noise")
        share = randomness.uniform([count, 1], "critic/share").numpy().astype(np.float64)
    fake = loop.generator((noise, labels)).numpy().reshape(count, -1).astype(np.float64)
    real = real.reshape(count, -1).astype(np.float64)
    between = share * real + (1 - share) * fake

    matrix = loop.critic.matrix.numpy().astype(np.float64)
    symmetric = (matrix + matrix.T) / 2
    slope = between @ symmetric
    norm = np.linalg.norm(slope, axis=1, keepdims=True)
    penalty = 7.0 * (norm[:, 0] - 1) ** 2
    score = {name: np.einsum("ni,ij,nj->n", x, matrix, x) / 2 for name, x in (("real", real), ("fake", fake))}
    outer = (2 * 7.0 * (norm - 1) / norm * slope).T @ between
    expected = (outer + outer.T) / 2 + (fake.T @ fake - real.T @ real) / 2

    (gradient,), sums = loop.critic_gradients(features, at, at)
    assert np.linalg.norm(gradient - expected / count) <= 1e-4 * np.linalg.norm(expected / count)
    assert len(set(share[:, 0])) == count and not np.allclose(penalty, 0)
    loss = np.sum(score["fake"] - score["real"] + penalty)
    np.testing.assert_allclose(sums, [loss, count, 0, penalty.sum(), np.sum(score["real"] - score["fake"])], rtol=1e-4)


def test_the_generator_climbs_what_the_critic_says_on_labels_of_all_classes(run):
    hooks = Caught()
    run(hooks=hooks, train_steps=1, batch_size=512)
    loop, at = hooks.loop, tf.constant(0, tf.int64)
    asked = []
    loop.generated = lambda labels, *rest, **more: asked.append(labels.numpy()) or tf.zeros([len(labels), 8, 8, 1])
    _, sums = loop.generator_gradients(at, at)
    assert len(asked[0]) == 256 and set(asked[0]) == set(range(10))
    scores = loop.critic((tf.zeros([256, 8, 8, 1]), asked[0]))
    np.testing.assert_allclose(sums[2], -2 * np.sum(scores), rtol=1e-4)


def test_steps_of_one_update_have_examples_and_noise_of_their_own(run):
    seen = []

    class Watched(Adversarial):
        def critic_gradients(self, features, step, first):
            with randomness.at(self.config.seed, step, first):
                noise = randomness.normal([2, 2], "critic/noise")
            tf.py_function(lambda *values: seen.append([v.numpy() for v in values]), [features["label"], noise], [])
            return super().critic_gradients(features, step, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adversarial_loop, "Adversarial", Watched)
        run(train_steps=2)
    assert len(seen) == 4
    assert len({row[0].tobytes() for row in seen}) == 4
    assert len({row[1].tobytes() for row in seen}) == 4


def test_xla_computes_the_same(run):
    flags = {"train_steps": 1, "optimizer": "sgd", "learning_rate": 1e-2, "replicas": 2, "eval_every": 0}
    one, other = (weights(run(jit, jit=jit, **flags).run_dir) for jit in ("off", "on"))
    assert largest_relative_difference(one, other, "") <= 1e-4


def test_what_is_exported_is_the_averaged_generator(run):
    hooks = Caught()
    summary = run(hooks=hooks, ema=0.5, replicas=2, export=True)
    noise, labels = tf.random.normal([3, 64]), tf.constant([0, 5, 9], tf.int64)
    with hooks.loop.evaluated():
        expected = hooks.loop.generator((noise, labels))
    exported = tf.saved_model.load(str(summary.run_dir / "export"))
    served = exported.serve(noise, labels)
    np.testing.assert_allclose(served, expected, atol=1e-6)
    assert not np.allclose(served, hooks.loop.generator((noise, labels)), atol=1e-6)
    assert served.shape == (3, 8, 8, 1) and np.abs(served).max() <= 1


def test_tensorboard_has_samples_and_the_graphs_of_both_models(run):
    folder = run(train_steps=1, replicas=2).run_dir
    readers = {split: EventAccumulator(str(folder / split)) for split in ("train", "eval")}
    for reader in readers.values():
        reader.Reload()
    assert "samples" in readers["eval"].Tags()["tensors"]
    width, height = (int(text) for text in readers["eval"].Tensors("samples")[0].tensor_proto.string_val[:2])
    assert height >= 10 * 64 and width >= 10 * 64
    assert "critic" in readers["train"].Tags()["tensors"]
    assert any(node.name.startswith("generator/double_1/") for node in readers["train"].Graph().node)
    (event,) = readers["train"].Tensors("step of all replicas")
    step = tf.compat.v1.RunMetadata.FromString(event.tensor_proto.string_val[0]).function_graphs[0]
    names = [node.name for node in step.pre_optimization_graph.node]
    boxes = {name.partition("/")[0] for name in names if "/" in name}
    # Two critic steps and one of the generator, each summed and applied by all replicas together.
    assert {f"{box}{number}" for box in ("all_reduce", "optimizer") for number in ("", "_1", "_2")} <= boxes
    assert not [name for name in names if name.startswith(("replica_0/all_reduce", "replica_0/optimizer"))]
    # The second derivative is in the box of its replica, too.
    assert not [name for name in names if "gradient_tape" in name]


def test_colour_images_of_32_pixels_are_generated(run, tmp_path):
    rng = np.random.default_rng(0)
    for split, label in ((split, label) for split in ("train", "val") for label in ("cat", "dog")):
        folder = tmp_path / "images" / split / label
        folder.mkdir(parents=True)
        for i in range(8):
            PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    hooks = Caught()
    summary = run(hooks=hooks, dataset=f"images:{tmp_path / 'images'}", train_steps=1, batch_size=8, augment="flip")
    assert hooks.loop.generator.image_shape == (32, 32, 3)
    assert np.isfinite(summary.eval["frechet"])


def test_an_evaluation_beside_the_run_has_its_numbers_whatever_its_size(run):
    summary = run("followed", replicas=2, train_steps=3, batch_size=48)
    follower = run("followed", replicas=1, train_steps=3, batch_size=48, mode="evaluate")
    assert follower.eval == pytest.approx({"step": 3} | summary.eval, rel=1e-5)


REFUSED = {
    "float16": ({"precision": "float16"}, "--precision float16 needs a loss scale.*bfloat16"),
    "blended labels": ({"augment": "mixup"}, "--augment mixup blends labels"),
    "a table": ({"dataset": "csv:/tmp/a.csv"}, "--dataset csv:/tmp/a.csv has no images"),
    "numbers": ({"dataset": "diabetes"}, "has regression data, the loop adversarial takes classification"),
    "a second gradient": ({"optimizer": "sam"}, "--optimizer sam takes two gradients an update.*take adam"),
    "a size": (
        {"image_size": 30},
        r"--dataset digits: examples of shape \(30, 30, 1\) have sides that 4 does not divide; set --image_size=32",
    ),
    "a batch": ({"batch_size": 33}, "--batch_size 33 does not divide over 1 replicas × 2 parts; use 32 or 34"),
    "no critic step": ({"critic_steps": 0}, "--critic_steps 0 is below 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loop_cannot_do_is_refused_in_one_line(run, name):
    flags, words = REFUSED[name]
    with pytest.raises(BadConfiguration, match=words) as caught:
        run(**flags)
    assert "\n" not in str(caught.value)


def test_rows_of_the_users_own_are_no_images(run, tmp_path, monkeypatch):
    rows = "rows = np.zeros([8, 2]), np.arange(8) % 2"
    (tmp_path / "own_rows.py").write_text(f"import numpy as np\n\n{rows}\n\n\ndef data():\n    return rows, rows\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadConfiguration, match=r"--dataset own_rows:data: .* are no images; give images \[size"):
        run(dataset="own_rows:data")


class Normalized(adversarial.Critic):
    """A critic with batch normalization, which the paper warns of."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = BatchNormalization(name="norm")

    def call(self, inputs, training=False):
        return super().call((self.norm(inputs[0], training=training), inputs[1]), training=training)


def test_a_critic_with_batch_normalization_ends_as_one_line_that_names_its_layer(run, monkeypatch):
    monkeypatch.setattr(adversarial_loop, "Critic", Normalized)
    words = "^layer critic/norm: .* first derivative only; use .*LayerNormalization.*--batch_norm=per_replica"
    with pytest.raises(BadConfiguration, match=words) as caught:
        run(replicas=2)
    assert "\n" not in str(caught.value)
    assert run("remedy", replicas=2, batch_norm="per_replica", train_steps=1).step == 1


def test_the_page_explains_its_own_flags_and_ends_with_code_2(tmp_path):
    def started(*flags):
        command = [sys.executable, str(ROOT / "trainers/adversarial_loop.py"), *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)

    help_page = started("--help")
    assert help_page.returncode == 0
    assert "--critic_steps" in help_page.stdout and "--penalty" in help_page.stdout
    assert "  --loss\n" not in help_page.stdout and "  --accumulate\n" not in help_page.stdout
    refused = started("--precision=float16")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
