"""Devices and the strategy: visible GPUs, or virtual CPU devices that share this machine's cores."""

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from trainers.settings.config import DEFAULT_CPU_REPLICAS, Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.world import collectives, data_sheets, nvidia, private_api, quiet, rendezvous
from trainers.world.cluster import Cluster


@dataclasses.dataclass(frozen=True)
class World:
    """The replicas of a run: the strategy over them and, with `--strategy=multi_worker`, the cluster of workers."""

    strategy: tf.distribute.Strategy
    cluster: Cluster | None = None

    @property
    def chief(self) -> bool:
        """Whether this process writes what users read."""
        return self.cluster is None or self.cluster.index == 0

    def waited(self) -> float:
        """Seconds that this worker has been in sums over workers since it was asked last; 0 where there is one."""
        meter = collectives.meter_of(self.strategy)
        return meter.more_seconds() if meter else 0.0

    @property
    def workers(self) -> int:
        """Number of processes."""
        return self.cluster.size if self.cluster else 1

    @property
    def replicas(self) -> int:
        """Replicas in all, over which the global batch is divided."""
        return self.strategy.num_replicas_in_sync


def native(variable: Any) -> tf.Variable:
    """The TensorFlow variable under a Keras variable."""
    return getattr(variable, "value", variable) if not isinstance(variable, tf.Variable) else variable


def components(variable: Any) -> tuple[tf.Variable, ...]:
    """The variables under a Keras or TensorFlow variable, one for each replica of this process."""
    own = native(variable)
    return tuple(getattr(own, "values", (own,)))


def first_component(variable: Any) -> tf.Variable:
    """A variable as it lies on this process's first device."""
    return components(variable)[0]


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
    if config.strategy == "multi_worker" and not gpus:
        if config.replicas > 1:
            raise BadConfiguration(
                f"--replicas {config.replicas} with --strategy=multi_worker and no GPU; a worker has one; add workers"
            )
        return 1
    return config.replicas or gpus or DEFAULT_CPU_REPLICAS


def join(config: Config, cluster: Cluster, log: Callable[[str], None]) -> tf.distribute.Strategy:
    """Meets the other workers and starts the strategy over all of them. Nothing may use TensorFlow before.

    Raises:
      PeerLost: a worker did not come within `--startup_timeout`.
      BadConfiguration: the workers disagree about the cluster or the flags.
    """
    common = config.values((*config.names("fixed"), *config.names("shared")))
    identity = {"loop": config.loop} | {name: str(value) for name, value in common.items()}
    rendezvous.meet(cluster, identity, config.startup_timeout, log)
    os.environ["TF_CONFIG"] = cluster.tf_config()
    without_proxy(cluster)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    implementation = tf.distribute.experimental.CommunicationImplementation
    gpus = tf.config.list_physical_devices("GPU")
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=implementation.NCCL if gpus else implementation.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def without_proxy(cluster: Cluster) -> None:
    """Keeps the workers' own traffic off an HTTP proxy, to which gRPC would send it."""
    hosts = [address.rpartition(":")[0].strip("[]") for address in cluster.addresses]
    for name in ("no_proxy", "no_grpc_proxy"):
        given = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*given, *hosts]))


def set_up(config: Config, cluster: Cluster | None = None, log: Callable[[str], None] = print) -> World:
    """Configures TensorFlow for a run and starts the strategy, over the workers of `cluster` if there is one.

    Sets Keras's defaults, the precision policy and determinism, lets GPUs grow their memory, and splits the CPU
    into virtual devices where there is no GPU. Says so where the machine has GPUs that TensorFlow does not see.
    """
    if not tf.config.list_physical_devices("GPU"):
        nvidia.warn_of_unseen()
        private_api.rewrite_graphs_little()  # half of a first call; no GPU's graphs were measured
    replicas = replica_count(config)
    keep_freed_memory()
    if cluster is None:
        os.environ.pop("TF_CONFIG", None)  # TensorFlow reads it for every strategy; this run has no other workers
    # First of all: TensorFlow configures collectives only before its first operation.
    joined = join(config, cluster, log) if cluster else None
    kind = configure_devices(replicas) if joined is None else ""
    keras.backend.clear_session()
    quiet.set_keras_defaults()
    keras.config.set_dtype_policy(config.precision if config.precision == "float32" else f"mixed_{config.precision}")
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if joined is not None:
        collectives.Meter(joined)
        return World(joined, cluster)
    if config.strategy == "one_device":
        return World(tf.distribute.OneDeviceStrategy(f"{kind}:0"))
    devices = [f"{kind}:{i}" for i in range(replicas)]
    # Virtual CPU devices share one memory: adding on one of them is the fastest reduction, and it lets one process
    # hold several strategies. GPUs keep TensorFlow's choice, NCCL.
    reduction = tf.distribute.ReductionToOneDevice() if kind == "CPU" else None
    return World(tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction))


def keep_freed_memory() -> None:
    """Has the C library keep memory that is freed, for the next step to use; it is the same memory at every step.

    Left alone, glibc may give it back to the kernel and ask for it again, a page fault for each 4 KiB. In a process
    that had built several models, `resnet` on 2 replicas had 8,500 faults a step and more, 100 with this, and took up
    to three times as long. Parameters of malloc: man 3 mallopt. A C library without them is left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (-3, 1 << 30),  # M_MMAP_THRESHOLD: no mapping of its own for each tensor
            (-1, (1 << 31) - 1),  # M_TRIM_THRESHOLD: the end of a heap is not given back
            (-2, 64 << 20),  # M_TOP_PAD: nor is a heap of another thread, which is as large
        ):
            mallopt(parameter, value)


def configure_devices(replicas: int) -> str:
    """Returns `GPU` or `CPU`. The first call in a process decides how many virtual devices there are.

    Raises:
      BadConfiguration: TensorFlow runs already, with fewer.
    """
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


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within the block a GPU multiplies float32 in float32: TensorFloat-32 keeps three digits of each factor."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def peak_flops(precision: str) -> float | None:
    """Operations a second of one GPU at its best, as the data sheet has it; None for a device that is not known."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return None
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "")
    peak = data_sheets.peak_teraflops(name, precision)
    return None if peak is None else peak * 1e12


def peak_memory_mib() -> dict[str, int]:
    """The most memory that this process has held on each GPU, in MiB."""
    names = [device.name.split("device:")[-1] for device in tf.config.list_logical_devices("GPU")]
    return {name: tf.config.experimental.get_memory_info(name)["peak"] >> 20 for name in names}
