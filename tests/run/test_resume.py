"""Promise 2: a run that is killed at any moment and started again ends with the bits of the uninterrupted run."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import metrics, short, weights, without_times

from trainers.record import reading
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve

RUNS = {
    "mlp": ("--model=mlp", "--train_steps=1500", "--batch_size=32", "--checkpoint_every=70", "--eval_every=110"),
    "resnet": ("--model=resnet", "--train_steps=240", "--batch_size=32", "--checkpoint_every=30", "--eval_every=40"),
    "vit": (
        "--model=vit",
        "--jit=on",
        "--train_steps=160",
        "--batch_size=32",
        "--checkpoint_every=20",
        "--eval_every=30",
    ),
}
RUNS["mlp, read by index"] = (
    "--model=mlp",
    "--input=stream",
    "--augment=crop,randaugment=5,erase,mixup,cutmix",
    "--train_steps=600",
    "--batch_size=32",
    "--checkpoint_every=35",
    "--eval_every=110",
)
# Other loops, by the names of their scripts.
LOOPS = {
    "adversarial_loop": (
        "--train_steps=400",
        "--batch_size=40",
        "--critic_steps=2",
        "--checkpoint_every=40",
        "--eval_every=90",
    ),
    "contrastive_loop": (
        "--model=mlp",
        "--train_steps=700",
        "--batch_size=64",
        "--checkpoint_every=50",
        "--eval_every=150",
    ),
    "distillation_loop": (
        "--model=mlp",
        "--teacher=TEACHER",
        "--train_steps=1000",
        "--batch_size=32",
        "--checkpoint_every=70",
        "--eval_every=150",
    ),
}
EXACT = ("--deterministic", "--seed=3", "--replicas=2", "--ema=0.99", "--log_every=20")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Run directories of finished runs, by model; each is made once."""
    return {}, tmp_path_factory.mktemp("uninterrupted")


def reference(uninterrupted, trainer, model):
    made, folder = uninterrupted
    if model not in made:
        code, output = trainer(*RUNS[model], *EXACT, f"--run_dir={folder / model}").wait()
        assert code == 0, output
        made[model] = folder / model
    return made[model]


def newest_step(run_dir):
    steps = [int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*") if path.suffix == ""]
    return max(steps, default=0)


def wait_until(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        if process.poll() is not None:
            return
        time.sleep(0.005)


def catches(pid, number):
    """Whether a process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def assert_same_bits(run_dir, expected_dir):
    expected, found = weights(expected_dir), weights(run_dir)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not np.array_equal(expected[name], found[name])]
    assert different == []
    assert without_times(metrics(run_dir)) == without_times(metrics(expected_dir))


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)


@pytest.mark.parametrize("model", short(RUNS, ("mlp",)))
def test_killed_at_random_moments_the_run_ends_with_the_same_bits(trainer, tmp_path, uninterrupted, model):
    expected = reference(uninterrupted, trainer, model)
    # A start of the others takes long.
    signals = SIGNALS if model == "mlp" else SIGNALS[:2]
    kill_at_random(lambda *flags: trainer(*RUNS[model], *EXACT, *flags), tmp_path / "run", model, signals)
    assert_same_bits(tmp_path / "run", expected)


@pytest.mark.long
@pytest.mark.parametrize("loop", LOOPS)
def test_another_loop_that_is_killed_ends_with_the_same_bits(trainer, made, tmp_path, loop):
    if loop == "distillation_loop":
        made("teacher", train_steps=3)
    flags = [flag.replace("TEACHER", str(tmp_path / "teacher")) for flag in LOOPS[loop]]

    def begin(*more):
        return trainer(*flags, *EXACT, *more, loop=loop)

    code, output = begin(f"--run_dir={tmp_path / 'expected'}").wait()
    assert code == 0, output
    kill_at_random(begin, tmp_path / "run", loop, SIGNALS[:2])
    assert_same_bits(tmp_path / "run", tmp_path / "expected")


def kill_at_random(begin, run_dir, seed, signals):
    """Starts a run again and again, with a signal to each at a random moment, and at last to its end."""
    chance, kills = random.Random(seed), 0
    for sent in signals:
        one = begin(f"--run_dir={run_dir}")
        before = newest_step(run_dir)
        wait_until(lambda before=before: newest_step(run_dir) > before, one.process)
        first, began = newest_step(run_dir), time.monotonic()
        wait_until(lambda first=first: newest_step(run_dir) > first, one.process)
        time.sleep(chance.uniform(0, time.monotonic() - began))
        one.process.send_signal(sent)
        code, output = one.wait()
        if code == 0:
            break  # it was done before the signal came
        kills += 1
        assert code == (-signal.SIGKILL if sent == signal.SIGKILL else 143), output
        if code == 143:
            assert newest_step(run_dir) > before
            assert "the same command continues" in output
    else:
        code, output = begin(f"--run_dir={run_dir}").wait()
        assert code == 0, output
        assert "resumed from the checkpoint of step" in output
    assert kills >= 2


def test_killed_during_a_save_the_run_ends_with_the_same_bits(trainer, tmp_path):
    # Large enough that a save takes a while.
    flags = ("--model=mlp,width=1024x1024", "--train_steps=60", "--batch_size=32", "--eval_every=0")
    flags += ("--checkpoint_every=1", *EXACT)
    code, output = trainer(*flags, f"--run_dir={tmp_path / 'expected'}").wait()
    assert code == 0, output
    run_dir, killed = tmp_path / "run", False
    for _ in range(20):
        one = trainer(*flags, f"--run_dir={run_dir}")
        before = newest_step(run_dir)

        def saving(before=before):
            return newest_step(run_dir) > before and any((run_dir / "checkpoints").glob(".writing-step-*"))

        wait_until(saving, one.process)
        one.process.kill()
        one.wait()
        if killed := any((run_dir / "checkpoints").glob(".writing-*")):
            break
    assert killed, "no kill fell into a save"
    code, output = trainer(*flags, f"--run_dir={run_dir}").wait()
    assert code == 0, output
    assert not any((run_dir / "checkpoints").glob(".writing-*"))
    assert_same_bits(run_dir, tmp_path / "expected")


def test_a_checkpoint_of_one_size_resumes_on_any_other(run, tmp_path):
    flags = {"optimizer": "sgd", "schedule": "constant", "warmup_steps": 0, "learning_rate": 0.05}
    run("whole", replicas=1, train_steps=12, **flags)
    for step, replicas in ((4, 4), (8, 1), (12, 2)):
        summary = run("resized", replicas=replicas, train_steps=step, **flags)
    assert summary.step == 12
    whole, resized = weights(tmp_path / "whole"), weights(tmp_path / "resized")
    for name, value in whole.items():
        np.testing.assert_allclose(resized[name], value, rtol=1e-5, atol=1e-7)


def test_a_complete_run_is_complete_already(run, made, tmp_path):
    first = made()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    second = run()
    assert (second.step, second.eval, second.traces) == (first.step, first.eval, 0)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


def test_more_steps_go_on_with_the_warm_up_that_the_run_began_with(trainer, tmp_path):
    """A recipe's warm-up is shorter in a short run; nobody has set it, so nobody can be told to set another."""
    flags = ("--model=mlp", "--batch_size=32", "--schedule=constant", *EXACT)
    for steps in (20, 40):
        code, output = trainer(*flags, f"--train_steps={steps}", f"--run_dir={tmp_path / 'longer'}").wait()
        assert code == 0, output
    assert "resumed from the checkpoint of step 20" in output
    assert "--warmup_steps=2\n" in (tmp_path / "longer/flags.txt").read_text()
    code, output = trainer(*flags, "--train_steps=40", "--warmup_steps=2", f"--run_dir={tmp_path / 'whole'}").wait()
    assert code == 0, output
    one, other = weights(tmp_path / "longer"), weights(tmp_path / "whole")
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []
    code, output = trainer(*flags, "--train_steps=40", "--warmup_steps=4", f"--run_dir={tmp_path / 'longer'}").wait()
    assert code == 2 and "--warmup_steps 4 differs from 2, with which --run_dir" in output


def test_a_run_goes_on_with_its_table_however_the_path_is_written(run, tmp_path, monkeypatch):
    """In run.json, in the checkpoint, and for workers that find the run complete."""
    (tmp_path / "rows.csv").write_text("size,price\n" + "".join(f"{i},{i * 1.5}\n" for i in range(30)))
    flags = {"model": "residual_regressor", "label": "price", "batch_size": 8}
    monkeypatch.chdir(tmp_path)
    run(dataset="csv:rows.csv", train_steps=3, **flags)
    monkeypatch.chdir("/")
    assert run(dataset=f"csv:{tmp_path}/./rows.csv", **flags).step == 6
    begun = resolve(Config(dataset=f"csv:{tmp_path}/rows.csv", run_dir=str(tmp_path / "run"), train_steps=6, **flags))
    assert reading.completed(begun)["step"] == 6
    (tmp_path / "other.csv").write_text((tmp_path / "rows.csv").read_text())
    with pytest.raises(BadConfiguration, match=r"--dataset csv:.*other\.csv differs from csv:.*rows\.csv"):
        run(dataset=f"csv:{tmp_path}/other.csv", **flags)


def test_a_description_of_other_workers_does_not_matter_to_one_process(trainer, tmp_path):
    for number, text in enumerate(("{garbage", '{"cluster": {"worker": ["a:1", "b:2"]}}', "[]")):
        for strategy in ("mirrored", "one_device")[: 1 + (number == 0)]:
            flags = ("--model=mlp", "--train_steps=2", f"--strategy={strategy}", f"--run_dir={tmp_path / str(number)}")
            code, output = trainer(*flags, "--resume=auto", env={"TF_CONFIG": text}).wait()
            assert code == 0, output


@pytest.mark.parametrize("log_every", [20, 0])
def test_a_run_dir_that_is_removed_is_one_line_and_the_state_is_kept(trainer, tmp_path, log_every):
    """Found when a line is written or, where there are no lines, when a checkpoint is."""
    run_dir = tmp_path / "run"
    flags = ("--model=mlp", "--batch_size=32", "--checkpoint_every=50", "--eval_every=0", f"--log_every={log_every}")
    one = trainer(*flags, "--train_steps=1000000", f"--run_dir={run_dir}")
    wait_until(lambda: newest_step(run_dir) >= 100, one.process)
    run_dir.rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    code, output = one.wait(120)
    assert code == 2 and "Traceback" not in output, output
    lines = [line for line in output.splitlines() if "was removed while the run wrote to it" in line]
    assert len(lines) == 1, output
    step = int(re.search(r"the checkpoint of step (\d+) was written there again", lines[0])[1])
    assert newest_step(run_dir) == step
    assert reading.read_run(run_dir)["exit_code"] == 2
    code, output = trainer(*flags, f"--train_steps={step + 50}", f"--run_dir={run_dir}").wait()
    assert code == 0 and f"resumed from the checkpoint of step {step}" in output, output


def test_a_run_dir_that_is_removed_for_good_is_one_line(trainer, tmp_path):
    run_dir = tmp_path / "folder" / "run"
    one = trainer(
        "--model=mlp",
        "--batch_size=32",
        "--checkpoint_every=50",
        f"--run_dir={run_dir}",
        "--log_every=20",
        "--train_steps=1000000",
    )
    wait_until(lambda: newest_step(run_dir) >= 100, one.process)
    (tmp_path / "folder").rename(tmp_path / "gone")
    (tmp_path / "folder").write_text("")
    code, output = one.wait(120)
    assert code == 2 and "Traceback" not in output, output
    assert "could not be saved there again (--run_dir" in output and "and is lost" in output


def test_the_second_signal_ends_at_once(trainer, tmp_path):
    one = trainer("--model=mlp", "--train_steps=1000000", f"--run_dir={tmp_path}", "--checkpoint_every=50")
    wait_until(lambda: newest_step(tmp_path) > 0, one.process)
    one.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)  # two that wait for one process are one
    one.process.send_signal(signal.SIGTERM)
    assert one.wait(120)[0] == 143


def test_a_signal_during_start_up_ends_with_the_same_code(trainer, tmp_path):
    one = trainer("--model=mlp", f"--run_dir={tmp_path}")
    wait_until(lambda: catches(one.process.pid, signal.SIGTERM), one.process)
    time.sleep(0.5)
    one.process.send_signal(signal.SIGTERM)
    assert one.wait(60)[0] == 143
