"""Compares TensorFlow's operations with NumPy's on each device: values within a tolerance, and speeds."""

import dataclasses
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainers.world.devices import full_float32

# A replica's vector in the all-reduce: 32 bytes for each element of a matrix, and at most this many (256 MiB).
LONGEST_VECTOR = 2**26


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation that TensorFlow and NumPy both compute.

    Attributes:
      name: as it is printed.
      group: what it belongs to; a heading of the table.
      inputs: makes the arrays, given a generator and the side of the matrices.
      tensorflow: given those arrays as tensors, returns a dense tensor.
      numpy: given those arrays, returns the array that `tensorflow` must return.
      tolerance: largest allowed difference (`largest_difference`); 0 = every element must be equal.
      flops: additions and multiplications of one call, given the arrays; None = there is no customary count.
      traffic: bytes that one call must read and write, given the arrays; used where `flops` is None.
    """

    name: str
    group: str
    inputs: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
    tensorflow: Callable[..., tf.Tensor]
    numpy: Callable[..., np.ndarray]
    tolerance: float
    flops: Callable[..., float] | None = None
    traffic: Callable[..., float] | None = None

    def work(self, arrays: Sequence[np.ndarray]) -> tuple[float | None, str | None]:
        """The work of one call in units of 10⁹, and the unit of its rate."""
        if self.flops is not None:
            return self.flops(*arrays) / 1e9, "GFLOP/s"
        if self.traffic is not None:
            return self.traffic(*arrays) / 1e9, "GB/s"
        return None, None


@dataclasses.dataclass(frozen=True)
class Result:
    """An operation on a device: median seconds, rates in `unit`, and the difference of the values from NumPy's.

    `device` is where the values were computed: a GPU leaves strings and sets to the CPU. `error` says what went wrong
    where there is no number for it; `tensorflow_seconds` is None if the call returned nothing.
    """

    group: str
    operation: str
    device: str
    inputs: str
    tensorflow_seconds: float | None
    numpy_seconds: float
    tensorflow_rate: float | None
    numpy_rate: float | None
    unit: str | None
    difference: float | None
    tolerance: float
    error: str | None

    @property
    def agrees(self) -> bool:
        """Whether the values are within the tolerance of NumPy's."""
        return self.error is None and self.difference <= self.tolerance

    @property
    def complaint(self) -> str:
        """The line for a result that does not agree."""
        what = self.error or f"differs from NumPy by {self.difference:.1e}, above its tolerance {self.tolerance:.1e}"
        return f"{self.group}: {self.operation} on {self.device}, {self.inputs}: {what}"


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The difference of an array from the expected one, which has the same shape.

    Floating point: the largest |actual - expected| over the largest |expected|. Other types, and where an element of
    either array is not finite: the number of elements that are not equal.
    """
    if expected.dtype.kind == "f":
        actual, expected = actual.astype(np.float64), expected.astype(np.float64)
        if np.isfinite(actual).all() and np.isfinite(expected).all():
            scale = np.abs(expected).max(initial=0.0)
            return float(np.abs(actual - expected).max(initial=0.0) / (scale or 1.0))
        return float(np.sum((actual != expected) & ~(np.isnan(actual) & np.isnan(expected))))
    if expected.dtype.kind == "S":  # TensorFlow's strings come as objects
        actual, expected = actual.astype(object), expected.astype(object)
    return float(np.sum(actual != expected))


def _mismatch(actual: np.ndarray, expected: np.ndarray) -> str | None:
    """Why two arrays cannot be compared, if so. In NumPy bfloat16 is of kind V, and TensorFlow's strings of kind O."""
    if actual.shape != expected.shape:
        return f"shape {actual.shape} instead of {expected.shape}"
    if {"V": "f", "O": "S"}.get(actual.dtype.kind, actual.dtype.kind) != expected.dtype.kind:
        return f"type {actual.dtype} instead of {expected.dtype}"
    return None


def _device_name(device: str) -> str:
    """`/job:localhost/replica:0/task:0/device:GPU:0` → `GPU:0`."""
    return ":".join(device.split(":")[-2:])


def _description(array: np.ndarray) -> str:
    """`512×512 float32`."""
    kind = "bytes" if array.dtype.kind == "S" else array.dtype.name
    return f"{'×'.join(map(str, array.shape))} {kind}"


def _median_seconds(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The value of a first call, which is not timed, and the median time of the calls after it."""
    value = function()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return value, statistics.median(seconds)


@dataclasses.dataclass(frozen=True)
class _Reference:
    """NumPy's side of a comparison: the input arrays, the expected array, and NumPy's median seconds."""

    arrays: Sequence[np.ndarray]
    expected: np.ndarray
    seconds: float


def _reference(operation: Operation, size: int, repeats: int) -> _Reference:
    arrays = operation.inputs(np.random.default_rng(0), size)
    expected, seconds = _median_seconds(lambda: operation.numpy(*arrays), repeats)
    return _Reference(arrays, np.asarray(expected), seconds)


def _compare(operation: Operation, reference: _Reference, tensors: Sequence[Any], device: str, repeats: int) -> Result:
    """Times TensorFlow on `tensors`, and compares each tensor that it returns (a tuple: one for each replica)."""

    def call() -> Any:
        value = operation.tensorflow(*tensors)
        if "GPU" in device:  # the call returns before the GPU has finished
            tf.test.experimental.sync_devices()
        return value

    expected, (work, unit) = reference.expected, operation.work(reference.arrays)
    seconds = difference = error = None
    try:
        value, seconds = _median_seconds(call, repeats)
        if isinstance(value, tuple):
            actual = [np.asarray(tensor.numpy()) for tensor in value]
        else:
            actual, device = [np.asarray(value.numpy())], _device_name(value.device)
        error = next(filter(None, (_mismatch(array, expected) for array in actual)), None)
        if error is None:
            difference = max(largest_difference(array, expected) for array in actual)
    except Exception as failure:  # what this machine cannot compute is a result, and does not end the check
        message = textwrap.shorten(" ".join(str(failure).split()), 300, placeholder=" …")
        error = f"{type(failure).__name__}: {message}"
    return Result(
        group=operation.group,
        operation=operation.name,
        device=device,
        inputs=_description(reference.arrays[0]),
        tensorflow_seconds=seconds,
        numpy_seconds=reference.seconds,
        tensorflow_rate=work / seconds if work and seconds else None,
        numpy_rate=work / reference.seconds if work else None,
        unit=unit,
        difference=difference,
        tolerance=operation.tolerance,
        error=error,
    )


def compare(
    operations: Sequence[Operation],
    size: int,
    repeats: int,
    report: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Computes each operation on every visible GPU or, with no GPU, on the CPU; products of float32 in float32.

    Args:
      operations: what is compared.
      size: side of the matrices.
      repeats: timed calls, after one that is not timed.
      report: called with each result as soon as it is known.
    """
    names = [device.name for device in tf.config.list_logical_devices("GPU")]
    names = names or [tf.config.list_logical_devices("CPU")[0].name]
    results = []
    with full_float32():
        for operation in operations:
            reference = _reference(operation, size, repeats)
            for name in names:
                with tf.device(name):
                    tensors = [tf.identity(array) for array in reference.arrays]
                    results.append(_compare(operation, reference, tensors, _device_name(name), repeats))
                report(results[-1])
    return results


def compare_all_reduce(strategy: tf.distribute.Strategy, size: int, repeats: int) -> Result:
    """Sums a vector over the replicas, as a trainer does with gradients; every replica must hold NumPy's sum.

    The rate is the bytes of one replica's vector over the time of the sum.

    Args:
      strategy: whose replicas sum.
      size: the vectors hold `8 * size ** 2` float32, at most `LONGEST_VECTOR`.
      repeats: timed calls, after one that is not timed.
    """
    replicas = strategy.num_replicas_in_sync

    def in_replica(vector: tf.Tensor) -> tf.Tensor:
        # The identity places an argument on a device; a single replica refuses an argument without one.
        return tf.distribute.get_replica_context().all_reduce("sum", tf.identity(vector))

    @tf.function
    def total(vectors: Any) -> Any:
        return strategy.run(in_replica, (vectors,))

    def vectors_of(generator: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
        return (generator.standard_normal((replicas, min(8 * n**2, LONGEST_VECTOR)), dtype=np.float32),)

    operation = Operation(
        f"sum over {replicas} replica{'s' if replicas > 1 else ''}",
        "all-reduce",
        vectors_of,
        lambda vectors: strategy.experimental_local_results(total(vectors)),
        lambda vectors: vectors.sum(axis=0),
        1e-6,
        traffic=(lambda vectors: vectors[0].nbytes) if replicas > 1 else None,
    )
    reference = _reference(operation, size, repeats)
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.identity(reference.arrays[0][context.replica_id_in_sync_group])
    )
    places = [_device_name(device) for device in strategy.extended.worker_devices]
    place = places[0] if replicas == 1 else f"{places[0]}–{places[-1].split(':')[1]}"
    return _compare(operation, reference, [values], place, repeats)
