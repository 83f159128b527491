"""The layout that WORKSPACE.md describes: which room may import which, how long a file may be, what an import does."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# Lowest first. A module imports from rooms below its own, and from its own.
LAYERS = [
    ("models",),
    ("trainers.settings",),
    ("trainers.world", "trainers.input"),
    ("trainers.record", "trainers.show"),
    ("trainers.run",),
    ("trainers.use",),
    ("inner loops",),
    ("trainers.measure",),
    ("scripts",),
    ("launch",),
]
# Between rooms of one layer.
SIDEWAYS = {("trainers.input", "trainers.world")}
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_SCRIPT, MOST_LINES_OF_A_LOOP = 420, 45, 330, 200
# Nothing but tables of data.
DATA_ONLY: set[str] = set()
SOURCES = sorted(
    path for room in ("models", "trainers", "launch") for path in (ROOT / room).rglob("*.py") if path.stem != "__init__"
)
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]


def room_of(module):
    """The room of `a.b.c`."""
    parts = module.split(".")
    if parts[0] != "trainers":
        return parts[0]
    if len(parts) > 2 or (ROOT / "trainers" / parts[-1]).is_dir():
        return ".".join(parts[:2])
    return "inner loops" if parts[-1].endswith("_loop") else "scripts"


def layer_of(room):
    return next(i for i, rooms in enumerate(LAYERS) if room in rooms)


def imports_of(path):
    """Modules of the project that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [
                name if (ROOT / name.replace(".", "/")).with_suffix(".py").exists() else node.module for name in below
            ]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("models", "trainers", "launch"))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_imports_downwards_only(name):
    path = ROOT / name
    room = room_of(name.removesuffix(".py").replace("/", "."))
    for module in imports_of(path):
        other = room_of(module)
        allowed = other == room or (room, other) in SIDEWAYS or layer_of(other) < layer_of(room)
        assert allowed, f"{name} ({room}) imports {module} ({other})"


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_short(name):
    text = (ROOT / name).read_text()
    script = name.startswith("trainers/") and name.count("/") == 1
    most = MOST_LINES_OF_A_SCRIPT if script else MOST_LINES
    if name.endswith("_loop.py") and name != "trainers/custom_loop.py":
        most = MOST_LINES_OF_A_LOOP
    assert len(text.splitlines()) <= most or name in DATA_ONLY
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= MOST_LINES_OF_A_FUNCTION, node.name


def test_no_two_test_files_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(set(names)) == sorted(names), "pytest imports them by their names alone"


def test_trainers_holds_what_a_user_starts_and_the_rooms_alone():
    scripts = {path.stem for path in (ROOT / "trainers").glob("*.py")} - {"__init__"}
    loops = {script for script in scripts if script.endswith("_loop")}
    assert loops >= {"custom_loop", "run_loop", "distillation_loop", "contrastive_loop"}
    assert scripts - loops == {"benchmark", "graph_benchmark", "tensor_check", "sweep", "report", "predict", "generate"}
    for script in scripts:
        assert 'if __name__ == "__main__":' in (ROOT / f"trainers/{script}.py").read_text()
    rooms = {path.name for path in (ROOT / "trainers").iterdir() if path.is_dir()} - {"__pycache__"}
    assert rooms == {"run", "settings", "input", "record", "world", "show", "measure", "use"}


def test_no_module_of_the_trainers_bears_a_name_of_the_standard_library():
    names = {path.stem for path in (ROOT / "trainers").rglob("*.py")} - {"__init__"}
    assert names.isdisjoint(sys.stdlib_module_names)


def test_the_outer_loop_knows_no_model_and_no_optimizer():
    """What an inner loop is handed may; what drives every loop may not."""
    outer = ("command", "driver", "evaluator", "hooks", "inner_loop", "pace", "plan", "reporter", "start", "training")
    for name in (*outer, "windows", "workers"):
        path = ROOT / f"trainers/run/{name}.py"
        assert {module for module in imports_of(path) if module.startswith("models")} <= {"models.sums"}, name
        assert ".optimizer" not in path.read_text() and ".model." not in path.read_text(), name


def test_nothing_below_the_loops_names_one_of_them():
    loops = [
        path.stem for path in (ROOT / "trainers").glob("*_loop.py") if path.stem not in ("custom_loop", "run_loop")
    ]
    assert len(loops) >= 3
    for path in SOURCES:
        if str(path.relative_to(ROOT)).startswith(
            ("trainers/run/", "trainers/record/", "trainers/input/", "trainers/show/")
        ):
            text = path.read_text().lower()
            assert [loop for loop in loops if loop.removesuffix("_loop") in text] == [], path.name


def outcome(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_import_neither_tensorflow_nor_numpy():
    modules = [f"trainers.settings.{path.stem}" for path in (ROOT / "trainers/settings").glob("*.py")]
    code = f"import sys, {', '.join(module for module in modules if not module.endswith('__init__'))}\n"
    assert outcome(code + "print(sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))") == "[]\n"


def test_importing_the_trainer_has_no_effects():
    code = """
import os, signal, sys
import tensorflow as tf, keras, tensorflow_datasets  # which have effects of their own
before = dict(os.environ), list(sys.path), [signal.getsignal(n) for n in (2, 10, 15)], os.getcwd()
import trainers.custom_loop
assert callable(trainers.custom_loop.train)
assert before == (dict(os.environ), list(sys.path), [signal.getsignal(n) for n in (2, 10, 15)], os.getcwd())
assert len(tf.config.list_logical_devices("CPU")) == 1
"""
    outcome(code)
