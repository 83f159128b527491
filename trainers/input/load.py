"""Data sets by name: finds the kind of data and has it loaded."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow as tf

from trainers.input import object_cache
from trainers.input.dataset import Dataset, ImageOptions, Request
from trainers.input.errors import reason_of
from trainers.settings import augmentation
from trainers.settings.config import Config
from trainers.settings.data_cards import data_card, is_own, split_name
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.paths import is_address


def load(
    name: str,
    data_dir: str,
    placement: str = "auto",
    label: str = "",
    images: ImageOptions | None = None,
    document_mask: bool = False,
    needs_images: str = "",
    cache_dir: str = "",
) -> Dataset:
    """Prepares a data set in `data_dir` if it is not there yet, and loads it.

    `name`: of `trainers.settings.data_cards`, with its argument, or of TensorFlow Datasets. `placement`: `resident`,
    `stream`, or `auto` by size. `label`: the column of a table to predict. `images`: how images are prepared.
    `document_mask`: whether the documents of a window of tokens are kept apart. `needs_images`: the loop that takes
    nothing but images, if it is one. `cache_dir`: where what lies in object stores is kept on this machine.

    Raises:
      BadConfiguration: no such data set, no network for it, no space, or unusable data.
    """
    card = data_card(name)
    data_dir = object_cache.data_dir(data_dir, name, cache_dir, prepared=not card.argument and not is_own(name))
    request = Request(
        *split_name(name), data_dir, placement, label, images or ImageOptions(), document_mask, needs_images, cache_dir
    )
    load_kind = card.loader()
    with _readable_errors(request):
        return load_kind(request)


def lies_elsewhere(config: Config) -> bool:
    """Whether `--dataset` or `--data_dir` name an object store."""
    return is_address(config.data_dir) or is_address(split_name(config.dataset)[1])


def bring_for(config: Config, feed: Callable[[str], None]) -> None:
    """Brings what `--dataset` and `--data_dir` name in object stores to this machine, where `load_for` finds it.

    `feed`: called with what is waited for, as long as it is.

    Raises:
      BadConfiguration: there is nothing, it does not fit, or the store refuses.
      StoreLost: the store cannot be reached, or nothing has moved for `--step_timeout`.
    """
    name, patience = config.dataset, config.step_timeout or 600.0
    card, (kind, argument) = data_card(name), split_name(name)
    if card.argument and is_address(argument):
        object_cache.brought(kind, argument, config.cache_dir, feed=feed, patience=patience)
    prepared = not card.argument and not is_own(name)
    object_cache.data_dir(config.data_dir, name, config.cache_dir, prepared, feed, patience)


def load_for(config: Config) -> Dataset:
    """The data set of a configuration, prepared as its flags and its model's card say.

    Raises:
      BadConfiguration: as `load`.
    """
    card = config.card
    options = ImageOptions(augmentation.parse(config.augment), config.image_size, card.mean, card.deviation)
    needs_images = config.loop if config.needs_images else ""
    rest = (config.document_mask, needs_images, config.cache_dir)
    return load(config.dataset, config.data_dir, config.input, config.label, options, *rest)


def prepared_folder(name: str, data_dir: str) -> Path:
    """Where a data set that is prepared by its name lies in `data_dir` once it is there. Nothing is downloaded.

    Raises:
      BadConfiguration: no such data set.
    """
    from trainers.input.kinds import embedded, tfds

    own = embedded.BUILDERS.get(name)
    return Path((own(data_dir=data_dir) if own else tfds.builder_of(Request(name, data_dir=data_dir))).data_path)


@contextlib.contextmanager
def _readable_errors(request: Request) -> Iterator[None]:
    """Errors of the user's own files in one line. `trainers.input.builders` handles those of prepared data."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise BadConfiguration(
            f"--dataset {request.full_name!r} cannot be read: {reason_of(error)}; make it readable or name another"
        ) from error
