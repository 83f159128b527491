"""Each fault of a machine, planted as it is on a real one: its row names it, and says what to do."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import faults
import pytest
from conftest import ROOT

from launch import doctor
from launch.health import computing, engines, gpus, libraries, machine, network, packages, probe, storage
from launch.health.computing import Seen
from launch.health.libraries import Loaded
from launch.health.rows import BAD, NOT_HERE, OK, WARNING, Row
from trainers.world import nvidia, programs

BUILT = {"tensorflow": "2.21.0", "is_cuda_build": True, "cuda_version": "12.5.1"}
WHEEL = ["sm_60", "sm_70", "sm_80", "sm_89", "compute_90"]


@pytest.fixture
def empty_path(tmp_path, monkeypatch):
    """A PATH without any program."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mount: not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def places(tmp_path):
    """Folders of the kernel of a machine without a GPU, outside a container."""
    for name in ("dev", "pci", "root"):
        (tmp_path / name).mkdir()
    return gpus.Places(tmp_path / "driver", tmp_path / "dev", tmp_path / "pci", tmp_path / "root")


def only(rows, name):
    """The row whose name begins so."""
    found = [row for row in rows if row.name.startswith(name)]
    assert len(found) == 1, rows
    return found[0]


# ----------------------------------------------------------------------------------------------------------------------
# Python, packages, disks, memory.


def make_venv(root, installed, lock, name="cpu", stamped=True):
    """A checkout with a lock, and an environment that holds packages."""
    site = root / ".venv/lib/python3.11/site-packages"
    site.mkdir(parents=True)
    for package, version in installed.items():
        folder = site / f"{package.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (root / ".venv/bin").mkdir()
    (root / ".venv/bin/python").symlink_to(sys.executable)
    (root / "requirements").mkdir()
    path = root / f"requirements/{name}.txt"
    path.write_text(lock)
    if stamped:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (root / ".venv/lockstep.json").write_text(json.dumps({"python": "3.11", name: digest}))
    folders = (str(site),)
    return packages.Environment(
        root / ".venv/bin/python", folders, json.loads((root / ".venv/lockstep.json").read_text())
    )


LOCK = """numpy==2.5.2 ; python_full_version < '3.12' \\
    --hash=sha256:00
numpy==2.6.0 ; python_full_version >= '3.12' \\
    --hash=sha256:00
absl-py==2.5.1 \\
    --hash=sha256:00
array-record==0.8.6 ; sys_platform == 'linux' \\
    --hash=sha256:00
colorama==0.4.6 ; sys_platform == 'win32' \\
    --hash=sha256:00
"""


def test_packages_that_differ_from_the_lock_are_named(tmp_path):
    env = make_venv(tmp_path, {"numpy": "2.1.0", "Absl_Py": "2.5.1"}, LOCK)
    (row,) = packages.lock_rows(env, 0, tmp_path)
    assert row.status == BAD and "numpy 2.1.0 instead of 2.5.2" in row.found
    assert "array-record 0.8.6 is missing" in row.found and "colorama" not in row.found and "absl" not in row.found
    assert "launch/local.sh" in row.remedy


def test_packages_of_the_lock_are_fine_until_the_lock_changes(tmp_path):
    env = make_venv(tmp_path, {"numpy": "2.5.2", "absl-py": "2.5.1", "array-record": "0.8.6"}, LOCK)
    (row,) = packages.lock_rows(env, 0, tmp_path)
    assert row.status == OK and row.found.startswith("3 packages")
    with open(tmp_path / "requirements/cpu.txt", "a") as lock:
        lock.write("# changed\n")
    (row,) = packages.lock_rows(env, 0, tmp_path)
    assert row.status == WARNING and "has changed" in row.found


def test_without_an_environment_the_rows_say_how_to_make_one(tmp_path):
    (row,) = packages.lock_rows(None, 0, tmp_path)
    assert row.status == NOT_HERE and row.found == "not installed: launch/local.sh"
    found = computing.speed_rows(computing.look(None))
    assert {row.status for row in found} == {NOT_HERE} and "launch/local.sh" in found[0].found


def test_the_locks_of_this_checkout_can_be_read():
    for name in ("cpu", "gpu", "test"):
        text = (ROOT / f"requirements/{name}.txt").read_text()
        wanted = set(re.findall(r"^([\w.-]+)==[^;\n]*\\$", text, re.MULTILINE))
        assert {packages.normalized(each) for each in wanted} <= set(
            packages.locked(ROOT / f"requirements/{name}.txt", (3, 12))
        )
    assert re.fullmatch(r"\d+\.\d+", packages.cuda_of_lock())


def test_a_python_that_is_too_old_is_bad():
    assert packages.python_row(version=(3, 9, 18)).status == BAD
    assert "PYTHON=python3.11" in packages.python_row(version=(3, 9, 18)).remedy
    assert packages.python_row().status == OK


def test_a_full_disk_is_bad(small_disk):
    row = machine.disk("run_dir", small_disk / "runs/first")
    assert row.status == BAD and "1 MiB free" in row.found and str(small_disk) in row.found and row.remedy
    with pytest.raises(OSError):
        (small_disk / "fill").write_bytes(b"0" * 2**21)
    rows = storage.trial_rows(small_disk / "runs/first")
    assert BAD in {row.status for row in rows} and "No space left on device" in "".join(row.found for row in rows)
    assert [path.name for path in small_disk.iterdir()] == ["fill"]


def test_a_disk_without_room_for_more_files_is_bad(small_disk):
    subprocess.run(["mount", "-o", "remount,nr_inodes=10,size=8g", small_disk], check=True)
    row = machine.disk("run_dir", small_disk)
    assert row.status == BAD and "more files fit" in row.found


def test_a_disk_that_is_mounted_for_reading_is_bad(small_disk):
    subprocess.run(["mount", "-o", "remount,ro,size=8g", small_disk], check=True)
    row = machine.disk("data_dir", small_disk / "data")
    assert row.status == BAD and "cannot be written" in row.found and "--data_dir" in row.remedy
    (row,) = storage.trial_rows(small_disk)
    assert row.status == BAD and "Read-only file system" in row.found


@pytest.mark.parametrize("gpu_count, status", [(0, WARNING), (2, BAD)])
def test_little_shared_memory_is_bad_where_gpus_share_it(small_disk, gpu_count, status):
    row = machine.shared_memory(gpu_count, small_disk)
    assert row.status == status and "--shm-size" in row.remedy
    assert machine.shared_memory(gpu_count, small_disk / "none").status == WARNING


def test_memory_is_that_of_the_container_where_it_is_limited(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "groups").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 65000000 kB\nMemFree: 100 kB\nMemAvailable: 60000000 kB\n")
    assert machine.memory(tmp_path / "proc", tmp_path / "groups").status == OK
    (tmp_path / "groups/memory.max").write_text("max\n")
    (tmp_path / "groups/memory.current").write_text("1000000\n")
    assert machine.memory(tmp_path / "proc", tmp_path / "groups").status == OK
    (tmp_path / "groups/memory.max").write_text(f"{512 * 2**20}\n")
    row = machine.memory(tmp_path / "proc", tmp_path / "groups")
    assert row.status == BAD and "of this container's 512 MiB" in row.found and row.remedy


@pytest.mark.parametrize("limit, status", [(100, BAD), (512, WARNING), (1024, OK)])
def test_few_open_files_are_named(limit, status):
    code = "from launch.health import machine; print(*machine.open_files(), sep='\\n')"
    done = subprocess.run(
        ["sh", "-c", f'ulimit -n {limit}; exec "$0" -c "$1"', sys.executable, code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[1] == status and f"at most {limit}" in done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The driver.


def test_the_gpus_of_nvidia_smi_are_read(plant, places):
    plant("nvidia-smi", faults.smi([faults.H100, faults.H100]))
    driver = nvidia.look(places.driver)
    assert driver.version == "550.54.14" and driver.complaint == ""
    assert driver.gpus[1] == nvidia.Gpu(1, "NVIDIA H100 80GB HBM3", 81559, "9.0")
    assert gpus.driver_row(driver, places) == Row("driver", OK, "550.54.14")
    assert nvidia.listed() == ["NVIDIA H100 80GB HBM3"] * 2


def test_a_driver_that_knows_no_compute_capabilities_is_asked_without(plant, places):
    plant("nvidia-smi", faults.smi([("Tesla V100-SXM2-16GB", "16160", "")], driver="450.51.06"))
    driver = nvidia.look(places.driver)
    assert [gpu.capability for gpu in driver.gpus] == [""] and driver.version == "450.51.06"
    row = gpus.cuda_row(driver, "12.9")
    assert row.status == BAD and "450.51.06" in row.found and "525.60" in row.found and "driver 525" in row.remedy
    assert gpus.cuda_row(driver._replace(version="525.60.13"), "12.9").status == OK
    assert gpus.cuda_row(driver._replace(version="570.10"), "13.0").status == BAD


@pytest.mark.parametrize("text", [faults.VERSION, faults.OPEN_VERSION])
def test_the_version_of_the_kernels_module_is_read(tmp_path, text):
    faults.kernel(tmp_path / "driver", "550.54.14", ["NVIDIA A100-SXM4-80GB"], text)
    assert nvidia.loaded_version(tmp_path / "driver") == "550.54.14"
    assert nvidia.models(tmp_path / "driver") == ("NVIDIA A100-SXM4-80GB",)


def card_in_a_slot(places):
    folder = places.pci / "0000:01:00.0"
    folder.mkdir()
    (folder / "vendor").write_text("0x10de\n")
    (folder / "class").write_text("0x030200\n")


@pytest.mark.parametrize(
    "script, loaded, slot, container, status, found, remedy",
    [
        (None, "", False, False, NOT_HERE, "no NVIDIA GPU", ""),
        (None, "", True, False, BAD, "0000:01:00.0", "install NVIDIA's driver"),
        (None, "550.54.14", False, True, BAD, "nothing of it is in this container", "nvidia-container-toolkit"),
        (None, "550.54.14", False, False, BAD, "nvidia-smi is missing", "nvidia-utils"),
        (faults.failing(faults.NO_DRIVER, 9), "", False, False, WARNING, "couldn't communicate", "install"),
        (faults.failing(faults.NO_DRIVER, 9), "", True, False, BAD, "no driver for the GPU 0000:01:00.0", "install"),
        (faults.failing(faults.MISMATCH, 18), "545.23.08", False, False, BAD, "version mismatch", "restart"),
        (
            faults.failing("No devices were found", 6),
            "550.54.14",
            False,
            False,
            BAD,
            "No devices were found",
            "restart",
        ),
        ("sleep 60", "550.54.14", False, False, BAD, "no answer within 0.3 s", "restart"),
    ],
)
def test_what_is_wrong_with_a_driver_is_said(
    plant, places, monkeypatch, script, loaded, slot, container, status, found, remedy
):
    monkeypatch.setattr(programs, "SECONDS", 0.3 if script == "sleep 60" else 10.0)
    if script:
        plant("nvidia-smi", script)
    if loaded:
        faults.kernel(places.driver, loaded)
    if slot:
        card_in_a_slot(places)
    if container:
        (places.root / ".dockerenv").touch()
    row = gpus.driver_row(nvidia.look(places.driver), places)
    assert (row.status, bool(row.remedy)) == (status, status != NOT_HERE), row
    assert found in row.found and remedy in row.remedy, row


# ----------------------------------------------------------------------------------------------------------------------
# Why TensorFlow does not see a GPU.


@pytest.fixture
def two_cards(plant, places):
    """What is known on a machine with two GPUs that are fine, and TensorFlow sees none: `two_cards(**changes)`."""
    plant("nvidia-smi", faults.smi([faults.H100, faults.H100]))
    for name in ("nvidiactl", "nvidia0", "nvidia1"):
        (places.dev / name).touch()
    seen = Seen(BUILT, WHEEL, [], [], {}, log="I0000 00:00:1.5 1 cudart_stub.cc:31] Could not find cuda drivers\n")
    facts = gpus.Facts(nvidia.look(places.driver), seen, Loaded({}, 0), "12.9", {}, places)
    return lambda **changes: facts._replace(**changes)


def only_cause(facts):
    (row,) = gpus.seen_rows(facts)
    assert row.status == BAD and row.found.startswith("0 of the 2 that the driver has: ") and row.remedy, row
    return row


def test_a_device_that_is_not_there_hides_the_others(two_cards):
    row = only_cause(two_cards(environment={"CUDA_VISIBLE_DEVICES": "2,0"}))
    assert "CUDA_VISIBLE_DEVICES=2,0 names GPU 2, and nvidia-smi lists 2" in row.found


@pytest.mark.parametrize("value", ["", "-1", "-1,0"])
def test_gpus_that_are_hidden_on_purpose_are_a_warning(two_cards, value):
    (row,) = gpus.seen_rows(two_cards(environment={"CUDA_VISIBLE_DEVICES": value}))
    assert row.status == WARNING and "hides all GPUs" in row.found and row.remedy == "unset CUDA_VISIBLE_DEVICES"


def test_some_gpus_that_are_chosen_are_fine(two_cards):
    seen = Seen(BUILT, WHEEL, [{"name": faults.H100[0], "capability": "9.0"}], [], {})
    (row,) = gpus.seen_rows(two_cards(seen=seen, environment={"CUDA_VISIBLE_DEVICES": "1"}))
    assert row.status == OK and "CUDA_VISIBLE_DEVICES=1 chooses" in row.found
    (row,) = gpus.seen_rows(two_cards(seen=seen))
    assert row.status == BAD and row.found.startswith("1 of the 2")


def test_a_container_without_the_devices_is_named(two_cards, places):
    (places.dev / "nvidiactl").unlink()
    (places.root / ".dockerenv").touch()
    row = only_cause(two_cards())
    assert "this container has no" in row.found and "nvidia-container-toolkit" in row.remedy


def test_a_build_without_cuda_is_named(two_cards):
    row = only_cause(two_cards(seen=Seen({"is_cuda_build": False}, [], [], [], {})))
    assert "built without CUDA" in row.found and "tensorflow-cpu" in row.remedy


def test_an_old_driver_is_named(two_cards):
    row = only_cause(two_cards(driver=two_cards().driver._replace(version="470.82.01")))
    assert "driver 470.82.01; CUDA 12.9" in row.found


def test_a_cause_that_is_not_known_shows_what_tensorflow_said(two_cards):
    (row,) = gpus.seen_rows(two_cards())
    assert row.status == BAD and "Could not find cuda drivers" in row.found and row.remedy


def test_a_tensorflow_that_does_not_start_is_bad(tmp_path, two_cards):
    broken = faults.write_program(
        tmp_path / "bin", "python", "echo 'ImportError: libfoo.so.1: cannot open' >&2; exit 1"
    )
    seen = computing.look(packages.Environment(broken, (), {}))
    (row,) = gpus.seen_rows(two_cards(seen=seen))
    assert row.status == BAD and "does not start: ImportError: libfoo.so.1" in row.found and row.remedy
    hanging = faults.write_program(tmp_path / "bin", "python", "echo '{\"gpus\": []}'; sleep 60")
    seen = computing.look(packages.Environment(hanging, (), {}), seconds=0.3)
    assert seen.gpus == [] and "no answer within 0.3 s" in seen.failure
    assert only(computing.speed_rows(seen), "TensorFlow").status == BAD


def library(folder, name, source):
    """A library of C, as a wheel of NVIDIA holds it."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not here")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / name], input=source, text=True, check=True
    )


@pytest.mark.parametrize(
    "code, words", [(803, "different versions"), (802, "fabric manager"), (100, "no device"), (46, "46")]
)
def test_what_the_driver_says_to_cuda_is_told(tmp_path, two_cards, monkeypatch, code, words):
    library(tmp_path / "driver_lib", "libcuda.so.1", f"int cuInit(unsigned flags) {{ return {code}; }}")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "driver_lib"))
    for name in libraries.SONAMES["12"]:
        library(tmp_path / "site/nvidia/some/lib", name, "int nothing;")
    loaded = libraries.load("12.9", [str(tmp_path / "site")])
    assert loaded == Loaded({}, code)
    row = only_cause(two_cards(loaded=loaded))
    assert f"cuInit returns {code}" in row.found and words in row.found


def test_libraries_that_are_missing_or_damaged_are_named(tmp_path, two_cards, monkeypatch):
    library(tmp_path / "driver_lib", "libcuda.so.1", "int cuInit(unsigned flags) { return 0; }")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "driver_lib"))
    folder = tmp_path / "site/nvidia/some/lib"
    for name in libraries.SONAMES["12"][:-1]:
        library(folder, name, "int nothing;")
    (folder / "libcufft.so.11").write_text("not a library")
    loaded = libraries.load("12.9", [str(tmp_path / "site")])
    missing, damaged = gpus.seen_rows(two_cards(loaded=loaded))
    assert "not installed: libcudnn.so.9" in missing.found and "LOCKSTEP_DEVICE=gpu launch/local.sh" in missing.remedy
    assert "libcufft.so.11 does not load" in damaged.found and damaged.status == BAD and damaged.remedy


def test_a_driver_library_that_is_missing_or_crashes_is_named(tmp_path, two_cards, places, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    loaded = libraries.load("12.9", [])
    if "libcuda.so.1" in loaded.errors:
        row = next(row for row in gpus.seen_rows(two_cards(loaded=loaded)) if "libcuda.so.1" in row.found)
        assert row.status == BAD and "ldconfig" in row.remedy
    library(tmp_path, "libcuda.so.1", "int cuInit(unsigned flags) { return *(volatile int *)0; }")
    assert "cuInit does not return" in libraries.load("12.9", []).errors["libcuda.so.1"]


@pytest.mark.parametrize(
    "capability, status",
    [("9.0", OK), ("8.6", OK), ("7.5", OK), ("8.9", OK), ("12.0", BAD), ("10.0", BAD), ("5.2", BAD)],
)
def test_a_gpu_without_kernels_in_the_wheel_is_named(two_cards, capability, status):
    driver = two_cards().driver
    driver = driver._replace(gpus=(driver.gpus[0]._replace(capability=capability),))
    row = gpus.capability_row(driver, WHEEL)
    assert row.status == status and capability in row.found
    assert ("89272" in row.found) == (capability in ("12.0", "10.0"))
    assert bool(row.remedy) == (status != OK)


def test_the_links_between_gpus_are_read(plant, places):
    nvlink = {(i, j): "NV18" for i in range(4) for j in range(4)}
    plant("nvidia-smi", faults.smi([faults.H100] * 4, topology=faults.topology(nvlink, 4)))
    assert gpus.link_row(nvidia.look(places.driver)) == (Row("links", OK, "NVLink: 6 pairs NV18"), True)
    mixed = nvlink | {(0, 2): "SYS", (0, 3): "SYS", (1, 2): "SYS", (1, 3): "SYS"}
    plant("nvidia-smi", faults.smi([faults.H100] * 4, topology=faults.topology(mixed, 4)))
    row, all_nvlink = gpus.link_row(nvidia.look(places.driver))
    assert row.status == WARNING and not all_nvlink and "GPU0–GPU2" in row.found and row.remedy
    plant("nvidia-smi", faults.smi([faults.H100] * 2, topology=faults.topology({(0, 1): "PHB"}, 2)))
    assert gpus.link_row(nvidia.look(places.driver))[0] == Row("links", OK, "PCIe: 1 pair PHB")
    plant("nvidia-smi", faults.smi([faults.H100] * 2))
    assert gpus.link_row(nvidia.look(places.driver))[0].status == WARNING
    plant("nvidia-smi", faults.smi([faults.H100]))
    assert gpus.link_row(nvidia.look(places.driver))[0].status == NOT_HERE


def test_a_gpu_far_below_its_data_sheet_is_a_warning(monkeypatch):
    def row(name, rate, precision="bfloat16"):
        found = {"device": "GPU:0", "name": name, "precision": precision, "teraflops": rate}
        return computing.speed_rows(Seen(BUILT, WHEEL, [], [found], {}))[0]

    assert row("NVIDIA H200", 666).status == OK and "0.67 of the data sheet's 989" in row("NVIDIA H200", 666).found
    assert row("NVIDIA H100 80GB HBM3", 200).status == WARNING and row("NVIDIA H100 80GB HBM3", 200).remedy
    assert row("Tesla T4", 5, "float32").status == OK
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert row("NVIDIA H200", 50, "float32").status == OK and row("NVIDIA H200", 50).status == WARNING
    # A name that only begins like that of a known card has no data sheet here.
    assert (
        "is not known here" in row("NVIDIA RTX A1000", 10).found and "is not known here" in row("NVIDIA T400", 1).found
    )


def test_a_gpu_is_measured_in_what_it_has_units_for():
    assert [probe.precisions(each)[1] for each in ("7.5", "8.0", "12.0", "")] == ["float16", *["bfloat16"] * 3]


def test_an_all_reduce_is_held_against_the_links():
    def row(rate, nvlink, wrong=""):
        found = {"replicas": 8, "gigabytes": rate, "name": "NVIDIA H100 80GB HBM3", "wrong": wrong}
        return only(computing.speed_rows(Seen(BUILT, WHEEL, [], [], found), nvlink), "all-reduce")

    assert row(200, True).status == OK and "350 GB/s on each link, 0.78" in row(200, True).found
    assert row(20, True).status == WARNING and "NCCL_DEBUG" in row(20, True).remedy
    assert row(20, False).status == OK
    assert row(200, True, "the sum is wrong").status == BAD


# ----------------------------------------------------------------------------------------------------------------------
# The file system of run_dir.


def trials(folder, call=None, error=0):
    """The rows of a process in which the kernel refuses a call."""
    code = f"""
import sys
sys.path[:0] = ["{ROOT}", "{ROOT}/tests"]
import faults
from pathlib import Path
from launch.health import storage
if {call!r}: faults.refuse({call!r}, {error})
for row in storage.trial_rows(Path("{folder}")): print(*row, sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "seccomp" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return {row[0]: Row(*row) for row in (line.split("|") for line in done.stdout.splitlines())}


@pytest.mark.parametrize(
    "call, error, status, name",
    [
        ("flock", errno.ENOLCK, WARNING, "lock"),
        ("fsync", errno.EIO, BAD, "fsync"),
        ("rename", errno.EPERM, BAD, "rename"),
    ],
)
def test_what_a_file_system_does_not_do_is_named(tmp_path, call, error, status, name):
    rows = trials(tmp_path, call, error)
    assert rows[name].status == status and os.strerror(error) in rows[name].found and rows[name].remedy
    assert rows["append"].status == OK
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_does_all_leaves_nothing_behind(tmp_path):
    rows = trials(tmp_path / "runs/first")
    assert {row.status for row in rows.values()} == {OK} and list(rows)[-1] == "lock"
    assert list(tmp_path.iterdir()) == []


MOUNTS = """/dev/sda1 / ext4 rw 0 0
server:/export {0} nfs4 rw,vers=4.2 0 0
tmpfs {0}/fast tmpfs rw 0 0
bucket {0}/my\\040bucket fuse.s3fs rw 0 0
//nas/x {0}/nas cifs rw 0 0
overlay {0}/layer overlay rw 0 0
me@host: {0}/remote fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    "folder, machines, status, words",
    [
        ("runs/first", 2, OK, "nfs4"),
        ("fast/runs", 1, WARNING, "lost with the machine's memory"),
        ("layer", 1, WARNING, "lost with the container"),
        ("my bucket", 1, WARNING, "store of objects"),
        ("nas", 2, OK, "cifs"),
        ("remote", 2, OK, "fuse.sshfs"),
        ("..", 1, OK, "of this machine alone"),
        ("..", 2, BAD, "2 machines are named"),
    ],
)
def test_whether_machines_share_run_dir_is_told(tmp_path, folder, machines, status, words):
    share = tmp_path / "share"
    for name in ("fast", "my bucket", "nas", "layer", "remote"):
        (share / name).mkdir(parents=True)
    (tmp_path / "mounts").write_text(MOUNTS.format(share))
    row = storage.sharing_row(share / folder, machines, tmp_path / "mounts")
    assert row.status == status and words in row.found and bool(row.remedy) == (status != OK), row


def test_the_clock_of_a_file_server_is_measured_where_there_is_one(tmp_path):
    (tmp_path / "mounts").write_text(f"server:/export {tmp_path} nfs4 rw 0 0\n")
    row = storage.clock_row(tmp_path, tmp_path / "mounts")
    assert row.status == OK and row.found.endswith("s from this machine's")
    assert storage.clock_row(tmp_path, tmp_path / "none").status == NOT_HERE


# ----------------------------------------------------------------------------------------------------------------------
# Workers.


@pytest.fixture
def listener():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen(0)
        yield own


def test_a_port_that_is_taken_is_bad(listener):
    port = listener.getsockname()[1]
    rows = network.network_rows(f"127.0.0.1:{port}", {})
    row = only(rows, "worker 127.0.0.1")
    assert row.status == BAD and f"port {port} is taken" in row.found and "ss -ltnp" in row.remedy


def test_a_name_that_does_not_resolve_is_bad():
    row = only(network.network_rows("nosuch.invalid:2222", {}), "worker nosuch")
    assert row.status == BAD and "nosuch.invalid does not resolve" in row.found and "/etc/hosts" in row.remedy


def test_a_question_without_an_answer_is_given_up():
    answer = threading.Event()
    with pytest.raises(TimeoutError):
        network.bounded(answer.wait, 0.1)  # nobody answers before it has returned
    assert not answer.is_set()
    answer.set()


def test_an_address_of_another_machine_is_no_address_of_this_worker():
    config = {"cluster": {"worker": ["192.0.2.1:2222", "127.0.0.1:2223"]}, "task": {"type": "worker", "index": 0}}
    row = only(network.network_rows("", {"TF_CONFIG": json.dumps(config)}), "worker 192.0.2.1")
    assert row.status == BAD and "not an address of this machine" in row.found and "index" in row.remedy


def test_a_worker_that_does_not_answer_is_bad(listener, monkeypatch):
    monkeypatch.setattr(network, "CONNECT_SECONDS", 0.2)
    host, port = listener.getsockname()
    waiting = []
    for _ in range(4):  # until the queue of those who wait is full, and the kernel answers no more
        waiting.append(socket.socket())
        waiting[-1].setblocking(False)
        waiting[-1].connect_ex((host, port))
    time.sleep(0.2)
    place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    row = network._far_row("worker", host, port, network._connect(place))
    for each in waiting:
        each.close()
    assert row.status == BAD and "has not answered" in row.found and "firewall" in row.remedy
    closed = socket.getaddrinfo(host, 1, type=socket.SOCK_STREAM)[0]
    assert network._far_row("worker", host, 1, network._connect(closed)).status == OK


def test_a_worker_that_runs_already_beside_this_one_is_fine(listener):
    port = listener.getsockname()[1]
    config = {"cluster": {"worker": ["127.0.0.1:1", f"127.0.0.1:{port}"]}, "task": {"type": "worker", "index": 0}}
    row = only(network.network_rows("", {"TF_CONFIG": json.dumps(config)}), f"worker 127.0.0.1:{port}")
    assert row.status == OK and "a worker that runs" in row.found


@pytest.mark.parametrize(
    "hosts, environment, words",
    [
        ("a", {}, "write host:port"),
        ("", {"TF_CONFIG": "{"}, "TF_CONFIG is not of the form"),
        ("", {"SLURM_PROCID": "0", "SLURM_NTASKS": "x"}, "SLURM_NTASKS"),
    ],
)
def test_a_list_of_workers_that_is_wrong_is_bad(hosts, environment, words):
    row = only(network.network_rows(hosts, environment), "workers")
    assert row.status == BAD and words in row.found and row.remedy


def test_workers_of_slurm_are_found():
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "nosuch[1-2].invalid"}
    assert network.machines("", environment) == 2
    assert len([row for row in network.network_rows("", environment) if row.name.startswith("worker nosuch")]) == 2
    assert network.machines("localhost:1,127.0.0.1:2", {}) == 1


def test_a_pod_of_a_run_on_one_node_names_no_workers():
    row = only(network.network_rows("", {"JOB_COMPLETION_INDEX": "0"}), "workers")
    assert row.status == NOT_HERE
    row = only(network.network_rows("", {"JOB_COMPLETION_INDEX": "0", "NUM_WORKERS": "2"}), "workers")
    assert row.status == BAD and "JOB_NAME" in row.found


def test_a_proxy_is_remarked_with_what_the_trainers_do():
    workers = network.Workers(("node1.cluster.local:2222", "10.0.0.2:2222"), None, "--hosts")
    assert network.proxy_row(workers, {}).found == "none"
    row = network.proxy_row(workers, {"http_proxy": "http://proxy:3128", "no_proxy": ".cluster.local"})
    assert row.status == OK and "does not name 10.0.0.2" in row.found and "trainers add it" in row.found
    row = network.proxy_row(workers, {"https_proxy": "http://proxy", "no_proxy": "cluster.local,10.0.0.2"})
    assert "excepts the workers" in row.found


def test_the_clock_is_that_of_the_kernel_and_others_are_not_measured():
    workers = network.Workers(("a:1", "b:1"), None, "--hosts")
    row = network.clock_row(workers)
    assert row.name == "clock" and ("not measured" in row.found)
    assert network.clock_row(None).status in (OK, NOT_HERE)


# ----------------------------------------------------------------------------------------------------------------------
# Engines and kubectl.


def test_engines_and_kubectl_that_are_missing_are_not_here(empty_path):
    assert [row.status for row in engines.engine_rows(0)] == [NOT_HERE] * 3


def test_an_engine_that_does_not_answer_is_a_warning(plant, monkeypatch, tmp_path):
    said = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"
    plant("docker", f"""echo '{{"ServerVersion":"","ServerErrors":["{said}"]}}'; exit 0""")
    row = engines.engine_row("docker", 0)
    assert row.status == WARNING and said in row.found and "systemctl start docker" in row.remedy
    monkeypatch.setattr(programs, "SECONDS", 0.3)
    answered = tmp_path / "answered"
    plant("podman", f"(sleep 60; touch {answered}) & sleep 60; touch {answered}")
    row = engines.engine_row("podman", 0)
    assert row.status == WARNING and "no answer within 0.3 s" in row.found and not answered.exists()


def test_an_engine_without_nvidias_toolkit_is_a_warning_where_a_gpu_is(plant, tmp_path):
    plant("docker", """echo '{"ServerVersion":"28.2.2","Runtimes":{"runc":{},"nvidia":{}}}'""")
    assert engines.engine_row("docker", 0) == Row("docker", OK, "28.2.2, works")
    row = engines.engine_row("docker", 1, (tmp_path,))
    assert row.status == WARNING and "is not installed" in row.found and "nvidia-container-toolkit" in row.remedy
    plant("nvidia-ctk", "echo")
    assert "toolkit is set up" in engines.engine_row("docker", 1, (tmp_path,)).found
    plant("podman", """echo '{"version":{"Version":"4.3.1"}}'""")
    row = engines.engine_row("podman", 1, (tmp_path,))
    assert row.status == WARNING and "not set up" in row.found and "nvidia-ctk cdi generate" in row.remedy
    (tmp_path / "nvidia.yaml").touch()
    assert engines.engine_row("podman", 1, (tmp_path,)).status == OK


CLUSTER = """case "$*" in
version*) echo '{"clientVersion":{"gitVersion":"v1.32.4"},"serverVersion":{"gitVersion":"v1.33.1"}}' ;;
"auth can-i create jobs.batch"*) echo "no - no RBAC policy matched"; exit 1 ;;
"auth can-i create namespaces"*) echo no; exit 1 ;;
"auth can-i "*) echo yes ;;
esac"""


def test_rights_that_a_cluster_does_not_give_are_named(plant):
    plant("kubectl", CLUSTER)
    rows = engines.kubectl_rows()
    assert [row.found for row in rows[:2]] == ["v1.32.4", "v1.33.1"]
    row = only(rows, "rights to run")
    assert row.status == WARNING and row.found.endswith("lockstep: create jobs") and "administrator" in row.remedy
    assert only(rows, "rights to set up").status == OK and "create namespaces" in only(rows, "rights to set up").found
    plant("kubectl", CLUSTER.replace("echo yes", "echo 'error: unknown' >&2; exit 1"))
    row = only(engines.kubectl_rows(), "rights to run")
    assert row.status == WARNING and "does not tell" in row.found
    plant("kubectl", CLUSTER.replace('echo "no - no RBAC policy matched"; exit 1', "echo yes"))
    assert only(engines.kubectl_rows(), "rights to run").status == OK


def test_a_cluster_that_does_not_answer_and_an_old_kubectl_are_warnings(plant):
    refused = "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
    plant("kubectl", f"""echo '{{"clientVersion":{{"gitVersion":"v1.28.2"}}}}'; echo "{refused}" >&2; exit 1""")
    kubectl, cluster = engines.kubectl_rows()
    assert kubectl.status == WARNING and "1.31" in kubectl.remedy
    assert cluster.status == WARNING and "was refused" in cluster.found and "KUBECONFIG" in cluster.remedy
    plant("kubectl", "exit 127")
    assert engines.kubectl_rows()[0].status == WARNING


# ----------------------------------------------------------------------------------------------------------------------
# The script.


@pytest.fixture
def checkout(tmp_path):
    """A checkout in which nothing is installed."""
    place = tmp_path / "checkout"
    place.mkdir()
    for name in ("launch", "trainers", "requirements"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def pythons():
    """Interpreters that hold no packages of this project: this one without them, and an old one where there is one."""
    old = next(iter(sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python"))), None) or shutil.which("python3.9")
    works = old and subprocess.run([old, "-c", ""], capture_output=True).returncode == 0
    skip = pytest.mark.skip(reason="Python 3.9 is not here")
    return [pytest.param(sys.executable, id="this"), pytest.param(str(old), id="3.9", marks=[] if works else [skip])]


@pytest.mark.parametrize("python", pythons())
def test_before_anything_is_installed_the_doctor_says_so(checkout, python, tmp_path):
    before = sorted(checkout.rglob("*"))
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [python, "-I", "-S", "-B", checkout / "launch/doctor.py", "--json", "--hosts=nosuch.invalid:1"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and done.stderr == "", done.stderr
    answer = json.loads(done.stdout)
    assert answer["fine"] is False
    rows = {row["name"]: row for row in answer["rows"]}
    for name in ("packages", "GPUs of TensorFlow", "matmul", "all-reduce"):
        assert rows[name]["status"] == NOT_HERE and rows[name]["found"] == "not installed: launch/local.sh"
    assert rows["worker nosuch.invalid:1"]["status"] == BAD
    assert all(row["remedy"] for row in answer["rows"] if row["status"] in (BAD, WARNING))
    assert "doctor" not in rows
    assert (
        sorted(checkout.rglob("*")) == before
        and not list(tmp_path.glob("runs"))
        and not list(tmp_path.glob(".doctor*"))
    )


def test_what_the_doctor_imports_is_python_3_9():
    code = """
import sys
from launch import doctor, gpu_check
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
print(*(file for file in files if file.startswith(sys.argv[1])), sep="\\n")
print(sorted({"tensorflow", "keras", "numpy", "absl", "yaml"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=ROOT)
    *files, packages_seen = done.stdout.splitlines()
    files = [name for name in files if "site-packages" not in name]
    assert packages_seen == "[]" and len(files) > 10, done.stderr
    ruff = [Path(sys.executable).parent / "ruff", "check", "--isolated", "--target-version=py39", "--select=F,FA102"]
    done = subprocess.run([*ruff, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for name in files:
        compile(Path(name).read_text(), name, "exec", flags=0, dont_inherit=True, _feature_version=9)


def test_gpus_that_tensorflow_does_not_see_make_the_doctor_fail(plant, tmp_path):
    plant("nvidia-smi", faults.smi([faults.H100, faults.RTX_5090], topology=faults.topology({(0, 1): "PHB"}, 2)))
    command = [sys.executable, ROOT / "launch/doctor.py", f"--run_dir={tmp_path}", f"--data_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "", done.stderr
    assert "0: NVIDIA H100 80GB HBM3 80 GiB, 1: NVIDIA GeForce RTX 5090 32 GiB" in done.stdout
    assert "0 of the 2 that the driver has" in done.stdout and "PCIe: 1 pair PHB" in done.stdout
    assert "NVIDIA GeForce RTX 5090 has 12.0, and TensorFlow's wheel holds sm_60" in done.stdout
    assert "matmul: CPU:0 float32" in done.stdout and "all-reduce: 2 replicas" in done.stdout
    lines = done.stdout.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("  bad", "  warning")):
            assert lines[number + 1].lstrip().startswith("→"), line
    assert re.fullmatch(r"\d+ bad.*; \d+ s", lines[-1])


def test_a_question_of_the_doctor_that_fails_does_not_stop_the_others():
    section = doctor.examine("title", lambda: [Row("one", OK, "")], lambda: [1 / 0], lambda: [Row("three", OK, "")])
    assert [row.name for row in section.rows] == ["one", "doctor", "three"]
    assert section.rows[1].status == BAD and "ZeroDivisionError" in section.rows[1].found


def test_a_doctor_that_is_ended_ends_what_it_asks(plant, tmp_path):
    plant("nvidia-smi", f"echo $$ > {tmp_path}/asked; exec sleep 60")
    command = [sys.executable, ROOT / "launch/doctor.py", f"--run_dir={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "asked").exists() or not (tmp_path / "asked").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == 143
    deadline = time.monotonic() + 30  # whoever ends it need not wait until it has ended
    while not faults.has_ended((tmp_path / "asked").read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_flag_that_is_wrong_is_refused():
    done = subprocess.run([sys.executable, ROOT / "launch/doctor.py", "--rundir=x"], capture_output=True, text=True)
    assert done.returncode == 2 and "--rundir" in done.stderr


def test_a_run_in_an_object_store_needs_its_package(monkeypatch):
    """The store itself is not asked, and no folder is made of its address."""
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    row = storage.store_row("s3://bucket/runs/first")
    assert row.status == WARNING and row.remedy == "run python3 launch/environment.py storage"
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: name)
    assert storage.store_row("s3://bucket/runs/first").status == OK
