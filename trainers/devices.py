"""Devices and the strategy: visible GPUs, or virtual CPU devices that share this machine's cores."""

import keras
import tensorflow as tf

from trainers.config import Config
from trainers.exit_codes import BadConfiguration

DEFAULT_CPU_REPLICAS = 2


def replica_count(config: Config) -> int:
    """Replicas on this machine, after `--replicas=0` is resolved against the devices that are there.

    Raises:
      BadConfiguration: more replicas are asked for than GPUs are visible.
    """
    gpus = len(tf.config.list_physical_devices("GPU"))
    if config.strategy == "one_device":
        if config.replicas > 1:
            raise BadConfiguration(f"--replicas {config.replicas} with --strategy=one_device; use --strategy=mirrored")
        return 1
    if gpus and config.replicas > gpus:
        raise BadConfiguration(f"--replicas {config.replicas} is above the {gpus} visible GPUs; use {gpus} or fewer")
    return config.replicas or gpus or DEFAULT_CPU_REPLICAS


def set_up(config: Config) -> tf.distribute.Strategy:
    """Configures TensorFlow for a run and returns the strategy.

    Sets the precision policy and determinism, lets GPUs grow their memory, and splits the CPU
    into virtual devices where there is no GPU.
    """
    replicas = replica_count(config)
    kind = _configure_devices(replicas)
    keras.backend.clear_session()
    keras.config.set_dtype_policy(config.precision if config.precision == "float32" else f"mixed_{config.precision}")
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if config.strategy == "one_device":
        return tf.distribute.OneDeviceStrategy(f"{kind}:0")
    devices = [f"{kind}:{i}" for i in range(replicas)]
    # Virtual CPU devices share one memory: adding on one of them is the fastest reduction, and it lets one process
    # hold several strategies. GPUs keep TensorFlow's choice, NCCL.
    reduction = tf.distribute.ReductionToOneDevice() if kind == "CPU" else None
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)


def _configure_devices(replicas: int) -> str:
    """Returns `GPU` or `CPU`. The first call in a process decides how many virtual devices there are."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        return "GPU"
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        present = tf.config.get_logical_device_configuration(cpu)
        if present is None or len(present) < replicas:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    except RuntimeError as error:  # TensorFlow runs already, with too few devices
        raise BadConfiguration(
            f"--replicas {replicas}: TensorFlow has started with fewer virtual CPU devices in this process; "
            "start another process"
        ) from error
    return "CPU"
