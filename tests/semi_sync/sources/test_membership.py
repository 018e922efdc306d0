"""Sources where sites come and go: real managers and a real lighthouse, each site a thread."""

import pytest
import torch

from tests.semi_sync.sites import Meeting, outer_loop, run_sites
from titan_ext.semi_sync.sources.source import Source

PULL = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}


class Site:
    """A parameter to which each source adds its own number in an inner step."""

    def __init__(self, index, own, sources, **settings):
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.model.weight.data.zero_()
        self.trained: list[tuple[int, str]] = []
        self.outer = outer_loop(
            self.model,
            [],
            own,
            name=f"site{index}",
            sources=[Source(name=each) for each in sources],
            method="local_sgd",
            sync_every=4,
            **settings,
        )

    def train(self, rounds):
        """Until so many rounds of the run are committed."""
        outer = self.outer
        while outer.rounds < rounds:
            if not outer.sits_out:
                self.model.weight.data += PULL[outer.source]
                self.trained.append((outer.inner_step, outer.source))
            outer.step(tokens=1)

    def sources_of(self, round_):
        return [source for step, source in self.trained if step // 4 == round_][::4]


@pytest.mark.slow  # on a loaded machine the site may come a round later, which the expected numbers do not allow
def test_a_site_that_comes_later_brings_its_sources_from_the_next_round_on():
    started, there = Meeting(), Meeting()

    def body(index, own):
        site = Site(index, own, "ab" if index == 0 else "cd")
        if index:
            there.arrive()
        site.outer.join()
        if index == 0:
            site.train(2)
            started.arrive()
            there.wait()
        site.train(6)
        return site.model.weight.item(), site.sources_of(3), len(site.trained)

    results = run_sites(2, body, min_sites=1, before=lambda index: started.wait() if index else None)
    # Means of 1 and 2 in the rounds before and the one that it joins in, then of all four; 4 steps a round.
    assert [value for value, *_ in results] == [pytest.approx(4 * (3 * 1.5 + 3 * 2.5))] * 2
    assert [sources for _, sources, _ in results] == [["a", "b"], ["c", "d"]]
    assert [steps for *_, steps in results] == [6 * 2 * 4, 3 * 2 * 4]


def test_the_sources_of_a_site_that_left_are_placed_on_those_that_stay():
    rounds = 5

    def body(index, own):
        site = Site(index, own, "abcd", source_placement="pollen", heartbeat_timeout_seconds=1.0)
        site.outer.join()
        site.train(2 if index else rounds)
        return site.model.weight.item(), [site.sources_of(round_) for round_ in range(rounds)]

    (value, staying), (_, leaving) = run_sites(2, body, min_sites=1, heartbeat_timeout_ms=1000)
    for round_ in (0, 1):
        assert sorted(staying[round_] + leaving[round_]) == list("abcd")
    # Placed before it left, or while the lighthouse still took it for alive: the mean over the other's sources.
    for round_ in (2, 3):
        assert 0 < len(staying[round_]) < 4 or staying[round_] == list("abcd")
    assert staying[-1] == list("abcd")
    pulls = [sum(PULL[source] for source in sources) / len(sources) for sources in staying[2:]]
    assert value == pytest.approx(4 * (2.5 + 2.5 + sum(pulls)))
