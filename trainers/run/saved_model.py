"""A model as files that others load: a SavedModel, or a file `.keras`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainers.settings.exit_codes import BadConfiguration
from trainers.world import files

KERAS_FILE = "model.keras"


class Endpoint(NamedTuple):
    """A signature: what is computed, and what of, nested `tf.TensorSpec` for each argument."""

    compute: Callable[..., Any]
    specs: tuple[Any, ...]


def write_all(path: Path, formats: str, model: keras.Model, endpoints: Mapping[str, Endpoint]) -> None:
    """Writes a folder with what `formats`, the value of `--export`, names. The first endpoint is the default.

    Raises:
      BadConfiguration: the model cannot be written as `.keras`.
    """
    words = formats.split(",")
    with files.aside(path) as place:
        place.mkdir()
        if "saved_model" in words:
            archive = keras.export.ExportArchive()
            archive.track(model)
            for name, endpoint in endpoints.items():
                archive.add_endpoint(name, endpoint.compute, input_signature=list(endpoint.specs))
            archive.write_out(str(place), verbose=False)
        if "keras" in words:
            try:
                model.save(place / KERAS_FILE)
            except (NotImplementedError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise BadConfiguration(
                    f"--export=keras: the model {model.name} cannot be written ({reason:.200}); give its classes "
                    "get_config, or use --export=saved_model"
                ) from error


def write(path: Path, model: keras.Model, inputs_of: Callable[..., Any], *specs: tf.TensorSpec) -> None:
    """Writes a SavedModel to `path`, whose `serve` computes `model(inputs_of(*data))`, a tensor for each of `specs`."""
    compute = Endpoint(lambda *data: model(inputs_of(*data), training=False), specs)
    write_all(path, "saved_model", model, {"serve": compute})


def write_copy(path: Path, formats: str, model: keras.Model, *specs: tf.TensorSpec) -> None:
    """Writes a model of the same class, configuration and weights, which is called with a tuple of inputs."""
    copy = type(model).from_config(model.get_config())
    copy(tuple(tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype) for spec in specs))
    copy.set_weights(model.get_weights())
    write_all(path, formats, copy, {"serve": Endpoint(lambda *data: copy(data, training=False), specs)})
