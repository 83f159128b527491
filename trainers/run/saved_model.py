"""A model as a SavedModel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from trainers.world import files


def write(path: Path, model: keras.Model, inputs_of: Callable[..., Any], *specs: tf.TensorSpec) -> None:
    """Writes a SavedModel to `path`, whose `serve` computes `model(inputs_of(*data))`, a tensor for each of `specs`."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", lambda *data: model(inputs_of(*data), training=False), input_signature=list(specs))
    with files.aside(path) as place:
        archive.write_out(str(place), verbose=False)


def write_copy(path: Path, model: keras.Model, *specs: tf.TensorSpec) -> None:
    """Writes a SavedModel of a model's class, configuration and weights, which is called with a tuple of inputs."""
    copy = type(model).from_config(model.get_config())
    copy(tuple(tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype) for spec in specs))
    copy.set_weights(model.get_weights())
    write(path, copy, lambda *data: data, *specs)
