"""Streaming metrics: each is a function of a sum, over examples, of additive statistics.

That form is exact at every number of replicas: statistics of all examples add up in any grouping, and one all-reduce
merges replicas. A compiled loop uses the two pure functions (`statistics`, `result_of`) and keeps the sums itself, in
one vector (`models.sums`). As an ordinary Keras metric (`update_state`, `result`, `reset_state`) the same class works
anywhere else.
"""

from typing import Any

import keras
import tensorflow as tf

from models import losses

register = keras.saving.register_keras_serializable("lockstep")


class StreamingMetric(keras.metrics.Metric):
    """A metric that is `result_of(sum over examples of statistics)`.

    A subclass sets `width`, the number of statistics of one example, lists its constructor's own arguments in
    `arguments`, and implements the two pure functions.
    """

    width = 1
    arguments: tuple[str, ...] = ()

    def __init__(self, name: str | None = None, dtype: Any = None):
        super().__init__(name=name, dtype=dtype)
        self._total = None

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """Additive statistics of each example: `[batch, width]`, float32."""
        raise NotImplementedError

    def result_of(self, total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """The metric from the summed statistics `[width]` of `count` examples: a scalar. Default: the mean."""
        return tf.math.divide_no_nan(total[0], count)

    def _state(self) -> keras.Variable:
        if self._total is None:
            self._total = self.add_variable((self.width + 1,), initializer="zeros", name="total", aggregation="sum")
        return self._total

    def update_state(self, targets: Any, outputs: Any, sample_weight: Any = None) -> None:
        """Adds a batch. `sample_weight: [batch]` scales each example's statistics and its count."""
        values = tf.cast(self.statistics(targets, outputs), tf.float32)
        values = tf.concat([values, tf.ones_like(values[:, :1])], axis=1)
        if sample_weight is not None:
            values *= tf.cast(sample_weight, tf.float32)[:, None]
        self._state().assign_add(tf.reduce_sum(values, axis=0))

    def result(self) -> tf.Tensor:
        """The metric over everything added since the last reset: a scalar."""
        total = tf.convert_to_tensor(self._state())
        return self.result_of(total[:-1], total[-1])

    def reset_state(self) -> None:
        self._state().assign(tf.zeros([self.width + 1]))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {name: getattr(self, name) for name in self.arguments}


def _predicted(logits: tf.Tensor) -> tf.Tensor:
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


@register
class Accuracy(StreamingMetric):
    """Fraction of correct predictions: labels `[batch, …]`, logits `[batch, …, num_classes]`.

    An example with several labels counts with the mean over them.
    """

    def __init__(self, name: str = "accuracy", dtype: Any = None):
        super().__init__(name, dtype)

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The fraction of an example's labels that have the largest logit: `[batch, 1]`."""
        correct = tf.cast(tf.equal(_predicted(outputs), tf.cast(targets, tf.int32)), tf.float32)
        if correct.shape.rank == 1:
            return tf.expand_dims(correct, axis=1)
        return tf.reduce_mean(tf.reshape(correct, [tf.shape(correct)[0], -1]), axis=1, keepdims=True)


@register
class TopK(StreamingMetric):
    """Fraction of examples whose label is among the `k` largest of the logits `[batch, num_classes]`.

    Of equal logits the first are taken, as in `Accuracy`: a model that tells no classes apart is not right.
    """

    arguments = ("k",)

    def __init__(self, k: int = 5, name: str | None = None, dtype: Any = None):
        super().__init__(name or f"top_{k}", dtype)
        self.k = k

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """1 where the label is among the k largest, and all logits are finite: `[batch, 1]`."""
        logits, labels = tf.cast(outputs, tf.float32), tf.cast(targets, tf.int32)[:, None]
        classes = tf.range(tf.shape(logits)[1])
        own = tf.reduce_sum(tf.where(classes == labels, logits, 0), axis=1, keepdims=True)
        ahead = (logits > own) | ((logits == own) & (classes < labels)) | (labels < 0)
        among = tf.reduce_sum(tf.cast(ahead, tf.int32), axis=1) < self.k
        hit = among & tf.reduce_all(tf.math.is_finite(logits), axis=1)
        return tf.cast(hit, tf.float32)[:, None]


class _ConfusionCounts(StreamingMetric):
    """Three counts for each class: correct predictions, predictions, and labels.

    Labels `[batch, …]`, logits `[batch, …, num_classes]`: an example with several labels counts once for each.
    """

    arguments = ("num_classes",)

    def __init__(self, num_classes: int, name: str, dtype: Any = None):
        super().__init__(name, dtype)
        self.num_classes = num_classes
        self.width = 3 * num_classes

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """How often label ∧ prediction, prediction, and label are each class: `[batch, 3 · num_classes]`."""
        true = tf.one_hot(tf.cast(targets, tf.int32), self.num_classes)
        predicted = tf.one_hot(_predicted(outputs), self.num_classes)
        counts = tf.concat([true * predicted, predicted, true], axis=-1)
        return tf.reduce_sum(counts, axis=list(range(1, counts.shape.rank - 1)))

    def result_of(self, total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """Mean over the classes that occur, as a label or as a prediction."""
        correct, predicted, true = tf.unstack(tf.reshape(total, [3, self.num_classes]))
        occurs = tf.cast(predicted + true > 0, tf.float32)
        return tf.math.divide_no_nan(
            tf.reduce_sum(self._of_class(correct, predicted, true) * occurs), tf.reduce_sum(occurs)
        )

    def _of_class(self, correct: tf.Tensor, predicted: tf.Tensor, true: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError


@register
class Precision(_ConfusionCounts):
    """Fraction of the predictions of a class that are correct, mean over classes; 0 for a class never predicted."""

    def __init__(self, num_classes: int, name: str = "precision", dtype: Any = None):
        super().__init__(num_classes, name, dtype)

    def _of_class(self, correct: tf.Tensor, predicted: tf.Tensor, true: tf.Tensor) -> tf.Tensor:
        return tf.math.divide_no_nan(correct, predicted)


@register
class Recall(_ConfusionCounts):
    """Fraction of the examples of a class that are predicted as such, mean over classes; 0 for one without examples."""

    def __init__(self, num_classes: int, name: str = "recall", dtype: Any = None):
        super().__init__(num_classes, name, dtype)

    def _of_class(self, correct: tf.Tensor, predicted: tf.Tensor, true: tf.Tensor) -> tf.Tensor:
        return tf.math.divide_no_nan(correct, true)


@register
class F1(_ConfusionCounts):
    """Harmonic mean of precision and recall, mean over classes."""

    def __init__(self, num_classes: int, name: str = "f1", dtype: Any = None):
        super().__init__(num_classes, name, dtype)

    def _of_class(self, correct: tf.Tensor, predicted: tf.Tensor, true: tf.Tensor) -> tf.Tensor:
        return tf.math.divide_no_nan(2 * correct, predicted + true)


@register
class MeanIoU(_ConfusionCounts):
    """Intersection over union of predicted and true positions of a class, mean over the classes that occur.

    The counts are those of all examples together, as published results have it, not a mean over images. Source:
    Everingham et al., "The PASCAL visual object classes challenge", IJCV 2010, section 4.2.
    """

    def __init__(self, num_classes: int, name: str = "mean_iou", dtype: Any = None):
        super().__init__(num_classes, name, dtype)

    def _of_class(self, correct: tf.Tensor, predicted: tf.Tensor, true: tf.Tensor) -> tf.Tensor:
        return tf.math.divide_no_nan(correct, predicted + true - correct)


@register
class CalibrationError(StreamingMetric):
    """Expected calibration error: |accuracy - confidence| in bins of confidence, weighted by their examples.

    Bins are `(i / bins, (i + 1) / bins]`. Source: Guo et al., "On calibration of modern neural networks", ICML 2017.
    """

    arguments = ("bins",)

    def __init__(self, bins: int = 15, name: str = "calibration_error", dtype: Any = None):
        super().__init__(name, dtype)
        self.bins = bins
        self.width = 2 * bins

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The confidence and 0 or 1 for correct, each in the column of the example's bin: `[batch, 2 · bins]`."""
        confidence = tf.reduce_max(tf.nn.softmax(tf.cast(outputs, tf.float32)), axis=-1)
        bin_of = tf.clip_by_value(tf.cast(tf.math.ceil(confidence * self.bins), tf.int32) - 1, 0, self.bins - 1)
        column = tf.one_hot(bin_of, self.bins)
        correct = tf.cast(tf.equal(_predicted(outputs), tf.cast(targets, tf.int32)), tf.float32)
        return tf.concat([column * confidence[:, None], column * correct[:, None]], axis=1)

    def result_of(self, total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """The error: a scalar in [0, 1]."""
        confidence, correct = tf.unstack(tf.reshape(total, [2, self.bins]))
        return tf.math.divide_no_nan(tf.reduce_sum(tf.abs(confidence - correct)), count)


@register
class HuberMetric(StreamingMetric):
    """Mean Huber loss, with its `threshold` in the configuration. Targets `[batch, …]`."""

    arguments = ("threshold",)

    def __init__(self, threshold: float = 1.0, name: str = "huber", dtype: Any = None):
        super().__init__(name, dtype)
        self._loss = losses.Huber(threshold)
        self.threshold = self._loss.threshold

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The loss of each example: `[batch, 1]`."""
        return self._loss.call(targets, outputs)[:, None]


@register
class AbsoluteError(StreamingMetric):
    """Mean absolute error. Targets `[batch, …]`."""

    def __init__(self, name: str = "absolute_error", dtype: Any = None):
        super().__init__(name, dtype)

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The mean absolute error of each example: `[batch, 1]`."""
        return losses.per_example(tf.abs(losses.errors(targets, outputs)))[:, None]


@register
class R2(StreamingMetric):
    """Coefficient of determination, `1 - Σ error² / Σ (target - mean)²`: the mean over `num_outputs` target columns."""

    arguments = ("num_outputs",)

    def __init__(self, num_outputs: int = 1, name: str = "r2", dtype: Any = None):
        super().__init__(name, dtype)
        self.num_outputs = num_outputs
        self.width = 3 * num_outputs

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """Squared error, target and its square: `[batch, 3 · num_outputs]`."""
        errors = tf.reshape(losses.errors(targets, outputs), [-1, self.num_outputs])
        targets = tf.reshape(tf.cast(targets, tf.float32), [-1, self.num_outputs])
        return tf.concat([tf.square(errors), targets, tf.square(targets)], axis=1)

    def result_of(self, total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """The coefficient: a scalar, 1 at best; 0 where the target does not vary."""
        squared, sums, squares = tf.unstack(tf.reshape(total, [3, self.num_outputs]))
        spread = squares - tf.math.divide_no_nan(tf.square(sums), count)
        return tf.reduce_mean(tf.where(spread > 0, 1 - tf.math.divide_no_nan(squared, spread), 0.0))


@register
class BitsPerToken(StreamingMetric):
    """Mean cross-entropy of the next token, in bits per token; where tokens are bytes, bits per byte.

    Tokens `[batch, time]`, logits `[batch, time, vocabulary]`.
    """

    def __init__(self, name: str = "bits_per_token", dtype: Any = None):
        super().__init__(name, dtype)
        self._loss = losses.TokenCrossEntropy()

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """Bits per token of each example: `[batch, 1]`."""
        return self._loss.call(targets, outputs)[:, None] / tf.math.log(2.0)


class _PerToken(StreamingMetric):
    """A mean over the tokens that are predicted: those whose target is not negative.

    Tokens `[batch, time]`, logits `[batch, time, vocabulary]`. Statistics: the sum over an example and the number of
    its tokens, both divided by `time`.
    """

    width = 2

    def _with_count(self, values: tf.Tensor, targets: Any) -> tf.Tensor:
        """`values [batch]` and the fraction of positions with a target: `[batch, 2]`."""
        return tf.stack([values, losses.per_example(tf.cast(tf.cast(targets, tf.int32) >= 0, tf.float32))], axis=1)

    def result_of(self, total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """The mean: a scalar."""
        return tf.math.divide_no_nan(total[0], total[1])


@register
class BitsPerPredictedToken(_PerToken):
    """`BitsPerToken` over the tokens that are predicted."""

    def __init__(self, name: str = "bits_per_token", dtype: Any = None):
        super().__init__(name, dtype)
        self._loss = losses.TokenCrossEntropy()

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """Bits of each example and its tokens, each divided by `time`: `[batch, 2]`."""
        return self._with_count(self._loss.call(targets, outputs) / tf.math.log(2.0), targets)


@register
class PredictedTokenAccuracy(_PerToken):
    """Fraction of the tokens that are predicted and have the largest logit."""

    def __init__(self, name: str = "accuracy", dtype: Any = None):
        super().__init__(name, dtype)

    def statistics(self, targets: Any, outputs: Any) -> tf.Tensor:
        """Correct tokens of each example and its tokens, each divided by `time`: `[batch, 2]`."""
        correct = tf.cast(tf.equal(_predicted(outputs), tf.cast(targets, tf.int32)), tf.float32)
        return self._with_count(losses.per_example(correct), targets)
