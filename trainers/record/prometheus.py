"""`--metrics_port`: what Prometheus reads of a run, served by the chief for all workers, in threads of its own.

Nothing is counted for it: at each question the numbers are those that the run has told already, in run_dir and in
memory. The library is `prometheus-client`, in requirements of its own (`requirements/metrics.txt`).
"""

import contextlib
import importlib.util
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from trainers.record import fleet, standing
from trainers.record.run_record import RunRecord
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import metrics_address
from trainers.world import process

PREFIX = "lockstep"
# Of what a worker tells: its name here, a factor that makes it a base unit, and the help.
_HOST = {
    "load": ("worker_load", 1, "processes that want to run on the machine of a worker, over a minute"),
    "free_mib": ("worker_free_bytes", 1 << 20, "memory that is free on the machine of a worker"),
    "resident_mib": ("worker_resident_bytes", 1 << 20, "memory that a worker holds"),
}
_GPU = {
    "utilization": ("gpu_utilization_ratio", 0.01, "share of the time in which a GPU computed"),
    "memory_mib": ("gpu_memory_bytes", 1 << 20, "memory of a GPU that is taken"),
    "clock_mhz": ("gpu_clock_hertz", 1e6, "clock of a GPU's multiprocessors"),
    "temperature": ("gpu_temperature_celsius", 1, "temperature of a GPU"),
    "watts": ("gpu_power_watts", 1, "power that a GPU draws"),
    "ecc_errors": ("gpu_ecc_errors", 1, "memory errors of a GPU that were not corrected, since its driver was loaded"),
}


def check(port: str) -> None:
    """Whether the library is here, if a port is asked for. Free of TensorFlow.

    Raises:
      BadConfiguration: it is not.
    """
    if port and importlib.util.find_spec("prometheus_client") is None:
        raise BadConfiguration(
            f"--metrics_port {port} needs prometheus-client, which is not installed; pip install --require-hashes -r "
            "requirements/metrics.txt"
        )


class Collector:
    """The numbers of a run at the moment of a question, as `prometheus_client` collects them."""

    def __init__(self, record: RunRecord, ear: fleet.Ear):
        self.record, self.ear = record, ear

    def collect(self) -> Iterator[Any]:
        """Families of gauges: what goes down again at a restart is no counter."""
        from prometheus_client.core import GaugeMetricFamily

        families: dict[str, Any] = {}

        def put(name: str, text: str, value: Any, /, **labels: Any) -> None:
            if value is None:
                return
            if name not in families:
                families[name] = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=tuple(labels))
            families[name].add_metric([str(label) for label in labels.values()], float(value))

        self._of_run(put)
        for told in fleet.told_by_all(self.record.directory, self.ear):
            with contextlib.suppress(KeyError, TypeError, ValueError):  # of another version
                if told["worker"] < told.get("workers", 1):
                    self._of_worker(put, told)
        yield from families.values()

    def _of_run(self, put: Any) -> None:
        facts = self.record.facts
        flags, versions = facts.get("flags", {}), facts.get("versions", {})
        about = {"run_dir": str(self.record.directory), "loop": facts.get("loop", ""), "host": facts.get("host", "")}
        about |= {name: flags.get(name, "") or "" for name in ("model", "dataset")}
        put("run_info", "what the run is", 1, **about, tensorflow=versions.get("tensorflow", ""))
        put("train_steps", "updates in the whole run", flags.get("train_steps"))
        put("replicas", "replicas over all workers", facts.get("replicas"))
        for split, line in self.record.latest.items():
            for name, value in line.items():
                if name not in ("step", "split"):
                    put("metric", "the newest value of a metric of a split", value, split=split, name=name)
        if not self.record.goodput:
            return
        goodput = self.record.goodput.facts()
        now = goodput["attempts"][-1]
        put("step", "updates that are done", now["step"])
        put(
            "seconds_left",
            "time left at the pace of this attempt",
            standing.seconds_left(now, flags.get("train_steps")),
        )
        put("attempts", "starts of the run", facts.get("attempts"))
        put("wall_seconds", "time since the first start of the run", goodput["wall_seconds"])
        for part, seconds in goodput["seconds"].items():
            put("goodput_seconds", "what the wall time went into", seconds, part=part)

    def _of_worker(self, put: Any, told: Mapping[str, Any]) -> None:
        who = {"worker": told["worker"], "host": told["host"]}
        put("worker_told_seconds", "time since a worker was heard of", told[fleet.UNHEARD], **who)
        for part, seconds in told.get("pace", {}).items():
            if part != "steps":
                put("worker_step_seconds", "what a step of a worker takes, by part", seconds, **who, part=part)
        for key, (name, factor, text) in _HOST.items():
            if told.get(key) is not None:
                put(name, text, told[key] * factor, **who)
        for gpu in told.get("gpus", ()):
            which = who | {"gpu": gpu["gpu"]}
            for key, (name, factor, text) in _GPU.items():
                if gpu.get(key) is not None:
                    put(name, text, gpu[key] * factor, **which)
            put("gpu_throttled", "whether the driver holds a GPU back", bool(gpu.get("throttled")), **which)


@contextlib.contextmanager
def served(record: RunRecord, port: str, ear: fleet.Ear) -> Iterator[None]:
    """Within the block the chief answers at `--metrics_port`, if it is given. That it cannot is said, and no more."""
    server = None
    if port and record.writes:
        try:
            server = _serve(record, port, ear)
        except Exception as error:  # a port that is taken, a name that is not known
            process.say(f"--metrics_port {port} is not served: {error}; the run goes on without")
    try:
        yield
    finally:
        if server:
            # In a thread: a question that is never read to its end must not keep a process that is to end.
            threading.Thread(target=server.shutdown, daemon=True).start()


def _serve(record: RunRecord, port: str, ear: fleet.Ear) -> Any:
    from prometheus_client import CollectorRegistry, start_http_server

    host, number = metrics_address(port)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(record, ear))
    server, _ = start_http_server(number, host, registry)
    shown = f"[{host}]" if ":" in host else host
    process.say(f"metrics   http://{shown}:{server.server_port}/metrics")
    return server
