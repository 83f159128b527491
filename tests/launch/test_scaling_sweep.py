"""`launch/scaling.py --sweep`: what a start costs at each size, measured once, kept, and told where it is left out."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from launch import scaling, sweeping
from trainers.measure.growth import PARAMETERS, Size
from trainers.settings.exit_codes import PREEMPTED, BadConfiguration


def script(*words):
    return subprocess.run(
        [sys.executable, ROOT / "launch/scaling.py", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=ROOT,
    )


def test_a_sweep_measures_starts_and_is_gone_on_with(tmp_path, data_dir):
    words = ["--sweep=replicas", "--replicas=1,2", "--seconds=0.2", f"--out_dir={tmp_path}"]
    flags = ["--", "--model=mlp", "--batch_size=32", f"--data_dir={data_dir}"]
    done = script(*words, *flags)
    assert done.returncode == 0, done.stderr
    assert "1 replicas: " in done.stdout and "s to the first update" in done.stdout
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["axis"], row["count"]) for row in record["rows"]] == [("replicas", 1), ("replicas", 2)]
    for row in record["rows"]:
        assert row["first_update_seconds"] > row["compile_seconds"] > 0, "a process imports before it traces"
        assert row["peak_mib"] > 100 and row["steps_per_second"] > 0 and row["parameters"] == 50_826
    assert set(record["growth"]["replicas"]) == {
        "first_update_seconds",
        "compile_seconds",
        "peak_mib",
        "steps_per_second",
    }
    assert "with n" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")

    again = script(*words, *flags)
    assert again.returncode == 0 and "s to the first update," not in again.stdout, "nothing is measured again"
    assert json.loads((tmp_path / "sweep.json").read_text()) == record
    other = script(*words, *flags, "--seed=1")
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    assert "is of a sweep with other flags" in other.stderr and "name another --out_dir" in other.stderr


class Runs:
    """Stands for the trainer's processes: what a run.json tells, and what was asked for. `ends`: after so many."""

    def __init__(self, ends=None):
        self.asked, self.ends = [], ends

    def __call__(self, kind, count, flags, steps):
        if len(self.asked) == self.ends:
            raise KeyboardInterrupt
        self.asked.append((kind, count, steps))
        model = next((flag[8:] for flag in reversed(flags) if flag.startswith("--model=")), "resnet")
        return {
            "flags": {"model": model},
            "parameters": int(model.partition("x")[2] or 100) ** 2,
            "seconds": {"trace": 1.0 * count},
            "first_update": {"call_seconds": 2.0 * count, "process_seconds": 5 + 3.0 * count},
            "steady": {"steps": 100, "seconds": 1.0 * count},
            "peak_resident_mib": 500 + steps,
        }


SIZES = (Size("replicas", 1), Size("replicas", 2), Size("workers", 1), Size("workers", 8))


def test_a_signal_leaves_what_is_there_and_the_same_command_goes_on(tmp_path, capsys):
    interrupted = Runs(ends=3)
    assert sweeping.sweep(SIZES, ["--model=mlp"], 3.0, tmp_path, interrupted) == PREEMPTED
    assert interrupted.asked == [("replicas", 1, 30), ("replicas", 1, 300), ("replicas", 2, 150)]
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert len(record["rows"]) == 2 and "the same command goes on" in record["left_out"][0]
    assert "5 + 3 · n" in (tmp_path / "sweep.md").read_text() and (tmp_path / "sweep.png").exists()
    assert "the same command goes on" in capsys.readouterr().out

    rest = Runs()
    assert sweeping.sweep(SIZES, ["--model=mlp"], 3.0, tmp_path, rest) == 0
    assert rest.asked == [("workers", 1, 30), ("workers", 1, 300), ("workers", 8, 38)]
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert len(record["rows"]) == 4 and record["left_out"] == []


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here to look for children in")
def test_a_signal_ends_the_run_that_is_measured_too(tmp_path, data_dir):
    words = ["--sweep", f"--out_dir={tmp_path}", "--", "--model=mlp", f"--data_dir={data_dir}"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "launch/scaling.py", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not children_of(process.pid):
        time.sleep(0.05)
    (child,) = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED and complaints == ""
    assert "the same command goes on" in said and not Path(f"/proc/{child}").exists()
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == []


def test_parameters_are_of_mlp_and_those_without_room_are_left_out_and_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweeping.machine, "memory", lambda: 2**30)
    runs = Runs()
    sizes = tuple(Size("parameters", count) for count in PARAMETERS)
    assert sweeping.sweep(sizes, ["--model=resnet", "--batch_size=64"], 1.0, tmp_path, runs) == 0
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["count"] for row in record["rows"]] == [10**5, 10**6, 10**7]
    assert all(row["model"].startswith("mlp,width=") for row in record["rows"])
    assert record["left_out"] == [
        "100,000,000 parameters: a run holds about 4 GiB at most, more than half of the 1 GiB here"
    ]
    assert "left out: 100,000,000 parameters" in capsys.readouterr().out
    assert all(kind == "replicas" and count == 1 for kind, count, _ in runs.asked)


def test_replicas_beyond_the_gpus_are_left_out(monkeypatch):
    monkeypatch.setattr(sweeping, "visible_gpus", lambda: ["0", "1"])
    assert sweeping.left_out(Size("workers", 2)) is None
    assert sweeping.left_out(Size("replicas", 4)) == "4 replicas: here are 2 GPUs"


def test_a_file_that_is_no_sweep_is_not_overwritten(tmp_path):
    for text in ("{", "{}", '{"rows": [1]}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(BadConfiguration, match="is not what a sweep writes; remove it"):
            sweeping.sweep(SIZES, [], 1.0, tmp_path, Runs())
        assert (tmp_path / "sweep.json").read_text() == text


def test_axes_and_sizes_are_chosen_in_one_grammar():
    def sizes(*words):
        return scaling.settings_from(["scaling", *words]).sizes

    everything = sizes("--sweep")
    assert [size.axis for size in everything] == ["replicas"] * 4 + ["workers"] * 4 + ["parameters"] * 4
    assert sizes("--sweep", "--", "--model=mlp") == everything
    assert sizes("--sweep=parameters") == everything[8:]
    assert sizes("--sweep=workers,replicas", "--workers=1,2") == (*everything[:4], *everything[4:6])
    assert scaling.settings_from(["scaling"]).sizes == ()
    assert scaling.settings_from(["scaling"]).options.replicas == [1, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sweep=nodes"], "--sweep 'nodes' is not made of replicas, workers, parameters"),
        (["--sweep="], "--sweep '' is not made of"),
        (["--sweep", "--workers="], "--workers is empty and --sweep asks for it"),
        (["--sweep=replicas", "--replicas=3"], "--batch_size 128 does not divide over 3 replicas"),
        (["--sweep", "--repeats=5"], "--repeats: a sweep makes one run for each size"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused(words, said):
    with pytest.raises(BadConfiguration) as found:
        scaling.settings_from(["scaling", *words])
    assert said in str(found.value)
