"""Sites that a round does not wait for bring their work to a later one, by its staleness."""

import pytest
import torch

from tests.lab.virtual_sites import TwoLayers, VirtualSites
from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, outer_loop, run_sites
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.plan.resolve import resolve
from titan_ext.semi_sync.testing import InProcessSites

RATES = (1.0, 2.0, 4.0)
"""What an inner step adds to every parameter, by site."""
STEPS = 16


def train(pauses: dict[int, float], *, min_sites: int = 2, join_seconds: float = 0.5, steps=STEPS, **settings):
    """What three sites come to of which the last one pauses before some of its inner steps, for some seconds."""
    sites = VirtualSites(len(RATES), min_sites=min_sites, join_seconds=join_seconds)

    def body(site: int):
        model, log = TwoLayers(), []
        taken = 0

        def note(record) -> None:
            values = {name: value[0, 0].item() for name, value in outer.global_parameters().items()}
            own = {name: value[0, 0].item() for name, value in model.named_parameters()}
            log.append((record, taken, values, own, sites.simulation.now))

        outer = sites.outer_loop(site, model, on_round=note, **settings)
        outer.join()
        while outer.inner_step < steps:
            sites.sleep(1.0 + (pauses.get(outer.inner_step, 0.0) if site == len(RATES) - 1 else 0.0))
            for each in model.parameters():
                each.data += RATES[site]
            taken += 1
            outer.step()
        outer.finish()
        return log, outer.shared_state_sha256(), outer.ledger

    return sites.run(body)


def committed(results):
    """By round and site the log of it."""
    by_round: dict[int, dict[int, tuple]] = {}
    for site, (log, _, _) in enumerate(results):
        for entry in log:
            if entry[0].committed:
                by_round.setdefault(entry[0].round, {})[site] = entry
    return by_round


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_work_of_a_late_site_counts_in_a_later_round_by_its_staleness(exponent):
    """Against the sums of the equations in float64: the global value, and all that was trained is in it once."""
    results = train({5: 4.4, 10: 2.3}, method="local_sgd", sync_every=2, late_work="keep", staleness_exponent=exponent)
    assert len({sha for _, sha, _ in results}) == 1, "all sites end with the same bits"
    value, counted = 0.0, [0] * len(RATES)
    seen: list[int] = []
    for _, entries in sorted(committed(results).items()):
        record = next(iter(entries.values()))[0]
        total, moved = 0.0, 0.0
        for name in record.contributors:
            site = int(name[-1])
            weight = (1.0 + record.staleness.get(name, 0)) ** -exponent
            steps = entries[site][1] - counted[site]
            counted[site] += steps
            total, moved = total + weight, moved + weight * RATES[site] * steps
        value += moved / total
        seen += record.staleness.values()
        for site, (_, _, values, own, _) in entries.items():
            assert list(values.values()) == pytest.approx([value] * len(values), rel=1e-6), (record.round, site)
            assert own == values
    assert seen == [2, 1], "rounds that went by in its pauses"
    assert results[0][2].stale == 2 and results[0][2].most_stale == 2
    assert all(counted[site] == results[site][0][-1][1] for site in range(len(RATES)))


def test_the_others_do_not_wait_beyond_the_grace_and_say_who_was_missing():
    results = train({5: 4.4}, method="local_sgd", sync_every=2, late_work="keep")
    log = results[0][0]
    records = [record for record, *_ in log]
    assert all(record.committed for record in records)
    assert max(record.seconds_quorum for record in records) == pytest.approx(0.5)
    without = [record for record in records if "site2" not in record.contributors]
    assert len(without) == 2 and all(record.missing == {"site2": "not in the quorum"} for record in without)
    assert records[-1].contributors == ["site0", "site1", "site2"]


@pytest.mark.parametrize(("seconds", "warns"), [(1.9, True), (2.1, False)])
def test_a_grace_shorter_than_the_steps_between_two_rounds_is_warned_of(seconds, warns, caplog):
    train({}, steps=8, join_seconds=seconds, method="local_sgd", sync_every=2, late_work="keep")
    found = [each.getMessage() for each in caplog.records if "join_timeout_seconds" in each.getMessage()]
    assert len(found) == (len(RATES) if warns else 0)
    assert all("= 1.9 is shorter than the inner steps between two rounds (2.0 s)" in each for each in found)


def test_without_it_the_work_is_dropped_as_ever():
    results = train({5: 4.4}, method="local_sgd", sync_every=2)
    assert all(not record.staleness for record, *_ in results[0][0])
    joined = next(record for record, *_ in results[2][0] if record.healed)
    assert joined.participants == 2


def test_of_several_fragments_the_work_waits_for_the_turn_of_each():
    """A round in flight was written before the others' state came: of another fragment it brings nothing and loses nothing."""
    results = train(
        {5: 6.2},
        join_seconds=2.5,
        steps=20,
        method="diloco",
        outer_optimizer="average",
        sync_every=4,
        num_fragments=2,
        fragment_sync_delay=1,
        late_work="keep",
    )
    assert len({sha for _, sha, _ in results}) == 1
    log = results[2][0]
    caught_up = next(at for at, entry in enumerate(log) if entry[0].healed)
    record, taken, values, own, _ = log[caught_up]
    assert record.missing == {"site2": "late, with another part of the model; its work goes into a later round"}
    assert not record.staleness and taken == 8
    # Of fragment 0 the last result was applied after the 6th of its steps, of fragment 1 after the 4th.
    kept = {name: own[name] - values[name] for name in own}
    assert kept == {"layers.0.weight": RATES[2] * 2, "layers.1.weight": RATES[2] * 4}
    # Of fragment 1 rounds 4 and 6 went by, of fragment 0 rounds 5 and 7; each is brought by the next one.
    stale = {record.round: record.staleness for record, *_ in results[0][0] if record.staleness}
    assert stale == {8: {"site2": 2}, 9: {"site2": 2}}


def test_a_site_whose_work_the_others_have_already_does_not_bring_it_again():
    """Its own vote alone failed: the others' commit contains what it did."""
    sites = VirtualSites(2, min_sites=1, join_seconds=0.5)
    vote = sites.managers[1].should_commit
    votes = []

    def failing() -> bool:
        votes.append(1)
        if len(votes) == 2:  # the first is that of joining
            sites.managers[1].report_error(RuntimeError("broken"))
        return vote()

    sites.managers[1].should_commit = failing

    def body(site: int):
        model, records = TwoLayers(), []
        outer = sites.outer_loop(
            site, model, on_round=records.append, method="local_sgd", sync_every=2, late_work="keep"
        )
        outer.join()
        while outer.inner_step < 6:
            sites.sleep(1.0)
            for each in model.parameters():
                each.data += RATES[site]
            outer.step()
        outer.finish()
        return records, {value[0, 0].item() for value in outer.global_parameters().values()}

    (first, values), (second, theirs) = sites.run(body)
    healed = [record for record in second if record.healed]
    assert len(healed) == 1 and not healed[0].staleness and healed[0].missing == {"site1": "joining"}
    assert values == theirs
    moved = [RATES[0] * 2 if record.participants == 1 else 1.5 * 2 for record in first if record.committed]
    assert values == {sum(moved)} or values == {sum(moved) + 1.0}


@pytest.mark.parametrize("delay", [0, 1])
def test_torchfts_own_lighthouse_and_transfer_do_the_same(delay):
    """The third site comes after a round that went on without it, and brings what it did before and after that."""
    others_went_on = Meeting()

    def body(site, own):
        model, records, taken = TwoLayers(), [], []
        settings = dict(method="local_sgd", sync_every=2, fragment_sync_delay=delay, late_work="keep")
        outer = outer_loop(model, [], own, name=f"site{site}", on_round=records.append, **settings)
        outer.join()
        while outer.inner_step < 8:
            if site == 2 and len(taken) == 3:
                others_went_on.wait()
            if site != 2 and outer.inner_step == 5 + delay:
                others_went_on.arrive()
                wait_for_requests(own.lighthouse, 1)
            for each in model.parameters():
                each.data += RATES[site]
            taken.append(outer.inner_step)
            outer.step()
        outer.finish()
        return records, len(taken), outer.shared_state_sha256(), [each[0, 0].item() for each in model.parameters()]

    results = run_sites(3, body, min_sites=2, join_timeout_ms=8000)
    assert len({sha for _, _, sha, _ in results}) == 1
    first, third = results[0][0], results[2][0]
    assert [record.contributors for record in first if len(record.contributors) == 2] == [["site0", "site1"]]
    assert [record.staleness for record in first if record.staleness] == [{"site2": 1}]
    healed = next(record for record in third if record.healed)
    assert healed.contributors == ["site0", "site1", "site2"] and results[2][1] < 8
    if not delay:
        discount = 2.0**-0.5
        late = (2 * RATES[0] + 2 * RATES[1] + discount * 2 * RATES[2]) / (2 + discount)
        alike = 2 * sum(RATES) / 3
        assert results[0][3] == pytest.approx([alike + 2 * (RATES[0] + RATES[1]) / 2 + late + alike] * 2)


@pytest.mark.parametrize("fragments", [1, 2])
def test_with_all_sites_in_time_it_is_streaming_diloco_bit_for_bit(fragments):
    """Decoupled DiLoCo's plan with means instead of directions, equal weights and a quorum of all sites."""
    common = dict(sync_every=4, num_fragments=fragments, fragment_sync_delay=1, outer_lr=0.7, weighting="uniform")
    streaming = SemiSyncConfig(method="diloco", **common)
    decoupled = SemiSyncConfig(
        method="decoupled_diloco", late_work="keep", settings={"decoupled_diloco": {"mean": ["*"]}}, **common
    )
    assert final_bits(streaming) == final_bits(decoupled)


def final_bits(config: SemiSyncConfig) -> str:
    models = [TwoLayers() for _ in RATES]
    sites = InProcessSites(len(RATES))
    outer = sites.outer_loops(config, models, options=[{"name": f"site{site}"} for site in range(len(RATES))])
    for step in range(1, STEPS + 1):
        for site, model in enumerate(models):
            for place, each in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + 10 * site + place)
                each.data += torch.randn(each.shape, generator=generator)
        sites.at_once(lambda site: outer[site].step())
    sites.at_once(lambda site: outer[site].finish())
    sites.close()
    return outer[0].shared_state_sha256()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "des_loc"},
        {"method": "noloco"},
        {"method": "sparta"},
        {"sites_per_round": 2},
        {"sources_per_round": 2},
        {"sync_point": "before_step", "method": "local_sgd"},
        {"topology": "regions"},
    ],
    ids=str,
)
def test_methods_that_cannot_keep_it_refuse(settings):
    with pytest.raises(ValueError, match="late_work"):
        resolve(SemiSyncConfig(late_work="keep", **settings))


def test_a_discount_without_late_work_is_refused():
    with pytest.raises(ValueError, match="staleness_exponent"):
        resolve(SemiSyncConfig(staleness_exponent=1.0))


def test_a_site_needs_a_name():
    sites = InProcessSites(1)
    with pytest.raises(ValueError, match="site_name"):
        sites.outer_loops(SemiSyncConfig(late_work="keep"), [TwoLayers()])
    sites.close()
