"""The simulator of sites: its documented example, its collectives, and how it ends when a site fails."""

import doctest
import threading

import pytest
import torch
from torch.distributed import ReduceOp

from titan_ext.errors import RunError
from titan_ext.semi_sync import testing
from titan_ext.semi_sync.testing import InProcessSites


def test_the_documented_example_does_what_it_says():
    failed, tried = doctest.testmod(testing)
    assert failed == 0 and tried > 8


def test_sites_sum_what_they_offer():
    sites = InProcessSites(4)
    managers = sites.managers()
    values = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    held = values.clone()

    def twice(site: int) -> None:
        for _ in range(2):
            managers[site].allreduce(held[site], reduce_op=ReduceOp.SUM).wait()

    sites.at_once(twice)
    sites.close()
    torch.testing.assert_close(held, (4 * values.sum(0)).expand_as(held))
    assert all(torch.equal(held[0], each) for each in held)


def test_a_site_that_fails_does_not_leave_the_others_waiting():
    before = set(threading.enumerate())
    sites = InProcessSites(3)
    manager = sites.managers()[0]

    def act(site: int) -> None:
        if site == 1:
            raise ArithmeticError("site 1")
        manager.allreduce(torch.ones(1), reduce_op=ReduceOp.SUM)

    with pytest.raises(ArithmeticError, match="site 1"):
        sites.at_once(act)
    sites.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("site")]


def test_sites_exchange_messages_by_tag():
    sites = InProcessSites(3)
    groups = [manager.process_group for manager in sites.managers()]

    def act(site: int) -> list[list[int]]:
        others = [other for other in range(3) if other != site]
        for tag in (1, 0):
            for other in others:
                groups[site].send([torch.tensor([site, other, tag])], other, tag)
        places = {(other, tag): torch.empty(3, dtype=torch.int64) for other in others for tag in (0, 1)}
        for (other, tag), place in places.items():
            groups[site].recv([place], other, tag).wait()
        return [place.tolist() for place in places.values()]

    found = sites.at_once(act)
    sites.close()
    assert found == [
        [[1, 0, 0], [1, 0, 1], [2, 0, 0], [2, 0, 1]],
        [[0, 1, 0], [0, 1, 1], [2, 1, 0], [2, 1, 1]],
        [[0, 2, 0], [0, 2, 1], [1, 2, 0], [1, 2, 1]],
    ]


def test_an_error_that_the_outer_loop_reports_is_one_of_the_program():
    with pytest.raises(RunError, match="site 1: wrong plan"):
        InProcessSites(2).managers()[1].report_error(RuntimeError("wrong plan"))
