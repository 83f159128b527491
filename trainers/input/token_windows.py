"""A file of tokens without a header, cut into windows: held in memory, or read by index through a memory map."""

import dataclasses
import hashlib
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainers.input.dataset import Features, Request, Split
from trainers.input.records import Crop, Example, Records
from trainers.input.tfrecords import size_change
from trainers.settings.exit_codes import BadConfiguration

LEAST_WINDOWS = 20
# Of a file that streams, blocks that its fingerprint looks at, spread from its first byte to its last.
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
# Python has no name for it before 3.14.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def count_windows(num_tokens: int, length: int) -> int:
    """Windows of `length` tokens and the one that follows them. Each begins with the last token of the one before."""
    return max((num_tokens - 1) // length, 0)


def windows_of(tokens: np.ndarray, length: int) -> np.ndarray:
    """All windows of `tokens [n]`: `[windows, length + 1]`."""
    count = count_windows(len(tokens), length)
    view = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[: count * length : length]
    return np.ascontiguousarray(view)


def num_training(count: int) -> int:
    """How many of the windows are for training: all but the last tenth."""
    return count - count // 10


def resident_splits(tokens: np.ndarray, length: int) -> tuple[Split, Split]:
    """The windows of `tokens [n]` for training and for evaluation, as arrays."""
    windows = windows_of(tokens, length)
    cut = num_training(len(windows))
    train, evaluation = (Split(len(part), arrays={"tokens": part}) for part in (windows[:cut], windows[cut:]))
    return train, evaluation


def preparation(separator: int | None = None) -> Callable[[Features], tuple[tf.Tensor, tf.Tensor]]:
    """The function that turns windows into inputs and targets.

    `tokens: [batch, time + 1]`, unsigned → all but the last, and all but the first, as int32. After a `separator` the
    target is -1: nothing tells how the next document begins.
    """

    def prepare(features: Features) -> tuple[tf.Tensor, tf.Tensor]:
        tokens = tf.cast(features["tokens"], tf.int32)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return inputs, targets if separator is None else tf.where(tf.equal(inputs, separator), -1, targets)

    return prepare


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """`num_bytes` of tokens, unsigned numbers of `dtype` below `vocabulary`, lowest byte first.

    `length`: tokens that a window sees. `remedy`: what is to be done where a token is not in the vocabulary.
    """

    path: Path
    dtype: np.dtype
    vocabulary: int
    length: int
    num_bytes: int
    remedy: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens in the file."""
        return self.num_bytes // self.dtype.itemsize

    @property
    def can_be_wrong(self) -> bool:
        """Whether a number of this type can be outside of the vocabulary."""
        return self.vocabulary <= np.iinfo(self.dtype).max

    def read(self, first: int = 0, count: int = -1) -> np.ndarray:
        """`count` tokens from number `first` on, as many as there are with -1."""
        stored = self.dtype.newbyteorder("<")
        values = np.fromfile(self.path, stored, count, offset=first * self.dtype.itemsize)
        return values.astype(self.dtype, copy=False)

    def fault_in(self, values: np.ndarray, first: int = 0) -> BadConfiguration | None:
        """The first of `values [n]` that is not in the vocabulary, as an error. `first`: the number of `values[0]`."""
        if not self.can_be_wrong or values.max(initial=0) < self.vocabulary:
            return None
        at = int(np.argmax(values >= self.vocabulary))
        return BadConfiguration(
            f"{self.path}: token number {first + at} is {values[at]}, not below the vocabulary of {self.vocabulary}; "
            f"{self.remedy}"
        )

    def sample(self) -> str:
        """What the file is, without its name and without reading all of it: its size, and a hash of some blocks."""
        digest = hashlib.sha256()
        last = max(self.num_bytes - _SAMPLE_BYTES, 0)
        with open(self.path, "rb") as file:
            for number in range(_SAMPLES):
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, last * number // (_SAMPLES - 1)))
        return f"{self.num_bytes}:{digest.hexdigest()}"

    def mapped(self) -> tf.Tensor:
        """All tokens `[num_tokens]`, in the memory of the host. A page of the file is read when it is asked for.

        Not by the operation ImmutableConst: TensorFlow folds it as a constant, and reads all of the file for that.
        """
        # TensorFlow ends the process where an address is not a multiple of 64; that of a page is.
        # Private and not reserved: NumPy gives away only what can be written, and no file is too large for that.
        with open(self.path, "rb") as file:
            try:
                flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                content = mmap.mmap(file.fileno(), self.num_bytes, flags, access)
            except ValueError as error:
                raise BadConfiguration(f"{self.path} changes while it is opened ({error}); wait for it") from None
        values = np.frombuffer(content, self.dtype)
        with tf.init_scope(), tf.device("CPU:0"):
            return tf.experimental.dlpack.from_dlpack(values.__dlpack__())

    def splits(self, request: Request) -> tuple[Split, Split]:
        """Windows for training and, the last tenth, for evaluation, held or read by index.

        Raises:
          BadConfiguration: a token of a file that is held is not in the vocabulary.
        """
        if request.is_resident(self.num_bytes):
            values = self.read()
            if fault := self.fault_in(values):
                raise fault
            return resident_splits(values, self.length)
        count, mapped = count_windows(self.num_tokens, self.length), self.mapped()
        cut = num_training(count)
        parts = TokenWindows(self, mapped, 0, cut), TokenWindows(self, mapped, cut, count - cut)
        train, evaluation = (Split(records.size, records=records) for records in parts)
        return train, evaluation


class TokenWindows(Records):
    """`size` windows of a file, from window number `first` on. `mapped`: the tokens of the whole file.

    What was mapped stays, also when the file is renamed, removed or grows. When it is cut short, the operating system
    ends the process that reads beyond its end.
    """

    def __init__(self, tokens: TokenFile, mapped: tf.Tensor, first: int, size: int):
        self.tokens, self.first, self.size, self._mapped = tokens, first, size, mapped

    def read(self, index: tf.Tensor) -> Example:
        """`tokens: [length + 1]`, as stored."""
        begin = (index + self.first) * self.tokens.length
        return {"tokens": tf.slice(self._mapped, [begin], [self.tokens.length + 1])}

    def decode(self, stored: Example, crop: Crop | None = None) -> Example:
        """The window, if all of it is in the vocabulary."""
        if not self.tokens.can_be_wrong:
            return stored
        largest = tf.reduce_max(tf.cast(stored["tokens"], tf.int64))
        # Without the branches that `tf.debugging` puts around it, which cost more than all the rest.
        inside = tf.raw_ops.Assert(condition=largest < self.tokens.vocabulary, data=["vocabulary", largest])
        with tf.control_dependencies([inside] if inside is not None else []):
            return {"tokens": tf.identity(stored["tokens"])}

    def where(self, index: int) -> str:
        """The file, and the numbers of the first and the last token of the window."""
        begin = (index + self.first) * self.tokens.length
        return f"{self.tokens.path}, tokens {begin} to {begin + self.tokens.length},"

    def changed(self, index: int) -> str:
        """Whether the file is there, and as long as it was."""
        return size_change(self.tokens.path, self.tokens.num_bytes)

    def fault(self, index: int) -> BadConfiguration | None:
        """A file that has changed, or a token that is not in the vocabulary. Never reads what is mapped."""
        if reason := self.changed(index):
            return BadConfiguration(f"{self.where(index)} has changed ({reason}); begin another run")
        begin = (index + self.first) * self.tokens.length
        return self.tokens.fault_in(self.tokens.read(begin, self.tokens.length + 1), begin)
