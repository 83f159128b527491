"""What the tests share: four virtual CPU devices in this process, prepared data, and runs of the real loop."""

import dataclasses
import fcntl
import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainers.world import quiet

quiet.import_tensorflow()

import faults
import keras
import numpy as np
import pytest
import tensorflow as tf
from object_store import address, proxy, server  # noqa: F401 - fixtures, of all tests of object stores
from tensorflow.python.framework import config as process_config
from tensorflow.python.framework import ops

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)

from models.cards import MODELS
from trainers import custom_loop
from trainers.input import builders
from trainers.record import checkpoints, reading
from trainers.run import start
from trainers.settings.config import Config
from trainers.settings.rules import resolve
from trainers.world import process

# CI runs what takes more time than a person waits for, too.
LONG_TESTS = os.environ.get("LOCKSTEP_LONG") == "1"


def short(names, chosen):
    """Cases of a test, of which those in `chosen` are for everybody, the others long."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.long) for name in names]


# Every model at a size that is trained in a moment.
SMALL_MODELS = [
    "mlp",
    "resnet,width=8",
    "resnet18,blocks=1x1x2,width=8",
    "resnet50,blocks=1x2,width=4",
    "vit,depth=1",
    "transformer,depth=1,heads=2,width=16",
    "residual_regressor",
    "wide_deep",
    "reconstructing_regressor",
    "unet,depth=1,width=4",
]
assert [model.partition(",")[0] for model in SMALL_MODELS] == list(MODELS)
EXIT_STATUS = pytest.StashKey[int]()


def pytest_collection_finish():
    """Modules and tests stay to the end: no collection, of which each run orders one, need go through them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[EXIT_STATUS] = int(exitstatus)


def pytest_collection_modifyitems(items):
    """The longest come first, then those that wait for processes: what computes fills the cores meanwhile."""
    for item in items:
        # Images take minutes to build, and their writing makes every checkpoint of other tests wait for the disk.
        if "images" in item.fixturenames:
            item.add_marker(pytest.mark.long)
        if item.get_closest_marker("long") and not LONG_TESTS:
            item.add_marker(pytest.mark.skip(reason="long; LOCKSTEP_LONG=1 runs it"))
    waiting = (
        "test_containers.py",
        "test_pods.py",
        "test_workers.py",
        "test_slurm.py",
        "test_resume.py",
        "test_prove.py",
        "test_prove_loops.py",
    )
    items.sort(key=lambda item: ("soak" not in item.name, item.path.name not in waiting))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leaves as the trainer does: TensorFlow's input threads may wait for an interpreter that is shutting down."""
    if EXIT_STATUS in config.stash:
        process.leave(config.stash[EXIT_STATUS])


@pytest.fixture(autouse=True)
def settings_of_a_process():
    """A run sets Keras's policy and determinism for its process; the next test begins without."""
    keras.config.set_dtype_policy("float32")
    process_config.disable_op_determinism()


@pytest.fixture(autouse=True)
def custom_gradients_are_forgotten():
    """TensorFlow keeps the gradient function of each `tf.custom_gradient` in a graph for ever, and with it the graph.

    A process of the trainer traces once. One of many tests would fill gigabytes, and Python's collector would go
    through them again and again.
    """
    yield
    kept = ops.gradient_registry._registry
    for name in [name for name in kept if name.startswith("CustomGradient-")]:
        del kept[name]


@pytest.fixture(autouse=True)
def modules_of_a_test_are_forgotten(tmp_path_factory: pytest.TempPathFactory):
    """A module that a test has written and imported is not what the next one imports under the same name."""
    temporary, imported = str(tmp_path_factory.getbasetemp()), set(sys.modules)
    yield
    sys.path[:] = [place for place in sys.path if not place.startswith(temporary)]
    for name in set(sys.modules) - imported:
        places = [getattr(sys.modules[name], "__file__", None) or "", *getattr(sys.modules[name], "__path__", ())]
        if any(place.startswith(temporary) for place in places):
            del sys.modules[name]


@pytest.fixture(autouse=True, scope="session")
def prepared_images_are_decoded_once():
    """The images of a builder are the same for every run of a process, as long as their files are."""
    read, kept = builders.split_of, {}

    def split_of(records, resident):
        files = [(path, path.stat()) for path in records.shards.paths if path.exists()]
        key = (*((path, stat.st_mtime_ns, stat.st_size) for path, stat in files), repr(records.pictures))
        if not resident or len(files) < len(records.shards.paths):
            return read(records, resident)
        if key not in kept:
            kept[key] = read(records, resident)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "split_of", split_of)
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of prepared data for all tests."""
    return tmp_path_factory.mktemp("data")


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make) -> Path:
    """A folder that `make(folder)` has filled, once for all processes in which tests run."""
    folder = tmp_path_factory.getbasetemp().parent / name
    with open(folder.with_suffix(".lock"), "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not folder.exists():
            aside = folder.with_suffix(".making")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            make(aside)
            aside.rename(folder)
    return folder


@pytest.fixture
def run(data_dir, tmp_path):
    """`run(name, **flags)` trains in this process, by default for a few steps in `tmp_path / name`: the summary."""

    def train(name: str = "run", **flags) -> start.Summary:
        settings = {"model": "mlp", "train_steps": 6, "batch_size": 32, "data_dir": str(data_dir)}
        settings |= {"log_every": 2, "eval_every": 3, "checkpoint_every": 3, "run_dir": str(tmp_path / name)}
        return custom_loop.train(resolve(Config(**(settings | flags))))

    return train


@pytest.fixture(scope="session")
def made_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, start.Summary], Path]:
    """Runs that tests begin with, by their flags, and the folder that holds them."""
    return {}, tmp_path_factory.mktemp("made")


@pytest.fixture
def made(run, made_runs, tmp_path):
    """As `run`, for a run that is only begun with: this process trains it once for all tests, and each has a copy."""
    runs, folder = made_runs

    def copied(name: str = "run", **flags) -> start.Summary:
        key = repr(sorted(flags.items()))
        if key not in runs:
            runs[key] = run(str(folder / str(len(runs))), **flags)
        shutil.copytree(runs[key].run_dir, tmp_path / name)
        return dataclasses.replace(runs[key], run_dir=tmp_path / name)

    return copied


def as_after(step: int, run_dir: Path, name: str) -> None:
    """Beside a finished run, what it was when it was killed after the checkpoint of a step: training goes on there."""
    killed = run_dir.with_name(name)
    shutil.copytree(run_dir, killed)
    steps = {int(path.name.removeprefix("step-")): path for path in (killed / "checkpoints").glob("step-*")}
    assert step in steps
    for later in [path for number, path in steps.items() if number > step]:
        shutil.rmtree(later)


def weights(run_dir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Everything in a run's checkpoint: the newest, or that of a step."""
    store = checkpoints.Checkpoints(Path(run_dir), 3, {}, "loss", "min")
    return store.read(step if step is not None else store.steps()[-1])


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    assert all(line.endswith("}") for line in lines), "a line is torn"
    return reading.metric_lines(Path(run_dir))


def without_times(lines: list[dict]) -> list[dict]:
    """Lines of metrics without what a clock decides."""
    return [{k: v for k, v in line.items() if not reading.is_timing(k)} for line in lines]


def largest_relative_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray], group: str = "model/") -> float:
    """The largest over variables of max |a - b| / max |a|."""
    worst = 0.0
    for name in a:
        if name.startswith(group):
            scale = max(float(np.abs(a[name]).max()), 1e-8)
            worst = max(worst, float(np.abs(a[name] - b[name]).max()) / scale)
    return worst


def relative_difference_as_one_vector(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray], group: str = "model/"
) -> float:
    """‖a - b‖ / ‖a‖ over all variables: the measure for deep networks with ReLU.

    Among millions of activations rounding flips one now and then, whatever the number of replicas, and an offset that
    has just left zero shows each flip at up to a tenth of itself. The weights as a whole do not.
    """
    names = [name for name in a if name.startswith(group)]
    one, other = (np.concatenate([state[name].ravel() for name in names]) for state in (a, b))
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """`plant(name, script)` puts a program on the PATH, before those of the system."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return lambda name, script: faults.write_program(folder, name, script)


class Trainer:
    """The script in a process of its own."""

    def __init__(self, *flags: str, data_dir: Path, env: dict[str, str] | None = None, loop: str = "custom_loop"):
        command = [sys.executable, str(ROOT / f"trainers/{loop}.py"), f"--data_dir={data_dir}", *flags]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | (env or {}), cwd=ROOT
        )

    def wait(self, timeout: float = 600) -> tuple[int, str]:
        """Exit code and everything that was printed."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, output


@pytest.fixture
def trainer(data_dir):
    """`trainer(*flags)` starts a loop's script in a process of its own; whatever is left is killed at the end."""
    started = []

    def start(*flags: str, env: dict[str, str] | None = None, loop: str = "custom_loop") -> Trainer:
        started.append(Trainer(*flags, data_dir=data_dir, env=env, loop=loop))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
