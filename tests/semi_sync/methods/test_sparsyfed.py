"""SparsyFed's invariants (arXiv 2504.05153), on several sites in one process."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from titan_ext.models.power_linear import power
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.nonzero import BLOCK, accumulate, block_bytes, encode

PERIOD = 3


class Net(nn.Module):
    """Two layers under a power between plain ones."""

    def __init__(self, exponent: float, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(6, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.exponent = exponent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = torch.tanh(nn.functional.linear(x, power(layer.weight, self.exponent), layer.bias))
        return x


def config(sparsity: float, **changes: object) -> SemiSyncConfig:
    own = {"sparsity": sparsity, "parameters": ["layers.*.weight"]}
    return SemiSyncConfig(method="sparsyfed", sync_every=PERIOD, settings={"sparsyfed": own}, **changes)


def matrices(model: Net) -> torch.Tensor:
    return torch.cat([layer.weight.detach().flatten() for layer in model.layers])


def train(
    settings: SemiSyncConfig,
    exponent: float = 1.25,
    sites: int = 3,
    rounds: int = 4,
    optimizer: Callable = lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=1e-3),
    before: Callable[[int, list[Net]], None] = lambda step, models: None,
) -> tuple[list[Net], list]:
    models = [Net(exponent) for _ in range(sites)]
    optimizers = [optimizer(model.parameters()) for model in models]
    world = InProcessSites(sites)
    outer = world.outer_loops(settings, models, optimizers)
    records = []
    for step in range(1, PERIOD * rounds + 1):
        for site, (model, inner) in enumerate(zip(models, optimizers)):
            torch.manual_seed(100 * step + site)
            inner.zero_grad()
            (model(torch.randn(8, 6)) - site).square().mean().backward()
            inner.step()
        before(step, models)
        world.at_once(lambda site: outer[site].step())
        if step % PERIOD == 0:
            records.append(outer[0].ledger.last)
    world.at_once(lambda site: outer[site].finish())
    world.close()
    return models, records


def pruned(values: torch.Tensor, keep: int) -> torch.Tensor:
    least = values.abs().sort(descending=True).values[keep - 1]
    return torch.where(values.abs() < least, 0.0, values)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_what_is_averaged_are_the_largest_weights_and_none_grows_again(sparsity: float, name: str) -> None:
    optimizers = {
        "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=1e-3),
        "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    }
    keep = round((1 - sparsity) * 512)
    sent: list[list[torch.Tensor]] = []
    received: list[torch.Tensor] = []

    def before(step: int, models: list[Net]) -> None:
        if step % PERIOD == 0:
            sent.append([pruned(matrices(model), keep) for model in models])
        elif step % PERIOD == 1 and step > 1:
            # A zero weight has no gradient, and its moments are gone: no site has moved it.
            for model in models:
                assert not (matrices(model) != 0)[received[-1] == 0].any()
        if step % PERIOD == 0 and received:
            for mine in sent[-1]:
                assert not ((mine != 0) & (received[-1] == 0)).any()
        if step % PERIOD == 0:
            received.append(torch.stack(sent[-1]).double().mean(0).float())

    models, records = train(config(sparsity), optimizer=optimizers[name], before=before)
    torch.testing.assert_close(matrices(models[0]), received[-1])
    union = torch.stack(sent[-1]).ne(0).any(0)
    assert torch.equal(matrices(models[0]) != 0, union)
    assert union.sum() <= min(512, 3 * keep)
    assert all(torch.equal(matrices(model), matrices(models[0])) for model in models)
    assert all(mine.count_nonzero() == keep for mine in sent[-1])
    assert models[0].embed.weight.count_nonzero() == 96 and models[0].layers[0].bias.count_nonzero() == 16
    for record, mine in zip(records, sent):
        assert record.measures["density_sent"] == mine[0].count_nonzero().item() / 512
        assert record.measures["regrown"] == 0.0
    assert records[0].measures["density_received"] == 1.0
    densities = [record.measures["density_received"] for record in records]
    assert densities == sorted(densities, reverse=True)


def test_without_a_power_weights_grow_again() -> None:
    fast = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=2.0), "rounds": 3}
    _, plain = train(config(0.9), exponent=1.0, **fast)
    _, powered = train(config(0.9), exponent=1.25, **fast)
    assert any(record.measures["regrown"] > 0 for record in plain)
    assert not any(record.measures["regrown"] > 0 for record in powered)


def test_nothing_pruned_is_local_sgd_bit_for_bit() -> None:
    plain = SemiSyncConfig(method="local_sgd", sync_every=PERIOD)
    expected, _ = train(plain, exponent=1.0, sites=2)
    found, _ = train(config(0.0), exponent=1.0, sites=2)
    for theirs, ours in zip(expected[0].parameters(), found[0].parameters()):
        assert torch.equal(theirs, ours)


def test_the_wire_carries_what_is_not_zero() -> None:
    _, dense = train(SemiSyncConfig(method="local_sgd", sync_every=PERIOD), sites=2)
    _, sparse = train(config(0.9), sites=2)
    others = 6 * 16 + 16 + 2 * 16
    keep = round(0.1 * 512)
    message, _ = block_bytes(512 + others, keep + others)
    assert sparse[-1].bytes_sent == message + 4 + 8 < dense[-1].bytes_sent == 4 * (512 + others)


@pytest.mark.parametrize("numel", [1, 7, 32, 1000, BLOCK, BLOCK + 5, 3 * BLOCK])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.3, 1.0])
def test_every_way_to_write_a_block_loses_nothing(numel: int, density: float) -> None:
    random = torch.Generator().manual_seed(numel)
    values = torch.randn(numel, generator=random)
    values[torch.rand(numel, generator=random) >= density] = 0.0
    message = encode(values)
    sizes = [(len(block), int(block.count_nonzero())) for block in values.split(BLOCK)]
    assert len(message) == sum(4 + block_bytes(*size)[0] for size in sizes)
    for size, nonzero in sizes:
        index = 4 * math.ceil(2 * nonzero / 4) + 4 * nonzero
        bitmask = 4 * math.ceil(math.ceil(size / 8) / 4) + 4 * nonzero
        assert block_bytes(size, nonzero)[0] == min(4 * size, bitmask, index)
    found = torch.full((numel,), 2.0)
    accumulate(torch.cat([message, message.new_zeros(12)]), found)
    assert torch.equal(found - 2.0, (values + 2.0) - 2.0)
    exact = torch.zeros(numel)
    accumulate(message, exact)
    assert torch.equal(exact, values)


def test_the_threshold_is_that_of_the_whole_model() -> None:
    def before(step: int, models: list[Net]) -> None:
        if step == PERIOD:
            with torch.no_grad():
                models[0].layers[0].weight.mul_(100)
            kept.append(pruned(matrices(models[0]), 128))

    kept: list[torch.Tensor] = []
    models, _ = train(config(0.75), sites=1, rounds=1, before=before)
    assert torch.equal(matrices(models[0]), kept[0])
    assert not models[0].layers[1].weight.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "int8"}, "codec"),
        ({"outer_optimizer": "sgd"}, "outer_optimizer"),
        ({"num_fragments": 3}, "num_fragments"),
        ({"aggregation": "median"}, "aggregation"),
    ],
)
def test_what_would_make_the_mean_dense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(0.9, **changes), rounds=0)


@pytest.mark.parametrize("settings", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"parameters": ["nothing.*"]}])
def test_settings_out_of_range_are_named(settings: dict) -> None:
    own = {"sparsity": 0.9, "parameters": ["layers.*.weight"]} | settings
    with pytest.raises(ValueError, match=next(iter(settings))):
        train(SemiSyncConfig(method="sparsyfed", sync_every=PERIOD, settings={"sparsyfed": own}), rounds=0)


def test_patterns_are_those_of_the_defaults() -> None:
    from titan_ext.semi_sync.methods.sparsyfed import SparsyFedSettings

    patterns = SparsyFedSettings().parameters
    for name, wanted in {
        "layers.3.attention.wq.weight": True,
        "layers.3.attention.qkv_linear.wq.weight": True,
        "layers.10.feed_forward.w2.weight": True,
        "layers.3.attention_norm.weight": False,
        "tok_embeddings.weight": False,
        "lm_head.weight": False,
    }.items():
        assert any(fnmatchcase(name, pattern) for pattern in patterns) is wanted, name
