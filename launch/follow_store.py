"""Show runs of an object store in TensorBoard: what is there is copied to a folder and kept up to date while it runs.

    launch/tensorboard.sh s3://bucket/runs [flags of tensorboard]

calls this. TensorBoard's own reader does not see what is added to a file in a bucket. Checkpoints and exports are left
out.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements("absl", "obstore", remedy="run `python3 launch/environment.py tensorboard` once")

import argparse
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainers.record import copies
from trainers.settings import paths
from trainers.settings.exit_codes import BadConfiguration, StoreLost
from trainers.world import process
from trainers.world.stores import Store

LOOK_SECONDS = 10.0


class Settings(NamedTuple):
    """The address, and TensorBoard's own flags."""

    address: str
    flags: tuple[str, ...]


def settings_from(argv: Sequence[str]) -> Settings:
    """The command line (`argv[0]` is the program).

    Raises:
      BadConfiguration: the address is none.
      SystemExit: `--help` was given.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("address", help="a folder of runs, or a run: s3://BUCKET/FOLDER, gs://…, az://…")
    options, flags = parser.parse_known_args(argv[1:])
    address = paths.place("the folder of runs", options.address)
    if not paths.is_address(address):
        raise BadConfiguration(f"{options.address} is a path; call launch/tensorboard.sh with it, or name an address")
    return Settings(address, tuple(flags))


def main(settings: Settings) -> int:
    """Copies, starts TensorBoard, and copies what comes until it ends. Returns its exit code.

    Raises:
      BadConfiguration, StoreLost: the store refuses, or cannot be reached at the begin.
    """
    store, seen = Store(settings.address, patience=20.0), {}
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        files = copies.follow(store, Path(folder), seen)
        process.say(f"{settings.address}: {files} files, looked for again every {LOOK_SECONDS:g} s")
        command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", *settings.flags]
        board = subprocess.Popen(command)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: board.terminate())
        while True:
            try:
                return board.wait(LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                try:
                    copies.follow(store, Path(folder), seen)
                except (BadConfiguration, StoreLost) as error:  # what only shows waits
                    process.say(str(error))


if __name__ == "__main__":
    process.main(settings_from, main)
