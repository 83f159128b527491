"""The README's commands for several machines, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SECTION = (ROOT / "README.md").read_text().split("## Several machines")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)


def shell(commands, data_dir, tmp_path):
    """Bash that runs commands of the README from a folder of its own, with this Python first on the path."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    python = tmp_path / "bin" / "python"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    for folder in ("launch", "trainers", "models"):
        if not (tmp_path / folder).exists():
            (tmp_path / folder).symlink_to(ROOT / folder)
    more = f" --model=mlp --train_steps=40 --data_dir={data_dir}"
    commands = commands.replace("--run_dir=runs/two", f"--run_dir=runs/two{more}")
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", "-ec", commands], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=tmp_path
    )


def test_the_rehearsal_on_one_machine(tmp_path, data_dir):
    process = shell(BLOCKS[0], data_dir, tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "[0] complete: step 40" in output
    assert "global batch 128 = 2 workers × 64 examples" in output
    assert (tmp_path / "runs/two/run.json").exists()


def test_two_terminals(tmp_path, data_dir):
    first = shell(BLOCKS[1], data_dir, tmp_path)
    second = shell(BLOCKS[1].replace('"index": 0', '"index": 1'), data_dir, tmp_path)
    outputs = [process.communicate(timeout=600)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert "complete: step 40" in outputs[0]
    assert "worker 1 of 2 (TF_CONFIG): 127.0.0.1:2222, 127.0.0.1:2223" in outputs[1]


def test_files_that_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:launch|trainers|docs|tests)/[\w./]+\.(?:py|sh|sbatch|png)", text))
    assert named >= {"launch/local.sh", "launch/workers.py", "launch/slurm.sbatch", "docs/graph.png"}
    assert [name for name in named if not Path(ROOT / name).exists()] == []
