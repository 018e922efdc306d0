"""Which node of a site a machine is: from flags and from what schedulers leave in the environment."""

import pytest

from titan_ext.errors import UserError
from titan_ext.launcher.node import Node, find_node, first_host

SLURM = {
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_JOB_NODELIST": "gpu[003-005,11],login1",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "3"}
SKYPILOT = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "4", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8\n"}


def find(environment: dict[str, str], name: str = "host", **flags: int | str) -> Node:
    given = {"rank": None, "rendezvous": None} | flags
    return find_node("east", 4, 29500, environment=environment, own_name=lambda: name, **given)


@pytest.mark.parametrize(
    ("environment", "name", "flags", "node"),
    [
        ({}, "host", {"rank": 1, "rendezvous": "gpu1"}, Node(1, 4, "gpu1", 29500)),
        ({}, "host", {"rank": 0, "rendezvous": "10.0.0.1:1234"}, Node(0, 4, "10.0.0.1", 1234)),
        ({}, "host", {"rank": 3, "rendezvous": "[fd00::1]:1234"}, Node(3, 4, "fd00::1", 1234)),
        ({}, "host", {"rank": 3, "rendezvous": "[fd00::1]"}, Node(3, 4, "fd00::1", 29500)),
        (SLURM, "host", {}, Node(2, 4, "gpu003", 29500)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7"}, "host", {}, Node(2, 4, "gpu7", 29500)),
        (SLURM, "host", {"rank": 1, "rendezvous": "10.0.0.1:1234"}, Node(1, 4, "10.0.0.1", 1234)),
        (KUBERNETES, "run-east-3.run-east.llm.svc.cluster.local", {}, Node(3, 4, "run-east-0.run-east.llm.svc.cluster.local", 29500)),
        (KUBERNETES, "anything", {"rendezvous": "run-east-0.run-east"}, Node(3, 4, "run-east-0.run-east", 29500)),
        (SKYPILOT, "host", {}, Node(1, 4, "10.0.0.7", 29500)),
    ],
)  # fmt: skip
def test_flags_go_before_what_the_scheduler_says(environment, name, flags, node):
    assert find(environment, name, **flags) == node


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-010]", "gpu003"),
        ("gpu[7,9-11]", "gpu7"),
        ("rack[2-3]-n,login", "rack2-n"),
        ("a-b.c[01]", "a-b.c01"),
    ],
)
def test_first_host_of_a_list_of_slurms(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "flags", "words"),
    [
        ({}, {}, ["4 nodes", "--node-rank K and --rendezvous HOST", "--local-nodes"]),
        ({}, {"rank": 1}, ["--rendezvous HOST"]),
        ({}, {"rendezvous": "gpu1"}, ["--node-rank K"]),
        (KUBERNETES, {}, ["--rendezvous HOST"]),
        ({}, {"rank": 4, "rendezvous": "gpu1"}, ["--node-rank 4", "0 to 3"]),
        ({}, {"rank": -1, "rendezvous": "gpu1"}, ["--node-rank -1"]),
        ({}, {"rank": 1, "rendezvous": "http://gpu1:1"}, ["--rendezvous http://gpu1:1"]),
        ({}, {"rank": 1, "rendezvous": "gpu1:99999"}, ["--rendezvous gpu1:99999"]),
        (SLURM | {"SLURM_JOB_NUM_NODES": "2"}, {}, ["nodes = 4", "Slurm", "2 node(s)"]),
        (SLURM | {"SLURM_LOCALID": "1"}, {}, ["--ntasks-per-node=1"]),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "8"}, {}, ["SkyPilot", "8 node(s)"]),
        ({"JOB_COMPLETION_INDEX": "x"}, {}, ["JOB_COMPLETION_INDEX", "'x'"]),
    ],
)
def test_what_is_missing_or_cannot_be_is_said_in_a_line(environment, flags, words):
    with pytest.raises(UserError) as caught:
        find(environment, **flags)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
