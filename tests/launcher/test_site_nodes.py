"""The nodes of a site begin and end together: stores are real, nodes are threads and processes, ranks are left out."""

import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from titan_ext.errors import RunError, UserError
from titan_ext.launcher import site_nodes
from titan_ext.launcher.node import Node
from titan_ext.launcher.placement import free_port
from titan_ext.launcher.site_nodes import SiteNodes
from titan_ext.launcher.torchrun import choose_interfaces
from titan_ext.replica.shutdown.failure import FAILURE_KEY

_PATIENCE = 60.0
_fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(site_nodes, "_POLL_SECONDS", 0.02)


def site(count: int, port: int | None = None) -> list[SiteNodes]:
    port = port or free_port()
    return [SiteNodes(Node(rank, count, "127.0.0.1", port), _PATIENCE) for rank in range(count)]


def together(nodes: list[SiteNodes], call) -> list:
    """What ``call`` returns for each node, all at the same time."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(call, nodes))


def begin(nodes: list[SiteNodes]) -> list[threading.Event]:
    """For each node, what is set when another one ends the attempt."""
    assert together(nodes, SiteNodes.meet) == [["127.0.0.1"] * len(nodes)] * len(nodes)
    told = [threading.Event() for _ in nodes]
    for node, event in zip(nodes, told, strict=True):
        node.watch(event.set)
    return told


@pytest.mark.parametrize("count", [2, 3])
def test_a_site_has_trained_when_all_its_nodes_have(count):
    nodes = site(count)
    told = begin(nodes)
    assert [end.code for end in together(nodes, lambda node: node.finish(0))] == [0] * count
    assert not any(event.is_set() for event in told)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_failure_of_one_node_ends_all_with_its_code_and_reason(failing):
    nodes = site(3)
    told = begin(nodes)

    def run(node: SiteNodes):
        if node is nodes[failing]:
            return node.finish(137, "rank 1 was ended by SIGKILL")
        assert told[nodes.index(node)].wait(_PATIENCE)
        return node.finish(143)

    ends = together(nodes, run)
    assert {(end.node, end.code, end.reason) for end in ends} == {(failing, 137, "rank 1 was ended by SIGKILL")}


def test_a_node_that_is_done_fails_with_the_one_that_is_not():
    nodes = site(2)
    begin(nodes)
    first, second = together(nodes, lambda node: node.finish(0 if node is nodes[0] else 1))
    assert first.code == second.code == 1


def test_what_a_rank_has_said_counts_before_what_agents_see():
    nodes = site(2)
    begin(nodes)
    store = TCPStore("127.0.0.1", nodes[0]._node.port, is_master=False, wait_for_workers=False)
    store.set(FAILURE_KEY, json.dumps({"node": 1, "code": UserError.exit_code, "reason": "data: no such file"}))
    ends = together(nodes, lambda node: node.finish(1))
    assert {(end.node, end.code, end.reason) for end in ends} == {(1, 2, "data: no such file")}


def test_a_node_that_starts_anew_ends_the_attempt_and_joins_the_next_one():
    port = free_port()
    first, second = site(2, port)
    told = begin([first, second])
    again = site(2, port)[1]
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(again.meet)
        assert told[0].wait(_PATIENCE) and told[1].wait(_PATIENCE)
        assert "node 1 has started anew" in first.finish(143).reason
        second.finish(143)
        assert not joining.done()
        # The process of node 0 ends with its store; here what is left of it has to go.
        del first._store, second._store
        host = site(2, port)[0]
        assert host.meet() == joining.result(_PATIENCE) == ["127.0.0.1"] * 2
    assert [end.code for end in together([host, again], lambda node: node.finish(0))] == [0, 0]


def test_a_node_that_says_nothing_counts_as_dead(monkeypatch):
    monkeypatch.setattr(site_nodes, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(site_nodes, "_READ_SECONDS", 0.3)
    nodes = site(2)
    together(nodes, SiteNodes.meet)
    told = threading.Event()
    nodes[0].watch(told.set)
    assert told.wait(_PATIENCE)
    assert "node 1 is silent" in nodes[0].finish(143).reason


def run_first_node(port: int, met, stop) -> None:
    node = site(2, port)[0]
    node.meet()
    node.watch(lambda: None)
    met.set()
    stop.wait()
    os._exit(0)


def test_the_end_of_the_first_nodes_process_ends_the_others():
    port, met, stop = free_port(), _fork.Event(), _fork.Event()
    first = _fork.Process(target=run_first_node, args=[port, met, stop])
    first.start()
    second = site(2, port)[1]
    second.meet()
    told = threading.Event()
    second.watch(told.set)
    assert met.wait(_PATIENCE) and not told.is_set()
    first.kill()
    assert told.wait(_PATIENCE)
    end = second.finish(143)
    assert (end.node, end.code) == (0, 1) and f"node 0 is gone: no store at 127.0.0.1:{port}" in end.reason


def test_waiting_ends_with_the_names_of_those_who_have_not_come():
    host = SiteNodes(Node(0, 3, "127.0.0.1", free_port()), patience=0.1)
    with pytest.raises(RunError, match=r"node\(s\) 1, 2 of 3 have not come within 0.1 s"):
        host.meet()


def test_a_port_that_is_taken_is_bad_input():
    port = free_port()
    taken = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with pytest.raises(UserError, match=f"rendezvous at 127.0.0.1:{port}: this node cannot listen there"):
        SiteNodes(Node(0, 2, "127.0.0.1", port), _PATIENCE).meet()
    assert taken.port == port


def test_ranks_talk_through_the_interface_towards_the_first_node(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # to be as it was before when the test ends
        monkeypatch.delenv(name)
    choose_interfaces(["127.0.0.1", "127.0.0.1"], 1)
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_an_interface_of_the_users_stays_and_must_exist(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    choose_interfaces(["127.0.0.1"] * 2, 0)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nothing7")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME = nothing7: no such interface; this machine has .*lo"):
        choose_interfaces(["127.0.0.1"] * 2, 0)


def test_a_first_node_that_takes_itself_for_its_loopback_interface_is_refused():
    with pytest.raises(UserError, match="node 0 finds itself at 127.0.1.1"):
        choose_interfaces(["127.0.1.1", "10.0.0.2"], 1)
