"""Boxed rounds of unequal sites, on clocks of their own."""

import pytest
import torch

from titan_ext.semi_sync import SemiSyncConfig, SiteRanks
from titan_ext.semi_sync.plan.box import Box, Pace
from titan_ext.semi_sync.plan.time_model import TimeModel
from titan_ext.semi_sync.round.agreement import SiteStatus
from titan_ext.semi_sync.round.box import RoundBox, pace_of, told
from titan_ext.semi_sync.round.clock import Clock
from titan_ext.semi_sync.testing import InProcessSites

CPU = torch.device("cpu")


class Sites:
    """Sites with one parameter, to which site k adds k + 1 in each inner step; a step takes what ``seconds`` says."""

    def __init__(self, config: SemiSyncConfig, seconds: list[float], tokens: list[int] | None = None) -> None:
        self.seconds, self.tokens = seconds, tokens or [10] * len(seconds)
        self.times = [0.0] * len(seconds)
        self.models = [torch.nn.Linear(1, 1, bias=False) for _ in seconds]
        for model in self.models:
            model.weight.data.zero_()
        self.sites = InProcessSites(len(seconds))
        options = [{"clock": Clock(now=lambda site=site: self.times[site])} for site in range(len(seconds))]
        self.waited = [0.0] * len(seconds)
        self.outer = self.sites.outer_loops(config, self.models, options=options)
        for site, outer in enumerate(self.outer):
            outer._manager.start_quorum = lambda site=site: self.meet(site)

    def step(self) -> None:
        """One inner step of the run, with the exchange where all meet."""
        tokens = [0] * len(self.seconds)
        for site, outer in enumerate(self.outer):
            if not outer.sits_out:
                self.models[site].weight.data += site + 1
                self.times[site] += self.seconds[site]
                tokens[site] = self.tokens[site]
                self.taken[site] += 1
        self.sites.at_once(lambda site: self.outer[site].step(tokens=tokens[site]))

    def meet(self, site: int) -> None:
        """The quorum comes when the last site does."""
        self.waited[site] = max(self.times) - self.times[site]
        self.times[site] = max(self.times)

    def round(self, period: int) -> list[int]:
        """The steps that each site took in it."""
        self.taken = [0] * len(self.seconds)
        for _ in range(period):
            self.step()
        return self.taken

    def value(self) -> float:
        values = {model.weight.item() for model in self.models}
        assert len(values) == 1, "all sites hold the same"
        return values.pop()


def test_unequal_sites_come_together_and_count_by_their_tokens():
    sites = Sites(SemiSyncConfig(method="local_sgd", sync_every=12, round_box="speed"), [1.0, 3.0], [5, 20])
    assert sites.round(12) == [12, 12], "nothing is known of their speed yet"
    before = sites.value()
    assert before == pytest.approx((60 * 12 + 240 * 24) / 300)
    for _ in range(3):
        assert sites.round(12) == [12, 4]
        assert max(sites.waited) == pytest.approx(0.0)
        assert sites.value() - before == pytest.approx((60 * 12 + 80 * 8) / 140)
        before = sites.value()
    assert [outer.inner_step for outer in sites.outer] == [48, 48]
    sites.sites.close()


def test_a_box_of_tokens():
    config = SemiSyncConfig(method="diloco", sync_every=10, round_box="tokens", round_box_size=60)
    sites = Sites(config, [1.0, 1.0], [30, 8])
    assert sites.round(10) == [10, 10]
    assert sites.round(10) == [2, 8]
    sites.sites.close()


def test_a_box_of_seconds():
    config = SemiSyncConfig(method="local_sgd", sync_every=10, round_box="seconds", round_box_size=6.0)
    sites = Sites(config, [1.0, 0.5, 2.0])
    assert sites.round(10) == [10, 10, 10]
    assert sites.round(10) == [6, 10, 3]
    sites.sites.close()


def test_a_site_that_slows_down_ends_its_part_when_the_time_is_over_and_recovers():
    """Throttled 4 times for three rounds: the others wait for a part of a round once, and everything returns."""
    sites = Sites(SemiSyncConfig(method="local_sgd", sync_every=16, round_box="speed"), [1.0, 1.0])
    for _ in range(2):
        assert sites.round(16) == [16, 16]
    sites.seconds[1] = 4.0
    first = sites.round(16)
    assert first[0] == 16 and first[1] <= 6, "ended at a look at the clock, not after 64 s"
    assert sites.waited[0] <= 8.0
    for _ in range(2):
        assert sites.round(16) == [16, 4]
        assert max(sites.waited) == 0.0
    sites.seconds[1] = 1.0
    assert sites.round(16) == [16, 4]
    assert sites.round(16) == [16, 16], "its budget is what it was"
    sites.sites.close()


def test_a_pause_in_one_round_does_not_change_the_speed_that_is_known():
    """Of 16 steps of a second one takes 17: 32 s for the round, of which the next one knows nothing."""
    sites = Sites(SemiSyncConfig(method="local_sgd", sync_every=16, round_box="speed"), [1.0, 2.0])
    sites.round(16)
    for _ in range(3):
        assert sites.round(16) == [16, 8]
    sites.taken = [0, 0]
    for step in range(16):
        sites.seconds[0] = 17.0 if step == 6 else 1.0
        sites.step()
    assert sites.taken[1] <= 9, "it has not waited for more than the grace"
    assert sites.round(16) == [16, 8]
    assert max(sites.waited) == 0.0
    sites.sites.close()


@pytest.mark.parametrize("stop", [5, 13, 24])
def test_a_resumed_round_has_the_budget_that_it_had(stop):
    config = SemiSyncConfig(method="diloco", sync_every=12, round_box="tokens", round_box_size=40)
    whole, first, second = (Sites(config, [1.0, 3.0], [5, 10]) for _ in range(3))
    for sites, steps in ((whole, 36), (first, stop)):
        sites.taken = [0, 0]
        for _ in range(steps):
            sites.step()
    second.taken = list(first.taken)
    for outer, old, model, before in zip(second.outer, first.outer, second.models, first.models, strict=True):
        outer.load_state_dict(old.state_dict())
        model.weight.data.copy_(before.weight.data)
    second.sites.at_once(lambda site: second.outer[site].join())
    for _ in range(36 - stop):
        second.step()
    assert second.taken == whole.taken and second.value() == whole.value()
    for sites in (whole, first, second):
        sites.sites.close()


def test_by_default_nothing_is_measured():
    sites = Sites(SemiSyncConfig(method="local_sgd", sync_every=4), [1.0, 3.0])
    for _ in range(3):
        assert sites.round(4) == [4, 4]
    sites.sites.close()


def test_after_a_round_that_failed_a_site_trains_on_until_one_is_committed():
    box = RoundBox(Box(kind="tokens", steps=8, size=20), SiteRanks(alone=True), Clock(now=lambda: 0.0), CPU)
    table = [SiteStatus(fingerprint=0, step=8, rules=[0], pace=(0, 0, 1, 10_000)) for _ in range(2)]
    box.after_round(table, 1, True)
    taken = 0
    while not box.is_full:
        box.count_step()
        taken += 1
    assert taken == 2, "20 tokens of 10 a step"
    box.after_round(table, 1, False)
    for _ in range(20):
        box.count_step()
        assert not box.is_full
    assert box.pace(tokens=220) == Pace(None, 10.0), "what was not begun with a commit is not timed"
    box.after_round(table, 1, True)
    assert not box.is_full
    box.count_step()
    box.count_step()
    assert box.is_full


def test_what_a_site_tells_of_its_pace_is_what_the_others_read():
    pace = Pace(TimeModel(constant=0.25, logarithmic=0.000003, linear=1.5), 1024.5)
    status = SiteStatus(fingerprint=0, step=1, rules=None, pace=told(pace))
    assert pace_of(status) == pace
    assert pace_of(SiteStatus(fingerprint=0, step=1, rules=None)) == Pace()
    done = SiteStatus(fingerprint=0, step=1, rules=None, pace=told(pace), done=True)
    assert pace_of(done).times is None, "who takes no more steps holds nobody up"
