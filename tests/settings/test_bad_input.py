"""Bad input is answered with one line that names the value, the rule and the remedy, and the right exit code."""

import contextlib
import dataclasses
import errno
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, metrics, weights

from trainers import custom_loop
from trainers.input import load as data
from trainers.record.run_record import RunRecord
from trainers.settings import flags
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration, Diverged
from trainers.settings.rules import resolve
from trainers.world import files, process


def answer(*arguments):
    """Exit code, standard output and error of the script, for arguments that end it before TensorFlow."""
    command = [sys.executable, str(ROOT / "trainers/custom_loop.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model=resnt", ["'resnt'", "did you mean resnet?", "mlp"]),
        ("--model=MLP", ["'MLP'", "did you mean mlp?"]),
        ("--loss=Focal", ["'Focal'", "did you mean focal?"]),
        ("--optimizer= ADAMW", ["' ADAMW'", "did you mean adamw?"]),
        ("--strategy=multi_worker", ["needs --run_dir, one folder that all workers share"]),
        ("--strategy=tpu", ["'tpu'", "one_device", "mirrored"]),
        ("--learning_rate=-0.1", ["--learning_rate -0.1", "below 0", "0 or more"]),
        ("--learning_rate=nan", ["--learning_rate nan"]),
        ("--learning_rate=inf", ["not finite"]),
        ("--batch_size=0", ["--batch_size 0", "1 or more"]),
        ("--batch_size=9223372036854775808", ["is above 2147483647; pass 2147483647 or less"]),
        ("--train_steps=99999999999", ["--train_steps 99999999999 is above"]),
        ("--replicas=2000000000", ["--replicas 2000000000 is above 1024"]),
        ("--keep_checkpoints=9223372036854775808", ["--keep_checkpoints"]),
        ("--step_timeout=1e300", ["--step_timeout 1e+300 is above 1000000000.0"]),
        ("--profile=²:³", ["START:STOP"]),
        ("--dataset=digits:abc", ["digits takes nothing after its name; write --dataset=digits"]),
        ("--dataset=digits:", ["digits takes nothing after its name"]),
        ("--dataset=mnist:3.0.1", ["'mnist:3.0.1'", "text, tokens, csv, images", "write --dataset=mnist"]),
        ("--dataset=text:", ["names no file or folder; write --dataset=text[:PATH]"]),
        ("--dataset=csv:", ["names no file or folder; write --dataset=csv:PATH"]),
        ("--dataset=images", ["names no file or folder; write --dataset=images:DIR"]),
        ("--dataset=", ["'' is not known", "digits"]),
        ("--dataset= digits", ["' digits' is not known; did you mean digits?"]),
        ("--dataset=../x", ["'../x' is not known", "mnist"]),
        ("--dataset=/etc/passwd", ["'/etc/passwd' is not known"]),
        (
            "--run_dir=hdfs://host/run",
            ["--run_dir 'hdfs://host/run' is not a path, nor an address s3://, gs://, az://"],
        ),
        ("--run_dir=gs://bucket", ["--run_dir 'gs://bucket' names no folder in a bucket; write gs://BUCKET/FOLDER"]),
        ("--data_dir=s3://bucket", ["--data_dir 's3://bucket' names no folder in a bucket"]),
        ("--dataset=csv:hdfs://host/x.csv", ["'hdfs://host/x.csv' is not a path, nor an address"]),
        ("--dataset=images:gs://b", ["--dataset=images: 'gs://b' names no folder in a bucket"]),
        ("--dataset=text:http://b/x", ["'http://b/x' is not a path, nor an address"]),
        ("--run_dir=~nobody-of-that-name/run", ["the home directory is not known"]),
        ("--batch_size=many", ["--batch_size=many"]),
        ("--train_steps=-5", ["--train_steps -5"]),
        ("--lerning_rate=1", ["lerning_rate", "learning_rate"]),
        ("--profile=10:5", ["START:STOP", "100:110"]),
        ("--metrics_port=70000", ["--metrics_port '70000'", "HOST:PORT", "9400"]),
        ("--warmup_steps=1000000", ["--warmup_steps 1000000", "--train_steps"]),
        ("--ema=1.0", ["--ema 1"]),
        ("--flagfile=/nonexistent", ["/nonexistent"]),
        ("stray", ["'stray'", "--name=value"]),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(flag, words):
    code, out, error = answer(flag)
    assert code == 2
    assert out == ""
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words), error


def test_an_evaluation_does_not_wait_for_a_run_that_cannot_be():
    code, _, error = answer("--mode=evaluate", "--run_dir=hdfs://host/run")
    assert code == 2 and "nor an address" in error and len(error.splitlines()) == 1


def test_help_answers_before_tensorflow_is_imported_and_names_every_flag(monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    code, out, imported = answer("--help")
    assert code == 0
    assert "trainers.settings.flags" in imported and "tensorflow" not in imported and "numpy" not in imported
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in out


def test_a_flagfile_repeats_a_run(run, tmp_path):
    first = run("first", seed=5, learning_rate=0.01)
    config = flags.config_from(
        ["x", f"--flagfile={tmp_path / 'first/flags.txt'}", f"--run_dir={tmp_path / 'second'}"], ""
    )
    second = custom_loop.train(config)
    assert second.eval == first.eval
    assert (tmp_path / "first/flags.txt").read_text() == (tmp_path / "second/flags.txt").read_text()


def test_an_unknown_data_set_names_the_near_ones(run):
    with pytest.raises(BadConfiguration, match=r"'minst' is not known; near.*mnist.*digits"):
        run(dataset="minst")


def test_a_variant_that_a_set_does_not_have_is_one_line(run):
    with pytest.raises(BadConfiguration, match="'mnist/nope': the set has no such variant; choose the set by its"):
        run(dataset="mnist/nope")


def test_a_data_set_without_network_names_digits(run, monkeypatch):
    def unreachable(*arguments, **keywords):
        raise OSError("no route")

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    with pytest.raises(BadConfiguration, match=r"'cifar10' is not in --data_dir.*no route.*--dataset=digits"):
        run(dataset="cifar10")


def test_a_data_dir_that_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfiguration, match="--data_dir"):
        run(data_dir=str(tmp_path / "file"))


def test_a_batch_that_does_not_divide_names_the_nearest(run):
    with pytest.raises(BadConfiguration, match="--batch_size 33 does not divide over 2 replicas; use 32 or 34"):
        run(batch_size=33, replicas=2)
    with pytest.raises(BadConfiguration, match=r"over 2 replicas × 4 parts; use 96 or 104"):
        run(batch_size=100, replicas=2, accumulate=4)
    with pytest.raises(BadConfiguration, match="over 4 replicas; use 4"):
        run(batch_size=3, replicas=4)


def test_a_run_dir_that_is_a_file(run, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(BadConfiguration, match="file; name a directory"):
        run()
    with pytest.raises(BadConfiguration, match="file; name a directory"):
        run("run/below")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_directory_that_is_a_link_to_nothing(run, tmp_path):
    """Nothing is there, so to call it a file would send the user the wrong way."""
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    said = f"a link to {tmp_path / 'gone'}, which does not exist; make that, or name another directory"
    for words, given in (
        (f"--run_dir {tmp_path / 'link'} is {said}", {"run_dir": str(tmp_path / "link")}),
        (f"--run_dir .* lies under {tmp_path / 'link'}, {said}", {"run_dir": str(tmp_path / "link/below")}),
        (f"--data_dir {tmp_path / 'link'} is {said}", {"data_dir": str(tmp_path / "link")}),
    ):
        with pytest.raises(BadConfiguration, match=words):
            run(**given)
    assert not (tmp_path / "gone").exists()


def test_a_run_dir_that_is_read_only(run, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs privileges")
    try:
        with pytest.raises(BadConfiguration, match="cannot be written: Read-only file system; name one that can"):
            run()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_run_dir_of_another_model_or_seed(run, made):
    made()
    with pytest.raises(BadConfiguration, match="--model resnet differs from mlp"):
        run(model="resnet")
    with pytest.raises(BadConfiguration, match="--seed 1 differs from 0"):
        run(seed=1)


def test_a_run_dir_in_use(run, tmp_path):
    record = RunRecord(resolve(Config(run_dir=str(tmp_path / "run"))))
    with contextlib.closing(record), pytest.raises(BadConfiguration, match="in use by another run"):
        run()


def test_resume_never_refuses_a_run_dir_with_a_checkpoint(run, made):
    made()
    with pytest.raises(BadConfiguration, match="--resume=never"):
        run(resume="never")


def damage(run_dir, step, how):
    folder = run_dir / "checkpoints" / f"step-{step:010d}"
    target = folder / ("manifest.json" if "manifest" in how else "state.data-00000-of-00001")
    content = bytearray(target.read_bytes())
    if how.startswith("truncated"):
        del content[len(content) // 2 :]
    elif how.startswith("flipped"):
        content[len(content) // 2] ^= 0x10
    target.write_bytes(content)
    if how == "missing":
        target.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "truncated manifest", "flipped manifest"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, made, tmp_path, caplog, how):
    for name in ("expected", "run"):
        made(name, deterministic=True)
    damage(tmp_path / "run", 6, how)
    summary = run(deterministic=True)
    assert summary.step == 6
    assert summary.traces == 1  # it trained again from step 3
    assert "is damaged and skipped" in caplog.text
    expected, found = weights(tmp_path / "expected"), weights(tmp_path / "run")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert [(line["step"], line["split"]) for line in metrics(tmp_path / "run")] == [
        (line["step"], line["split"]) for line in metrics(tmp_path / "expected")
    ]


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_start(run, made, tmp_path):
    made(train_steps=3)
    damage(tmp_path / "run", 3, "flipped")
    with pytest.raises(BadConfiguration, match="every checkpoint in .* is damaged"):
        run(train_steps=3)


def test_nan_in_the_data_is_divergence_at_the_step_that_meets_it(monkeypatch, tmp_path, data_dir):
    load = data.load

    def with_nan(*arguments):
        dataset = load(*arguments)
        images = dataset.train.arrays["image"].astype(np.float32)
        images[700] = np.nan
        arrays = dataset.train.arrays | {"image": images}
        return dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, arrays=arrays))

    monkeypatch.setattr(data, "load", with_nan)
    config = resolve(
        Config(
            model="mlp",
            train_steps=60,
            batch_size=32,
            data_dir=str(data_dir),
            run_dir=str(tmp_path / "run"),
            checkpoint_every=1,
        )
    )
    with pytest.raises(Diverged, match=r"not finite at step (\d+).*step-\d+.*--learning_rate") as caught:
        custom_loop.train(config)
    step = int(str(caught.value).split("at step ")[1].split()[0])
    assert f"step-{step - 1:010d}" in str(caught.value)
    assert all(np.isfinite(value).all() for value in weights(tmp_path / "run").values())
    assert process.run(lambda: custom_loop.train(config)) == 65


def test_a_rate_that_diverges_ends_with_65(trainer, tmp_path):
    code, output = trainer(
        "--model=mlp", "--optimizer=sgd", "--learning_rate=1e30", "--warmup_steps=0", f"--run_dir={tmp_path / 'run'}"
    ).wait()
    assert code == 65
    assert "not finite at step" in output
    assert "Traceback" not in output


def test_a_file_system_that_stumbles_is_a_crash_after_which_the_run_goes_on(run, tmp_path, monkeypatch):
    """Code 2 would tell a cluster never to start it again."""
    whole = run("whole")

    def stumbling(path, sync=files.sync):
        if "checkpoints" not in path.parts[-3:]:
            return sync(path)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync", stumbling)
        with pytest.raises(OSError, match="Input/output error"):
            run("run")
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert run("run").eval == whole.eval


def test_a_full_disk_is_named_and_leaves_whole_checkpoints(trainer, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs privileges")
    flags = ("--model=mlp", "--train_steps=40", "--checkpoint_every=5", f"--run_dir={tmp_path / 'run'}")
    flags += ("--keep_checkpoints=10",)
    try:
        code, output = trainer(*flags).wait()
        assert code == 2, output
        assert "the disk is full; the last good checkpoint is that of step" in output
        assert "Traceback" not in output
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
        code, output = trainer(*flags).wait()
        assert code == 0, output
        assert "resumed from the checkpoint of step" in output
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
