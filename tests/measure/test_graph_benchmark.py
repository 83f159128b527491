"""What the benchmark of @tf.function counts, compares and writes; its times are not checked."""

import dataclasses
import json
import os
import subprocess
import sys

import keras
import PIL.Image
import pytest
import tensorflow as tf
from conftest import ROOT, weights
from tensorboard.backend.event_processing import plugin_event_multiplexer as event_multiplexer

from models import mlp, tasks
from trainers import graph_benchmark
from trainers.custom_loop import Supervised
from trainers.input import load
from trainers.input.batches import batches
from trainers.measure import charts, steps, sums
from trainers.measure.traces import Compiled, Timing, TraceLog
from trainers.record import state
from trainers.settings.exit_codes import BadConfiguration, RunEnded
from trainers.world import devices, process


@pytest.fixture
def settings(data_dir, tmp_path):
    """`settings(**flags)`: small measurements of the mlp."""

    def make(**given) -> graph_benchmark.Settings:
        values = {"n": 20, "repeats": 2, "steps": 4, "steps_per_call": 3, "batch_size": 16}
        values |= {"data_dir": data_dir, "out_dir": tmp_path / "out"} | given
        return graph_benchmark.settings_from(["graph_benchmark.py", *(f"--{k}={v}" for k, v in values.items())])

    return make


def measured(settings: graph_benchmark.Settings) -> steps.TrainStep:
    world, sizes = devices.set_up(settings.config), (settings.steps, settings.steps_per_call, settings.repeats)
    return steps.measure_train_step(settings.config, world, *sizes)


def script(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    """The script in a process of its own."""
    command, env = [sys.executable, str(ROOT / "trainers/graph_benchmark.py"), *flags], os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=env, check=False)


@pytest.mark.parametrize("n", [1, 2, 33, 3000])
def test_all_ways_to_sum_give_the_formula(n):
    formula = n * (n + 1) * (2 * n + 1) // 6
    number = tf.constant(n, tf.int64)
    assert int(sums.sum_up_to(number)) == formula
    assert int(Compiled(sums.sum_up_to)(number)) == formula
    assert int(sums.sum_at_once(number)) == formula
    if n <= sums.LARGEST_UNROLLED:
        assert int(Compiled(sums.sum_unrolled)(n)) == formula


def test_the_largest_n_stays_within_int64():
    n = graph_benchmark.LARGEST_N
    assert int(sums.sum_at_once(tf.constant(n, tf.int64))) == n * (n + 1) * (2 * n + 1) // 6


def test_a_wrong_sum_is_an_error(settings, monkeypatch):
    monkeypatch.setattr(sums, "sum_at_once", lambda n: n)
    with pytest.raises(RunEnded, match=r"no loop, eager returns 20 at n = 20.* is 2870") as raised:
        sums.measure_sums(settings().n, settings().repeats)
    assert raised.value.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        ((10, 11), ["first call", "n: Python value changed 10 → 11"]),
        ((10, 10), ["first call"]),
        ((tf.constant(10), tf.constant(11)), ["first call"]),
        ((tf.constant(10, tf.int64), tf.constant(10)), ["first call", "n: dtype changed int64 → int32"]),
        ((tf.zeros([2]), tf.zeros([3])), ["first call", "n: shape changed (2,) → (3,)"]),
        ((10, tf.constant(10)), ["first call", "n: a Python int became a tensor"]),
        ((10, 11, 10, 12), ["first call", "n: Python value changed 10 → 11", "n: Python value changed 11 → 12"]),
    ],
)
def test_every_trace_is_counted_and_explained(arguments, reasons):
    compiled = Compiled(lambda n: tf.cast(n, tf.int64) * 2)
    for argument in arguments:
        compiled(argument)
    assert compiled.traces == len(reasons)
    assert compiled.log.reasons == reasons


def test_a_trace_within_a_trace_is_told_apart():
    log = TraceLog(["n"])
    log.note(2, [1])
    log.note(2, [1])
    assert log.reasons == ["first call", "again within the same call"]


def test_only_a_loop_over_tf_range_stays_a_loop(settings):
    results = sums.measure_sums(settings().n, settings().repeats)
    nodes = {(loop, n): timing.nodes for loop, n, timing in results.unrolled}
    assert nodes["tf.range", 10] == nodes["tf.range", 20]
    assert nodes["Python's range", 20] - nodes["Python's range", 10] == 10 * 3  # a constant, a product, a sum
    assert {calls: len(log.reasons) for calls, log in results.traces} == {
        "sum_up_to(10), sum_up_to(11)": 2,
        "sum_up_to of tensors 10, 11": 1,
        "sum_up_to of tensors int64, int32": 2,
        "sum_up_to(10), of a tensor 10": 2,
    }
    assert [len(timing.reasons) for timing in results.timings] == [0, 1, 0]
    assert results.value == 2870


@pytest.mark.parametrize(
    ("first", "later", "steps_in_a_call", "calls"),
    [(11.0, 1.0, 1, 10), (11.5, 1.0, 1, 11), (0.5, 1.0, 1, 1), (30.0, 1.0, 10, 2), (11.0, 2.0, 1, None)],
)
def test_tracing_pays_off_after_as_many_calls_as_the_sums_say(first, later, steps_in_a_call, calls):
    eager = Timing("eager", 2.0, 2.0)
    timing = Timing("graph", first, later, steps_in_a_call, ["first call"])
    assert timing.break_even(eager) == calls
    if calls is not None:
        step, eager_step = steps_in_a_call * later, steps_in_a_call * eager.later
        assert first + (calls - 1) * step <= calls * eager_step
        assert calls == 1 or first + (calls - 2) * step > (calls - 1) * eager_step
    assert eager.break_even(eager) is None


def test_all_variants_make_the_same_of_the_weights(settings):
    step = measured(settings())
    assert [timing.variant for timing in step.timings] == [
        "eager",
        "graph, 1 step a call",
        "graph, 3 steps a call",
        "XLA, 3 steps a call",
    ]
    assert [timing.reasons for timing in step.timings] == [[], *[["first call"]] * 3]
    assert all(not timing.failure and timing.difference <= steps.TOLERANCE for timing in step.timings)
    assert not tf.config.functions_run_eagerly()
    scopes = {name for node in step.graph.node for name in node.name.split("/")}
    assert {"hidden_1", "hidden_2", "logits"} <= scopes


def test_the_step_is_the_trainers(settings, run, tmp_path):
    """The trainer, given the same flags, ends with the weights that a variant ends with."""
    flags = {"schedule": "constant", "learning_rate": 1e-3, "warmup_steps": 0, "seed": 3, "batch_size": 16}
    chosen = settings()
    config = dataclasses.replace(chosen.config, **flags)
    world = devices.set_up(config)
    loop = Supervised(config, world, load.load(config.dataset, config.data_dir, config.input))
    source = batches(world.strategy, loop.dataset.train, config.batch_size, config.seed)
    initial = state.values_of(loop.variables)
    eager = steps.variants_of(chosen.steps_per_call)[0]
    _, measured_weights = steps.measure_variant(loop, source, initial, eager, chosen.steps, chosen.repeats)
    run("trainer", strategy="one_device", train_steps=chosen.steps, checkpoint_every=0, **flags)
    trained = weights(tmp_path / "trainer")
    assert steps.largest_relative_difference(trained, measured_weights) <= 1e-5
    assert steps.largest_relative_difference(trained, initial) > 1e-3


def test_variants_that_disagree_end_with_code_1(settings):
    step = steps.TrainStep([Timing("eager")], None, 1)
    graph_benchmark.check_agreement(settings(), step)
    for difference in (2e-4, float("nan")):
        step.timings[1:] = [Timing("graph", difference=difference)]
        with pytest.raises(RunEnded, match="graph: weights differ from eager by") as raised:
            graph_benchmark.check_agreement(settings(), step)
        assert raised.value.exit_code == 1


def test_a_model_that_xla_cannot_compile_is_a_row_with_the_reason(settings, monkeypatch):
    class Hostly(mlp.MLP):
        def call(self, x, training=False):
            same = tf.numpy_function(lambda a: a, [x], tf.float32)
            return super().call(tf.ensure_shape(same, x.shape), training=training)

    def build(spec: tasks.DataSpec) -> tuple[keras.Model, tasks.Task]:
        return Hostly(spec.num_classes, name="mlp"), tasks.classification(spec)

    monkeypatch.setattr(mlp, "build", build)
    chosen = settings(repeats=1)
    step = measured(chosen)
    assert [bool(timing.failure) for timing in step.timings] == [False, False, False, True]
    assert "PyFunc" in step.timings[-1].failure
    text = graph_benchmark.describe_train_step(chosen, step)
    assert "| XLA, 3 steps a call   | cannot run" in text
    assert f"XLA, 3 steps a call cannot run: {step.timings[-1].failure}" in text
    graph_benchmark.check_agreement(chosen, step)


def test_the_script_writes_tables_chart_and_graphs(data_dir, tmp_path):
    out = tmp_path / "out"
    flags = ("--n=300", "--steps=4", "--repeats=1", f"--data_dir={data_dir}", f"--out_dir={out}", "--show_autograph")
    done = script(*flags)
    assert done.returncode == 0, done.stderr
    assert "def tf__sum_up_to(n" in done.stdout
    assert "ag__.for_stmt" in done.stdout
    assert "CPU cores" in done.stdout
    assert "Python value changed 10 → 11" in done.stdout
    assert "retracing" not in done.stderr
    assert sorted(os.listdir(out)) == ["graph_benchmark.json", "graph_benchmark.png", "tensorboard"]

    results = json.loads((out / "graph_benchmark.json").read_text())
    assert results["sum_up_to"]["value"] == 300 * 301 * 601 // 6
    assert results["machine"]["cores"] >= 1
    # The default number of steps in a call gives way to a short measurement.
    assert [v["steps_in_a_call"] for v in results["train_step"]["variants"]] == [1, 1, 4, 4]
    assert [v["traces"] for v in results["train_step"]["variants"]] == [0, 1, 1, 1]
    assert results["train_step"]["largest_relative_difference"] <= results["train_step"]["tolerance"]
    assert all(v["first_call_seconds"] > 0 for v in results["train_step"]["variants"])

    with PIL.Image.open(out / "graph_benchmark.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300

    events = event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(out / "tensorboard"))
    events.Reload()
    assert list(events.PluginRunToTagToContent("text")["tables"]) == ["graph_benchmark"]
    text = events.Tensors("tables", "graph_benchmark")[0].tensor_proto.string_val[0].decode()
    assert "| @tf.function" in text
    assert "| graph, 1 step a call" in text
    names = {node.op for node in events.Graph("sum_up_to").node}
    assert names & {"While", "StatelessWhile"}
    assert any("hidden_1" in node.name and node.op == "MatMul" for node in events.Graph("train_step").node)


def test_a_second_run_replaces_the_first(settings, capsys):
    chosen = settings(repeats=1, steps=2, steps_per_call=1)
    for _ in range(2):
        graph_benchmark.benchmark(chosen)
    files = [path for path in (chosen.out_dir / "tensorboard").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert sorted(os.listdir(chosen.out_dir)) == ["graph_benchmark.json", "graph_benchmark.png", "tensorboard"]
    assert "XLA, 1 step a call" in capsys.readouterr().out


def test_help_and_bad_flags_are_answered_without_tensorflow(tmp_path):
    # Found before the real package; an import of it fails.
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not before the flags are checked')")
    hidden = {"PYTHONPATH": str(tmp_path)}
    done = script("--help", **hidden)
    assert done.returncode == 0
    assert "--steps_per_call" in done.stdout
    assert "wide_deep" in done.stdout
    for flag, line in (
        ("--model=mpl", "--model 'mpl' is not known; did you mean mlp?; choose one of: mlp, "),
        ("--n=0", "--n=0: 0 is not an integer in the range [1, 3000000]"),
        ("--repeats=0", "--repeats=0: 0 is not a positive integer"),
        ("--steps_per_call=60", "--steps_per_call 60 is above --steps 50; pass at most that"),
        ("--nonsense=1", "Unknown command line flag 'nonsense'"),
        ("nonsense", "'nonsense' is not a flag; flags are written --name=value"),
    ):
        done = script(flag, **hidden)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert line in done.stderr


def test_an_out_dir_that_is_a_file_is_refused(settings, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(BadConfiguration, match=r"--out_dir .*out cannot be made: File exists; name a directory"):
        graph_benchmark.benchmark(settings())


def test_an_out_dir_that_cannot_be_written_is_one_line(settings, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(charts, "write_timings", full)
    assert process.run(lambda: graph_benchmark.main(settings(repeats=1, steps=1, steps_per_call=1))) == 2
    assert (
        "cannot be written: [Errno 28] No space left on device; free space or name another" in capsys.readouterr().err
    )
