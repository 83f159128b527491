"""The commands of launch/, and the rules that the code keeps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from launch import workers
from trainers.settings.flags import config_from

BIN = Path(sys.executable).parent


def run_command(*command, **keywords):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, **keywords)


def test_ruff_finds_nothing():
    assert run_command(BIN / "ruff", "check", ".").stdout.strip() == "All checks passed!"
    formatted = run_command(BIN / "ruff", "format", "--check", ".")
    assert formatted.returncode == 0, formatted.stdout


def test_shellcheck_finds_nothing():
    scripts = [*map(str, (ROOT / "launch").rglob("*.sh")), ".ci/run"]
    assert len(scripts) > 5
    found = run_command(BIN / "shellcheck", *scripts)
    assert found.returncode == 0, found.stdout


def test_the_locks_name_no_registry_and_hash_every_file():
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text
        assert "--index-url" not in text
        requirements = [block for block in text.replace("\\\n", " ").splitlines() if block and block[0] != "#"]
        assert requirements
        assert all("--hash=sha256:" in requirement for requirement in requirements), lock
    cpu, gpu = ((ROOT / "requirements" / f"{name}.txt").read_text() for name in ("cpu", "gpu"))
    assert "nvidia" not in cpu
    assert "nvidia-cudnn" in gpu
    for name in ("tensorflow", "tensorflow-datasets", "absl-py", "tensorboard"):
        assert f"\n{name}==" in "\n" + cpu


@pytest.mark.skipif(not (ROOT / ".venv/lockstep.json").exists(), reason="no .venv of the launch scripts here")
def test_a_second_call_starts_at_once_and_reaches_no_network(tmp_path):
    # An index that cannot be reached would end any installation.
    env = os.environ | {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_NO_INDEX": "1", "PYTHON": sys.executable}
    if sys.prefix != sys.base_prefix:
        env["PYTHON"] = str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
    done = run_command("launch/local.sh", "--help", env=env)
    assert done.returncode == 0, done.stderr
    assert "--strategy" in done.stdout
    assert "installing" not in done.stderr
    done = run_command("launch/local.sh", "--model=nothing", env=env)
    assert done.returncode == 2


def test_workers_share_a_folder_also_where_a_flagfile_names_none(tmp_path):
    """The flags.txt of a run holds no run_dir."""
    (tmp_path / "flags.txt").write_text("--model=mlp\n")
    one, other = (workers.options_from(["workers", "--", f"--flagfile={tmp_path / 'flags.txt'}"]) for _ in range(2))
    first = config_from(["x", *one.flags], "").run_dir
    assert first.startswith("runs/workers-") and first != config_from(["x", *other.flags], "").run_dir
    (tmp_path / "flags.txt").write_text("--model=mlp\n--run_dir=named\n")
    assert config_from(["x", *one.flags], "").run_dir == "named"


@pytest.mark.parametrize("runs", ["a:b", "gs://bucket/runs", "a:b/../c:ro"])
def test_docker_gets_no_volume_whose_path_it_would_cut(tmp_path, runs):
    """Not by the name alone, since a link or the directory of the checkout may hold the colon."""
    env = os.environ | {"ENGINE": "true", "RUNS": str(tmp_path / runs) if "//" not in runs else runs}
    done = subprocess.run(
        [ROOT / "launch/docker.sh"], capture_output=True, text=True, check=False, env=env, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "ends the path of a volume at a colon" in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("loop", "words"), [("", ""), ("contrastive_loop", "/app/trainers/contrastive_loop.py ")])
def test_docker_runs_the_loop_that_is_named(tmp_path, loop, words):
    env = os.environ | {"ENGINE": "echo", "RUNS": str(tmp_path / "runs"), "IMAGE": "lockstep:cpu", "TRAINER": loop}
    command = [ROOT / "launch/docker.sh", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=tmp_path)
    assert done.stdout.endswith(f"lockstep:cpu {words}--strategy=mirrored --seed=1\n")
    assert ("--entrypoint python" in done.stdout) == bool(loop)


def test_launch_says_what_is_wrong_with_its_own_variables():
    done = run_command("launch/local.sh", env=os.environ | {"LOCKSTEP_DEVICE": "tpu"})
    assert done.returncode == 2
    assert "LOCKSTEP_DEVICE is 'tpu'; it must be cpu or gpu" in done.stderr


def test_every_public_module_is_on_the_map_of_the_workspace():
    """By its own name, or by that of a folder whose files are of a kind."""
    text = (ROOT / "WORKSPACE.md").read_text()
    modules = [path for room in ("trainers", "models", "launch") for path in (ROOT / room).rglob("*")]
    modules = [path for path in modules if path.is_file() and path.suffix in (".py", ".sh", ".sbatch")]
    assert len(modules) > 60
    missing = [
        str(path.relative_to(ROOT))
        for path in modules
        if path.stem != "__init__" and f"`{path.name}`" not in text and f"`{path.parent.name}/`" not in text
    ]
    assert missing == []


def test_the_page_of_flags_names_every_flag():
    import dataclasses

    from trainers.settings.config import Config

    text = (ROOT / "docs/flags.md").read_text()
    assert [field.name for field in dataclasses.fields(Config) if f"`--{field.name}`" not in text] == []


def test_models_know_nothing_of_trainers():
    paths = list((ROOT / "models").rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        assert "trainers" not in path.read_text(), path
