"""The cluster is found in the documented order, checked before a server starts, and met with a bound."""

import json
import socket
import threading
import time

import pytest

from launch.workers import free_ports
from trainers.settings.exit_codes import BadConfiguration, PeerLost
from trainers.world import rendezvous
from trainers.world.cluster import KUBERNETES as KUBERNETES_SOURCE
from trainers.world.cluster import Cluster, from_environment
from trainers.world.rendezvous import meet

KUBERNETES = {"JOB_COMPLETION_INDEX": "1", "NUM_WORKERS": "3", "JOB_NAME": "train", "WORKER_DOMAIN": "train.ns.svc"}
SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[01-02]", "SLURM_JOB_ID": "70123"}


def tf_config(addresses=("a:1", "b:2"), index=0, kind="worker", chief=()):
    described = {"worker": list(addresses)} | ({"chief": list(chief)} if chief else {})
    return {"TF_CONFIG": json.dumps({"cluster": described, "task": {"type": kind, "index": index}})}


def test_the_order_is_tf_config_then_kubernetes_then_slurm():
    assert from_environment(tf_config(index=1) | KUBERNETES | SLURM) == Cluster(1, ("a:1", "b:2"), "TF_CONFIG")
    found = from_environment(KUBERNETES | SLURM)
    assert (found.index, found.source) == (1, "Kubernetes Indexed Job")
    assert found.addresses == tuple(f"train-{i}.train.ns.svc:2222" for i in range(3))
    found = from_environment(SLURM)
    assert (found.index, found.source) == (2, "Slurm")
    assert found.addresses == ("gpu01:20123", "gpu01:20124", "gpu02:20123", "gpu02:20124")


def test_a_chief_in_tf_config_is_the_first_worker():
    found = from_environment(tf_config(index=1, chief=["c:3"]))
    assert (found.index, found.addresses) == (2, ("c:3", "a:1", "b:2"))
    assert from_environment(tf_config(index=0, kind="chief", chief=["c:3"])).index == 0
    assert json.loads(found.tf_config())["task"] == {"type": "worker", "index": 2}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "finds no cluster: set TF_CONFIG.*JOB_COMPLETION_INDEX.*launch/workers.py"),
        ({"TF_CONFIG": "{"}, "TF_CONFIG is not of the form"),
        (tf_config(kind="ps"), "its type must be worker or chief"),
        (tf_config(index=2), "index 2, but names 2 workers; use 0 to 1"),
        (tf_config(addresses=("a:1", "a:1")), "names a:1 more than once"),
        (tf_config(addresses=("a:1", "b")), "the address 'b'; write host:port"),
        (tf_config(addresses=()), "names no worker"),
        (KUBERNETES | {"NUM_WORKERS": ""}, "NUM_WORKERS is ''"),
        (KUBERNETES | {"JOB_NAME": ""}, "JOB_NAME is ''.*set them in the pod template"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "3"}, "index 3, but names 3 workers"),
        (SLURM | {"SLURM_NTASKS": "3"}, "SLURM_NTASKS 3 does not divide over the 2 nodes"),
    ],
)
def test_a_wrong_description_is_named(environment, words):
    with pytest.raises(BadConfiguration, match=words):
        from_environment(environment)


def free_addresses(count):
    return tuple(f"127.0.0.1:{port}" for port in free_ports(count))


def outcomes(members, timeout=20.0):
    """What `meet` did to each of (cluster, identity): None or the exception, and what was logged."""
    found, logs = [None] * len(members), []

    def one(place, member, identity):
        try:
            meet(member, identity, timeout, logs.append)
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=one, args=(i, *member)) for i, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, logs


def apart(members):
    """`start(index)` lets one of them meet, in a thread that it returns; and what became of each, by its index."""
    results = {}

    def start(index):
        thread = threading.Thread(target=lambda: results.update({index: outcomes([members[index]], 60.0)[0]}))
        thread.start()
        return thread

    return results, start


def test_workers_meet():
    addresses = free_addresses(4)
    found, logs = outcomes([(Cluster(i, addresses, "test"), {"seed": "0"}) for i in range(4)])
    assert found == [None] * 4
    assert any(line.startswith("worker 3 of 4 (test): 127.0.0.1:") for line in logs)


def test_sizes_addresses_and_flags_that_disagree_end_both():
    a, b, c = free_addresses(3)
    for theirs, identity, words in (
        (Cluster(1, (a, b, c), "test"), {"seed": "0"}, "of 3 workers, the chief a list of 2; use the same list"),
        (Cluster(1, (a, c), "test"), {"seed": "0"}, "has other addresses than the chief"),
        (Cluster(1, (a, b), "test"), {"seed": "1"}, "has --seed=1, the chief 0"),
    ):
        found, _ = outcomes([(Cluster(0, (a, b), "test"), {"seed": "0"}), (theirs, identity)])
        assert all(isinstance(error, BadConfiguration) and words in str(error) for error in found), found


def test_two_workers_with_one_index_on_one_machine():
    addresses = free_addresses(2)
    found, _ = outcomes([(Cluster(1, addresses, "test"), {})] * 2, timeout=2)
    assert any(isinstance(error, BadConfiguration) and "is taken" in str(error) for error in found), found


def test_an_address_of_another_machine():
    found, _ = outcomes([(Cluster(0, ("192.0.2.1:2222", "127.0.0.1:1"), "test"), {})])
    assert isinstance(found[0], BadConfiguration)
    assert "is not of this machine" in str(found[0])


def test_a_pod_waits_until_its_name_is_its_own():
    """A name may be cached that was another pod's, whose place this one takes: no reason to fail the run."""
    found, _ = outcomes([(Cluster(0, ("192.0.2.1:2222", "127.0.0.1:1"), KUBERNETES_SOURCE), {})], timeout=1)
    assert isinstance(found[0], PeerLost)
    assert "its own name 192.0.2.1 to be the address of this pod" in str(found[0])


def test_a_pod_takes_the_place_of_one_that_was_lost_with_its_node():
    addresses = free_addresses(3)
    members = [(Cluster(i, addresses, KUBERNETES_SOURCE), {}) for i in range(3)]
    results, start = apart(members)
    chief = start(0)
    host, port = addresses[0].split(":")
    lost = None
    for _ in range(100):
        try:
            lost = socket.create_connection((host, int(port)), timeout=2)
            break
        except OSError:
            time.sleep(0.05)
    lost.sendall(json.dumps({"index": 1, "addresses": addresses, "identity": {}}).encode() + b"\n")
    time.sleep(0.5)  # it has said hello, and will never say anything again
    again = start(1)
    lost.settimeout(60)
    assert lost.recv(1) == b""  # the chief has the other in its place
    last = start(2)
    for thread in (chief, again, last):
        thread.join()
    lost.close()
    assert results == {0: [None], 1: [None], 2: [None]}


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_that_never_comes_is_named_within_the_timeout(monkeypatch, index):
    monkeypatch.setattr(rendezvous, "_LOG_SECONDS", 0.5)
    addresses = free_addresses(2)
    found, logs = outcomes([(Cluster(index, addresses, "test"), {})], timeout=5)
    assert isinstance(found[0], PeerLost)
    assert addresses[1 - index] in str(found[0])
    assert any("waits for" in line and addresses[1 - index] in line for line in logs)


def test_a_name_that_never_resolves_is_named(monkeypatch):
    def nothing(*arguments, **keywords):
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    found, _ = outcomes([(Cluster(0, ("nowhere.invalid:2222", "b:1"), "test"), {})], timeout=1)
    assert isinstance(found[0], PeerLost)
    assert "nowhere.invalid to resolve" in str(found[0])


def test_a_stranger_at_the_door_does_no_harm():
    addresses = free_addresses(2)
    host, port = addresses[0].split(":")
    members = [(Cluster(i, addresses, "test"), {}) for i in range(2)]
    results, start = apart(members)
    chief = start(0)
    for words in (b"GET / HTTP/1.1\r\n\r\n\n", b"[1]\n", b'{"index": 1}\n', b""):
        for _ in range(50):
            try:
                with socket.create_connection((host, int(port)), timeout=2) as stranger:
                    stranger.sendall(words)
                break
            except OSError:
                time.sleep(0.05)
    worker, _ = outcomes(members[1:])
    chief.join()
    assert worker == [None]
    assert results == {0: [None]}
