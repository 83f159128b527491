"""TensorBoard: scalars of train and eval under the same names, and the model's graph."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from trainers import graphs


class Summaries:
    """Event files in `train/` and `eval/` of a run_dir."""

    def __init__(self, directory: Path):
        self._writers = {split: tf.summary.create_file_writer(str(directory / split)) for split in ("train", "eval")}

    def scalars(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of a split."""
        with self._writers[split].as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step)

    def model_graph(self, model: keras.Model, spec: Any) -> None:
        """Writes the forward pass of one replica: what the Graphs tab shows first."""
        with self._writers["train"].as_default():
            tf.summary.graph(graphs.forward(model, spec))

    def flush(self) -> None:
        """Brings the events to the files."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._writers.values():
            writer.close()
