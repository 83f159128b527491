"""The whole way of a package outside of the repository, as docs/models.md shows it: the checkout is only read."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, metrics, weights

FILES = {
    "net.py": ("docs/models.md", "class Net(keras.Model)"),
    "losses.py": ("docs/models.md", "class Brier("),
    "data.py": ("docs/data.md", "def load(*, size"),
    "denoising.py": ("docs/own-loops.md", "class Denoising("),
}
SMALL = "--batch_size=32 --log_every=0 --eval_every=0 --deterministic"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def listed(folder):
    """Every path below a folder, with its time and size."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in folder.rglob("*")
        if ".venv" not in path.parts
    }


class Walk:
    """A home with `lockstep`, a checkout that cannot be written, and `project`, the folder that holds `my_pkg`."""

    def __init__(self, home):
        self.home, self.checkout, self.project = home, home / "lockstep", home / "project"
        for room in ("models", "trainers", "launch"):
            shutil.copytree(ROOT / room, self.checkout / room, ignore=shutil.ignore_patterns("__pycache__"))
        (self.checkout / ".venv/bin").mkdir(parents=True)
        (self.checkout / ".venv/bin/activate").write_text(f"PATH={self.checkout}/.venv/bin:$PATH\n")
        (self.checkout / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (self.checkout / ".venv/bin/python").chmod(0o755)
        for path in [self.checkout, *self.checkout.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
        (self.project / "my_pkg").mkdir(parents=True)
        for name, (page, part) in FILES.items():
            (code,) = [block for block in blocks(page, "python") if part in block]
            (self.project / "my_pkg" / name).write_text(code)
        self.before = listed(self.checkout)
        *self.first, self.train, self.tune, self.workers, self.prove = (
            line.partition("#")[0].strip() for line in blocks("docs/models.md", "bash")[-2].splitlines()
        )

    def begin(self, line):
        """A line of the page, after those that come first there."""
        # Root may write what is closed to others; Python's own bytecode is not what is looked for.
        env = os.environ | {"HOME": str(self.home), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(
            ["bash", "-ec", "\n".join([*self.first, f"exec {line}"])],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=self.home,
        )  # fmt: skip

    def __call__(self, line):
        process = self.begin(line)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        assert listed(self.checkout) == self.before
        return output


@pytest.fixture
def walk(tmp_path):
    made = Walk(tmp_path)
    yield made
    for path in [made.checkout, *made.checkout.rglob("*")]:  # so that its folder can be removed
        path.chmod(path.stat().st_mode | 0o200)


def test_a_package_trains_from_a_folder_of_its_own_and_a_killed_run_ends_with_the_same_bits(walk):
    more = f"{SMALL} --train_steps=3000 --checkpoint_every=100"
    output = walk(f"{walk.train} {more}")
    assert "complete: step 3000" in output
    killed = walk.begin(f"{walk.train.replace('first', 'killed')} {more}")
    deadline = time.monotonic() + 300
    while not any((walk.project / "runs/killed/checkpoints").glob("step-*")):
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0]
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    output = walk(f"{walk.train.replace('first', 'killed')} {more}")
    assert "resumed from the checkpoint of step" in output
    one, other = (weights(walk.project / "runs" / name) for name in ("first", "killed"))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert metrics(walk.project / "runs/killed")[-1]["step"] == 3000
    output = walk(f"{walk.tune} {SMALL} --train_steps=50")
    assert "complete: step 50" in output
    tuned = weights(walk.project / "runs/tuned")
    for name, value in weights(walk.project / "runs/first").items():
        if name.startswith("model/"):
            assert np.array_equal(value, tuned[name]) == ("/hidden/" in name), name
    assert sorted(path.name for path in walk.project.iterdir()) == ["my_pkg", "runs"]


@pytest.mark.long
def test_a_package_is_proved_from_a_folder_of_its_own(walk):
    output = walk(f"{walk.prove} --rows=replicas,resume --steps=4 --batch_size=32")
    assert "every row holds" in output


def test_a_loop_of_a_package_runs_from_a_folder_of_its_own(walk):
    (line,) = [
        one
        for one in "\n".join(blocks("docs/own-loops.md", "bash")).splitlines()
        if "run_loop.py my_pkg" in one and "help" not in one
    ]
    output = walk(f"{line} {SMALL} --train_steps=20")
    assert "complete: step 20" in output
    assert (walk.project / "runs/denoising/run.json").exists()


@pytest.mark.long
def test_workers_train_a_package_from_a_folder_of_its_own(walk):
    output = walk(f"{walk.workers} {SMALL} --train_steps=20")
    assert "[0] complete: step 20" in output
    facts = (walk.project / "runs/two/run.json").read_text()
    assert str(walk.project / "my_pkg/losses.py") in facts
