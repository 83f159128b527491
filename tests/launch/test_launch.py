"""The commands of launch/, and the rules that the code keeps."""

import os
import socket
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
    scripts = [*map(str, (ROOT / "launch").rglob("*.sh")), "launch/slurm.sbatch", ".ci/run"]
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


@pytest.fixture
def engine(tmp_path):
    """An engine that answers `image inspect` with $HELD and prints the words that it is called with otherwise."""
    program = tmp_path / "engine"
    program.write_text('#!/bin/sh\ncase "$1 $2" in "image inspect") echo "$HELD" ;; *) printf "%s\\n" "$@" ;; esac\n')
    program.chmod(0o755)
    return program


def contained(engine, folder, *flags, script="docker.sh", **env):
    """What launch/docker.sh does in a folder: its end, and what it mounts besides the runs."""
    env = os.environ | {"ENGINE": str(engine), "RUNS": str(engine.parent / "runs")} | env
    done = subprocess.run(
        [ROOT / "launch" / script, *flags], capture_output=True, text=True, check=False, env=env, cwd=folder
    )
    return done, [word for word in done.stdout.splitlines() if word.endswith(":ro")]


def filled(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")
    return folder


def test_a_container_gets_the_packages_of_the_current_directory_and_nothing_else_of_it(engine, tmp_path):
    files = ["my_pkg/net.py", "deep/one/two.py", "alone.py", "data/x.csv", "my-notes/x.py", "notes.txt", ".hidden/x.py"]
    files += ["env/pyvenv.cfg", "env/x.py", "runs/x.py", "models/x.py", "__pycache__/x.py"]
    folder = filled(tmp_path / "project", *files)
    done, mounted = contained(engine, folder)
    assert mounted == [f"{folder / name}:/work/{name}:ro" for name in ("alone.py", "deep", "my_pkg")]
    assert done.stderr == "launch/docker.sh: mounted read-only: alone.py deep my_pkg\n"


def test_a_container_gets_nothing_of_a_home_directory_or_of_the_checkout(engine, tmp_path):
    home = filled(tmp_path / "home", "my_pkg/net.py")
    done, mounted = contained(engine, home, HOME=str(home))
    assert mounted == [] and done.returncode == 0
    assert done.stderr.startswith(f"launch/docker.sh: nothing of {home} is mounted") and done.stderr.count("\n") == 1
    done, mounted = contained(engine, ROOT)
    assert mounted == [] and done.stderr == ""


def test_a_package_whose_path_holds_a_colon_is_refused_before_anything_is_made(engine, tmp_path):
    done, _ = contained(engine, filled(tmp_path / "a:b", "my_pkg/net.py"))
    assert done.returncode == 2 and "ends the path of a volume at a colon" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_a_package_that_an_image_holds_is_not_hidden_by_the_current_directory(engine, tmp_path):
    folder = filled(tmp_path / "project", "my_pkg/net.py", "other/x.py")
    done, mounted = contained(engine, folder, HELD="my_pkg@sha256:12", IMAGE="mine")
    assert mounted == [f"{folder}/other:/work/other:ro"]
    assert f"mine holds my_pkg, which is taken in place of {folder}/my_pkg" in done.stderr


def test_a_container_runs_a_loop_of_the_image_or_a_module(engine, tmp_path):
    words = {name: contained(engine, tmp_path, TRAINER=name)[0].stdout for name in ("contrastive_loop", "my_pkg.mine")}
    assert "\n/app/trainers/contrastive_loop.py\n--strategy=mirrored" in words["contrastive_loop"]
    assert "\n/app/trainers/run_loop.py\nmy_pkg.mine\n--strategy=mirrored" in words["my_pkg.mine"]
    done, _ = contained(engine, tmp_path, TRAINER="my_pkg/mine.py")
    assert done.returncode == 2 and "name a loop of the image or a module" in done.stderr


UNFIT = {
    "no folder": (("--with=nothing", "cpu"), "--with=nothing is not a directory"),
    "a file": (("--with=alone.py", "cpu"), "--with=alone.py is not a directory"),
    "no Python": (("--with=data", "cpu"), "--with=data holds no Python files"),
    "ignored": (("--with=ignored", "cpu"), "--with=ignored holds no Python files, or git ignores them"),
    "a dash": (("--with=my-notes", "cpu"), "Python cannot import a package of the name 'my-notes'"),
    "ours": (("--with=models", "cpu"), "the image has a package models of its own; rename yours"),
    "twice": (("--with=my_pkg", "--with=deep/my_pkg", "cpu"), "there are two packages of the name my_pkg"),
    "no stage": (("--with=my_pkg",), "no stage is named; write cpu, gpu or tensorboard"),
    "TensorBoard": (("--with=my_pkg", "tensorboard"), "--with goes on top of cpu or gpu, not of tensorboard"),
    "two words": (("cpu", "--with", "my_pkg"), "--with needs a value; write --with=PACKAGE"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_no_image_is_built_with_what_is_no_package(engine, tmp_path, name):
    folder = filled(tmp_path / "project", "my_pkg/net.py", "deep/my_pkg/net.py", "alone.py", "data/x.csv")
    filled(folder, "models/x.py", "my-notes/x.py", "ignored/x.py")
    (folder / "ignored/.gitignore").write_text("*.py\n")
    words, said = UNFIT[name]
    done, _ = contained(engine, folder, *words, script="image.sh")
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_workers_find_a_package_of_the_current_directory_or_of_pythonpath(tmp_path, monkeypatch):
    """They inherit both; a worker of a gang says what it finds."""
    filled(tmp_path, "elsewhere/on_path.py", "project/here.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path / "project")
    code = "import os, on_path; assert os.path.exists('here.py') and os.environ['OWN'] == '1'"
    gang = workers.Gang([sys.executable, "-c", code], [{"OWN": "1"}, {"OWN": "1"}])
    assert gang.wait(grace=5) == 0


SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do echo "$1"; shift; done
pwd; echo "$PYTHONPATH"; printf '%s\\n' "$@"
"""


@pytest.mark.parametrize("trainer", ["", "contrastive_loop", "my_pkg.mine"])
def test_slurm_starts_a_loop_in_the_folder_of_the_submission_with_its_path(tmp_path, trainer):
    """What the script gives to srun; tests/launch/test_slurm.py has a real one."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": "/own",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    command = ["bash", ROOT / "launch/slurm.sbatch", "--model=my_pkg.net:build"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 2 and "is no checkout of Lockstep; set LOCKSTEP_ROOT" in done.stderr
    env |= {"LOCKSTEP_ROOT": str(ROOT), "LOCKSTEP_TRAINER": trainer}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    lines = done.stdout.splitlines()
    where = lines.index(str(tmp_path))
    assert "--export=ALL" in lines[:where] and lines[where + 1] == "/own"
    loop = {"": ["custom_loop.py"], "contrastive_loop": ["contrastive_loop.py"]}.get(trainer, ["run_loop.py", trainer])
    loop[0] = f"{ROOT}/trainers/{loop[0]}"
    assert lines[where + 2 :] == [f"{ROOT}/.venv/bin/python", *loop, "--strategy=multi_worker", command[-1]]


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


def test_workers_listen_where_the_system_puts_no_connection():
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = workers.free_ports(50)
    assert len(set(ports)) == 50 and all(workers.FIRST_PORT <= port < first for port in ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert ports[0] not in workers.free_ports(200)
