"""What a model is trained for: its loss of each example and its metrics, apart from any loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from models import cards, options
from models import metrics as metrics_lib
from models.metrics import StreamingMetric


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a model must know of the data to be built.

    `task`: the kind of data, a key of `cards.LOSSES` or a word of the user's own. `input_shape`: one example's shape
    without the batch, e.g. `(8, 8, 1)`, after the data set's own preparation; `input_dtype` its element type.
    `num_classes`: classes of a label or tokens of the vocabulary; 0 where targets are numbers. `target_shape`: one
    target's: `()` a label, `(time,)` tokens, `(height, width)` a label for each pixel, `(columns,)` numbers. `loss`:
    `NAME,key=value,…` with a name of `cards.LOSSES[task]` or `module:object`; empty for the first of the task.
    `separator`: the token that ends a document, if there is one. `document_mask`: attention and loss do not cross
    documents; a target that is not to be predicted is -1.
    """

    task: str
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"
    num_classes: int = 0
    target_shape: tuple[int, ...] = ()
    loss: str = ""
    separator: int | None = None
    document_mask: bool = False

    @property
    def num_outputs(self) -> int:
        """The number of columns of a regression target."""
        return self.target_shape[0] if self.target_shape else 1


def _same(value: Any) -> Any:
    return value


class Mixed(NamedTuple):
    """Targets of examples that are blends of two: `share [batch]` of `own`, the rest of `other`, `[batch, …]` each."""

    own: Any
    other: Any
    share: tf.Tensor


class Predictions(NamedTuple):
    """Examples of the evaluation, on the host: inputs, targets, outputs, each `[n, …]`, and losses `[n]`."""

    inputs: Any
    targets: Any
    outputs: Any
    losses: Any


# What can be shown of outputs by name: logits of classes, `[n, classes]`; numbers over the true ones; logits of each
# pixel, `[n, height, width, classes]`; how a language model continues a text.
PICTURES = ("classes", "numbers", "masks", "text")


@dataclasses.dataclass(frozen=True)
class Task:
    """The loss, the metrics and the pictures of a model: all that a loop, TensorBoard and a benchmark ask of it.

    `loss(targets, outputs) -> [batch]` gives one value for each example; only the loop reduces. `metrics` are measured
    in training and evaluation, `eval_metrics` in evaluation only. `best_metric`, `best_mode`: the eval metric by which
    the best checkpoint is kept, and `max` or `min`. `inputs` turns the data set's inputs into those of the model.
    `pictures`: what people see of an evaluation: a word of `PICTURES`, or a function of `Predictions` that returns
    pictures by name, each the bytes of a PNG or an array `[height, width]` or `[height, width, 3]`, uint8; empty for
    none.
    """

    loss: Callable[[Any, Any], tf.Tensor]
    metrics: Mapping[str, StreamingMetric]
    eval_metrics: Mapping[str, StreamingMetric] = dataclasses.field(default_factory=dict)
    best_metric: str = "loss"
    best_mode: str = "min"
    inputs: Callable[[Any], Any] = _same
    pictures: str | Callable[[Predictions], Mapping[str, Any]] = ""

    def losses(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The loss of each example, `[batch]`. For `Mixed` targets that of both, each by its share.

        Source: Zhang et al., "mixup", ICLR 2018, section 2. For cross-entropy this is that of the blended labels.
        """
        if not isinstance(targets, Mixed):
            return self.loss(targets, outputs)
        own, other = self.loss(targets.own, outputs), self.loss(targets.other, outputs)
        share = tf.cast(targets.share, own.dtype)
        return share * own + (1 - share) * other


def named_loss(spec: DataSpec) -> Callable[[Any, Any], tf.Tensor]:
    """The loss that the spec names, or the first of its task: `(targets, outputs) -> [batch]`.

    Raises:
      models.options.OptionError: an unknown name or option, or a value of the wrong type.
    """
    if spec.task not in cards.LOSSES and not options.is_object(spec.loss.partition(",")[0]):
        raise options.OptionError(
            f"no loss of ours is for {spec.task or 'unnamed'} data; let the model's Task bring one, or pass "
            "--loss=module:object"
        )
    choice = options.choose("loss", spec.loss or next(iter(cards.LOSSES[spec.task])), spec.task)
    loss = choice.make()
    if choice.is_own:
        _check_loss(choice.name, loss, spec)
    return loss.call


def _check_loss(name: str, loss: Any, spec: DataSpec) -> None:
    """Tries a loss of the user's own on two examples. Raises `models.options.OptionError`."""
    if not callable(getattr(loss, "call", None)):
        raise options.OptionError(f"--loss {name} gives {loss!r:.80}; give a keras.losses.Loss with a method call")
    if spec.num_classes:
        labels = [2, *(min(side, 2) for side in spec.target_shape)]  # of a long text logits would fill the memory
        targets, outputs = tf.zeros(labels, tf.int32), tf.zeros([*labels, spec.num_classes])
    else:
        targets, outputs = tf.zeros([2, *spec.target_shape]), tf.zeros([2, spec.num_outputs])
    try:
        shape = tuple(loss.call(targets, outputs).shape)
    except (ValueError, TypeError, tf.errors.OpError) as error:
        reason = " ".join(str(error).split())
        raise options.OptionError(
            f"--loss {name} fails with targets {targets.shape} and outputs {outputs.shape}: {reason}"
        ) from error
    if shape != (2,):
        raise options.OptionError(
            f"--loss {name} gives values of shape {shape} for 2 examples; give one for each, [batch]: the loop reduces"
        )


def model_of(text: str, spec: DataSpec) -> tuple[keras.Model, Task]:
    """The model `NAME,key=value,…` of `cards.MODELS`, or of `module:object`, and its task, built for the data.

    Raises:
      models.options.OptionError: an unknown name or option, a value that the builder refuses, or not such a pair; or
        the model takes images, and the data are none.
    """
    choice = options.choose("model", text)
    if len(spec.input_shape) != 3 and not choice.is_own and cards.MODELS[choice.name].images:
        fit = [name for name, card in cards.MODELS.items() if card.task == spec.task and not card.images]
        raise options.OptionError(
            f"--model {text} takes images [height, width, channels], and an example here has the shape "
            f"{tuple(spec.input_shape)}; choose one of: {', '.join(fit)}, or other data"
        )
    built = choice.make(spec)
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], keras.Model)):
        raise options.OptionError(f"--model {text} gives {built!r:.80}; give a pair of a keras.Model and its Task")
    if not isinstance(built[1], Task):
        raise options.OptionError(f"--model {text} gives the task {built[1]!r:.80}; give a models.tasks.Task")
    _check_task(text, built[1])
    return built


def _check_task(text: str, task: Task) -> None:
    """Whether what a task names is there. Raises `models.options.OptionError`."""
    measured = ("loss", *task.metrics, *task.eval_metrics)
    if task.best_metric not in measured:
        raise options.OptionError(
            f"--model {text}: its Task's best_metric {task.best_metric!r} is not measured; name one of: "
            f"{', '.join(measured)}"
        )
    if task.best_mode not in ("max", "min"):
        raise options.OptionError(f"--model {text}: its Task's best_mode {task.best_mode!r} is not max or min")
    if task.pictures and task.pictures not in PICTURES and not callable(task.pictures):
        raise options.OptionError(
            f"--model {text}: its Task's pictures {task.pictures!r:.80} are not known; name one of: "
            f"{', '.join(PICTURES)}, or give a function of models.tasks.Predictions"
        )


def classification(spec: DataSpec) -> Task:
    """One label in `[0, num_classes)` for each example. The model returns logits `[batch, num_classes]`."""
    thorough = [metrics_lib.F1(spec.num_classes), metrics_lib.CalibrationError()]
    if spec.num_classes > 10:
        thorough.append(metrics_lib.TopK(5))
    return Task(
        named_loss(spec),
        {"accuracy": metrics_lib.Accuracy()},
        {metric.name: metric for metric in thorough},
        best_metric="accuracy",
        best_mode="max",
        pictures="classes",
    )


def regression(spec: DataSpec) -> Task:
    """A real target for each example, scaled to standard deviations of the training split; outputs of its shape."""
    thorough = [metrics_lib.AbsoluteError(), metrics_lib.HuberMetric()]
    return Task(
        named_loss(spec),
        {"r2": metrics_lib.R2(spec.num_outputs)},
        {metric.name: metric for metric in thorough},
        best_metric="r2",
        best_mode="max",
        pictures="numbers",
    )


def language(spec: DataSpec) -> Task:
    """The next token at every position: tokens `[batch, time]`, logits `[batch, time, num_classes]`.

    With `spec.document_mask` a target of -1 is predicted by nobody: it has no loss, and no metric counts it.
    """
    if spec.document_mask:
        bits, accuracy = metrics_lib.BitsPerPredictedToken(), metrics_lib.PredictedTokenAccuracy()
    else:
        bits, accuracy = metrics_lib.BitsPerToken(), metrics_lib.Accuracy()
    return Task(named_loss(spec), {"bits_per_token": bits}, {"accuracy": accuracy}, pictures="text")


def segmentation(spec: DataSpec) -> Task:
    """A label for each pixel: labels `[batch, height, width]`, logits `[batch, height, width, num_classes]`."""
    measured = (metrics_lib.MeanIoU(spec.num_classes), metrics_lib.Accuracy("pixel_accuracy"))
    return Task(
        named_loss(spec),
        {metric.name: metric for metric in measured},
        best_metric="mean_iou",
        best_mode="max",
        pictures="masks",
    )
