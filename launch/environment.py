"""Make or reuse the checkout's `.venv` from the hash-locked requirements and print its interpreter.

    python launch/environment.py runtime        # what launch/local.sh needs
    python launch/environment.py test           # the same and the test tools, for launch/test.sh
    python launch/environment.py tensorboard    # .venv.tensorboard, without TensorFlow, for launch/tensorboard.sh
    python launch/environment.py sbom           # .venv.sbom, what lists and audits packages, for launch/audit.sh
    python launch/environment.py k8s            # .venv.k8s, what checks the manifests, for the tests

Standard library only: this runs on a machine that has bash and Python 3.11 and nothing else. A lock that is
installed already (a stamp holds its digest) costs one small file read, and reaches no network.
The run-time lock is `gpu.txt` where an NVIDIA driver answers, else `cpu.txt`; `LOCKSTEP_DEVICE=cpu|gpu` overrides.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Those with an environment of their own, and those that share `.venv`.
ALONE = ("tensorboard", "sbom", "k8s")
PURPOSES = ("runtime", "test", *ALONE)
USAGE_ERROR = 2


def venv(purpose: str) -> Path:
    """Where the environment for a purpose lies."""
    return ROOT / (f".venv.{purpose}" if purpose in ALONE else ".venv")


def stamp_of(place: Path) -> Path:
    """The file that says what an environment holds."""
    return place / "lockstep.json"


def fail(message: str) -> None:
    """Ends the program with one line and the exit code of a bad configuration."""
    print(f"launch/environment.py: {message}", file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


def device() -> str:
    """`gpu` where an NVIDIA driver answers, else `cpu`; the variable LOCKSTEP_DEVICE decides if it is set."""
    chosen = os.environ.get("LOCKSTEP_DEVICE", "")
    if chosen not in ("", "cpu", "gpu"):
        fail(f"LOCKSTEP_DEVICE is {chosen!r}; it must be cpu or gpu; unset it to detect the device")
    if chosen:
        return chosen
    driver = shutil.which("nvidia-smi")
    if driver and subprocess.run([driver, "-L"], capture_output=True, check=False).returncode == 0:
        return "gpu"
    return "cpu"


def locks(purpose: str) -> list[str]:
    """The lock files that a purpose needs, in the order of their installation."""
    if purpose in ALONE:
        return ["build", purpose]
    return ["build", device()] + (["test"] if purpose == "test" else [])


def digest(lock: str) -> str:
    """SHA-256 of a lock file, as hexadecimal digits."""
    return hashlib.sha256((ROOT / "requirements" / f"{lock}.txt").read_bytes()).hexdigest()


def read_stamp(place: Path) -> dict[str, str]:
    """Lock name → digest of what an environment holds; empty if there is none or another interpreter made it."""
    try:
        stamp = json.loads(stamp_of(place).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if stamp.get("python") == sys.version else {}


def install(lock: str, place: Path) -> None:
    """Installs one lock file into an environment, every file checked against its hash."""
    print(f"launch/environment.py: installing requirements/{lock}.txt into {place} …", file=sys.stderr)
    command = [place / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--require-hashes", "--no-deps", "--no-build-isolation", "--only-binary=:all:"]
    command += ["--no-binary=promise", "-r", ROOT / "requirements" / f"{lock}.txt"]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        fail(f"requirements/{lock}.txt could not be installed; the lines above say why; fix that and call again")


def ensure(purpose: str) -> Path:
    """Makes the environment of a purpose hold its locks and returns its interpreter."""
    place = venv(purpose)
    if sys.version_info < (3, 11):  # noqa: UP036 - this runs before anything is installed
        fail(f"Python {sys.version.split()[0]} is too old; 3.11 or newer is needed; set PYTHON=python3.11")
    needed = {lock: digest(lock) for lock in locks(purpose)}
    if needed.items() <= read_stamp(place).items():
        return place / "bin/python"
    with open(ROOT / ".venv.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        stamp = read_stamp(place)
        if not stamp:
            shutil.rmtree(place, ignore_errors=True)
            made = subprocess.run([sys.executable, "-m", "venv", place], stdout=sys.stderr, check=False)
            if made.returncode:
                fail(f"{sys.executable} cannot make a virtual environment; on Debian: apt-get install python3-venv")
            stamp = {"python": sys.version}
        for lock, wanted in needed.items():
            if stamp.get(lock) != wanted:
                install(lock, place)
                stamp[lock] = wanted
                aside = stamp_of(place).with_suffix(".tmp")
                aside.write_text(json.dumps(stamp))
                aside.replace(stamp_of(place))
    return place / "bin/python"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PURPOSES:
        fail(f"call it with one word: {', '.join(PURPOSES)}")
    print(ensure(sys.argv[1]))
