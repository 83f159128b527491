"""A model as a SavedModel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from trainers.world import files


def write(path: Path, model: keras.Model, inputs_of: Callable[[Any], Any], spec: tf.TensorSpec) -> None:
    """Writes a SavedModel to `path`, whose `serve` computes `model(inputs_of(data))` for data of `spec`."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", lambda inputs: model(inputs_of(inputs), training=False), input_signature=[spec])
    with files.aside(path) as place:
        archive.write_out(str(place), verbose=False)
