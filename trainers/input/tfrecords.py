"""Records of TFRecord files by their number: where each begins, kept beside the data, and how one is read."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainers.input.pictures import Pictures
from trainers.input.pipelines import calls_at_once
from trainers.input.records import Crop, Example, Records
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files

# Of the file that holds the offsets; another one is not read.
INDEX_VERSION = 1
# A record is a length of 8 bytes, 4 of its checksum, the data, and 4 of its checksum.
_HEADER, _FRAME = 12, 16
_SCANS_AT_ONCE = 16


def offsets_in(path: Path, num_records: int) -> np.ndarray:
    """Where each record of a file begins: int64 `[num_records]`. Reads their headers alone.

    Raises:
      BadConfiguration: the file is cut off, longer, or not of TFRecords.
    """
    size = path.stat().st_size
    offsets, at = np.zeros([num_records], np.int64), 0
    with open(path, "rb", buffering=0) as file:
        for number in range(num_records):
            header = os.pread(file.fileno(), _HEADER, at)
            end = at + _FRAME + struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else size + 1
            if end > size:
                raise BadConfiguration(
                    f"{path} is cut off or damaged: record {number} of {num_records}, at byte {at}, ends after the "
                    f"file's {size} bytes; remove its folder and prepare the data again"
                )
            offsets[number], at = at, end
    if at != size:
        raise BadConfiguration(
            f"{path} has {size - at} bytes after its {num_records} records; it is not what its dataset_info.json "
            "describes; remove its folder and prepare the data again"
        )
    return offsets


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a split in their order, and how many records each holds. `index`: where the offsets are kept."""

    paths: tuple[Path, ...]
    lengths: tuple[int, ...]
    index: Path

    @property
    def identity(self) -> str:
        """What the files were when they were indexed: names, sizes, numbers of records."""
        facts = [f"{p.name}:{p.stat().st_size}:{n}" for p, n in zip(self.paths, self.lengths, strict=True)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where each record of all files begins in its file: int64 `[records]`. Scanned once, then read.

        Raises:
          BadConfiguration: a file does not hold what it should, or has changed since it was indexed.
        """
        if self.index.exists():
            return self._kept()
        with concurrent.futures.ThreadPoolExecutor(_SCANS_AT_ONCE) as pool:
            found = np.concatenate(list(pool.map(offsets_in, self.paths, self.lengths)))
        self._keep(found)
        return found

    def _kept(self) -> np.ndarray:
        remedy = f"remove {self.index}, and it is made again"
        try:
            with np.load(self.index, allow_pickle=False) as kept:
                version, identity, offsets = int(kept["version"]), str(kept["identity"]), kept["offsets"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise BadConfiguration(f"{self.index} cannot be read ({error}); {remedy}") from None
        if version != INDEX_VERSION:
            raise BadConfiguration(f"{self.index} is of version {version}, not {INDEX_VERSION}; {remedy}")
        if identity != self.identity:
            raise BadConfiguration(
                f"the files of {self.index.parent} have changed since they were indexed; restore them, or {remedy}"
            )
        return offsets

    def _keep(self, offsets: np.ndarray) -> None:
        """For the next run. Where the folder cannot be written, each run scans."""
        try:
            with files.aside(self.index) as place, open(place, "wb") as file:
                np.savez(file, version=INDEX_VERSION, identity=self.identity, offsets=offsets)
        except OSError:
            return

    def place(self, index: int) -> tuple[Path, int, int]:
        """The file of a record, its number in it, and the byte at which it begins."""
        ends = np.cumsum(self.lengths)
        shard = int(np.searchsorted(ends, index, side="right"))
        return self.paths[shard], index - int(ends[shard] - self.lengths[shard]), int(self.offsets[index])


class TFRecordImages(Records):
    """Images with labels in TFRecord files. `parse(record) -> {"image": bytes, "label": int64}`."""

    def __init__(self, shards: Shards, parse: Callable[[tf.Tensor], Example], pictures: Pictures):
        self.shards, self.parse, self.pictures = shards, parse, pictures
        self.size = sum(shards.lengths)
        self._sizes = [path.stat().st_size for path in shards.paths]

    @functools.cached_property
    def _tables(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        with tf.init_scope(), tf.device("CPU:0"):
            ends = tf.constant(np.cumsum(self.shards.lengths), tf.int64)
            return tf.constant([str(path) for path in self.shards.paths]), ends, tf.constant(self.shards.offsets)

    def read(self, index: tf.Tensor) -> Example:
        """Reads a record where it lies, and checks its sums."""
        paths, ends, offsets = self._tables
        shard = tf.searchsorted(ends, [index], side="right")
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=tf.gather(paths, shard),
            compression_type="",
            # Anything else reads more than the record.
            buffer_size=tf.constant(0, tf.int64),
            byte_offsets=tf.gather(offsets, [index]),
        )
        records = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
        return self.parse(records.take(1).get_single_element())

    def in_order(self) -> tf.data.Dataset:
        """Reads each file from its begin."""
        records = tf.data.TFRecordDataset([str(path) for path in self.shards.paths])
        return records.map(
            tf.autograph.experimental.do_not_convert(self.parse), num_parallel_calls=calls_at_once(), deterministic=True
        )

    def decode(self, stored: Example, crop: Crop | None = None) -> Example:
        """`image`: uint8 pixels; `label`: int64."""
        return {"image": self.pictures.decode(stored["image"], None, crop), "label": stored["label"]}

    def where(self, index: int) -> str:
        """The file, and the number of the record in it."""
        path, number, offset = self.shards.place(index)
        return f"{path}, record {number} at byte {offset},"

    def changed(self, index: int) -> str:
        """Whether the file is there, and as long as it was."""
        path, _, _ = self.shards.place(index)
        return size_change(path, self._sizes[self.shards.paths.index(path)])


def size_change(path: Path, expected: int) -> str:
    """How the size of a file differs from what it was; empty if it does not."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return str(error.strerror)
    return f"{expected} bytes when the run began, now {size}" if size != expected else ""


def identity_of(name: str, shards: Sequence[Shards]) -> str:
    """What identifies streamed files, for a fingerprint."""
    return "\n".join([name, "by index", *(each.identity for each in shards)])
