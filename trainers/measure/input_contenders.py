"""One contender of `trainers.measure.input_pipelines`, in this process: its figures, as lines of JSON."""

import functools
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from absl import logging

from models import randomness
from trainers.input import load
from trainers.input.batches import batches
from trainers.input.dataset import Features, ImageOptions, Split
from trainers.input.image_files import ImageFiles
from trainers.input.tfrecords import TFRecordImages
from trainers.measure.input_pipelines import PREPARE, InputSettings
from trainers.run.replicas import on_replicas
from trainers.settings import augmentation
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import devices, machine

# `advance(n)`: takes n batches.
Advance = Callable[[int], None]
# Of TensorFlow's guides and most public code.
_BUFFER = 10_000
_READY_BATCHES = 2
# Of the memory that is free, what decoded images in a buffer may fill.
_MEMORY_SHARE = 0.5
# Of a measurement, what one call should take.
_CALL_SHARE = 0.25


def training_split(settings: InputSettings) -> Split:
    """The split whose examples are read.

    Raises:
      BadConfiguration: it is not of images that can be read by index.
    """
    options = ImageOptions(augmentation.parse(settings.augment), settings.image_size)
    split = load.load(settings.dataset, settings.data_dir, "stream", images=options).train
    if not isinstance(split.records, (ImageFiles, TFRecordImages)):
        raise BadConfiguration(
            f"--input {settings.dataset!r} is not images that can be read by index; pass images:DIR, or a set of "
            "TensorFlow Datasets with images in TFRecord files"
        )
    return split


def reduced(features: Features) -> tf.Tensor:
    """A scalar, int64, that needs every pixel of a batch."""
    return tf.cast(tf.reduce_max(features["image"]), tf.int64) + tf.reduce_sum(tf.cast(features["label"], tf.int64))


# ----------------------------------------------------------------------------------------------------------------------
# The contenders: each begins at a step.


def lockstep(split: Split, settings: InputSettings, step: int) -> Advance:
    """The trainer's own source, in a compiled loop such as the trainer's."""
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    source = batches(strategy, split, settings.batch_size, settings.seed)
    source.start(step)
    order_of = on_replicas(strategy, source.order)
    take = on_replicas(strategy, lambda feed, order, at: reduced(source.part(feed, order, at, 0)[0]))

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)] * 2)
    def call(first: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        total, at = tf.constant(0, tf.int64), first
        order = order_of(first, last)
        while at < last:
            feed, _ = source.feed()
            total += take(feed, order, at)
            at += 1
        return total

    at = step

    def advance(count: int) -> None:
        nonlocal at
        call(tf.constant(at, tf.int64), tf.constant(at + count, tf.int64)).numpy()
        at += count

    return advance


def advance_through(elements: tf.data.Dataset) -> Advance:
    """Takes batches in a compiled loop."""
    iterator = iter(elements)

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)])
    def call(count: tf.Tensor) -> tf.Tensor:
        total = tf.constant(0, tf.int64)
        for _ in tf.range(count):
            total += reduced(next(iterator))
        return total

    return lambda count: call(tf.constant(count, tf.int64)).numpy()


def sequential_elements(split: Split, settings: InputSettings, step: int) -> tf.data.Dataset:
    """The examples of the files in their order, changed as ours are."""
    records, size = split.records, settings.batch_size

    @tf.autograph.experimental.do_not_convert
    def example(number: tf.Tensor, stored: Features) -> Features:
        with randomness.at(settings.seed, number // size, number % size):
            return split.augmentation.of_one(records.decode(stored, split.augmentation.crop))

    stored = records.in_order().repeat().skip(step * size)
    numbered = tf.data.Dataset.zip(tf.data.Dataset.range(step * size, tf.int64.max), stored)
    examples = numbered.map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return examples.batch(size, drop_remainder=True).prefetch(_READY_BATCHES)


class Usual:
    """tf.data as TensorFlow's guides and Model Garden write it, each time in the fastest way that they know.

    The order need not be deterministic. What is repeated is shuffled, rather than the other way round, so that no
    epoch ends with an empty buffer. Pixels are rounded to uint8, which is faster than batches of float32.
    """

    def __init__(self, split: Split, settings: InputSettings):
        self.records, self.batch_size = split.records, settings.batch_size
        self.size = (settings.image_size, settings.image_size)
        self.least_area = split.augmentation.words["inception"]
        self.flips = "flip" in split.augmentation.words
        self.in_files = isinstance(self.records, ImageFiles)
        names = self.records.names if self.in_files else ()
        self.jpeg_alone = bool(names) and all(Path(name).suffix.lower() in (".jpg", ".jpeg") for name in names)

    def elements(self, step: int) -> tf.data.Dataset:
        """Batches from a step on. Encoded records are shuffled and skipped."""
        stored = self._stored(shuffled=True).skip(step * self.batch_size)
        return self._batches(stored.map(self._cropped, num_parallel_calls=tf.data.AUTOTUNE))

    def elements_decoded(self, step: int) -> tf.data.Dataset:
        """Batches from a step on. Decoded images are shuffled and skipped."""
        decoded = self._stored(shuffled=False).map(self._decoded, num_parallel_calls=tf.data.AUTOTUNE)
        decoded = decoded.shuffle(self.decoded_buffer()).skip(step * self.batch_size)
        return self._batches(decoded.map(self._changed, num_parallel_calls=tf.data.AUTOTUNE))

    def decoded_buffer(self) -> int:
        """Images in the buffer: 10,000, or all that there are, or as many as the memory has room for."""
        example = self._decoded(*next(iter(self._stored(shuffled=False))))["image"]
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        room = int(free * _MEMORY_SHARE / int(tf.size(example)))
        return max(min(_BUFFER, self.records.size, room), 1)

    def _stored(self, shuffled: bool) -> tf.data.Dataset:
        """What is stored, repeated: names of files with labels, or records."""
        records = self.records
        if self.in_files:
            paths = [f"{records.root}{os.sep}{name}" for name in records.names]
            # The list is shuffled in any case: it costs nothing.
            return tf.data.Dataset.from_tensor_slices((paths, records.labels)).repeat().shuffle(len(paths))
        paths = [str(path) for path in records.shards.paths]
        shards = tf.data.Dataset.from_tensor_slices(paths).repeat().shuffle(len(paths))
        stored = shards.interleave(
            tf.data.TFRecordDataset,
            cycle_length=min(16, len(paths)),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=False,
        ).map(lambda record: (record,))
        return stored.shuffle(min(_BUFFER, records.size)) if shuffled else stored

    def _batches(self, examples: tf.data.Dataset) -> tf.data.Dataset:
        options = tf.data.Options()
        options.deterministic = False
        batched = examples.batch(self.batch_size, drop_remainder=True)
        return batched.prefetch(tf.data.AUTOTUNE).with_options(options)

    def _opened(self, stored: tf.Tensor, label: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        """Encoded bytes and the label."""
        if self.in_files:
            return tf.io.read_file(stored), label
        example = self.records.parse(stored)
        return example["image"], example["label"]

    def _cropped(self, stored: tf.Tensor, label: tf.Tensor | None = None) -> Features:
        encoded, label = self._opened(stored, label)

        def from_jpeg() -> tf.Tensor:
            begin, extent = self._window(tf.image.extract_jpeg_shape(encoded))
            return tf.image.decode_and_crop_jpeg(
                encoded,
                tf.stack([begin[0], begin[1], extent[0], extent[1]]),
                channels=3,
                fancy_upscaling=False,
                dct_method="INTEGER_FAST",
            )

        def from_any() -> tf.Tensor:
            image = self._pixels(encoded)
            return tf.slice(image, *self._window(tf.shape(image)))

        image = from_jpeg() if self.jpeg_alone else tf.cond(tf.io.is_jpeg(encoded), from_jpeg, from_any)
        return {"image": self._finished(image), "label": label}

    def _pixels(self, encoded: tf.Tensor) -> tf.Tensor:
        def from_jpeg() -> tf.Tensor:
            return tf.io.decode_jpeg(encoded, channels=3, fancy_upscaling=False, dct_method="INTEGER_FAST")

        def from_any() -> tf.Tensor:
            return tf.io.decode_image(encoded, channels=3, expand_animations=False)

        return from_jpeg() if self.jpeg_alone else tf.cond(tf.io.is_jpeg(encoded), from_jpeg, from_any)

    def _decoded(self, stored: tf.Tensor, label: tf.Tensor | None = None) -> Features:
        encoded, label = self._opened(stored, label)
        return {"image": self._pixels(encoded), "label": label}

    def _changed(self, features: Features) -> Features:
        image = features["image"]
        return features | {"image": self._finished(tf.slice(image, *self._window(tf.shape(image))))}

    def _window(self, shape: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Begin and extent, `[3]` each, of a crop as Model Garden draws it."""
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(self.least_area, 1.0),
            max_attempts=10,
            min_object_covered=0.0,
            use_image_if_no_bounding_boxes=True,
        )
        return begin, extent

    def _finished(self, image: tf.Tensor) -> tf.Tensor:
        image = tf.cast(tf.image.resize(image, self.size), tf.uint8)
        image = tf.image.random_flip_left_right(image) if self.flips else image
        return tf.ensure_shape(image, (*self.size, 3))


def starter(key: str, split: Split, settings: InputSettings) -> Callable[[int], Advance]:
    """The function that begins a contender of `KINDS` at a step."""
    if key == "lockstep":
        return functools.partial(lockstep, split, settings)
    if key == "sequential":
        return lambda step: advance_through(sequential_elements(split, settings, step))
    usual = Usual(split, settings)
    elements = {"usual": usual.elements, "usual_decoded": usual.elements_decoded}[key]
    return lambda step: advance_through(elements(step))


# ----------------------------------------------------------------------------------------------------------------------
# The measurement.


def peak_mib() -> float:
    """The most memory that this process has held."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def say(**facts: Any) -> None:
    """A line for the process that has started this one."""
    print(json.dumps(facts), flush=True)


def begun(start: Callable[[int], Advance], step: int) -> tuple[Advance, float]:
    """The contender after its first batch, and the seconds until then."""
    began = time.perf_counter()
    advance = start(step)
    advance(1)
    return advance, time.perf_counter() - began


def measure(start: Callable[[int], Advance], settings: InputSettings, middle: int) -> None:
    """Says the figures of a contender, each when it is found. `middle`: the step in the middle of an epoch."""
    before = peak_mib()
    advance, seconds = begun(start, 0)
    say(first_batch_seconds=seconds)
    began = time.perf_counter()
    advance(1)
    count = max(int(settings.seconds * _CALL_SHARE / (time.perf_counter() - began)), 1)
    done, cpu, began = 0, time.process_time(), time.perf_counter()
    while (elapsed := time.perf_counter() - began) < settings.seconds:
        advance(count)
        done += count * settings.batch_size
    say(images_per_second=done / elapsed, images_per_cpu_second=done / (time.process_time() - cpu))
    say(peak_mib=peak_mib() - before)
    del advance
    gc.collect()
    say(middle_batch_seconds=begun(start, middle)[1])


def run(arguments: tuple[str, InputSettings]) -> None:
    """Measures a contender, or loads the data set alone, which may take long the first time."""
    key, settings = arguments
    logging.set_verbosity(logging.ERROR)
    tf.config.set_visible_devices([], "GPU")
    tf.get_logger().setLevel("ERROR")
    devices.keep_freed_memory()
    split = training_split(settings)
    if key == PREPARE:
        say(machine=machine.facts(), examples=split.size)
        return
    measure(starter(key, split, settings), settings, max(split.size // settings.batch_size // 2, 1))


def read(argv: Sequence[str]) -> tuple[str, InputSettings]:
    """The contender and its settings, of a command line."""
    return argv[1], InputSettings(**json.loads(argv[2]))
