"""TensorBoard: scalars of train and eval under the same names, graphs, histograms, pictures, text and HParams."""

import functools
import os
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.world import private_api
from trainers.world.devices import first_component

tb = private_api.tensorboard()
HISTOGRAM_BUCKETS = 30
# Values of a tensor that a histogram counts, evenly spaced: more would cost, and show no more.
HISTOGRAM_VALUES = 8192
PR_THRESHOLDS = 51
# Of a file of events of a run in an object store, about.
LARGEST_FILE = 4 << 20
# The plugin that shows a graph under a tag of its own, beside the default one.
_GRAPH_PLUGIN = "graph_run_metadata_graph"


def _put_first(directory: Path, now: int) -> None:
    """Gives the event files of earlier attempts names that stand before those of `now`, in the order that they had.

    TensorBoard reads files in the order of their names, which hold the time. It may have been set back since, and
    TensorFlow names its file by the clock.
    """
    late = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        stamp, _, rest = path.name.removeprefix("events.out.tfevents.").partition(".")
        if stamp.isdecimal() and int(stamp) >= now:
            late.append((path, rest.split(".", 1)[1] if rest.startswith("~") else rest))
    first = sum(1 for _ in directory.glob("events.out.tfevents.*.~*"))
    for i, (path, rest) in enumerate(late):
        # `~` stands after whatever a host's name begins with: behind the files of that second.
        path.rename(directory / f"events.out.tfevents.{now - 1}.~{first + i:06d}.{rest}")


def _mark_start(directory: Path, step: int) -> None:
    """Tells TensorBoard to forget events after `step`, which a killed process wrote and this one writes again.

    Its rule: the second and later START in a folder discard what lies at or after their step.
    """
    directory.mkdir(exist_ok=True)
    now = int(time.time())
    _put_first(directory, now)
    # Files are read in the order of their names: `-` stands before the digit in the name of the file that follows.
    name = f"events.out.tfevents.{now}.{socket.gethostname()}.{os.getpid()}.-start.v2"
    start = tb.event_pb2.SessionLog(status=tb.event_pb2.SessionLog.START)
    with tf.io.TFRecordWriter(str(directory / name)) as writer:
        writer.write(tb.event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        event = tb.event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start)
        writer.write(event.SerializeToString())


def _tensor(tag: str, metadata: tb.summary_pb2.SummaryMetadata, values: Sequence[Any]) -> tb.summary_pb2.Summary:
    """A summary whose value is a vector of strings, as the plugins for text and images read it."""
    event = tb.summary_pb2.Summary()
    value = event.value.add(tag=tag, metadata=metadata)
    value.tensor.dtype = tb.types_pb2.DT_STRING
    value.tensor.tensor_shape.dim.add(size=len(values))
    value.tensor.string_val.extend(value if isinstance(value, bytes) else value.encode() for value in values)
    return event


class Summaries:
    """Event files in a folder for each split of a run_dir, from a step on. `silent`: writes nothing.

    `bounded`: large files are left, and others begun (`rotate`), where a file that grows is sent whole each time.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        silent: bool = False,
        bounded: bool = False,
        splits: Sequence[str] = ("train", "eval"),
    ):
        self.silent, self.bounded, self._directory = silent, bounded, directory
        self._writers = {split: tf.summary.create_noop_writer() for split in splits}
        self._events: dict[tuple[str, ...], tb.summary_pb2.Summary] = {}
        for split in self._writers if not silent else ():
            _mark_start(directory / split, step)
            self._writers[split] = tf.summary.create_file_writer(str(directory / split))

    def _write(self, split: str, step: int, event: tb.summary_pb2.Summary) -> None:
        with self._writers[split].as_default():
            tf.summary.experimental.write_raw_pb(event.SerializeToString(), step)

    def scalars(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of a split, as one event: an operation for each would cost a fast model its speed."""
        if (split, *values) not in self._events:
            event = self._events[split, *values] = tb.summary_pb2.Summary()
            for name in values:
                event.MergeFrom(tb.scalar.scalar_pb(name, 0.0))
                event.value[-1].tensor.ClearField("tensor_content")
        event = self._events[split, *values]
        for value, number in zip(event.value, values.values(), strict=True):
            value.tensor.float_val[:] = [number]
        self._write(split, step, event)

    def histograms(self, step: Any, weights: Sequence[Any], gradients: Sequence[tf.Tensor] = ()) -> None:
        """Writes the distribution of each weight after update `step`, and of its gradient if that is given.

        In a graph, too: then it is part of the compiled loop.
        """
        with self._writers["train"].as_default():
            for i, weight in enumerate(weights):
                values = {"weights": first_component(weight)}
                for group, value in (values | ({"gradients": gradients[i]} if gradients else {})).items():
                    metadata = tb.histogram.create_summary_metadata(display_name=None, description=None)
                    tag = f"{group}/{weight.path}"
                    tf.summary.write(tag, _histogram(value), step=step, metadata=_for_tensorflow(metadata))

    def graph(self, graph: tf.compat.v1.GraphDef) -> None:
        """Writes what the Graphs tab shows first."""
        with self._writers["train"].as_default():
            tf.summary.graph(graph)

    def tagged_graph(self, tag: str, graph: tf.compat.v1.GraphDef) -> None:
        """Writes a graph that the Graphs tab shows under a tag."""
        facts = tf.compat.v1.RunMetadata()
        facts.function_graphs.add().pre_optimization_graph.CopyFrom(graph)
        metadata = tb.summary_pb2.SummaryMetadata()
        metadata.plugin_data.plugin_name = _GRAPH_PLUGIN
        metadata.plugin_data.content = b"1"
        with self._writers["train"].as_default():
            value = tf.constant(facts.SerializeToString())
            tf.summary.write(tag, value, step=0, metadata=_for_tensorflow(metadata))

    def text(self, split: str, step: int, tag: str, markdown: str) -> None:
        """Writes Markdown for the Text tab."""
        metadata = tb.text.create_summary_metadata(display_name=None, description=None)
        self._write(split, step, _tensor(tag, metadata, [markdown]))

    def image(self, split: str, step: int, tag: str, png: bytes, size: tuple[int, int], description: str) -> None:
        """Writes a PNG of `size` (width, height) for the Images tab."""
        metadata = tb.image.create_summary_metadata(display_name=None, description=description)
        self._write(split, step, _tensor(tag, metadata, [str(size[0]), str(size[1]), png]))

    def pr_curve(self, split: str, step: int, tag: str, labels: np.ndarray, scores: np.ndarray) -> None:
        """Writes precision over recall of one class: `labels [n]` of truth, `scores [n]` in [0, 1]."""
        metadata = tb.pr_curve.create_summary_metadata(
            display_name=None, description="precision over recall", num_thresholds=PR_THRESHOLDS
        )
        event = tb.summary_pb2.Summary()
        value = event.value.add(tag=tag, metadata=metadata)
        data = pr_curve(labels, scores)
        value.tensor.CopyFrom(_proto(data.astype(np.float32)))
        self._write(split, step, event)

    def hparams(self, step: int, flags: Mapping[str, Any], metrics: Collection[str], started: float) -> None:
        """Writes what the HParams tab compares: the flags, and which metrics of the evaluation to show beside them."""
        experiment = tb.api_pb2.Experiment(time_created_secs=started)
        session = tb.plugin_data_pb2.SessionStartInfo(start_time_secs=started)
        for name, flag in flags.items():
            if flag is None:
                continue
            info = experiment.hparam_infos.add(name=name)
            if isinstance(flag, bool):
                info.type, session.hparams[name].bool_value = tb.api_pb2.DATA_TYPE_BOOL, flag
            elif isinstance(flag, (int, float)):
                info.type, session.hparams[name].number_value = tb.api_pb2.DATA_TYPE_FLOAT64, flag
            else:
                info.type, session.hparams[name].string_value = tb.api_pb2.DATA_TYPE_STRING, str(flag)
        for metric in metrics:
            # The session is `eval/`, where what it is judged by lies: the tab looks for metrics at or below it.
            experiment.metric_infos.add(name=tb.api_pb2.MetricName(tag=metric), display_name=metric)
        self._hparams(step, tb.hparams.EXPERIMENT_TAG, tb.plugin_data_pb2.HParamsPluginData(experiment=experiment))
        start = tb.plugin_data_pb2.HParamsPluginData(session_start_info=session)
        self._hparams(step, tb.hparams.SESSION_START_INFO_TAG, start)

    def end_of_session(self, step: int, succeeded: bool) -> None:
        """Tells the HParams tab how the run ended."""
        status = tb.api_pb2.STATUS_SUCCESS if succeeded else tb.api_pb2.STATUS_FAILURE
        session = tb.plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        tag = tb.hparams.SESSION_END_INFO_TAG
        self._hparams(step, tag, tb.plugin_data_pb2.HParamsPluginData(session_end_info=session))

    def _hparams(self, step: int, tag: str, content: tb.plugin_data_pb2.HParamsPluginData) -> None:
        event = tb.summary_pb2.Summary()
        value = event.value.add(tag=tag, metadata=tb.hparams.create_summary_metadata(content))
        value.tensor.CopyFrom(tb.hparams.NULL_TENSOR)
        self._write("eval", step, event)

    def go_back(self, step: int) -> None:
        """Tells TensorBoard to forget events after `step`: they are written again."""
        for split, writer in self._writers.items() if not self.silent else ():
            folder = self._directory / split
            private_api.reopen(writer, str(folder), functools.partial(_mark_start, folder, step))

    def rotate(self) -> None:
        """Begins another file of each split whose last one is large. Called while nobody else writes.

        TensorBoard reads all files of a folder, in the order of their names.
        """
        for split, writer in self._writers.items() if self.bounded and not self.silent else ():
            folder = self._directory / split
            last = max(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns, default=None)
            if last and last.stat().st_size > LARGEST_FILE:
                private_api.reopen(writer, str(folder), lambda folder=folder: _put_first(folder, int(time.time())))

    def flush(self) -> None:
        """Brings the events to the files."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._writers.values():
            writer.close()


def _for_tensorflow(metadata: tb.summary_pb2.SummaryMetadata) -> tf.compat.v1.SummaryMetadata:
    """TensorBoard's message as TensorFlow's class of the same."""
    return tf.compat.v1.SummaryMetadata.FromString(metadata.SerializeToString())


def _proto(array: np.ndarray) -> Any:
    """An array as the message that events hold."""
    return tb.tensor_pb2.TensorProto.FromString(tf.make_tensor_proto(array).SerializeToString())


def _histogram(value: tf.Tensor) -> tf.Tensor:
    """`[buckets, 3]`, float64: left edge, right edge and count of buckets of one width, as the plugin reads it."""
    value = tf.reshape(value, [-1])
    value = tf.cast(value[:: max((value.shape[0] or 1) // HISTOGRAM_VALUES, 1)], tf.float64)
    # What is not finite has no bucket; of nothing, a histogram of zeros.
    value = tf.boolean_mask(value, tf.math.is_finite(value))
    low = tf.where(tf.size(value) > 0, tf.reduce_min(value), 0.0)
    high = tf.where(tf.size(value) > 0, tf.reduce_max(value), 0.0)
    # Where all values are one, a width of 1 around it.
    low, high = tf.where(low < high, low, low - 0.5), tf.where(low < high, high, high + 0.5)
    counts = tf.histogram_fixed_width(value, tf.stack([low, high]), HISTOGRAM_BUCKETS)
    edges = tf.linspace(low, high, HISTOGRAM_BUCKETS + 1)
    return tf.stack([edges[:-1], edges[1:], tf.cast(counts, tf.float64)], axis=1)


def pr_curve(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """`[6, thresholds]`: true and false positives, true and false negatives, precision, recall, thresholds rising."""
    thresholds = np.linspace(0.0, 1.0, PR_THRESHOLDS)
    positive = scores[:, None] >= thresholds[None, :]
    truth = labels.astype(bool)[:, None]
    cases = [(positive & truth), (positive & ~truth), (~positive & ~truth), (~positive & truth)]
    true_positive, false_positive, true_negative, false_negative = (case.sum(axis=0) for case in cases)
    precision = true_positive / np.maximum(true_positive + false_positive, 1e-7)
    recall = true_positive / np.maximum(true_positive + false_negative, 1e-7)
    return np.stack([true_positive, false_positive, true_negative, false_negative, precision, recall])
