"""A loop's script by name: its flags without TensorFlow, and the loop that a run belongs to."""

import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT

from trainers.run import command
from trainers.settings import flags, pages
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration

PAGE = """
import dataclasses
from typing import ClassVar
from trainers.settings.config import Config, flag

@dataclasses.dataclass(frozen=True)
class Settings(Config):
    loop: ClassVar[str] = "mine"
    left_out: ClassVar[frozenset[str]] = frozenset({"loss", "ema"})
    knots: int = flag(3, "mine", "how many", low=1, fixed=True)

if __name__ == "__main__":
    from trainers.run.command import main
    main(__file__, __doc__, Settings)

raise SystemExit("what stands below is not run")
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page of a user's own in a package of the current directory."""
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg/__init__.py").touch()
    (tmp_path / "my_pkg/mine.py").write_text(PAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "my_pkg/mine.py"


def test_a_page_is_named_by_its_name_its_path_or_its_module(page):
    own = pages.page_of("distillation_loop")
    assert own.path == ROOT / "trainers/distillation_loop.py"
    assert own == pages.page_of("trainers.distillation_loop")
    assert pages.page_of(str(own.path)).command == own.command == (str(own.path),)
    assert pages.page_of(str(own.path)).module == own.module == "trainers.distillation_loop"
    assert pages.page_of("my_pkg/mine.py") == (str(page), "mine", page, (str(page),))
    assert pages.page_of("my_pkg.mine").command == (str(ROOT / "trainers/run_loop.py"), "my_pkg.mine")


def test_the_flags_of_a_page_are_read_without_running_it(page):
    kind = pages.page_of("my_pkg.mine").settings
    assert kind.__name__ == "Settings" and kind.loop == "mine"
    config = flags.config_from(["mine", "--knots=5", "--model=mlp"], "", kind)
    assert (config.knots, config.model, config.dataset) == (5, "mlp", "digits")
    assert "--knots=5" in config.flag_lines() and not any(line.startswith("--ema") for line in config.flag_lines())
    for word, says in (("--knots=0", "--knots 0 is below 1"), ("--ema=0.9", "Unknown command line flag 'ema'")):
        with pytest.raises(BadConfiguration, match=says):
            flags.config_from(["mine", word], "", kind)


def test_annotations_may_be_text(page):
    page.write_text("from __future__ import annotations\n" + PAGE)
    kind = pages.page_of("my_pkg.mine").settings
    assert flags.config_from(["mine", "--knots=5"], "", kind).knots == 5


def test_a_page_elsewhere_finds_this_project_and_one_of_it_needs_nothing(page, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert pages.page_of("my_pkg/mine.py").environment == {"PYTHONPATH": f"{ROOT}:/elsewhere"}
    assert pages.page_of("custom_loop").environment == {}


def test_a_profiler_that_runs_a_script_is_not_its_module(monkeypatch):
    script, main = str(ROOT / "trainers/custom_loop.py"), type(sys)("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    for module, expected in (("cProfile", "trainers.custom_loop"), ("trainers.custom_loop", "trainers.custom_loop")):
        main.__spec__ = importlib.util.find_spec(module)
        assert command.module_of(script) == expected
    main.__spec__ = None
    assert command.module_of(script) == "trainers.custom_loop"
    assert command.module_of("/elsewhere/mine.py") == "mine"


def test_every_page_of_the_project_has_its_settings_free_of_tensorflow():
    code = "import sys; from trainers.settings.pages import page_of, shipped\n"
    code += "for name in shipped(): print(name, page_of(name).settings.loop)\n"
    code += "assert not {'tensorflow', 'keras', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loops = dict(line.split() for line in done.stdout.splitlines())
    assert loops.keys() >= {"custom_loop", "distillation_loop"}
    assert len(set(loops.values())) == len(loops)
    assert loops["custom_loop"] == Config.loop


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ("distilation_loop", "did you mean distillation_loop"),
        ("my_pkg.nobody", "is neither one of this project nor a module that Python finds"),
        ("my_pkg/nobody.py", "is not a file"),
        ("..", "is neither one of this project"),
    ],
)
def test_a_page_that_is_not_there_is_one_line(page, trainer, says):
    with pytest.raises(BadConfiguration, match=says):
        pages.page_of(trainer)


def test_a_page_that_cannot_be_read_is_one_line(page):
    page.write_text("knots = 1 / 0\n" + PAGE)
    with pytest.raises(BadConfiguration, match=r"mine.py cannot be read: ZeroDivisionError: division by zero; mend it"):
        pages.page_of("my_pkg.mine").settings  # noqa: B018


def test_a_page_that_ends_or_starts_no_run_is_one_line(page):
    page.write_text("raise SystemExit(3)\n" + PAGE)
    with pytest.raises(BadConfiguration, match="cannot be read: SystemExit: 3; mend it"):
        pages.page_of("my_pkg.mine").settings  # noqa: B018
    page.write_text('"""Nothing starts here."""\n')
    with pytest.raises(BadConfiguration, match="the module my_pkg.mine starts no run; let it call"):
        pages.page_of("my_pkg.mine").settings  # noqa: B018


def test_run_loop_says_what_is_missing(page):
    page.write_text('"""Nothing starts here."""\n')
    for words, says in (
        (["my_pkg.mine"], "starts no run; let it call trainers.run.command.main"),
        (["--model=mlp"], "stands where the module of a loop belongs"),
        (["my_pkg.nobody"], "is neither one of this project"),
    ):
        command = [sys.executable, str(ROOT / "trainers/run_loop.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=page.parents[1])
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_run_goes_on_with_the_loop_that_began_it_alone(run, tmp_path, data_dir):
    run("begun", train_steps=2)
    facts = tmp_path / "begun/run.json"
    facts.write_text(facts.read_text().replace('"loop": "supervised"', '"loop": "contrastive"'))
    with pytest.raises(BadConfiguration, match="was begun by the loop 'contrastive', and this is 'supervised'"):
        run("begun", train_steps=4)
    script = [sys.executable, str(ROOT / "trainers/custom_loop.py"), "--mode=evaluate", f"--data_dir={data_dir}"]
    done = subprocess.run([*script, f"--run_dir={tmp_path / 'begun'}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "was begun by the loop 'contrastive'" in done.stderr
