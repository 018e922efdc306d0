"""The simulator of sites: its documented example, its collectives, and how it ends when a site fails."""

import doctest

import pytest
import torch

from titan_ext.errors import RunError
from titan_ext.semi_sync import testing
from titan_ext.semi_sync.testing import InProcessSites


def test_the_documented_example_does_what_it_says():
    failed, tried = doctest.testmod(testing)
    assert failed == 0 and tried > 8


def test_a_site_that_fails_ends_the_others_wait():
    sites = InProcessSites(3)

    def act(site: int) -> None:
        if site == 1:
            raise KeyError("site 1")
        sites.sum(site, torch.ones(1))

    with pytest.raises(KeyError, match="site 1"):
        sites.at_once(act)
    sites.close()


def test_an_error_that_the_outer_loop_reports_is_one_of_the_program():
    with pytest.raises(RunError, match="site 1: wrong plan"):
        InProcessSites(2).managers()[1].report_error(RuntimeError("wrong plan"))
