"""Any image classification set of TensorFlow Datasets, by its name there."""

import tensorflow_datasets as tfds

from models.names import nearest
from trainers.input import builders
from trainers.input.dataset import Dataset, Request
from trainers.settings.data_cards import DATASETS
from trainers.settings.exit_codes import BadConfiguration


def load(request: Request) -> Dataset:
    """The set `request.name`, prepared in `data_dir`.

    Raises:
      BadConfiguration: no such set, one of another kind, no network for it, or no space.
    """
    with builders.readable_errors(request):
        builder = builders.prepared(lambda: builder_of(request), request)
        return builders.image_classification(builder, request.name, request)


def builder_of(request: Request) -> tfds.core.DatasetBuilder:
    name = request.name
    try:
        return tfds.builder(name, data_dir=request.data_dir)
    except tfds.core.DatasetNotFoundError:
        near = nearest(name, {*DATASETS, *tfds.list_builders()}, 3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise BadConfiguration(
            f"--dataset {name!r} is not known{hint}; choose one of: {', '.join(sorted(DATASETS))}, "
            "or an image classification set of TensorFlow Datasets such as mnist or cifar10"
        ) from None
    except ValueError:  # its text is a page
        variants = sorted(tfds.builder_cls(name.partition("/")[0]).builder_configs)
        choices = f"one of: {', '.join(variants[:20])}" if variants else "the set by its name alone"
        raise BadConfiguration(f"--dataset {name!r}: the set has no such variant; choose {choices}") from None
