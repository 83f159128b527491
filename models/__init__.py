"""Models, losses, metrics, layers and optimizers. Nothing here knows of flags, strategies, files or logging."""

import importlib
import pkgutil
from os import PathLike
from typing import Any


def load(path: str | PathLike) -> Any:
    """The `keras.Model` of a file `.keras` that `--export=keras` has written. Needs nothing but this package.

    A model of one's own needs its own modules too: import them first.
    """
    for module in pkgutil.iter_modules(__path__):  # which registers their classes
        importlib.import_module(f"{__name__}.{module.name}")
    import keras

    return keras.saving.load_model(path, compile=False)
