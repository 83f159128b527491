"""Arrays that a function of the user's own returns: held or read by index, the same examples; numbers that fit."""

import itertools
import sys

import numpy as np
import pytest
import tensorflow as tf

from trainers.input import batches, load
from trainers.input.array_records import ArrayRecords
from trainers.input.dataset import ImageOptions
from trainers.input.indexed import IndexedBatches
from trainers.input.resident import ResidentBatches
from trainers.settings.exit_codes import BadConfiguration

SIZE, BATCH = 50, 12
COUNT = itertools.count()
CHANCE = np.random.default_rng(0)
ROWS = CHANCE.normal(size=(SIZE, 5))
CLASSES = np.arange(SIZE) % 3
TOKENS = CHANCE.integers(0, 7, (SIZE, 8))
IMAGES = CHANCE.integers(0, 256, (SIZE, 9, 7, 3)).astype(np.uint8)
KINDS = {
    "rows": (ROWS, CLASSES),
    "numbers": (ROWS.astype(np.float16), ROWS[:, :2]),
    "truths": (ROWS > 0, CLASSES),
    "tokens": (TOKENS[:, :-1], TOKENS[:, 1:]),
    "images": (IMAGES, CLASSES),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """`own(inputs, targets, **flags)`: the data set of a function that returns these for both splits."""
    monkeypatch.chdir(tmp_path)
    names = []

    def made(inputs, targets, evaluation=None, **flags):
        names.append(f"own_data_{next(COUNT)}")
        (tmp_path / f"{names[-1]}.py").write_text("def data():\n    return SPLITS\n")
        monkeypatch.syspath_prepend(tmp_path)
        __import__(names[-1])
        sys.modules[names[-1]].SPLITS = (inputs, targets), evaluation or (inputs[:9], targets[:9])
        return load.load(f"{names[-1]}:data", str(tmp_path), **flags)

    yield made
    for name in names:
        sys.modules.pop(name)


def global_batches(split, replicas, steps, first=0, seed=3):
    """The global batches of steps `first … first + steps`, each feature in order of position."""
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    source = batches.batches(strategy, split, BATCH, seed)
    assert isinstance(source, ResidentBatches if split.arrays else IndexedBatches)
    source.start(first)

    @tf.function
    def batch(step):
        order = strategy.run(source.order, args=(tf.constant(first, tf.int64), tf.constant(first + steps, tf.int64)))
        return strategy.run(lambda feed, o: source.part(feed, o, step, 0)[0], args=(source.feed()[0], order))

    found = []
    for step in range(first, first + steps):
        features = batch(tf.constant(step, tf.int64))
        found.append({k: np.concatenate(strategy.experimental_local_results(v)) for k, v in features.items()})
    return found


def check_equal(found, expected, apart=0):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_allclose(one[key].astype(float), other[key].astype(float), 0, apart, err_msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_own_arrays_give_the_same_examples_held_and_read_by_index(own, kind):
    held, read = (own(*KINDS[kind], placement=placement) for placement in ("resident", "stream"))
    assert held.fingerprint == read.fingerprint and held.spec == read.spec
    expected = global_batches(held.train, 1, 9)  # two epochs
    for replicas in (1, 2):
        check_equal(global_batches(read.train, replicas, 9), expected)
    check_equal(global_batches(read.train, 2, 3, first=6), expected[6:])
    check_equal(global_batches(read.eval, 2, 1, seed=None), global_batches(held.eval, 1, 1, seed=None))


@pytest.mark.parametrize(("augment", "size"), [("flip", 6), ("inception", 0)])
def test_own_images_that_are_changed_are_the_same_held_and_read_by_index(own, augment, size):
    options = ImageOptions({augment: 0.08}, size)
    held, read = (own(*KINDS["images"], placement=each, images=options) for each in ("resident", "stream"))
    # A pixel of a crop may be rounded otherwise: what is held is resized by operations that GPUs have.
    check_equal(global_batches(read.train, 2, 5), global_batches(held.train, 1, 5), apart=int(augment == "inception"))


def test_inception_crops_own_images_as_they_are_stored(own):
    read = own(*KINDS["images"], images=ImageOptions({"inception": 0.08}, 6))
    pictures, size = read.train.records.pictures, (6, 6, 3)
    assert read.train.arrays is None and pictures.shape == size
    stored = read.train.records.read(tf.constant(4, tf.int64))
    np.testing.assert_array_equal(stored["image"], IMAGES[4])
    corner = tf.constant([1, 0, 6, 6])
    np.testing.assert_array_equal(read.train.records.decode(stored, lambda shape: corner)["image"], IMAGES[4, 1:7, :6])
    assert all(batch["image"].shape == (BATCH, *size) for batch in global_batches(read.train, 2, 2))


def test_the_graph_of_own_arrays_does_not_hold_them(own):
    rows = np.zeros([SIZE, 1 << 15], np.float32)
    records = own(rows, CLASSES, placement="stream").train.records

    @tf.function
    def read(index):
        return records.read(index)

    graph = read.get_concrete_function(tf.TensorSpec([], tf.int64)).graph.as_graph_def()
    assert graph.ByteSize() < rows.nbytes / 100


@pytest.mark.long
def test_arrays_above_2_gib_are_read_by_index():
    rows = np.zeros([2, (1 << 30) + 9], np.uint8)
    rows[1, -1] = 5
    *_, last = iter(ArrayRecords("rows", {"x": rows}).examples())
    assert int(last["x"][-1]) == 5


@pytest.mark.parametrize(
    ("inputs", "targets", "says"),
    [
        (
            np.full([SIZE, 2], 20240101123000),
            CLASSES,
            "20240101123000, outside of -2147483648 to 2147483647",
        ),
        (np.full([SIZE, 2], -(2**40)), CLASSES, "inputs of train hold -1099511627776, outside .* or floats"),
        (np.full([SIZE, 2], 2**63, np.uint64), CLASSES, "inputs of train hold 9223372036854775808, outside"),
        (ROWS, CLASSES + 2**40, "targets of train hold 1099511627778, outside .* give smaller"),
        (IMAGES, CLASSES + 2**40, "targets of train hold 1099511627778, outside .* give smaller"),
        (TOKENS, TOKENS + 2**40, r"targets of train hold \d+, outside .* give smaller"),
        (ROWS * 1e300, CLASSES, r"inputs of train hold .*e\+.*, beyond ±3.4e38, the range of float32; scale them"),
        (ROWS, ROWS * 1e300, r"targets of train hold .*e\+.*, beyond ±3.4e38, the range of float32; scale them"),
        (TOKENS - 1, TOKENS, "a token is below 0; number tokens from 0"),
    ],
)
def test_numbers_that_do_not_fit_are_answered_in_one_line(own, inputs, targets, says):
    with pytest.raises(BadConfiguration, match=f"--dataset own_data_.*{says}") as failure:
        own(inputs, targets)
    assert "\n" not in str(failure.value)


def test_numbers_that_do_not_fit_are_found_in_the_eval_split_too(own):
    evaluation = np.full([9, 2], 2**31), CLASSES[:9]
    with pytest.raises(BadConfiguration, match="the inputs of eval hold 2147483648, outside"):
        own(np.zeros([SIZE, 2], np.int64), CLASSES, evaluation)
    assert own(np.full([SIZE, 2], -(2**31)), CLASSES).train.arrays["features"].min() == -(2**31)
    held = own(np.full([SIZE, 2], np.inf), CLASSES).train.arrays["features"]
    assert np.isinf(held).all()  # as it was given


def test_a_loop_of_images_says_that_own_data_are_none(own):
    options = ImageOptions({"crop": 0.125})
    with pytest.raises(BadConfiguration, match=r"are no images, which the loop contrastive needs; give uint8 \[size,"):
        own(ROWS, CLASSES, images=options, needs_images="contrastive")
    with pytest.raises(BadConfiguration, match="are no images, which the loop contrastive needs"):
        own(IMAGES.astype(np.float32), CLASSES, images=options, needs_images="contrastive")
    assert own(IMAGES, CLASSES, images=options, needs_images="contrastive").spec.num_classes == 3
