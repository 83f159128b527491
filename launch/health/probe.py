"""What TensorFlow sees and how fast it computes here, for launch/doctor.py: a line of JSON for each thing.

python launch/health/probe.py

The lines: `build` (of the wheel), `gpus` (names and compute capabilities), `matmul` (a line for each device and
precision, 10¹² operations a second), `all_reduce`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie two above.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from trainers.world import process

    process.check_requirements()

import json
import os
import time
from collections.abc import Sequence
from typing import Any

from trainers.settings.config import Config
from trainers.settings.exit_codes import OK
from trainers.world import process

# Sides of the matrices.
GPU_SIDE, CPU_SIDE = 8192, 1024
REPEATS = 3
# Seconds that a timed call takes, about, and the most products in it.
CALL_SECONDS, MOST_PRODUCTS = 0.2, 200
# The vectors that are summed hold 8 · side² float32: 128 MiB and 2 MiB.
GPU_SUM_SIDE, CPU_SUM_SIDE = 2048, 256


def tell(name: str, value: Any) -> None:
    """Prints a line."""
    print(json.dumps({name: value}), flush=True)


def precisions(capability: str) -> tuple[str, str]:
    """What a GPU computes fast in: those before 8.0 have no units for bfloat16."""
    return "float32", "bfloat16" if int(capability.partition(".")[0] or 8) >= 8 else "float16"


def matmul(device: str, precision: str, side: int) -> float:
    """10¹² operations a second of products of two square matrices, each with the product before it; the best of a few.

    A multiplication and an addition are two operations.
    """
    import tensorflow as tf

    @tf.function
    def chain(a: tf.Tensor, b: tf.Tensor, products: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(products):
            with tf.device(device):
                a = a @ b
        return tf.reduce_sum(tf.cast(a, tf.float32))

    with tf.device(device):
        a = tf.cast(tf.random.normal([side, side]), precision)
        b = tf.cast(tf.random.normal([side, side], stddev=side**-0.5), precision)

        def seconds(products: int) -> float:
            began = time.perf_counter()
            chain(a, b, tf.constant(products)).numpy()
            return time.perf_counter() - began

        seconds(1)
        products = max(1, min(MOST_PRODUCTS, int(CALL_SECONDS / seconds(1))))
        best = min(seconds(products) for _ in range(REPEATS))
    return products * 2 * side**3 / best * 1e-12


def main(_: Sequence[str]) -> int:
    """Prints all lines. What goes wrong on the way ends the process as any error does."""
    # Why a GPU is not seen is told at this level.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
    import tensorflow as tf

    build = dict(tf.sysconfig.get_build_info())
    tell("build", {"tensorflow": tf.__version__, **{k: v for k, v in build.items() if isinstance(v, (str, bool))}})
    tell("capabilities", list(build.get("cuda_compute_capabilities", [])))
    gpus = []
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        capability = ".".join(map(str, details.get("compute_capability", ())))
        gpus.append({"name": details.get("device_name", "unknown"), "capability": capability})
    tell("gpus", gpus)
    from trainers.measure.comparison import compare_all_reduce
    from trainers.world import devices

    world = devices.set_up(Config(strategy="mirrored"))
    for i in range(len(gpus)):
        for precision in precisions(gpus[i]["capability"]):
            rate = matmul(f"GPU:{i}", precision, GPU_SIDE)
            tell("matmul", {"device": f"GPU:{i}", "name": gpus[i]["name"], "precision": precision, "teraflops": rate})
    if not gpus:
        rate = matmul("CPU:0", "float32", CPU_SIDE)
        tell("matmul", {"device": "CPU:0", "name": "CPU", "precision": "float32", "teraflops": rate})
    result = compare_all_reduce(world.strategy, GPU_SUM_SIDE if gpus else CPU_SUM_SIDE, REPEATS)
    found = {
        "replicas": world.replicas,
        "gigabytes": result.tensorflow_rate,
        "name": gpus[0]["name"] if gpus else "CPU",
    }
    tell("all_reduce", {**found, "wrong": "" if result.agrees else result.complaint})
    return OK


if __name__ == "__main__":
    process.main(lambda argv: argv[1:], main)
