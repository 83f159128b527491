"""What --augment does: each change by an independent reference, and each number a function of (seed, position)."""

import functools

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
import tensorflow as tf

from models import randomness, sums, tasks
from models.metrics import Accuracy
from trainers.input import batches
from trainers.input.augment import crops, mixing, randaugment
from trainers.input.augment.augmentation import Augmentation
from trainers.input.dataset import HALF, ImageOptions, Split, image_preparation
from trainers.input.records import Records
from trainers.settings import augmentation
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import check_batch, resolve

CHANCE = np.random.default_rng(0)
SHAPE = (12, 16, 3)
SIZE, BATCH = 40, 8
IMAGES = CHANCE.integers(0, 256, (SIZE, *SHAPE)).astype(np.uint8)
ARRAYS = {"image": IMAGES, "label": np.arange(SIZE, dtype=np.int64) % 5}
EVERYTHING = "crop,flip,randaugment=9,erase=0.5,mixup,cutmix"


class Held(Records):
    """Records out of arrays: the pixels are stored as bytes."""

    size = SIZE

    def read(self, index):
        return {"image": tf.io.encode_png(tf.gather(IMAGES, index)), "label": tf.gather(ARRAYS["label"], index)}

    def decode(self, stored, crop=None):
        return {"image": tf.ensure_shape(tf.io.decode_png(stored["image"]), SHAPE), "label": stored["label"]}

    def where(self, index):
        return f"image {index}"


def place(first=0, step=3, seed=1):
    return randomness.at(seed, tf.constant(step, tf.int64), tf.constant(first, tf.int64))


def words(text):
    return Augmentation(augmentation.parse(text), SHAPE[:2])


# The flag -------------------------------------------------------------------------------------------------------------


def test_words_compose_and_have_values_of_their_own():
    assert augmentation.parse("") == {}
    assert augmentation.parse("inception,flip,mixup=0.4") == {"inception": 0.08, "flip": 1.0, "mixup": 0.4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flop", "--augment 'flop' is not known; did you mean flip"),
        ("cut_mix=1", "did you mean cutmix"),
        ("flip,flip", "names flip twice"),
        ("flip=1", "flip takes no number"),
        ("erase=2", "erase=2 is not a number from 0 to 1"),
        ("mixup=much", "mixup=much is not a number"),
        ("mixup=nan", "mixup=nan is not a number"),
        ("flip,", "--augment '' is not known"),
    ],
)
def test_what_is_no_word_or_no_number_is_refused(text, message):
    with pytest.raises(BadConfiguration, match=message):
        resolve(Config(augment=text))


def test_augmentation_is_for_images_and_pairs_are_not_divided():
    with pytest.raises(BadConfiguration, match="--augment flip is for images, and --dataset text has none"):
        resolve(Config(model="transformer", augment="flip"))
    with pytest.raises(BadConfiguration, match="--image_size 32 is for images"):
        resolve(Config(model="wide_deep", image_size=32))
    config = resolve(Config(augment="mixup", batch_size=6))
    assert check_batch(config, 1) == 6
    with pytest.raises(BadConfiguration, match="does not divide over 2 replicas × pairs of mixed examples; use 4 or 8"):
        check_batch(config, 2)


# The same numbers everywhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["flip", "crop", "randaugment=10", "crop,flip,randaugment=5"])
def test_an_image_is_changed_alike_alone_and_among_others(text):
    augment = words(text)
    with place():
        together = augment.of_resident({"image": tf.constant(IMAGES)})["image"].numpy()
    assert not np.array_equal(together, IMAGES)
    for number in (0, 1, 17, 39):
        with place(first=number):
            np.testing.assert_array_equal(
                augment.of_one({"image": tf.constant(IMAGES[number])})["image"], together[number]
            )


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("text", ["flip", "crop", "crop,flip,erase=1"])
def test_the_labels_of_pixels_move_with_them(text, alone):
    augment, masks = words(text), IMAGES[..., 0] // 2
    with place():
        if alone:
            changed = augment.of_one({"image": tf.constant(IMAGES[0]), "mask": tf.constant(masks[0])})
        else:
            changed = augment.of_resident({"image": tf.constant(IMAGES), "mask": tf.constant(masks)})
    image, mask = changed["image"].numpy(), changed["mask"].numpy()
    np.testing.assert_array_equal(image[..., 0] // 2, mask)
    assert mask.dtype == np.uint8 and (alone or not np.array_equal(mask, masks))
    with place():
        last = augment.of_batch({"image": tf.constant(image)[None] if alone else changed["image"], "mask": mask})
    np.testing.assert_array_equal(last["mask"], mask)
    assert ("erase" in text) == (not np.array_equal(np.squeeze(last["image"]), np.squeeze(image)))


@pytest.mark.parametrize("word", [name for name, word in augmentation.WORDS.items() if not word.masks])
def test_what_would_move_an_image_away_from_its_labels_is_refused(word):
    with pytest.raises(BadConfiguration, match=f"--augment {word} does not move .* choose of: crop, flip, erase"):
        resolve(Config(model="unet", augment=f"flip,{word}"))


def test_images_are_not_resized_without_their_labels():
    with pytest.raises(BadConfiguration, match="--image_size 64 would resize images and not their labels"):
        resolve(Config(model="unet", image_size=64))


def global_batches(split, replicas, parts, steps=3, views=1):
    """Images, labels and, of mixed ones, shares of some global batches, in order of position."""
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    source = batches.batches(strategy, split, BATCH, 7, parts, views)
    source.start(0)

    @tf.function
    def batch(step):
        order = strategy.run(source.order, args=(tf.constant(0, tf.int64), tf.constant(steps, tf.int64)))
        feed, _ = source.feed()
        return [strategy.run(source.part, args=(feed, order, step, number))[0] for number in range(parts)]

    rows = {"image": [], "label": [], "other_label": [], "share": []}
    for step in range(steps):
        for features in batch(tf.constant(step, tf.int64)):
            for name in features:
                rows[name] += [value.numpy() for value in strategy.experimental_local_results(features[name])]
    return {name: np.concatenate(values) for name, values in rows.items() if values}


@functools.cache
def batches_of_everything(form, replicas, parts):
    """Batches under all words. Compiling them takes seconds, so each kind is made once."""
    held = {"arrays": ARRAYS} if form == "resident" else {"records": Held()}
    return global_batches(Split(SIZE, augmentation=words(EVERYTHING), **held), replicas, parts)


@pytest.mark.parametrize("form", ["resident", "indexed"])
def test_replicas_and_parts_change_no_bit_of_augmented_batches(form):
    expected = batches_of_everything(form, 1, 1)
    for replicas, parts in ((2, 1), (4, 1), (2, 2)):
        got = batches_of_everything(form, replicas, parts)
        for name, values in expected.items():
            np.testing.assert_array_equal(got[name], values, err_msg=f"{name}, {replicas} replicas, {parts} parts")


def test_resident_and_indexed_batches_are_augmented_alike():
    indexed = batches_of_everything("indexed", 2, 1)
    for name, values in batches_of_everything("resident", 2, 1).items():
        np.testing.assert_array_equal(indexed[name], values)


@pytest.mark.parametrize("form", ["resident", "indexed"])
def test_views_of_an_example_are_augmented_by_numbers_of_their_own(form):
    held = {"arrays": ARRAYS} if form == "resident" else {"records": Held()}
    text = "crop,flip,erase=0.5"
    rows = global_batches(Split(SIZE, augmentation=words(text), **held), 1, 1, views=2)
    np.testing.assert_array_equal(rows["label"][0::2], rows["label"][1::2])
    alike = [np.array_equal(one, other) for one, other in zip(rows["image"][0::2], rows["image"][1::2], strict=True)]
    assert np.mean(alike) < 0.1
    spread = global_batches(Split(SIZE, augmentation=words(text), **held), 2, 1, views=2)
    for name, values in rows.items():
        np.testing.assert_array_equal(spread[name], values)


def test_evaluation_is_not_augmented():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    source = batches.batches(strategy, Split(SIZE, arrays=ARRAYS, augmentation=words("flip")), BATCH, None)
    assert source.augmentation is None


# Geometry -------------------------------------------------------------------------------------------------------------


def test_inception_crops_have_the_area_and_the_aspect_of_the_paper():
    shape = np.tile([[375, 500]], [4000, 1]).astype(np.int32)
    with place():
        top, left, height, width = crops.inception(tf.constant(shape), 0.08).numpy().T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 375).all() and (left + width <= 500).all()
    area, aspect = height * width / (375 * 500), width / height
    # What does not fit is drawn anew, so that large areas are rarer than small ones.
    wanted, shapes = CHANCE.uniform(0.08, 1, 40_000), np.exp(CHANCE.uniform(np.log(3 / 4), np.log(4 / 3), 40_000))
    pixels = wanted * 375 * 500
    expected = wanted[(np.sqrt(pixels / shapes) <= 375) & (np.sqrt(pixels * shapes) <= 500)].mean()
    assert area.min() > 0.078 and area.max() <= 1.0 and abs(area.mean() - expected) < 0.02
    assert aspect.min() > 0.74 and aspect.max() < 1.345
    # Every place is reached: the largest offsets too.
    assert (top + height == 375).any() and (left + width == 500).any() and (top == 0).any()


def test_an_image_in_which_no_draw_fits_gives_its_central_square():
    with place():
        crop = crops.inception(tf.constant([[4, 400]]), 1.0).numpy()[0]
    assert crop.tolist() == [0, 198, 4, 4]


def test_a_resized_crop_is_that_of_tensorflow():
    boxes = np.array([[0, 0, 12, 16], [3, 2, 5, 9], [11, 15, 1, 1], [4, 0, 8, 3]], np.int32)
    got = crops.resized(tf.constant(IMAGES[:4]), tf.constant(boxes), (7, 9)).numpy().astype(int)
    for image, (top, left, height, width), own in zip(IMAGES, boxes, got, strict=False):
        expected = tf.image.resize(image[top : top + height, left : left + width], (7, 9)).numpy()
        assert np.abs(own - expected).max() <= 0.51


def test_shifts_reach_an_eighth_and_leave_black():
    white = np.full((300, 16, 16, 1), 255, np.uint8)
    with place():
        shifted = crops.shifted(tf.constant(white), 0.125, alone=False).numpy()
    rows = (shifted.max(axis=(2, 3)) > 0).sum(axis=1)
    assert sorted(set(rows.tolist())) == [14, 15, 16]
    assert set(np.unique(shifted)) == {0, 255}


def test_every_second_image_is_reflected():
    with place():
        flipped = crops.flipped(tf.constant(IMAGES), alone=False).numpy()
    same = [np.array_equal(a, b) for a, b in zip(flipped, IMAGES, strict=True)]
    reflected = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(same, reflected, strict=True)) and 10 < sum(reflected) < 30


# RandAugment, by Pillow -----------------------------------------------------------------------------------------------


def enhanced(kind, image, magnitude):
    return getattr(PIL.ImageEnhance, kind)(image).enhance(magnitude / 10 * 1.8 + 0.1)


PILLOW = {
    "identity": lambda image, m: image,
    "autocontrast": lambda image, m: PIL.ImageOps.autocontrast(image),
    "equalize": lambda image, m: PIL.ImageOps.equalize(image),
    "solarize": lambda image, m: PIL.ImageOps.solarize(image, 256 * (1 - m / 10)),
    "posterize": lambda image, m: PIL.ImageOps.posterize(image, 8 - round(4 * m / 10)),
    "color": functools.partial(enhanced, "Color"),
    "contrast": functools.partial(enhanced, "Contrast"),
    "brightness": functools.partial(enhanced, "Brightness"),
    "sharpness": functools.partial(enhanced, "Sharpness"),
}


@pytest.mark.parametrize("magnitude", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_on_colours_is_pillows(name, magnitude):
    dark = (IMAGES[:3].astype(int) // 2 + 20).astype(np.uint8)
    operation = randaugment.OPERATIONS[name]
    got = np.round(operation(tf.constant(dark, tf.float32), tf.ones([3]), magnitude).numpy()).astype(int)
    for image, own in zip(dark, got, strict=True):
        expected = np.asarray(PILLOW[name](PIL.Image.fromarray(image), magnitude)).astype(int)
        assert np.abs(own - expected).max() <= 2, name


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_an_operation_on_places_is_pillows(name, sign):
    """Pillow maps places of the output to the input, about the corner; ours about the centre."""
    size, magnitude = 33, 10.0
    image = np.kron(CHANCE.integers(0, 256, (11, 11)), np.ones((3, 3))).astype(np.uint8)
    angle, centre = np.radians(30) * sign, (size - 1) / 2
    matrices = {
        "rotate": [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]],
        "shear_x": [[1, 0.3 * sign], [0, 1]],
        "shear_y": [[1, 0], [0.3 * sign, 1]],
    }
    matrix = np.array(matrices.get(name, np.eye(2)))
    moved = np.array(
        [round(100 / 224 * size) * sign if name.endswith(axis) and "translate" in name else 0 for axis in "xy"]
    )
    y, x = np.mgrid[:size, :size]
    source = np.einsum("ij,jyx->iyx", matrix, np.stack([x - centre, y - centre])) + centre + moved[:, None, None]
    column, row = np.rint(source).astype(int)
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    expected = np.where(inside, image[np.clip(row, 0, size - 1), np.clip(column, 0, size - 1)], 128)
    operation = randaugment.OPERATIONS[name]
    got = operation(tf.constant(image[None, ..., None], tf.float32), tf.constant([sign]), magnitude)[0, ..., 0].numpy()
    assert (got != expected).mean() < 0.03  # places between two pixels may be rounded to either


def test_all_operations_are_drawn_and_magnitude_matters():
    images = np.repeat(IMAGES[:1], 400, axis=0)
    with place():
        strong = randaugment.randaugmented(tf.constant(images), 10.0, alone=False).numpy()
        weak = randaugment.randaugmented(tf.constant(images), 1.0, alone=False).numpy()
    assert len({image.tobytes() for image in strong}) > 80
    difference = [np.abs(values.astype(int) - images).mean() for values in (weak, strong)]
    assert difference[0] < difference[1]


def test_grey_images_are_augmented_too():
    grey = tf.constant(IMAGES[..., :1])
    with place():
        changed = randaugment.randaugmented(grey, 10.0, alone=False)
    assert changed.shape == grey.shape and changed.dtype == tf.uint8


# Mixing and erasing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_of_a_beta_distribution(alpha):
    with place():
        draws = mixing.beta(tf.constant(20_000), alpha, "x").numpy().astype(np.float64)
    assert draws.min() >= 0 and draws.max() <= 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert draws.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    # The fourth moment tells a beta distribution from others of this variance.
    fourth = 3 / ((2 * alpha + 1) * (2 * alpha + 3)) / 16
    assert ((draws - 0.5) ** 4).mean() == pytest.approx(fourth, rel=0.05)


def test_mixup_blends_neighbours():
    share = tf.constant(np.linspace(0, 1, SIZE), tf.float32)
    images = IMAGES.astype(np.float32)
    mixed = mixing.mixed_up(tf.constant(images), share).numpy()
    other = images.reshape(-1, 2, *SHAPE)[:, ::-1].reshape(images.shape)
    expected = share.numpy()[:, None, None, None] * images + (1 - share.numpy())[:, None, None, None] * other
    np.testing.assert_allclose(mixed, expected, atol=1e-3)


def test_the_share_of_cutmix_is_that_of_the_pixels():
    black_white = np.zeros((SIZE, *SHAPE), np.float32)
    black_white[1::2] = 255
    with place():
        mixed, own = mixing.cut_mixed(tf.constant(black_white), tf.constant(CHANCE.uniform(size=SIZE), tf.float32))
    same = (mixed.numpy() == black_white).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(own, same, atol=1e-6)
    assert 0.3 < own.numpy().mean() < 0.9


def test_one_of_two_mixings_is_drawn_for_a_batch():
    augment, kinds = words("mixup=1,cutmix=1"), set()
    black_white = np.zeros((8, *SHAPE), np.float32)
    black_white[1::2] = 255
    for step in range(20):
        with place(step=step):
            images = augment.of_batch({"image": tf.constant(black_white), "label": tf.range(8)})["image"].numpy()
        kinds.add("cutmix" if set(np.unique(images)) <= {0.0, 255.0} else "mixup")
    assert kinds == {"mixup", "cutmix"}


def test_erasing_fills_a_rectangle_with_noise_as_often_as_it_should():
    grey = np.full((6000, 24, 24, 1), 300, np.float32)
    with place():
        erased = mixing.erased(tf.constant(grey), 0.25).numpy()
    changed = (erased != 300).any(axis=-1)
    hit = changed.any(axis=(1, 2))
    assert 0.23 < hit.mean() < 0.27
    share = changed[hit].mean(axis=(1, 2))
    assert share.min() > 0.005 and share.max() < 0.40
    for image in changed[hit][:20]:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_mixed_labels_go_through_loss_and_metrics():
    spec = tasks.DataSpec("classification", (4,), num_classes=5)
    task = tasks.classification(spec)
    logits = tf.constant(CHANCE.normal(size=(6, 5)), tf.float32)
    own, other = np.array([0, 1, 2, 3, 4, 0]), np.array([1, 0, 3, 2, 0, 4])
    share = np.array([1.0, 0.0, 0.5, 0.3, 0.9, 0.2], np.float32)
    targets = tasks.Mixed(tf.constant(own), tf.constant(other), tf.constant(share))
    soft = np.eye(5)[own] * share[:, None] + np.eye(5)[other] * (1 - share)[:, None]
    expected = -(soft * tf.nn.log_softmax(logits).numpy()).sum(axis=1)
    losses = task.losses(targets, logits)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    layout = sums.Sums({"accuracy": Accuracy()})
    values = layout.values(tf.cast(layout.of_examples(targets, logits, losses, tf.ones([6])), tf.float64))
    best = np.argmax(logits, axis=1)
    accuracy = (share * (best == own) + (1 - share) * (best == other)).mean()
    np.testing.assert_allclose(values, [expected.mean(), accuracy], rtol=1e-5)


# Preparation ----------------------------------------------------------------------------------------------------------


def test_pixels_are_normalized_as_the_card_says():
    features = {"image": tf.constant(IMAGES[:2]), "label": tf.constant([1, 2])}
    plain, labels = image_preparation(ImageOptions(), 3)(features)
    np.testing.assert_array_equal(plain, tf.cast(IMAGES[:2], tf.float32) * (2 / 255) - 1)
    assert labels.numpy().tolist() == [1, 2]
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    own, _ = image_preparation(ImageOptions(mean=mean, deviation=deviation), 3)(features)
    np.testing.assert_allclose(own, (IMAGES[:2] / 255 - mean) / deviation, atol=1e-5)
    grey, _ = image_preparation(ImageOptions(mean=mean, deviation=deviation), 1)(
        {"image": IMAGES[:2, ..., :1], "label": 0}
    )
    assert grey.numpy().max() <= 1 and HALF == (0.5, 0.5, 0.5)


def test_a_run_with_everything_resumes_bit_for_bit(run, tmp_path):
    from conftest import as_after, weights

    flags = {"augment": EVERYTHING, "deterministic": True, "batch_size": 16, "log_every": 0, "warmup_steps": 0}
    flags |= {"replicas": 2, "model": "mlp", "schedule": "constant"}
    run("whole", train_steps=8, checkpoint_every=4, **flags)
    as_after(4, tmp_path / "whole", "halves")
    run("halves", train_steps=8, checkpoint_every=4, **flags)
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(np.array_equal(whole[name], halves[name]) for name in whole)
