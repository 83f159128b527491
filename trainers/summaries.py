"""TensorBoard: scalars of train and eval under the same names, and the model's graph."""

import os
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import tensorflow as tf
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.scalar import summary_v2 as scalar_summary

from trainers import graphs


def _mark_start(directory: Path, step: int) -> None:
    """Tells TensorBoard to forget events after `step`, which a killed process wrote and this one writes again.

    Its rule: the second and later START in a folder discard what lies at or after their step.
    """
    directory.mkdir(exist_ok=True)
    # Files are read in the order of their names: `-` stands before the digit in the name of the file that follows.
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.-start.v2"
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    with tf.io.TFRecordWriter(str(directory / name)) as writer:
        writer.write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        event = event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start)
        writer.write(event.SerializeToString())


class Summaries:
    """Event files in `train/` and `eval/` of a run_dir, from a step on. `silent`: writes nothing."""

    def __init__(self, directory: Path, step: int, silent: bool = False):
        self._writers = {split: tf.summary.create_noop_writer() for split in ("train", "eval")}
        self._events: dict[tuple[str, ...], summary_pb2.Summary] = {}
        for split in self._writers if not silent else ():
            _mark_start(directory / split, step)
            self._writers[split] = tf.summary.create_file_writer(str(directory / split))

    def scalars(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of a split, as one event: an operation for each would cost a fast model its speed."""
        if (split, *values) not in self._events:
            event = self._events[split, *values] = summary_pb2.Summary()
            for name in values:
                event.MergeFrom(scalar_summary.scalar_pb(name, 0.0))
                event.value[-1].tensor.ClearField("tensor_content")
        event = self._events[split, *values]
        for value, number in zip(event.value, values.values(), strict=True):
            value.tensor.float_val[:] = [number]
        with self._writers[split].as_default():
            tf.summary.experimental.write_raw_pb(event.SerializeToString(), step)

    def model_graph(self, graph: tf.Graph, layers: Collection[str]) -> None:
        """Writes the forward pass of one replica: what the Graphs tab shows first. `layers`: names of their own."""
        with self._writers["train"].as_default():
            tf.summary.graph(graphs.clean(graph.as_graph_def(add_shapes=True), layers))

    def flush(self) -> None:
        """Brings the events to the files."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._writers.values():
            writer.close()
