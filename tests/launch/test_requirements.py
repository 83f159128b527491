"""Every script says in one line what is not installed, before it imports more than the standard library."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for room in ("launch", "trainers")
    for path in (ROOT / room).rglob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text()
)
# An ordinary command line; --model=mlp where none is named.
WORDS = {
    "launch/environment.py": ("nothing",),
    "launch/k8s.py": ("status", "--name=first"),
    "launch/proof/probe.py": ("specification.json",),
    "launch/scaling.py": ("--", "--model=mlp"),
    "launch/follow_store.py": ("s3://bucket/runs",),
    "launch/workers.py": ("--", "--model=mlp"),
    "trainers/report.py": ("runs/first",),
    "trainers/generate.py": ("runs/first", "--prompt=x"),
    "trainers/predict.py": ("runs/first", "--input=eval", "--output=out.csv"),
}
# Standard library only, and what they say: their page, or how they are called.
STANDARD = {
    "launch/workers.py": (0, "--restarts"),
    "launch/environment.py": (2, "call it with one word: runtime"),
    "launch/doctor.py": (0, "--run_dir"),
    "launch/gpu_check.py": (0, "where all goes"),
    "launch/status.py": (0, "--watch"),
    "trainers/record/standing.py": (0, "--watch"),
    "trainers/input/receiving.py": (0, "--take"),
}
# Those of them that do their work without any package; tests of their own have them do it.
COMPLETE = ("launch/doctor.py", "launch/gpu_check.py", "launch/status.py", *list(STANDARD)[-2:])
# Those that need fewer packages than a trainer.
NEEDS = {"launch/k8s.py": ("absl", "yaml", "tqdm")}
REMEDIES = ("launch/local.sh", "launch/environment.py tokenize", "launch/environment.py tensorboard")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """`bare(script, …)` runs a script with an interpreter that has the standard library alone."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONDONTWRITEBYTECODE"] = "1"

    def run(script, *words):
        command = [folder / "venv/bin/python", ROOT / script, *words]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=folder, timeout=60)

    return run


def is_refusal(done):
    """Whether it ended with code 2 and a line that names a package and the remedy."""
    lines = (done.stdout + done.stderr).splitlines()
    return (
        done.returncode == 2
        and len(lines) == 1
        and "is not installed" in lines[0]
        and any(remedy in lines[0] for remedy in REMEDIES)
    )


def test_every_script_is_here():
    assert {"launch/prove.py", "launch/k8s.py", "launch/proof/probe.py", "trainers/custom_loop.py"} <= set(SCRIPTS)
    assert len(SCRIPTS) >= 12


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bare_interpreter_is_told_what_is_missing(bare, script):
    done = bare(script, "--help")
    if script in STANDARD:
        code, text = STANDARD[script]
        assert done.returncode == code and text in done.stdout + done.stderr, done.stderr
    else:
        assert is_refusal(done), done.stderr
    if script in COMPLETE:
        return
    done = bare(script, *WORDS.get(script, ("--model=mlp",)))
    if script == "launch/environment.py":
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    else:
        assert is_refusal(done), done.stderr


def test_a_plan_of_workers_needs_no_more_than_the_flags(bare):
    done = bare("launch/workers.py", "--dry_run", "--", "--model=mlp")
    assert is_refusal(done) and "absl is not installed" in done.stderr


@pytest.mark.parametrize("script", NEEDS)
def test_a_script_names_exactly_the_packages_that_it_needs(script, tmp_path):
    """With an interpreter that finds those packages alone, its page is printed."""
    code = f"""
import importlib.abc, runpy, sys
allowed = set({NEEDS[script]!r}) | set(sys.stdlib_module_names) | {{"trainers", "models", "launch", "_yaml"}}
class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Only())
sys.argv = ["{script}", "--help"]
runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    text = (ROOT / script).read_text()
    assert f"check_requirements({', '.join(map(repr, NEEDS[script]))})".replace("'", '"') in text
