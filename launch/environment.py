"""Make or reuse the checkout's `.venv` from the hash-locked requirements and print its interpreter.

    python launch/environment.py runtime        # what launch/local.sh needs
    python launch/environment.py storage        # the same and what object stores need (s3://, gs://, az://)
    python launch/environment.py mlflow         # what launch/local.sh and --tracker=mlflow need
    python launch/environment.py wandb          # the same for --tracker=wandb
    python launch/environment.py test           # all of these and the test tools, for launch/test.sh
    python launch/environment.py tensorboard    # .venv.tensorboard, without TensorFlow, for launch/tensorboard.sh
    python launch/environment.py sbom           # .venv.sbom, what lists and audits packages, for launch/audit.sh
    python launch/environment.py k8s            # .venv.k8s, what checks the manifests, for the tests
    python launch/environment.py tokenize       # .venv.tokenize, for launch/pack_tokens.py
    python launch/environment.py emulators      # .venv.emulators, an object store on this machine, for the tests
    python launch/environment.py trackers       # .venv.trackers, an MLflow server on this machine, for the tests
    python launch/environment.py jax            # .venv.jax, for trainers/benchmark.py --peers=jax

Standard library only: this runs on a machine that has bash and Python 3.11 and nothing else. A lock that is
installed already (a stamp holds its digest) costs a small file read and reaches no network.
The run-time lock is `gpu.txt` where an NVIDIA driver answers, else `cpu.txt`; `LOCKSTEP_DEVICE=cpu|gpu` overrides.
"""

import os
import sys

if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - this runs before anything is installed
        version = sys.version.split()[0]
        print(f"{sys.argv[0]}: Python {version} is too old; use 3.11 or newer: PYTHON=python3.11", file=sys.stderr)
        sys.exit(2)
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files, nvidia, process
from trainers.world.locks import hold

ROOT = Path(__file__).resolve().parent.parent
# Purposes with an environment of their own; the others share `.venv`.
ALONE = ("tensorboard", "sbom", "k8s", "tokenize", "emulators", "trackers", "jax")
# Those that share `.venv`, and what each adds.
SHARED = {
    "runtime": [],
    "storage": ["storage"],
    "mlflow": ["mlflow"],
    "wandb": ["wandb"],
    "test": ["storage", "mlflow", "wandb", "test"],
}
PURPOSES = (*SHARED, *ALONE)


def venv(purpose: str) -> Path:
    """Where the environment for a purpose lies."""
    return ROOT / (f".venv.{purpose}" if purpose in ALONE else ".venv")


def stamp_of(place: Path) -> Path:
    """The file that says what an environment holds."""
    return place / "lockstep.json"


def device() -> str:
    """`gpu` where an NVIDIA driver answers, else `cpu`; the variable LOCKSTEP_DEVICE decides if it is set.

    Raises:
      BadConfiguration: the variable has another value.
    """
    chosen = os.environ.get("LOCKSTEP_DEVICE", "")
    if chosen not in ("", "cpu", "gpu"):
        raise BadConfiguration(f"LOCKSTEP_DEVICE is {chosen!r}; it must be cpu or gpu; unset it to detect the device")
    if chosen:
        return chosen
    return "gpu" if nvidia.listed() else "cpu"


def locks(purpose: str) -> list[str]:
    """The lock files that a purpose needs, in the order of their installation."""
    if purpose in ALONE:
        return ["build", purpose]
    return ["build", device(), *SHARED[purpose]]


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
    """Installs a lock file into an environment, every file checked against its hash.

    Raises:
      BadConfiguration: pip has failed, and has printed why.
    """
    process.say(f"launch/environment.py: installing requirements/{lock}.txt into {place} …")
    command = [place / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--require-hashes", "--no-deps", "--no-build-isolation", "--only-binary=:all:"]
    command += ["--no-binary=promise", "-r", ROOT / "requirements" / f"{lock}.txt"]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise BadConfiguration(
            f"requirements/{lock}.txt could not be installed; the lines above say why; fix that and call again"
        )


def ensure(purpose: str) -> Path:
    """Makes the environment of a purpose hold its locks and returns its interpreter.

    Raises:
      BadConfiguration: it cannot be made.
    """
    place = venv(purpose)
    needed = {lock: digest(lock) for lock in locks(purpose)}
    if needed.items() <= read_stamp(place).items():
        return place / "bin/python"
    with open(ROOT / ".venv.lock", "w") as guard:
        hold(guard, wait=True)
        stamp = read_stamp(place)
        if not stamp:
            shutil.rmtree(place, ignore_errors=True)
            made = subprocess.run([sys.executable, "-m", "venv", place], stdout=sys.stderr, check=False)
            if made.returncode:
                raise BadConfiguration(
                    f"{sys.executable} cannot make a virtual environment; on Debian: apt-get install python3-venv"
                )
            stamp = {"python": sys.version}
        for lock, wanted in needed.items():
            if stamp.get(lock) != wanted:
                install(lock, place)
                stamp[lock] = wanted
                files.write_text(stamp_of(place), json.dumps(stamp))
    return place / "bin/python"


def purpose_from(argv: Sequence[str]) -> str:
    """The word of a command line; `argv[0]` is the program."""
    if len(argv) != 2 or argv[1] not in PURPOSES:
        raise BadConfiguration(f"call it with one word: {', '.join(PURPOSES)}")
    return argv[1]


if __name__ == "__main__":
    process.main(purpose_from, lambda purpose: print(ensure(purpose)))
