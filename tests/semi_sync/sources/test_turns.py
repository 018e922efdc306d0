"""Sources of a site train in turn: as if each were a site of its own."""

import pytest
import torch

from tests.semi_sync.sites import outer_loop, run_sites
from tests.semi_sync.sources.federations import TOKENS, Federation, batch, new_model
from titan_ext.semi_sync.plan.sampling import sampled_sources
from titan_ext.semi_sync.sources.source import Source, Turn

ALL = ["a", "b", "c", "d"]
DILOCO = {"method": "diloco", "outer_lr": 0.7}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    "settings", [{}, DILOCO, {"weighting": "tokens"}, {"weighting": "tokens_times_batch"}, {"codec": "bf16"}], ids=str
)
@pytest.mark.parametrize("sites", [[["a", "b"], ["c", "d"]], [["a", "b", "c", "d"]], [["a"], ["b", "c", "d"]]], ids=str)
def test_sources_in_turn_come_to_what_sites_of_their_own_come_to(sites, settings):
    """Photon's invariant: fewer nodes than clients give the same model. A codec codes what a site sends, not a source."""
    alone = Federation([[each] for each in ALL], **settings).run(3).end()
    together = Federation(sites, **settings).run(3).end()
    allowed = 2e-2 if "codec" in settings else 2e-6
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=allowed, atol=allowed)


def test_two_sources_of_a_site_come_to_the_same_bits_as_two_sites():
    alone, together = Federation([["a"], ["b"]]).run(4).end(), Federation([["a", "b"]]).run(4).end()
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def reference(rounds, period, sources_of, weight, steps_before, rate=lambda step: 0.1 / (1 + step)):
    """Federated averaging by plain loops in float64; each source's gradient steps from the common parameters."""
    model = new_model().double()
    for round_ in range(rounds):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        weights = 0.0
        for source in sources_of(round_):
            model.load_state_dict(start)
            for step in range(period):
                inputs, targets = (each.double() for each in batch(source, steps_before(source, round_) + step))
                model.zero_grad()
                ((model(inputs) - targets) ** 2).mean().backward()
                for parameter in model.parameters():
                    parameter.data -= rate(round_ * period + step) * parameter.grad
            for name, value in model.state_dict().items():
                total[name] += weight(source) * value
            weights += weight(source)
        model.load_state_dict({name: value / weights for name, value in total.items()})
    return model.state_dict()


@pytest.mark.parametrize("weighting", ["uniform", "tokens", "site"])
def test_a_population_is_sampled_and_weighed(weighting):
    own = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 3.0}
    weight = {"uniform": lambda source: 1.0, "tokens": TOKENS.get, "site": own.get}[weighting]
    drawn = [[ALL[each] for each in sampled_sources(4, 2, 7, round_)] for round_ in range(6)]

    def before(source, round_):
        return 4 * sum(source in earlier for earlier in drawn[:round_])

    federation = Federation(
        [["a", "b", "c"], ["d"]],
        optimizer=sgd,
        weights=own,
        weighting=weighting,
        sources_per_round=2,
        sampling_seed=7,
    ).run(6)
    expected = reference(6, 4, lambda round_: drawn[round_], weight, before)
    found = federation.end()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    trained = {(source, step // 4) for site in federation.sites for source, step, _ in site.steps}
    assert trained == {(source, round_) for round_, sources in enumerate(drawn) for source in sources}
    assert any("d" not in each for each in drawn) and any("d" in each for each in drawn)


def test_samples_are_equal_at_all_sites_and_depend_on_nothing_but_seed_and_round():
    drawn = [sampled_sources(32, 4, 1, round_) for round_ in range(200)]
    assert drawn == [sampled_sources(32, 4, 1, round_) for round_ in range(200)]
    assert all(len(set(each)) == 4 and each == sorted(each) for each in drawn)
    times = [sum(source in each for each in drawn) for source in range(32)]
    assert min(times) > 5 and max(times) < 60  # 25 on average
    assert drawn != [sampled_sources(32, 4, 2, round_) for round_ in range(200)]
    assert sampled_sources(3, 4, 0, 0) == sampled_sources(3, None, 0, 0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("clock", "expected"),
    [("run", [0, 1, 2, 3, 4, 5, 6, 7]), ("round", [0, 1, 2, 3] * 2), ("source", None)],
)
def test_the_learning_rate_goes_by_the_clock_that_is_chosen(clock, expected):
    """Photon's invariant: every client sees the rate of the server's steps, whichever round it trains in."""
    seen = {name: [] for name in ALL}
    federation = Federation([["a", "b"], ["c", "d"]], source_clock=clock, sources_per_round=3, sampling_seed=1)
    for site in federation.sites:
        site.rate = lambda step, site=site: seen[site.outer.source].append(step) or 0.1
    federation.run(6).end()
    for site in federation.sites:
        for source in {source for source, *_ in site.steps}:
            steps = [step for each, step, _ in site.steps if each == source]
            wanted = {"run": steps, "round": [step % 4 for step in steps], "source": list(range(len(steps)))}[clock]
            assert seen[source] == wanted and len(steps) >= 4


def test_a_stateful_source_keeps_its_moments_and_a_stateless_one_begins_without():
    """AdamW's count of steps is all that tells: it is in the moments' bias correction."""
    kept, dropped = {}, {}
    for optimizer, counts in (("stateful", kept), ("stateless", dropped)):
        federation = Federation([["a", "b"]], source_optimizer=optimizer)
        site = federation.sites[0]

        def rate(step, site=site, counts=counts):
            state = site.optimizer.state.get(site.model[0].weight, {})
            counts.setdefault(site.outer.source, []).append(int(state["step"]) if "step" in state else 0)
            return 0.1

        site.rate = rate
        federation.run(2).end()
    assert kept == {"a": list(range(8)), "b": list(range(8))}
    assert dropped == {"a": [0, 1, 2, 3] * 2, "b": [0, 1, 2, 3] * 2}


def test_data_is_read_on_or_from_the_beginning():
    on = Federation([["a", "b"]]).run(2)
    again = Federation([["a", "b"]], reset_source_data=True).run(2)
    assert [place for source, _, place in on.sites[0].steps if source == "b"] == list(range(8))
    assert [place for source, _, place in again.sites[0].steps if source == "b"] == [0, 1, 2, 3] * 2
    on.end(), again.end()


@pytest.mark.parametrize("settings", [{}, DILOCO, {"sources_per_round": 3, "source_optimizer": "stateful"}], ids=str)
@pytest.mark.parametrize("steps", [2, 5, 7, 9])
def test_a_resume_within_a_round_goes_on_bit_for_bit(steps, settings):
    sites = [["a", "b", "c"], ["d"]]
    straight = Federation(sites, **settings).run(4).end()
    broken = Federation(sites, **settings).run(2)
    for _ in range(steps):
        if broken.sites[0].outer.more_sources or steps < 4:  # the site's last source would end the round alone
            broken.step(0)
    saved = broken.save()
    broken.network.close()
    resumed = Federation(sites, loaded=saved, **settings).run(4).end()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_what_is_not_finite_is_left_out_alone():
    """Source b spoils the model in each of its steps: the round is that of the others."""
    without = Federation([["a", "c"]], optimizer=sgd).run(2).end()
    for sites in ([["a", "b", "c"]], [["a", "c", "b"]]):  # as one of several, and as the last
        found = Federation(sites, optimizer=sgd).run(2, spoil="b").end()
        for name, value in without.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_a_failed_vote_costs_no_source_its_work():
    """All add 1 a step; the first vote on a round fails, and the next step of the last source tries again."""

    def body(index, own):
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.zero_()
        own.fail_votes = {2}  # the first is that of the join
        outer = outer_loop(
            model,
            [],
            own,
            name=f"s{index}",
            method="local_sgd",
            sync_every=4,
            sources=[Source(name="a"), Source(name="b")],
        )
        outer.join()
        taken = 0
        while outer.rounds < 2:
            model.weight.data += 1.0
            taken += 1
            outer.step()
        return model.weight.item(), taken

    values = run_sites(2, body)
    # Sources brought 4 and 5 steps at both sites where the vote failed; then both of step 8.
    assert len({value for value, _ in values}) == 1
    assert values[0][0] == pytest.approx((4 + 5) / 2 + 3) and values[0][1] == 4 + 5 + 3 + 3


def test_with_sources_common_to_all_sites_every_one_is_placed_once_and_reads_on():
    sites = [ALL, ALL]
    federation = Federation(sites, source_placement="pollen", sources_per_round=3, sampling_seed=3)
    federation.run(6)
    drawn = [sampled_sources(4, 3, 3, round_) for round_ in range(6)]
    for round_ in range(6):
        there = [
            [(source, place) for source, step, place in site.steps if step // 4 == round_] for site in federation.sites
        ]
        trained = sorted({source for steps in there for source, _ in steps})
        assert trained == [ALL[each] for each in drawn[round_]]
        assert not {source for source, _ in there[0]} & {source for source, _ in there[1]}
        for source in trained:
            before = 4 * sum(ALL.index(source) in earlier for earlier in drawn[:round_])
            assert [place for steps in there for each, place in steps if each == source] == list(
                range(before, before + 4)
            )
    federation.end()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "local_adam"}, "parameters alone"),
        ({"method": "diloco", "num_fragments": 2}, "without a delay"),
        ({"aggregation": "median"}, "weighted mean"),
        ({"sync_point": "before_step"}, "after the inner step"),
    ],
    ids=str,
)
def test_methods_whose_sources_cannot_take_turns_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Federation([["a", "b"]], **settings)


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names"):
        Federation([["a", "a"]])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"sources_per_round": 0}, "sources_per_round"),
        ({"sources_per_round": 2, "sites_per_round": 1}, "sources_per_round"),
        ({"source_placement": "pollen", "source_optimizer": "stateful"}, "source_optimizer"),
        ({"source_optimizer": "sometimes"}, "source_optimizer"),
        ({"source_optimizer": "stateful", "reset_inner_optimizer": True}, "source_optimizer"),
        ({"method": "local_adam", "sources_per_round": 2}, "sources_per_round"),
        ({"method": "diloco", "num_fragments": 2, "source_clock": "round"}, "source_clock"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused_by_key(settings, key):
    with pytest.raises(ValueError, match=f"^{key} = "):
        Federation([["a", "b"]], **settings)


def test_a_turn_says_where_its_data_begins():
    site = Federation([["a", "b"]], reset_source_data=True).run(1).sites[0]
    assert site.turns[:3] == [
        Turn(source="a", skip_steps=0),
        Turn(source="b", skip_steps=0),
        Turn(source="a", skip_steps=0),
    ]


def test_a_resume_with_other_sources_begins_the_round_anew():
    """Saved after two steps of source b: what those came to belongs to no source that is still there."""
    before = Federation([["a", "b"], ["c"]]).run(1)
    for _ in range(6):
        before.step(0)
    saved = before.save()
    common = {name: value.clone() for name, value in before.loops[0].global_parameters().items()}
    before.network.close()
    after = Federation([["a", "d"], ["c"]], loaded=saved)
    model = after.sites[0].model.state_dict()
    assert all(torch.equal(model[name], value) for name, value in common.items())
    assert after.sites[0].outer.source == "a" and after.sites[0].outer.schedule_step == 6
    after.network.close()
