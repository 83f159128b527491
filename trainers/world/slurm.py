"""Slurm's variables as addresses: which task runs on which node."""

import itertools
import re
from collections.abc import Mapping, Sequence

from trainers.settings.exit_codes import BadConfiguration

_FIRST_PORT, _PORTS = 20000, 10000
_REMEDY = "set TF_CONFIG for each task instead"


def whole_number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    """The whole number that a variable holds.

    Raises:
      BadConfiguration: it holds something else.
    """
    text = environment.get(name, default)
    if not (text.isascii() and text.isdecimal()):
        raise BadConfiguration(f"{name} is {text!r}; it must be a whole number; set it as the cluster's manager would")
    return int(text)


def expand_hosts(text: str) -> list[str]:
    """Slurm's list of hosts, opened: `a[1-2,05],b` → a1, a2, a05, b; `r[0-1]n[0-1]` → r0n0, r0n1, r1n0, r1n1.

    Raises:
      BadConfiguration: it is not such a list.
    """
    hosts = []
    for item in re.split(r",(?![^\[]*\])", text) if text else []:
        pieces = re.split(r"\[([^\[\]]*)\]", item)
        if any(character in piece for piece in pieces for character in "[]") or not item:
            raise BadConfiguration(f"{text!r} is not a list of hosts as Slurm writes it; {_REMEDY}")
        # Every second piece stood in brackets; the last bracket counts fastest.
        choices = [_numbers(piece, text) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        hosts += ["".join(parts) for parts in itertools.product(*choices)]
    return hosts


def _numbers(ranges: str, text: str) -> list[str]:
    """`1-2,05` → 1, 2, 05."""
    numbers = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        if not match:
            raise BadConfiguration(f"{text!r} is not a list of hosts as Slurm writes it; {_REMEDY}")
        low, high = match[1], match[2] or match[1]
        numbers += [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    return numbers


def expand_tasks(text: str) -> list[int]:
    """Slurm's numbers of tasks on each node, opened: `2(x3),1` → 2, 2, 2, 1.

    Raises:
      BadConfiguration: it is not such a list.
    """
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        if not match:
            raise BadConfiguration(f"SLURM_TASKS_PER_NODE is {text!r}, not e.g. 2(x3),1; {_REMEDY}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _counts(environment: Mapping[str, str], size: int, nodes: int) -> list[int]:
    """Tasks on each node of the step."""
    in_step = "SLURM_STEP_NODELIST" in environment
    names = (["SLURM_STEP_TASKS_PER_NODE"] if in_step else []) + ["SLURM_TASKS_PER_NODE"]
    for name in names:
        if text := environment.get(name):
            counts = expand_tasks(text)
            if (len(counts), sum(counts)) == (nodes, size):
                return counts
            if name == names[0]:
                raise BadConfiguration(
                    f"{name} {text} is not {size} tasks on the {nodes} nodes that Slurm names; {_REMEDY}"
                )
    if not nodes or size % nodes:
        raise BadConfiguration(f"SLURM_NTASKS {size} does not divide over the {nodes} nodes; set --ntasks-per-node")
    return [size // nodes] * nodes


def nodes_of_tasks(distribution: str, counts: Sequence[int], plane: int) -> list[int]:
    """The node of each task, from the numbers of tasks on each node. `distribution`: as `srun --distribution` has it.

    Raises:
      BadConfiguration: the distribution is arbitrary or unknown.
    """
    kind, _, size = distribution.split(",")[0].split(":")[0].partition("=")
    run = {"": max(counts), "*": max(counts), "block": max(counts), "cyclic": 1, "plane": plane}.get(kind)
    if kind == "plane" and size.isdecimal():
        run = int(size)
    if not run:
        raise BadConfiguration(f"SLURM_DISTRIBUTION is {distribution!r}; use block, cyclic or plane=SIZE, or {_REMEDY}")
    left, nodes = list(counts), []
    while any(left):
        for node, count in enumerate(left):
            taken = min(run, count)
            nodes += [node] * taken
            left[node] -= taken
    return nodes


def workers(environment: Mapping[str, str]) -> tuple[int, list[str]]:
    """This task's number, and the address of each task.

    Raises:
      BadConfiguration: the variables do not say which task runs where.
    """
    if environment.get("SLURM_HET_SIZE", "1") not in ("", "0", "1"):
        raise BadConfiguration(
            f"SLURM_HET_SIZE is {environment['SLURM_HET_SIZE']}: a heterogeneous job; submit one of one kind, "
            f"or {_REMEDY}"
        )
    index, size = (whole_number(environment, name) for name in ("SLURM_PROCID", "SLURM_NTASKS"))
    hosts = expand_hosts(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    counts = _counts(environment, size, len(hosts))
    plane = whole_number(environment, "SLURM_DIST_PLANESIZE", "0")
    nodes = nodes_of_tasks(environment.get("SLURM_DISTRIBUTION", ""), counts, plane)
    # Jobs that share a node must not share ports; several tasks on a node neither.
    base = _FIRST_PORT + whole_number(environment, "SLURM_JOB_ID", "0") % _PORTS
    addresses = [f"{hosts[node]}:{base + nodes[:task].count(node)}" for task, node in enumerate(nodes)]
    own, distribution = environment.get("SLURM_NODEID", ""), environment.get("SLURM_DISTRIBUTION") or "block"
    if own and index < size and own != str(nodes[index]):
        raise BadConfiguration(
            f"SLURM_NODEID is {own}, but task {index} of distribution {distribution} would "
            f"run on node {nodes[index]}; use --distribution=block, or {_REMEDY}"
        )
    return index, addresses
