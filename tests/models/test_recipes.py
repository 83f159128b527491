"""Published recipes: every value, the number of parameters, the first loss, the curve of the rate, as published."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import optimizers, tasks
from models.recipes import RECIPES
from trainers.settings import options, recipes
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.flags import config_from, read
from trainers.settings.rules import with_epochs

IMAGENET, TOKENS = 1_281_167, "--dataset=tokens:somewhere"
SGD = "momentum,coupled=true,nesterov=false"
# What the published configurations say, written out here again.
PUBLISHED = {
    "resnet50": {
        "model": "resnet50",
        "dataset": "imagenet2012",
        "image_size": 224,
        "augment": "inception,flip",
        "batch_size": 4096,
        "train_epochs": 90.0,
        "warmup_epochs": 5.0,
        "train_steps": 28151,
        "warmup_steps": 1564,
        "optimizer": SGD,
        "learning_rate": 0.1 * 4096 / 256,
        "schedule": "stepwise,at=30.0x60.0x80.0,of=90.0",
        "weight_decay": 1e-4,
        "clip_norm": 0.0,
        "loss": "",
        "ema": 0.0,
    },
    "resnet50_fast": {
        "model": "resnet50",
        "dataset": "imagenet2012",
        "image_size": 192,
        "augment": "inception,flip",
        "batch_size": 512,
        "train_epochs": 88.0,
        "warmup_epochs": 2.0,
        "train_steps": 220201,
        "warmup_steps": 5005,
        "optimizer": SGD,
        "learning_rate": 1.7,
        "schedule": "cyclic",
        "weight_decay": 1e-4,
        "clip_norm": 0.0,
        "loss": "smoothed,label_smoothing=0.1",
        "ema": 0.0,
    },
    "vit_s16": {
        "model": "vit,depth=12,dropout=0.0,embedding=sincos,head=tanh,heads=6,patch=16,pool=mean,width=384",
        "dataset": "imagenet2012",
        "image_size": 224,
        "augment": "inception,flip,randaugment=10,mixup=0.2",
        "batch_size": 1024,
        "train_epochs": 90.0,
        "warmup_epochs": None,
        "train_steps": 112603,
        "warmup_steps": 10_000,
        "optimizer": "adamw,epsilon=1e-08",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "weight_decay": 1e-4 / 1e-3,
        "clip_norm": 1.0,
        "loss": "",
        "ema": 0.0,
    },
    "gpt2": {
        "model": "transformer,bias=false,depth=12,dropout=0.0,heads=12,scaled=true,width=768",
        "dataset": "tokens:somewhere",
        "image_size": 0,
        "augment": "",
        "batch_size": 491_520 // 1024,
        "train_epochs": None,
        "warmup_epochs": None,
        "train_steps": 600_000,
        "warmup_steps": 2000,
        "optimizer": "adamw,beta_2=0.95,epsilon=1e-08",
        "learning_rate": 6e-4,
        "schedule": "cosine,floor=0.1",
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "loss": "",
        "ema": 0.0,
    },
}
# Rates by step, by hand: epochs of 312.78, 2,502.28 and 1,251.14 steps.
RATES = {
    "resnet50": {0: 1.6 / 1564, 781: 0.8, 1563: 1.6, 9383: 1.6, 9384: 0.16, 18766: 0.16, 18767: 0.016}
    | {25022: 0.016, 25023: 1.6e-3, 28150: 1.6e-3},
    "resnet50_fast": {0: 1.7e-4, 5005: 1.7, 112_603: 0.85, 220_200: 1.7 / 215_196},
    "vit_s16": {0: 1e-7, 4999: 5e-4, 9999: 1e-3, 61_302: 5e-4, 112_602: 2.3e-13},
    "gpt2": {0: 3e-7, 1999: 6e-4, 301_000: 3.3e-4, 600_000: 6e-5},
}


def resolved(name, *flags, examples=IMAGENET):
    more = () if RECIPES[name].flags.get("dataset") else (TOKENS,)
    return with_epochs(config_from(["program", f"--recipe={name}", *more, *flags], ""), examples)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_values(name):
    config = resolved(name)
    assert {key: getattr(config, key) for key in PUBLISHED[name]} == pytest.approx(PUBLISHED[name])
    assert config.recipe == name
    assert set(RECIPES[name].flags) <= set(PUBLISHED[name]), "every value is held"
    for kind in ("model", "optimizer", "schedule"):
        assert options.check(kind, RECIPES[name].flags[kind]) == RECIPES[name].flags[kind], "in the one spelling"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_rate_follows_the_published_curve(name):
    config = resolved(name)
    rate = optimizers.schedule(config.schedule, config.learning_rate, config.warmup_steps, config.train_steps)
    for step, expected in RATES[name].items():
        assert float(rate(tf.constant(step, tf.int64))) == pytest.approx(expected, rel=1e-3, abs=1e-10), step


def test_flags_override_a_recipe():
    config = resolved("resnet50", "--batch_size=256", "--model=resnet18", "--train_steps=1000", examples=25_600)
    assert (config.batch_size, config.model, config.train_steps, config.train_epochs) == (256, "resnet18", 1000, None)
    assert (config.learning_rate, config.warmup_steps) == (1.6, 500)
    config = resolved("resnet50", "--train_steps=50")  # of which 5 epochs of warm-up are more
    assert (config.train_steps, config.warmup_steps) == (50, 5)
    config = resolved("vit_s16", "--train_steps=50", "--weight_decay=0")
    assert (config.train_steps, config.warmup_steps, config.weight_decay) == (50, 5, 0.0)
    config = resolved("gpt2", "--train_epochs=2", examples=48_000)
    assert (config.train_steps, config.train_epochs, config.warmup_steps) == (200, 2.0, 20)


def test_a_plan_names_what_the_run_has_in_place_of_the_recipe():
    line = recipes.described(resolved("resnet50", "--batch_size=256", "--train_steps=50"))
    assert line.startswith("resnet50: dataset imagenet2012; image_size 224; model resnet50; ")
    assert "batch_size 256 (not 4096); train_steps 50 (not train_epochs 90.0); warmup_epochs 5.0; " in line
    line = recipes.described(resolved("gpt2", "--train_epochs=2", examples=48_000))
    assert "train_epochs 2.0 (not train_steps 600000); warmup_steps 20 (not 2000); " in line


def test_a_recipe_that_cannot_be_is_one_line():
    with pytest.raises(BadConfiguration, match="--recipe 'resnet5' is not known; did you mean resnet50"):
        read(["program", "--recipe=resnet5"], "")
    with pytest.raises(BadConfiguration, match="--recipe gpt2 is for data of your own; name --dataset=tokens:PATH"):
        read(["program", "--recipe=gpt2"], "")


IMAGES = tasks.DataSpec("classification", (224, 224, 3), num_classes=1000)
TEXT = tasks.DataSpec("language", (1024,), "int32", num_classes=50_257, target_shape=(1024,))
SIZES = {
    "vit_s16": (PUBLISHED["vit_s16"]["model"], IMAGES, 22_122_472),
    "vit with a class token": ("vit,depth=12,heads=6,patch=16,width=384", IMAGES, 22_050_664),
    "vit by the mean, without a hidden layer": (
        "vit,depth=12,embedding=sincos,heads=6,patch=16,pool=mean,width=384",
        IMAGES,
        21_974_632,
    ),
    "gpt2": (PUBLISHED["gpt2"]["model"], TEXT, 124_337_664),
    "gpt2 with biases": ("transformer,depth=12,heads=12,width=768", TEXT, 124_439_808),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_model_has_the_published_number_of_parameters(name):
    text, spec, expected = SIZES[name]
    with zeros_for_chance():
        model, _ = tasks.model_of(text, spec)
        model.build((1, *spec.input_shape))
    assert model.count_params() == expected


def test_resnet50_has_the_published_number_of_parameters():
    model, _ = tasks.model_of("resnet50", tasks.DataSpec("classification", (64, 64, 3), num_classes=1000))
    model(tf.zeros([1, 64, 64, 3]))
    assert sum(math.prod(weight.shape) for weight in model.trainable_weights) == 25_557_032


def zeros_for_chance():
    """Within the block weights begin at 0, which takes no time."""
    patch = pytest.MonkeyPatch()
    patch.setattr(keras.initializers.RandomNormal, "__call__", lambda self, shape, dtype=None: tf.zeros(shape, dtype))
    return undone(patch)


class undone:  # noqa: N801 - a context
    def __init__(self, patch):
        self.patch = patch

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.patch.undo()


# At full width and with all classes, of less depth; the loss of a guess is that of as many equal chances.
FIRST = {
    "resnet50": ("resnet50,blocks=1x1x1x1", tasks.DataSpec("classification", (64, 64, 3), num_classes=1000)),
    "vit_s16": (
        PUBLISHED["vit_s16"]["model"].replace("depth=12", "depth=2"),
        tasks.DataSpec("classification", (64, 64, 3), num_classes=1000),
    ),
    "gpt2": (
        PUBLISHED["gpt2"]["model"].replace("depth=12", "depth=2"),
        tasks.DataSpec("language", (8,), "int32", num_classes=50_257, target_shape=(8,)),
    ),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_loss_before_the_first_update_is_that_of_a_guess(name):
    text, spec = FIRST[name]
    keras.utils.set_random_seed(0)
    chance = np.random.default_rng(0)
    model, task = tasks.model_of(text, spec)
    if spec.task == "language":
        inputs, targets = (tf.constant(chance.integers(0, spec.num_classes, (4, 8)), tf.int32) for _ in range(2))
    else:
        inputs = tf.constant(chance.normal(size=(16, *spec.input_shape)), tf.float32)
        targets = tf.constant(chance.integers(0, 1000, 16))
    loss = float(tf.reduce_mean(task.losses(targets, model(inputs, training=True))))
    allowed = 1e-4 if name == "vit_s16" else 0.25  # whose logits begin at 0
    assert loss == pytest.approx(math.log(spec.num_classes), abs=allowed)


def test_the_published_weights_decay():
    """Kernels of the vision transformer; matrices of GPT-2, those of tokens and positions too."""
    for name, decayed in {"vit_s16": {"kernel"}, "gpt2": {"kernel", "embedding", "positions"}}.items():
        text, spec = FIRST[name]
        with zeros_for_chance():
            model, _ = tasks.model_of(text, spec)
            model.build((1, *spec.input_shape))
        found = {weight.path.rpartition("/")[2] for weight in model.trainable_weights if len(weight.shape) > 1}
        assert found == decayed


def test_fixed_positions_are_sines_and_cosines_of_row_and_column():
    from models.transformers import sines_and_cosines

    found = sines_and_cosines((2, 3), 8)[0]
    for place, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        waves = [f(x * rate) for x in (column, row) for f in (math.sin, math.cos) for rate in (1.0, 1e-4)]
        np.testing.assert_allclose(found[place], waves, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(sines_and_cosines((2, 3), 8, 1)[0, 0], np.zeros(8))


def test_what_a_transformer_adds_begins_smaller_by_its_depth():
    keras.utils.set_random_seed(0)
    spec = tasks.DataSpec("language", (8,), "int32", num_classes=50, target_shape=(8,))
    model, _ = tasks.model_of("transformer,bias=false,depth=8,heads=2,scaled=true,width=64", spec)
    model.build((1, 8))
    for block in model.blocks:
        assert float(np.std(block.contract.kernel)) == pytest.approx(0.02 / 4, rel=0.1)
        assert float(np.std(block.expand.kernel)) == pytest.approx(0.02, rel=0.1)
    assert not [weight.path for weight in model.weights if weight.path.endswith(("bias", "offset"))]
