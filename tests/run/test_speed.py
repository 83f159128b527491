"""What the speed of the loop is told by: the benchmark, scaling, operations counted, and memory that does not grow."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, metrics

from trainers import custom_loop
from trainers.benchmark import settings_from
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve


def script(*words, timeout=900):
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
    )


@pytest.mark.long
def test_the_benchmark_measures_every_contender_and_writes_table_figures_and_chart(tmp_path, data_dir):
    flags = ["--rows=mlp:32:1", "--repeats=1", "--seconds=0.1", f"--data_dir={data_dir}", f"--out_dir={tmp_path}"]
    done = script(ROOT / "trainers/benchmark.py", *flags)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "benchmark.json").read_text())["rows"][0]
    assert {"ceiling", "ours", "fit", "fit_best", "call", "eager"} <= row["contenders"].keys()
    assert all(found["median_seconds_per_step"] > 0 for found in row["contenders"].values())
    assert row["best_peer"] in ("fit", "fit_best", "call", "eager")
    assert "ours ÷ best peer" in (tmp_path / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--rows=mlp", "not model:batch:replicas"),
        ("--rows=nothing:32:1", "'nothing' is not known"),
        ("--rows=mlp:33:2", "does not divide"),
        ("--rows=wide_deep:32:1", "two gradients a step"),
        ("--repeats=0", "repeats"),
    ],
)
def test_the_benchmark_refuses_what_it_cannot_measure(flag, said):
    with pytest.raises(BadConfiguration, match=said):
        settings_from(["benchmark", flag])


@pytest.mark.long
def test_scaling_measures_replicas_and_workers(tmp_path, data_dir):
    words = [ROOT / "launch/scaling.py", "--replicas=1,2", "--workers=", "--repeats=1", "--seconds=0.5"]
    done = script(*words, f"--out_dir={tmp_path}", "--", "--model=mlp", f"--data_dir={data_dir}")
    assert done.returncode == 0, done.stderr
    assert "strong, replicas" in done.stdout and "weak, replicas" in done.stdout
    assert "CPU cores; virtual CPU devices and workers share them" in done.stdout
    points = json.loads((tmp_path / "scaling.json").read_text())["points"]
    assert [(point["count"], point["batch_size"]) for point in points] == [(1, 128), (2, 128), (2, 256)]
    assert all(point["steps_per_second"][0] > 0 for point in points)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_scaling_says_what_is_wrong_with_its_flags(tmp_path):
    done = script(ROOT / "launch/scaling.py", "--replicas=3", f"--out_dir={tmp_path}", "--", "--model=mlp")
    assert done.returncode == 2
    assert "--batch_size 128 does not divide over 3 replicas" in done.stderr
    done = script(ROOT / "launch/scaling.py", f"--out_dir={tmp_path}", "--", "--model=nothing")
    assert done.returncode == 2
    assert "'nothing' is not known" in done.stderr


def test_operations_are_those_of_the_layers(data_dir):
    from trainers.input import load
    from trainers.world import devices

    config = resolve(Config(model="mlp", batch_size=32, replicas=2, data_dir=str(data_dir)))
    dataset = load.load("digits", str(data_dir))
    loop = custom_loop.Supervised(config, devices.set_up(config), dataset)
    found = loop.flops_of_step(loop.forward_graphs())
    # Two for each weight of a matrix and example, three passes; offsets and activations are a percent on top.
    products = 3 * 2 * 32 * (64 * 256 + 256 * 128 + 128 * 10)
    assert products < found < 1.02 * products
    config = resolve(Config(model="resnet", batch_size=32, replicas=2, data_dir=str(data_dir)))
    loop = custom_loop.Supervised(config, devices.set_up(config), dataset)
    found = loop.flops_of_step(loop.forward_graphs())
    convolutions = 8 * 8 * (9 * 32 * (1 + 32 + 32)) + 4 * 4 * (32 * 64 * (9 + 1) + 9 * 64 * 64)
    convolutions += 2 * 2 * (64 * 128 * (9 + 1) + 9 * 128 * 128) + 128 * 10
    # Padding: TensorFlow counts the whole kernel at the border too.
    assert convolutions * 3 * 2 * 32 < found < 1.05 * convolutions * 3 * 2 * 32


def test_the_lines_tell_where_the_time_went_and_how_much_was_computed(run, tmp_path):
    run(train_steps=8, replicas=2)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    lines = [line for line in metrics(tmp_path / "run") if line["split"] == "train"]
    for line in lines:
        shares = [line[f"share_{part}"] for part in ("input", "peers", "compute", "evaluate", "checkpoint", "python")]
        assert all(-1e-6 <= share <= 1 for share in shares) and sum(shares) == pytest.approx(1, abs=0.01)
        assert line["model_flops_per_second"] == pytest.approx(line["steps_per_second"] * facts["flops_per_step"])
    assert facts["peak_resident_mib"] > 100
    assert facts["peak_device_mib"] == {}
    assert {"import", "build", "trace"} <= facts["seconds"].keys()
    assert 0 < facts["first_update"]["call_seconds"] <= sum(facts["seconds"].values())


def test_steps_that_overflow_in_float16_are_skipped_and_counted(run, tmp_path):
    run(precision="float16", train_steps=6, model="resnet")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 0 <= facts["skipped_steps"] <= 6


def resident_mib(pid):
    """What a process holds in memory; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20
    except (FileNotFoundError, ProcessLookupError):
        return 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here to read the memory from")
def test_ten_thousand_steps_hold_their_memory_flat(trainer, tmp_path):
    flags = ("--model=mlp", "--batch_size=32", "--train_steps=10000", "--eval_every=500", "--checkpoint_every=500")
    one = trainer(*flags, f"--run_dir={tmp_path}")
    # Someone must read what it prints, or it waits.
    reader = threading.Thread(target=one.wait)
    reader.start()
    held = {}
    while one.process.poll() is None:
        steps = [int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*") if path.suffix == ""]
        if steps:
            held[max(steps)] = resident_mib(one.process.pid)
        time.sleep(0.02)
    reader.join()
    assert one.process.returncode == 0
    half = [mib for step, mib in held.items() if 2000 <= step <= 6000 and mib]
    last = [mib for step, mib in held.items() if 6000 < step < 10000 and mib]
    print(f"resident: {max(half):.0f} MiB up to step 6,000, {max(last):.0f} MiB up to the end")
    assert max(last) <= 1.02 * max(half) + 5
