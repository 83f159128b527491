"""What evaluation computes of some examples, for `launch/proof/served.py` to compare an export with."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from launch.proof import differences
from trainers.use import answers

# As many rows as the largest batch that is served.
ROWS = 64
# How often outputs are changed by what rounding may, to see which of their classes or tokens stay.
_ROUNDINGS = 8


def write(path: Path, loop: Any) -> bool:
    """Writes inputs as their user has them and prepared ones, the answers and the outputs. False if it cannot tell.

    Of a loop without a model and its task only its author knows what is exported.
    """
    if not (hasattr(loop, "task") and hasattr(loop, "model") and loop.task.pictures):
        return False
    dataset, task, raw = loop.dataset, loop.task, loop.dataset.raw
    stored = next(iter(dataset.eval.examples().batch(ROWS)))
    stored = {key: tf.gather(value, tf.range(ROWS) % tf.shape(value)[0]) for key, value in stored.items()}
    inputs, _ = dataset.prepare(stored)
    with loop.evaluated():
        outputs = loop.model(task.inputs(inputs), training=False)
    arrays = {"inputs": inputs.numpy()}
    arrays |= {f"output/{i}": output.numpy() for i, output in enumerate(tf.nest.flatten(outputs))}
    kind = answers.kind_of(task, raw)
    batch = raw.of_stored({key: value.numpy() for key, value in stored.items()}) if kind else None
    if batch is not None:
        count = tf.fill([ROWS], dataset.spec.input_shape[0])
        answering = answers.answering(kind, raw)
        answer = {
            name: each.numpy()
            for name, each in answering(outputs, {"count": count}).items()
            if each.dtype.is_floating or each.dtype.is_integer
        }
        arrays |= {f"answer/{name}": each for name, each in answer.items()}
        arrays |= {f"sure/{name}": np.ones(each.shape, bool) for name, each in answer.items() if each.dtype.kind == "i"}
        allowed = differences.of_outputs(getattr(loop.config, "precision", "float32"))
        for seed in range(_ROUNDINGS):
            near = answering(_rounded(outputs, allowed, seed), {"count": count})
            for name in [name for name in answer if f"sure/{name}" in arrays]:
                arrays[f"sure/{name}"] &= near[name].numpy() == answer[name]
        arrays |= _named(raw, batch)
    np.savez(path, **arrays)
    return True


def _rounded(outputs: Any, allowed: float, seed: int) -> Any:
    """The outputs, each off by up to `allowed` of the largest: what rounding may make of them."""

    def near(values: tf.Tensor) -> tf.Tensor:
        if not values.dtype.is_floating:
            return values
        noise = tf.random.stateless_uniform(tf.shape(values), [seed, 0], -allowed, allowed)
        return values + tf.cast(noise, values.dtype) * tf.reduce_max(tf.abs(values))

    return tf.nest.map_structure(near, outputs)


def _named(raw: Any, batch: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """The arguments of `serve` by the names of their tensors."""
    spec = raw.signature()[0]
    arguments = batch[0] if isinstance(spec, dict) else {spec.name: batch[0]}
    if raw.kind == "text":  # arrays of strings would lose zeros at the end
        return {
            f"bytes/{name}": np.stack([np.frombuffer(t, np.uint8) for t in texts]) for name, texts in arguments.items()
        }
    return {
        f"raw/{name}": np.array(values.tolist()) if values.dtype == object else np.asarray(values)
        for name, values in arguments.items()
    }
