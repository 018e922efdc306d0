"""A tree of sites: regions that average by themselves, and one site of each that speaks for it between regions."""

import pytest
import torch
from torch import nn

from tests.semi_sync.plan.test_group_scopes import _ByPeer, local_step
from titan_ext.semi_sync import ScopeConfig, SemiSync, SemiSyncConfig, SiteOptions, SiteRanks
from titan_ext.semi_sync.plan.regions import LEVELS, level_labels
from titan_ext.semi_sync.plan.resolve import resolve
from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.codecs import CODECS
from titan_ext.semi_sync.wire.coded_reductions import CodedReduction
from titan_ext.semi_sync.wire.reductions import AllReduce, RoundFacts
from titan_ext.semi_sync.wire.through_regions import ThroughRegions, tree_of

REGIONS = ["us", "eu/de", "eu", "us", "eu/de", "us"]
NUMEL = 1000


def labels_of(regions):
    labels = [level_labels(region) for region in regions]
    return {level: [each[level] for each in labels] for level in LEVELS}


def test_a_site_of_each_region_speaks_for_it_level_by_level():
    tree = tree_of(REGIONS)
    assert tree.groups == (((0, 3, 5), (1, 4)), (), ((1, 2),))
    assert tree.speakers == (0, 1)
    assert [tree.messages_within(rank) for rank in range(6)] == [2, 2, 1, 1, 1, 1]


def summed(codec, regions):
    """What every site gets, what it lost, and its counter, for values that differ between sites."""
    sites = InProcessSites(len(regions))
    managers, counters = sites.managers(), []
    for manager in managers:
        manager._process_group = _ByPeer(manager._process_group)
        counters.append(manager._process_group)
    values = [torch.randn(NUMEL, generator=torch.Generator().manual_seed(index)) for index in range(len(regions))]

    def body(site):
        flat = values[site].clone()
        whole = AllReduce(64) if codec == "fp32" else CodedReduction(CODECS.get(codec)(), 256)
        reduction = ThroughRegions(whole, 64)
        lost = torch.empty_like(flat)
        of = RoundFacts(0, [1.0] * len(regions), rank=site, labels=labels_of(regions))
        reduction.reduce(managers[site], flat, of, lost)
        return (
            flat,
            lost,
            reduction.take_traffic().sent,
            reduction.of_sites(regions, site).wire_bytes(NUMEL, len(regions)),
        )

    results = sites.at_once(body)
    sites.close()
    return values, results, counters


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "topk"])
@pytest.mark.parametrize("regions", [REGIONS, ["eu"] * 3, ["a", "b", "c"]], ids=["tree", "one region", "flat"])
def test_all_sites_get_one_sum_and_know_what_it_lost(codec, regions):
    values, results, counters = summed(codec, regions)
    whole = torch.stack(values).double().sum(0)
    first = results[0][0]
    for (flat, _, sent, _), counter in zip(results, counters, strict=True):
        assert torch.equal(flat, first)
        assert sent == counter.sent
    if codec == "fp32":
        assert (first - whole).abs().max() < 1e-5
        assert all(lost.abs().max() == 0 for _, lost, _, _ in results)
    elif codec in ("int8", "topk"):  # what is fed back is all that is missing
        owed = torch.stack([lost.double() for _, lost, _, _ in results]).sum(0)
        assert (first + owed - whole).abs().max() < 1e-4


def test_what_crosses_between_regions_is_what_one_site_sends():
    _, results, counters = summed("fp32", REGIONS)
    tops = [region.split("/")[0] for region in REGIONS]
    crossing = {
        rank: sum(sent for peer, sent in counter.by_peer.items() if tops[peer] != tops[rank])
        for rank, counter in enumerate(counters)
    }
    # Two regions send each other one copy of the values, whether they have three sites or thirty.
    assert crossing == {0: 4 * NUMEL, 1: 4 * NUMEL, 2: 0, 3: 0, 4: 0, 5: 0}
    assert [sent for *_, sent, _ in results] == [foretold for *_, foretold in results]


# -- the engine ---------------------------------------------------------------------------------------


def options_of(regions, weights=None):
    weights = weights or [1.0] * len(regions)
    return [
        {"name": f"site{index}", "labels": {"region": region, "language": region[:1]}, "weight": weight}
        for index, (region, weight) in enumerate(zip(regions, weights, strict=True))
    ]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))


def train(config, regions, steps, weights=None):
    sites = InProcessSites(len(regions))
    models = [Model() for _ in regions]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    outer = sites.outer_loops(config, models, optimizers, options_of(regions, weights))
    for step in range(steps):
        for index, model in enumerate(models):
            local_step(model, index, step)
        sites.at_once(lambda site: outer[site].step())
    sites.at_once(lambda site: outer[site].finish())
    digests = {each.shared_state_sha256() for each in outer}
    found = [[parameter.detach().clone() for parameter in model.parameters()] for model in models]
    sites.close()
    assert len(digests) == 1
    return found


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="diloco"),
        dict(method="diloco", num_fragments=2, fragment_sync_delay=1, sync_every=4),
        dict(method="des_loc", outer_optimizer="average"),
        dict(
            method="local_sgd",
            scopes=[ScopeConfig(name="head", parameters=["second.*"], shared="group", group="language")],
        ),
    ],
    ids=["diloco", "streaming", "des_loc", "with a group"],
)
def test_through_regions_is_the_mean_that_all_to_all_gives(settings):
    settings = {"sync_every": 2, "weighting": "site", **settings}
    weights = [1.0, 2.0, 1.0, 3.0, 1.0, 2.0]
    flat = train(SemiSyncConfig(**settings), REGIONS, 8, weights)
    tree = train(SemiSyncConfig(topology="regions", **settings), REGIONS, 8, weights)
    for ours, theirs in zip(tree, flat, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, other, atol=2e-6)


def test_plain_sgd_with_a_mean_at_each_step_is_one_batch_of_the_region():
    """Two regions of two sites with batches of their own sizes, against SGD on the whole batch in float64; the regions
    meet by DiLoCo's outer step every 4 steps, weighted by their tokens."""
    regions, sizes, lr = ["eu", "eu", "us", "us"], [3, 5, 4, 2], 0.05
    config = SemiSyncConfig(
        method="diloco",
        sync_every=4,
        region_sync_every=1,
        weighting="tokens",
        topology="regions",
        outlier_threshold=0.0,
    )
    sites = InProcessSites(4)
    models = [nn.Linear(6, 2, bias=False) for _ in regions]
    for model in models:
        model.weight.data.copy_(torch.linspace(-1, 1, 12).view(2, 6))
    outer = sites.outer_loops(config, models, options=options_of(regions))
    whole = torch.linspace(-1, 1, 12).view(2, 6).double()
    own, momentum = {"eu": whole.clone(), "us": whole.clone()}, torch.zeros(2, 6).double()
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 13):
        batches = [
            (torch.randn(size, 6, generator=generator), torch.randn(size, 2, generator=generator)) for size in sizes
        ]
        losses = []
        for model, (inputs, wanted) in zip(models, batches, strict=True):
            loss = ((model(inputs) - wanted) ** 2).sum(1).mean()
            losses.append(loss.item())
            (gradient,) = torch.autograd.grad(loss, [model.weight])
            model.weight.data -= lr * gradient
        for region, members in (("eu", (0, 1)), ("us", (2, 3))):
            inputs = torch.cat([batches[index][0] for index in members]).double()
            wanted = torch.cat([batches[index][1] for index in members]).double()
            error = inputs @ own[region].T - wanted
            mine = sum(losses[index] * sizes[index] for index in members) / sum(sizes[index] for index in members)
            assert mine == pytest.approx((error**2).sum(1).mean().item(), rel=1e-5)
            own[region] = own[region] - lr * 2 * error.T @ inputs / len(inputs)
        sites.at_once(lambda site: outer[site].step(tokens=sizes[site]))
        if step % 4 == 0:
            tokens = {"eu": 8, "us": 6}
            gradient = sum(tokens[region] * (whole - own[region]) for region in own) / 14
            momentum = 0.9 * momentum + gradient
            whole = whole - 0.7 * (gradient + 0.9 * momentum)
            own = {region: whole.clone() for region in own}
        for index, region in enumerate(regions):
            assert (models[index].weight - own[region]).abs().max() < 1e-6
    assert len({each.shared_state_sha256() for each in outer}) == 1
    assert torch.equal(models[0].weight, models[1].weight)
    sites.close()


def test_at_a_round_of_all_no_region_averages_first():
    plan = resolve(SemiSyncConfig(method="diloco", sync_every=8, num_fragments=2, region_sync_every=2))
    keys = {step: [plan.rules[index].key for index in plan.due(step)] for step in range(1, 9)}
    assert keys[2] == ["region/0", "region/1"] and keys[1] == []
    assert keys[4] == ["params/0", "region/1"]
    assert keys[8] == ["params/1", "region/0"]


def test_regions_train_on_their_own_between_rounds_of_all():
    """Each step adds what differs by site; the mean within a region is exact arithmetic of halves."""
    sites = InProcessSites(4)
    models = [nn.Linear(1, 1, bias=False) for _ in range(4)]
    for model in models:
        model.weight.data.zero_()
    config = SemiSyncConfig(method="local_sgd", sync_every=4, region_sync_every=2, topology="regions")
    outer = sites.outer_loops(config, models, options=options_of(["a", "a", "b", "b"]))
    seen = []
    for _ in range(4):
        for index, model in enumerate(models):
            model.weight.data += index + 1
        sites.at_once(lambda site: outer[site].step())
        seen.append([model.weight.item() for model in models])
    assert seen == [[1, 2, 3, 4], [3, 3, 7, 7], [4, 5, 10, 11], [10, 10, 10, 10]]
    assert [each.ledger.rounds for each in outer] == [2] * 4
    sites.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(topology="ring"), "topology = 'ring': must be one of flat, regions"),
        (dict(topology="regions", aggregation="median"), "aggregation"),
        (dict(topology="regions", method="noloco"), "topology"),
        (dict(region_sync_every=0), "region_sync_every = 0"),
        (dict(region_sync_every=8), "region_sync_every = 8"),
        (dict(region_sync_every=2, method="des_loc", outer_optimizer="average"), "region_sync_every"),
        (dict(region_sync_every=2, fragment_sync_delay=1), "region_sync_every"),
        (dict(region_sync_every=2), 'has no label "region"'),
        (dict(topology="regions"), 'has no label "region"'),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, words):
    model = Model()
    with pytest.raises(ValueError, match=words):
        SemiSync.Config(**{"method": "diloco", "sync_every": 8, **settings}).build(
            model_parts=[model],
            optimizers=[torch.optim.AdamW(model.parameters())],
            manager=None,
            site=SiteOptions(ranks=SiteRanks(alone=True)),
            register=False,
        )
