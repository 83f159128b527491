"""In a pod: prepares a data set, onto the claim or into a bucket. Started by `launch/k8s.py data --dataset=NAME`.

    python trainers/input/preparing.py --dataset=cifar10 --data_dir=/work/runs/data
    python trainers/input/preparing.py --dataset=cifar10 --data_dir=s3://bucket/runs/data --cache_dir=/work/runs/cache

For a bucket it is prepared in `--cache_dir` and then uploaded. What is there already is left as it is.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie two above.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from trainers.world import signals

    signals.end_at_once_on_signal()  # before an import that takes time
    from trainers.world import process

    process.check_requirements()

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainers.input import manifests, uploads
from trainers.settings import paths
from trainers.settings.data_cards import is_downloaded, is_prepared
from trainers.settings.exit_codes import OK, BadConfiguration
from trainers.world import process, quiet
from trainers.world.stores import Store

_SCRATCH = "preparing"
_PATIENCE = 120.0


def check_name(name: str) -> None:
    """Raises BadConfiguration if a data set is not one that is prepared by its name alone."""
    kind, _, argument = name.partition(":")
    if is_prepared(name):
        return
    if argument and not kind.count("."):
        raise BadConfiguration(
            f"--dataset {name} is not prepared, it is read where it lies; bring it: --from={argument}"
        )
    raise BadConfiguration(f"--dataset {name} is not prepared: it comes with the image; submit the run")


def prepare(name: str, data_dir: str, cache_dir: str) -> str:
    """Prepares a data set at a path or at an address. Returns a line that tells of it.

    Raises:
      BadConfiguration: there is no such data set, its source cannot be reached, or there is no space.
      StoreLost: the store cannot be reached.
    """
    quiet.import_tensorflow()
    from trainers.input import load

    check_name(name)
    if not paths.is_address(data_dir):
        load.load(name, data_dir, placement="stream")
        return f"{name} is prepared in {data_dir}"
    scratch = Path(cache_dir or paths.cache_dir("")) / _SCRATCH
    place = load.prepared_folder(name, str(scratch))
    address = f"{data_dir}/{place.relative_to(scratch).as_posix()}"
    entries = Store(address, _PATIENCE).entries()
    if "dataset_info.json" in entries and uploads.INCOMING not in entries:
        return f"{name} is at {address} already"
    load.load(name, str(scratch), placement="stream")
    source = manifests.source_of("--cache_dir", place)
    uploads.upload(address.rpartition("/")[0], source, process.say, alone=True)
    return f"{name} is prepared at {address}: {source.manifest.summary()}"


def settings_from(argv: Sequence[str]) -> argparse.Namespace:
    """The command line (`argv[0]` is the program)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", required=True, help="its name")
    parser.add_argument("--data_dir", required=True, help="a path, or s3://BUCKET/FOLDER, gs://…, az://…")
    parser.add_argument("--cache_dir", default="", help="where it is prepared that goes to an address")
    return parser.parse_args(argv[1:])


def main(options: argparse.Namespace) -> int:
    """Prepares it."""
    if is_downloaded(options.dataset):
        process.say(f"{options.dataset} is downloaded from its publisher, if it is not there")
    process.say(prepare(options.dataset, paths.place("--data_dir", options.data_dir), options.cache_dir))
    return OK


if __name__ == "__main__":
    process.main(settings_from, main)
