"""Image files in folders: `images:DIR`, with `DIR/train/CLASS/…` and `DIR/val/CLASS/…`, or with `DIR/CLASS/…`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from models.tasks import DataSpec
from trainers.input.dataset import (
    Dataset,
    Request,
    are_resident,
    augmented,
    fingerprint,
    image_preparation,
    pictures_for,
    raw_images,
    split_of,
)
from trainers.input.image_files import ImageFiles, Look, is_image, look_at
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files

TRAIN = "train"
# Folders of what is held out, the first that is there.
HELD_OUT = ("val", "valid", "validation", "test")
# Files of these kinds are meant to be images: one that is not is an error. Others are left out, and counted.
_MEANT = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".heif", ".avif"),
    *(".jp2", ".mpo", ".ppm", ".pgm", ".svg"),
}
_HELD_OUT_EVERY = 5
_LEAST_FILES, _LEAST_CLASSES = 10, 2
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Listing:
    """Files below a folder, relative to it, in order, and the index of the class of each."""

    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]


def load(request: Request) -> Dataset:
    """Images by class. Where nothing is held out in a folder of its own, every fifth file is for evaluation.

    Raises:
      BadConfiguration: there is no such folder, it holds too few images, or a file is not an image.
    """
    root = request.path
    if not request.argument or not root.is_dir():
        raise BadConfiguration(
            f"--dataset images:{request.argument} is not a folder; write images:DIR, with one folder a class"
        )
    skipped: list[str] = []
    listing, is_held_out = _listed(root, skipped)
    if skipped:
        named = ", ".join(skipped[:_NAMED]) + (", …" if len(skipped) > _NAMED else "")
        logging.warning("%d files in %s are left out, they are not images: %s", len(skipped), root, named)
    look = look_at(root, listing.names, Path(request.data_dir) / "lockstep")
    pictures = pictures_for(look.common_size, 3, request.images)
    resident = are_resident(request, pictures, look.common_size, int((~is_held_out).sum()))
    splits = []
    for chosen in (np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)):
        part = Look(*(getattr(look, field.name)[chosen] for field in dataclasses.fields(Look)))
        names, labels = [listing.names[i] for i in chosen], np.array(listing.labels)[chosen]
        splits.append(split_of(ImageFiles(root, names, labels, part, pictures), resident))
    train, held_out = augmented(splits[0], request.images, pictures.size), splits[1]
    identity = _identity(listing, look, resident)
    spec = DataSpec("classification", pictures.shape, num_classes=len(listing.classes))
    prepare = image_preparation(request.images, pictures.channels)
    told, raw = fingerprint(identity, train, held_out), raw_images(request.images, pictures, listing.classes)
    return Dataset(request.full_name, spec, train, held_out, told, prepare, raw=raw)


def _identity(listing: Listing, look: Look, resident: bool) -> str:
    """Names the data: its classes and, where the pixels are not at hand, each file with its size."""
    rows = [] if resident else [f"{name}:{size}" for name, size in zip(listing.names, look.bytes, strict=True)]
    return "\n".join([str(list(listing.classes)), *rows])


def _listed(root: Path, skipped: list[str]) -> tuple[Listing, np.ndarray]:
    """All files, and which of them are held out."""
    held_out = next((name for name in HELD_OUT if _has_classes(root / name)), None)
    if not _has_classes(root / TRAIN):
        listing = _by_class(root, "", None, skipped)
        _check_enough(root, listing)
        return listing, _every_fifth(listing.names)
    aside = [path.name for path in _folders_in(root) if path.name not in (TRAIN, *HELD_OUT)]
    if aside:
        logging.warning(
            "%s has a folder %s, so that classes are looked for there and in %s alone; left out: %s",
            *(root, TRAIN, held_out or TRAIN, ", ".join(aside[:_NAMED])),
        )
    train = _by_class(root, TRAIN, None, skipped)
    _check_enough(root / TRAIN, train)
    if held_out is None:
        return train, _every_fifth(train.names)
    other = _by_class(root, held_out, train.classes, skipped)
    if not other.names:
        raise BadConfiguration(f"{root / held_out} holds no images; add some, or remove the folder")
    listing = Listing(train.classes, train.names + other.names, train.labels + other.labels)
    return listing, np.arange(len(listing.names)) >= len(train.names)


def _every_fifth(names: Sequence[str]) -> np.ndarray:
    return np.arange(len(names)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def _has_classes(folder: Path) -> bool:
    """Whether a folder holds folders with files, and is no class itself."""
    return folder.is_dir() and any(next(files.walk(each), None) for each in _folders_in(folder))


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _by_class(root: Path, part: str, classes: Sequence[str] | None, skipped: list[str]) -> Listing:
    """The files of `root/part/CLASS`. `classes`: those that there may be; None = those that there are."""
    found = {folder.name: folder for folder in _folders_in(root / part)}
    if classes is not None and (strange := sorted(set(found) - set(classes))):
        raise BadConfiguration(
            f"{found[strange[0]]} is a class that {root / TRAIN} does not have; add it there, or remove it"
        )
    order, names, labels = tuple(classes or found), [], []
    for label, name in enumerate(order):
        before = len(names)
        for path in sorted(files.walk(found[name])) if name in found else ():
            if is_meant(path):
                names.append(str(path.relative_to(root)))
            else:
                skipped.append(str(path))
        labels += [label] * (len(names) - before)
        if classes is None and len(names) == before:
            raise BadConfiguration(f"{found[name]} holds no images; add some, or remove the folder")
    return Listing(order, tuple(names), tuple(labels))


def is_meant(path: Path) -> bool:
    """Whether a file should be an image: neither hidden nor of another kind, nor a link that leads nowhere.

    One without a suffix should if it is one.
    """
    if path.name.startswith(".") or not path.exists():
        return False
    return path.suffix.lower() in _MEANT or (not path.suffix and is_image(path))


def _check_enough(folder: Path, listing: Listing) -> None:
    if len(listing.classes) < _LEAST_CLASSES or len(listing.names) < _LEAST_FILES:
        raise BadConfiguration(
            f"{folder} holds {len(listing.names)} files in {len(listing.classes)} folders; at least {_LEAST_FILES} "
            f"files of {_LEAST_CLASSES} classes are needed"
        )
