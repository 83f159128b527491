"""Who the workers are: read from the environment and checked.

The order is TF_CONFIG as given, a Kubernetes Indexed Job, Slurm.
"""

import dataclasses
import json
from collections.abc import Mapping

from trainers.settings.exit_codes import BadConfiguration
from trainers.world import slurm

DEFAULT_PORT = 2222
KUBERNETES = "Kubernetes Indexed Job"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """This worker's index and the addresses (`host:port`) of all, the chief's first. `source`: where that was found."""

    index: int
    addresses: tuple[str, ...]
    source: str

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self.addresses)

    def tf_config(self) -> str:
        """The value of TF_CONFIG that TensorFlow reads."""
        task = {"type": "worker", "index": self.index}
        return json.dumps({"cluster": {"worker": list(self.addresses)}, "task": task})


def _from_tf_config(text: str) -> Cluster:
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        addresses = [*cluster.get("chief", []), *cluster.get("worker", [])]
        index = int(task["index"]) + (len(cluster.get("chief", [])) if task["type"] == "worker" else 0)
        known = task["type"] in ("chief", "worker") and all(isinstance(a, str) for a in addresses)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadConfiguration(
            "TF_CONFIG is not of the form {cluster: {worker: [host:port, …]}, task: {type, index}}: "
            f"{error!r}; fix it"
        ) from None
    if not known:
        raise BadConfiguration(f"TF_CONFIG names the task {task}; its type must be worker or chief")
    return Cluster(index, tuple(addresses), "TF_CONFIG")


def _from_kubernetes(environment: Mapping[str, str]) -> Cluster:
    index, size = (slurm.whole_number(environment, name) for name in ("JOB_COMPLETION_INDEX", "NUM_WORKERS"))
    job, domain = environment.get("JOB_NAME", ""), environment.get("WORKER_DOMAIN", "")
    if not job or not domain:
        raise BadConfiguration(
            f"JOB_NAME is {job!r} and WORKER_DOMAIN {domain!r}; an Indexed Job needs both; set them in the pod template"
        )
    addresses = tuple(f"{job}-{i}.{domain}:{DEFAULT_PORT}" for i in range(size))
    return Cluster(index, addresses, KUBERNETES)


def from_environment(environment: Mapping[str, str]) -> Cluster:
    """The cluster that the environment describes, checked for what can be checked alone.

    Raises:
      BadConfiguration: nothing describes one, or an index, an address or a size is wrong.
    """
    if environment.get("TF_CONFIG"):
        cluster = _from_tf_config(environment["TF_CONFIG"])
    elif "JOB_COMPLETION_INDEX" in environment:
        cluster = _from_kubernetes(environment)
    elif "SLURM_PROCID" in environment:
        index, found = slurm.workers(environment)
        cluster = Cluster(index, tuple(found), "Slurm")
    else:
        raise BadConfiguration(
            "--strategy=multi_worker finds no cluster: set TF_CONFIG, or run in a Kubernetes Indexed Job "
            "(JOB_COMPLETION_INDEX, NUM_WORKERS, JOB_NAME, WORKER_DOMAIN) or under srun; on one machine, use "
            "launch/workers.py"
        )
    _check(cluster)
    return cluster


def _check(cluster: Cluster) -> None:
    if not cluster.addresses:
        raise BadConfiguration(f"{cluster.source} names no worker; name each worker's host:port")
    for address in cluster.addresses:
        host, _, port = address.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
            raise BadConfiguration(f"{cluster.source} names the address {address!r}; write host:port")
    repeated = sorted({a for a in cluster.addresses if cluster.addresses.count(a) > 1})
    if repeated:
        raise BadConfiguration(f"{cluster.source} names {repeated[0]} more than once; give each worker its own address")
    if not 0 <= cluster.index < cluster.size:
        raise BadConfiguration(
            f"{cluster.source} gives this worker the index {cluster.index}, but names {cluster.size} workers; "
            f"use 0 to {cluster.size - 1}"
        )
