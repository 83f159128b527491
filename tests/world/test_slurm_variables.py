"""Which task runs on which node, from Slurm's variables: the right address for each, or one line."""

import pytest

from trainers.settings.exit_codes import BadConfiguration
from trainers.world.cluster import from_environment
from trainers.world.slurm import expand_hosts, expand_tasks, nodes_of_tasks

JOB = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[0-1]", "SLURM_JOB_ID": "7"}


def addresses(**changes):
    return list(from_environment(JOB | changes).addresses)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12]x,b2", ["n08x", "n09x", "n10x", "n12x", "b2"]),
        ("rack[0-1]node[0-1]", ["rack0node0", "rack0node1", "rack1node0", "rack1node1"]),
        ("r[0,2]n[1-2]x,b", ["r0n1x", "r0n2x", "r2n1x", "r2n2x", "b"]),
    ],
)
def test_a_list_of_hosts_is_opened(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["n[1-x]", "n[1-2", "n]1[", "n[]", "a,,b", "n[[1]]", "n[1-2]]"])
def test_what_is_no_list_of_hosts_is_named(text):
    with pytest.raises(BadConfiguration, match="is not a list of hosts as Slurm writes it"):
        expand_hosts(text)


def test_numbers_of_tasks_are_opened():
    assert expand_tasks("3,1") == [3, 1] and expand_tasks("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(BadConfiguration, match=r"SLURM_TASKS_PER_NODE is '2\(x', not e\.g\. 2\(x3\),1"):
        expand_tasks("2(x")


@pytest.mark.parametrize(
    ("distribution", "counts", "nodes"),
    [
        ("", [3, 1], [0, 0, 0, 1]),
        ("block:cyclic", [1, 3], [0, 1, 1, 1]),
        ("cyclic", [2, 2], [0, 1, 0, 1]),
        ("cyclic:block,NoPack", [3, 1], [0, 1, 0, 0]),
        ("plane=2", [4, 2], [0, 0, 1, 1, 0, 0]),
        ("plane", [4, 4], [0, 0, 0, 1, 1, 1, 0, 1]),
    ],
)
def test_tasks_are_distributed_as_slurm_does(distribution, counts, nodes):
    assert nodes_of_tasks(distribution, counts, 3) == nodes


def test_each_task_has_the_address_of_its_node():
    even = ["n0:20007", "n0:20008", "n1:20007", "n1:20008"]
    assert addresses() == addresses(SLURM_TASKS_PER_NODE="2(x2)") == even
    assert addresses(SLURM_STEP_TASKS_PER_NODE="3,1") == ["n0:20007", "n0:20008", "n0:20009", "n1:20007"]
    cyclic = addresses(SLURM_DISTRIBUTION="cyclic", SLURM_PROCID="1", SLURM_NODEID="1")
    assert cyclic == ["n0:20007", "n1:20007", "n0:20008", "n1:20008"]
    # The job's numbers are those of another step: what the step has counts.
    assert addresses(SLURM_STEP_TASKS_PER_NODE="2(x2)", SLURM_TASKS_PER_NODE="8(x4)") == even


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SLURM_NTASKS": "3"}, "SLURM_NTASKS 3 does not divide over the 2 nodes"),
        ({"SLURM_STEP_NODELIST": ""}, "does not divide over the 0 nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,2"}, "3,2 is not 4 tasks on the 2 nodes"),
        ({"SLURM_DISTRIBUTION": "arbitrary"}, "SLURM_DISTRIBUTION is 'arbitrary'; use block, cyclic or plane"),
        ({"SLURM_DISTRIBUTION": "plane"}, "SLURM_DISTRIBUTION is 'plane'"),
        ({"SLURM_PROCID": "1", "SLURM_NODEID": "1"}, "SLURM_NODEID is 1, but task 1 of distribution block would"),
        ({"SLURM_JOB_ID": "12+1"}, "SLURM_JOB_ID is '12[+]1'; it must be a whole number"),
        ({"SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE is 2: a heterogeneous job"),
        ({"SLURM_PROCID": "²"}, "SLURM_PROCID is '²'"),
        ({"SLURM_PROCID": "9"}, "the index 9, but names 4 workers"),
    ],
)
def test_what_does_not_say_where_tasks_run_is_one_line(changes, words):
    with pytest.raises(BadConfiguration, match=words) as error:
        addresses(**changes)
    assert "\n" not in str(error.value)
