"""The command lines of the scripts are answered before TensorFlow is imported, which takes seconds."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {
    "benchmark": "--rows=mlp",
    "graph_benchmark": "--n=0",
    "tensor_check": "--size=4",
    "sweep": "--nothing=1,2",
    "report": "no_run_dir",
    "predict": "no_run_dir",
}


def run_script(name, flag, tmp_path):
    # Found before the real package; an import of it fails.
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not before the flags are checked')")
    command = [sys.executable, str(ROOT / f"trainers/{name}.py"), flag]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env, check=False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_printed(name, tmp_path):
    done = run_script(name, "--help", tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"python trainers/{name}.py" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_flag_is_one_line_and_code_2(name, tmp_path):
    done = run_script(name, SCRIPTS[name], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["tensorflow.py"]
