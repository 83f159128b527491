"""Published recipes by name, `--recipe=NAME`: values of flags, apart from the models. Free of TensorFlow."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RecipeCard:
    """A recipe: what a run's flags are unless they are given.

    `flags`: by name. `source`: where it was published. `reaches`: what its authors report. `data`: what `--dataset`
    must name, where `flags` has none. `differs`: what of the published training is not done, or is done otherwise.
    """

    flags: Mapping[str, Any]
    source: str
    reaches: str
    data: str = ""
    differs: tuple[str, ...] = ()


_IMAGES = {"dataset": "imagenet2012", "image_size": 224}
_VALUES = "pixels in [-1, 1], not in standard deviations of the data"

RECIPES: dict[str, RecipeCard] = {
    "resnet50": RecipeCard(
        _IMAGES
        | {
            "model": "resnet50",
            "augment": "inception,flip",
            "batch_size": 4096,
            "train_epochs": 90.0,
            "warmup_epochs": 5.0,
            "optimizer": "momentum,coupled=true,nesterov=false",
            "learning_rate": 1.6,
            "schedule": "stepwise,at=30.0x60.0x80.0,of=90.0",
            "weight_decay": 1e-4,
            "clip_norm": 0.0,
        },
        source="TensorFlow Model Garden, resnet_imagenet",
        reaches="76.1 % top-1 on ImageNet",
        differs=(_VALUES, "batch normalization over the global batch", "no L2 of biases"),
    ),
    "resnet50_fast": RecipeCard(
        _IMAGES
        | {
            "model": "resnet50",
            "image_size": 192,
            "augment": "inception,flip",
            "batch_size": 512,
            "train_epochs": 88.0,
            "warmup_epochs": 2.0,
            "optimizer": "momentum,coupled=true,nesterov=false",
            "learning_rate": 1.7,
            "schedule": "cyclic",
            "weight_decay": 1e-4,
            "clip_norm": 0.0,
            "loss": "smoothed,label_smoothing=0.1",
        },
        source="ffcv-imagenet, rn50_88_epochs",
        reaches="78.4 % top-1 on ImageNet",
        differs=(
            "192 pixels throughout, not 160 until epoch 65 and 192 from 76 on",
            "evaluated at that size, not at 256 with the mean over the mirrored image",
            "no blur before strided convolutions",
            "a batch of 512 in all; the published script gives each of 8 processes one",
            "no decay of biases",
            _VALUES,
        ),
    ),
    "vit_s16": RecipeCard(
        _IMAGES
        | {
            "model": "vit,depth=12,dropout=0.0,embedding=sincos,head=tanh,heads=6,patch=16,pool=mean,width=384",
            "augment": "inception,flip,randaugment=10,mixup=0.2",
            "batch_size": 1024,
            "train_epochs": 90.0,
            "warmup_steps": 10_000,
            "optimizer": "adamw,epsilon=1e-08",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "weight_decay": 0.1,  # 1e-4, times the schedule and not the rate of 1e-3
            "clip_norm": 1.0,
        },
        source="big_vision, vit_s16_i1k; Beyer et al., Better plain ViT baselines for ImageNet-1k, 2022",
        reaches="76.5 % top-1 on ImageNet",
        differs=(
            "GELU exact, not by tanh",
            "kernels begin normal, not by Glorot",
            "all of the training split, not 99 %",
        ),
    ),
    "gpt2": RecipeCard(
        {
            "model": "transformer,bias=false,depth=12,dropout=0.0,heads=12,scaled=true,width=768",
            "batch_size": 480,  # of 1,024 tokens each: 491,520
            "train_steps": 600_000,
            "warmup_steps": 2000,
            "optimizer": "adamw,beta_2=0.95,epsilon=1e-08",
            "learning_rate": 6e-4,
            "schedule": "cosine,floor=0.1",
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        },
        source="nanoGPT, config/train_gpt2.py",
        reaches="a loss of 2.85 on OpenWebText",
        data="tokens:PATH, in windows of 1,024",
        differs=("an epsilon of 1e-6 in normalizations, not 1e-5", "windows do not overlap"),
    ),
}
