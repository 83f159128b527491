"""Image files by number: what is known of each without decoding it, kept between runs, and how one is read."""

import concurrent.futures
import dataclasses
import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import tensorflow as tf

from trainers.input.pictures import Pictures
from trainers.input.records import Crop, Example, Records
from trainers.input.tfrecords import size_change
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files

# What TensorFlow decodes, by Pillow's names. Phones and drones write MPO: a JPEG, and more behind it.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP")
# Headers alone are read, so no image can be too large.
PIL.Image.MAX_IMAGE_PIXELS = None
# Raised where what `header` refuses changes.
INDEX_VERSION = 2
_ORIENTATION_TAG = 274
_LOOKS_AT_ONCE = 16
# Bad files that a message names.
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Look:
    """Headers of files, `[files]` each: bytes, time of the last change in ns, height and width upright, orientation."""

    bytes: np.ndarray
    changed: np.ndarray
    height: np.ndarray
    width: np.ndarray
    orientation: np.ndarray

    @property
    def common_size(self) -> tuple[int, int] | None:
        """Height and width, if all images have the same."""
        alike = all(len(np.unique(values)) == 1 for values in (self.height, self.width))
        return (int(self.height[0]), int(self.width[0])) if alike else None


def look_at(root: Path, names: Sequence[str], kept_in: Path) -> Look:
    """Reads the headers of the image files `root/name`, but for those that are as a former look has found them.

    `kept_in`: a folder for what is found.

    Raises:
      BadConfiguration: a file is not an image that can be decoded; the message names the first ones.
    """
    place = kept_in / f"images-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"
    stats = [os.stat(root / name) for name in names]
    facts = np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], np.int64).reshape(-1, 2)
    known = _kept(place)
    found = np.zeros([len(names), 3], np.int64)
    missing = []
    for number, (name, fact) in enumerate(zip(names, facts.tolist(), strict=True)):
        row = known.get(name)
        if row is not None and row[:2] == fact:
            found[number] = row[2:]
        else:
            missing.append(number)
    if missing:
        with concurrent.futures.ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            looks = list(pool.map(header, [root / names[number] for number in missing]))
        _check(root, len(names), [(names[number], look) for number, look in zip(missing, looks, strict=True)])
        found[missing] = looks
        _keep(place, names, np.concatenate([facts, found], axis=1))
    return Look(*facts.T, *found.T)


def is_image(path: Path) -> bool:
    """Whether a file's header is that of an image that can be decoded."""
    return not isinstance(header(path), str)


def header(path: Path) -> tuple[int, int, int] | str:
    """Height and width as seen upright, and the EXIF orientation; or why it is no image."""
    try:
        with PIL.Image.open(path, formats=None) as image:
            if image.format not in FORMATS:
                return f"{image.format} is not one of {', '.join(FORMATS)}"
            if image.format == "BMP" and not _is_plain(image):
                return "a BMP of indices into a palette, or of other colours than TensorFlow reads; save it as PNG"
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
            height, width = image.height, image.width
    except PIL.UnidentifiedImageError:
        return "it is empty" if path.stat().st_size == 0 else "its content is not an image"
    except Exception as error:  # Pillow's readers of damaged files raise whatever they run into
        return str(error) or type(error).__name__
    orientation = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    return (width, height, orientation) if orientation >= 5 else (height, width, orientation)


def _is_plain(image: PIL.Image.Image) -> bool:
    """Whether a BMP holds grey levels, or 8 bits of blue, green and red: TensorFlow would show others as these."""
    return all(tile[0] == "raw" and tile[3][0] in ("L", "BGR", "BGRX", "BGRA") for tile in image.tile)


def _check(root: Path, count: int, looks: Sequence[tuple[str, tuple[int, int, int] | str]]) -> None:
    bad = [(name, look) for name, look in looks if isinstance(look, str)]
    if bad:
        named = "; ".join(f"{root / name} ({reason})" for name, reason in bad[:_NAMED])
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise BadConfiguration(
            f"{len(bad)} of {count} files are not usable images: {named}{more}; remove or replace them"
        )


def _kept(place: Path) -> dict[str, list[int]]:
    """What a former look has found: name → bytes, time, height, width, orientation. Nothing where it cannot be read."""
    try:
        with np.load(place, allow_pickle=False) as kept:
            if int(kept["version"]) != INDEX_VERSION:
                return {}
            names = kept["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            return dict(zip(names, kept["facts"].tolist(), strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def _keep(place: Path, names: Sequence[str], facts: np.ndarray) -> None:
    """For the next run. Where the folder cannot be written, each run looks anew."""
    joined = np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(place) as new, open(new, "wb") as file:
            np.savez(file, version=INDEX_VERSION, names=joined, facts=facts)
    except OSError:
        return


class ImageFiles(Records):
    """Files with labels. `look`: what their headers say."""

    def __init__(self, root: Path, names: Sequence[str], labels: np.ndarray, look: Look, pictures: Pictures):
        self.root, self.names, self.size, self.look, self.pictures = root, names, len(names), look, pictures
        self.labels = labels
        with tf.init_scope(), tf.device("CPU:0"):
            self._paths = tf.constant([os.fsencode(root / name) for name in names])
            self._labels = tf.constant(labels, tf.int64)
            self._bytes = tf.constant(look.bytes, tf.int64)
            self._orientations = tf.constant(look.orientation, tf.int32)
        self._turned = bool((look.orientation > 1).any())

    def read(self, index: tf.Tensor) -> Example:
        """The bytes of the file, as many as there were when it was looked at."""
        content = tf.io.read_file(tf.gather(self._paths, index))
        length = tf.cast(tf.strings.length(content), tf.int64)
        with tf.control_dependencies([tf.debugging.assert_equal(length, tf.gather(self._bytes, index), "size")]):
            stored = {"image": tf.identity(content), "label": tf.gather(self._labels, index)}
        return stored | ({"orientation": tf.gather(self._orientations, index)} if self._turned else {})

    def decode(self, stored: Example, crop: Crop | None = None) -> Example:
        """`image`: uint8 pixels, upright; `label`: int64."""
        image = self.pictures.decode(stored["image"], stored.get("orientation"), crop)
        return {"image": image, "label": stored["label"]}

    def where(self, index: int) -> str:
        """The file."""
        return str(self.root / self.names[index])

    def changed(self, index: int) -> str:
        """Whether the file is there, and as long as it was."""
        return size_change(self.root / self.names[index], int(self.look.bytes[index]))
