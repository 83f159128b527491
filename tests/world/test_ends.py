"""A process that is to end ends: with nobody to read what it says, or with its main thread stuck outside of Python."""

import functools
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

# A mutex that is locked twice: no signal interrupts the wait for it.
STUCK = """
import ctypes
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
print("stuck", flush=True)
lock(mutex), lock(mutex)
"""


def start(code, **keywords):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, **keywords)


@pytest.mark.parametrize("reader", ["there", "gone", "stuck"])
def test_the_watchdog_ends_the_process_whoever_reads(reader):
    code = "from trainers.world import watchdog\nwatchdog._TELLING_SECONDS = 2\nwith watchdog.Watchdog(1):\n"
    read, write = os.pipe()
    process = start(code + "".join(f"    {line}\n" for line in STUCK.strip().splitlines()), stderr=write)
    if reader == "gone":
        os.close(read)
    if reader == "stuck":
        os.set_blocking(write, False)
        while True:
            try:
                os.write(write, b"x" * 4096)
            except BlockingIOError:
                break
        os.set_blocking(write, True)
    os.close(write)
    assert process.wait(60) == 75
    if reader == "there":
        assert b"nothing has moved for" in os.read(read, 4096)


def test_the_second_signal_ends_a_process_whose_main_thread_is_stuck():
    process = start(f"from trainers.world.signals import Preemption\nwith Preemption():\n    exec({STUCK!r})")
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_what_clears_away_or_has_lost_the_first(number):
    code = """
import time
from trainers.world import signals
signals.unwind_on_signal()
for words in ("begun", "lost"):
    try:
        print(words, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        pass  # as where nobody can raise: while an object is removed
"""
    process = start(code)
    for words in ("begun", "lost"):
        assert process.stdout.readline().strip() == words
        process.send_signal(number)
    assert process.wait(timeout=30) == 143
    process.stdout.close()


# Waits for ever in C with Python's lock: no thread and no handler of Python runs.
LOCKED = STUCK.replace("ctypes.CDLL(None)", "ctypes.PyDLL(None)")


def test_a_wait_that_holds_pythons_lock_ends_with_75_and_the_stacks_of_all_threads():
    code = f"""
from trainers.world import watchdog
watchdog._LATER_SECONDS = 1
with watchdog.Watchdog(2) as dog:
    dog.feed("meeting the other workers")
    import time
    time.sleep(1)  # the watchdog looks once more
    exec({LOCKED!r})
"""
    process = start(code, stderr=subprocess.PIPE)
    assert process.wait(60) == 75
    error = process.stderr.read()
    assert "nothing has moved for 2 s in: meeting the other workers" in error
    assert 'File "<string>"' in error and "Thread 0x" in error


def test_two_signals_end_a_process_whose_lock_is_held():
    process = start(f"from trainers.world.signals import Preemption\nwith Preemption():\n    exec({LOCKED!r})")
    assert process.stdout.readline() == "stuck\n"
    for _ in range(2):
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
    assert process.wait(60) == 143


def test_time_in_which_the_process_was_stopped_does_not_count():
    code = """
import time
from trainers.world import watchdog
watchdog._LATER_SECONDS = 1
with watchdog.Watchdog(4) as dog:
    dog.feed("a step")
    print("begun", flush=True)
    time.sleep(2)
    dog.feed("the next step")
    time.sleep(2)
    print("done", flush=True)
"""
    process = start(code)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(10)  # more than all the limits together
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0 and process.stdout.read() == "done\n"


def test_after_its_context_signals_are_pythons_own_again():
    code = "from trainers.world.signals import Preemption\nimport os, signal\n"
    code += "for _ in range(3):\n    with Preemption() as p:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "        assert p.requested\nprint('alive')"
    process = start(code)
    assert process.wait(60) == 0 and process.stdout.read() == "alive\n"


def test_a_demand_for_a_profile_before_the_loop_runs_ends_nothing():
    code = "import os, signal\nfrom trainers.world.signals import end_at_once_on_signal\nend_at_once_on_signal()\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "os.kill(os.getpid(), signal.SIGUSR2)\nprint('alive')"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.stdout == "alive\n" and done.returncode == 0


def test_contexts_one_after_another_leave_no_file_open():
    code = """
import os, signal
from trainers.world.signals import Preemption
def used():
    return len(os.listdir("/proc/self/fd"))
with Preemption():
    pass
before = used()
for count in range(20):
    with Preemption():
        if count % 2:
            os.kill(os.getpid(), signal.SIGTERM)
assert used() == before, used()
print("alive")
"""
    process = start(code)
    assert process.wait(60) == 0 and process.stdout.read() == "alive\n"


SCRIPTS = [
    *(f"trainers/{name}.py" for name in ("custom_loop", "benchmark", "graph_benchmark", "tensor_check")),
    *(
        "trainers/sweep.py",
        "trainers/report.py",
        "trainers/predict.py",
        "trainers/generate.py",
        "launch/prove.py",
        "launch/workers.py",
        "launch/k8s.py",
        "launch/status.py",
    ),
    *("launch/scaling.py", "launch/environment.py", "launch/proof/probe.py"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_from_its_first_statement_a_script_ends_quietly_on_a_signal(script):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    began, seen = False, []
    for line in process.stderr:  # a line for each import, when it is done: any after that of signals is after the call
        seen.append(line)
        if began:
            break
        began = line.rpartition("|")[2].strip() == "trainers.world.signals"
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 143, rest
    assert "Traceback" not in rest
    ours = [line.rpartition("|")[2].strip() for line in seen]
    heavy = {"argparse", "pathlib", "absl", "ctypes", "numpy", "json", "tensorflow"} & set(
        ours[: ours.index("trainers.world.signals")]
    )
    assert not heavy - set(startup_imports()), "what takes time is imported after the call"


@functools.cache
def startup_imports():
    """What Python itself imports before a script, with the site of this environment."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", ""], capture_output=True, text=True, check=True
    ).stderr
    return [line.rpartition("|")[2].strip() for line in done.splitlines()]
