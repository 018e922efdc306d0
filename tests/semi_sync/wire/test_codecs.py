"""Codecs alone, and every codec through real rounds."""

import pytest
import torch

from tests.semi_sync.sites import outer_loop, run_sites
from titan_ext.semi_sync import ScopeConfig, SemiSync, SiteOptions, SiteRanks
from titan_ext.semi_sync.wire.codecs import CODECS, BFloat16, Int4, Int8, TopK
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap


def encoded(codec, values):
    message = torch.empty(codec.wire_bytes(values.numel()), dtype=torch.uint8)
    codec.encode(values, message)
    return message


def decoded_of(codec, message, numel):
    values = torch.full((numel,), torch.nan)
    codec.decode(message, values)
    twice = values.clone()
    codec.accumulate(message, twice)
    assert torch.equal(twice, 2 * values)  # of two equal numbers the sum is exact
    both = torch.full((numel,), torch.nan)
    codec.combine([message, message], both)
    assert torch.equal(both, twice)
    return values


def assert_encodes_in_place(codec, values, message, decoded):
    for lost in (None, torch.full_like(values, torch.nan)):
        own, written, read = values.clone(), torch.empty_like(message), torch.empty_like(values)
        codec.encode_in_place(own, written, lost)
        codec.decode(written, read)
        assert torch.equal(own, decoded) and torch.equal(read, decoded)
        assert lost is None or torch.equal(lost, values - decoded)


@pytest.mark.parametrize("codec", [BFloat16(), Int8(), Int4(), TopK(0.01), TopK(0.3), TopK(1.0)], ids=repr)
@pytest.mark.parametrize("blocks", [0, 1, 3, 600])
def test_messages_have_the_stated_size_and_decode_to_the_stated_error(codec, blocks):
    torch.manual_seed(blocks)
    numel = blocks * codec.granularity if codec.granularity > 1 else blocks * 37
    values = torch.randn(numel) * torch.rand(numel).mul(8).exp()
    message = encoded(codec, values)
    decoded = decoded_of(codec, message, numel)
    assert_encodes_in_place(codec, values, message, decoded)
    error = (decoded - values).abs()
    if isinstance(codec, BFloat16):
        assert (error <= values.abs() * 2**-8).all()
    elif isinstance(codec, Int8):
        absmax = values.view(-1, 256).abs().amax(dim=1, keepdim=True) if numel else values.view(0, 256)
        assert (error.view(-1, 256) <= absmax / (2 * codec.levels) * 1.0001).all()
    else:
        for chunk, got in zip(values.view(-1, 4096), decoded.view(-1, 4096)):
            kept = got != 0
            assert kept.sum() == codec.kept and torch.equal(got[kept], chunk[kept])
            assert codec.kept == 4096 or chunk[~kept].abs().max() <= chunk[kept].abs().min()


def test_zeros_stay_zeros_and_extremes_survive():
    for name in CODECS:
        codec = CODECS.get(name)()
        numel = codec.granularity * 2
        assert torch.equal(decoded_of(codec, encoded(codec, torch.zeros(numel)), numel), torch.zeros(numel))
        spike = torch.zeros(numel)
        spike[1] = -3e-38
        spike[-1] = 3e38
        got = torch.empty(numel)
        codec.decode(encoded(codec, spike), got)
        assert torch.isfinite(got).all()
        assert got[-1] == pytest.approx(3e38, rel=2**-7)


def test_bytes_of_a_hundred_million_parameters():
    numel = 100_000_000 // 4096 * 4096
    assert Int8().wire_bytes(numel) <= 0.27 * 4 * numel
    assert Int4().wire_bytes(numel) <= 0.14 * 4 * numel
    assert TopK(0.01).wire_bytes(numel) <= 0.015 * 4 * numel


DENSE = {"settings": {"topk": {"density": 0.5}}}
SPARSE = {"settings": {"topk": {"density": 0.1}}}


def one_round(codec: str, sites: int, numel: int, **settings):
    torch.manual_seed(7)
    steps = torch.randn(sites, numel)

    def body(index, own):
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for layer, size in zip(model.layers, (numel // 3, numel - numel // 3)):
            layer.weight = torch.nn.Parameter(torch.zeros(size))
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1, codec=codec, **settings)
        outer.join()
        for layer, change in zip(model.layers, steps[index].split([numel // 3, numel - numel // 3])):
            layer.weight.data += change
        outer.step()
        return (
            torch.cat([layer.weight.detach() for layer in model.layers]),
            outer.shared_state_sha256(),
            outer.ledger.last,
        )

    results = run_sites(sites, body)
    assert len({digest for _, digest, _ in results}) == 1
    return results[0][0], steps.mean(dim=0), steps, results[0][2]


@pytest.mark.parametrize("sites", [1, 2, 3])
@pytest.mark.parametrize("numel", [3, 257, 10_000])
@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "topk"])
def test_every_codec_agrees_at_all_sites_and_is_near_the_mean(codec, numel, sites):
    got, mean, steps, record = one_round(codec, sites, numel, **(DENSE if codec == "topk" else {}), bucket_mib=0.004)
    largest = steps.abs().max()
    # A value is coded once by each site and once more as part of the sum.
    bound = {"bf16": 2**-7, "int8": 2 / 254, "int4": 2 / 14, "topk": 1.0}[codec] * largest
    assert (got - mean).abs().max() <= bound
    assert record.bytes_sent == (0 if sites == 1 else record.bytes_received) and (sites == 1) == (
        record.bytes_sent == 0
    )


def test_everything_kept_equals_fp32_bit_for_bit():
    all_kept, _, _, _ = one_round("topk", 2, 9000, settings={"topk": {"density": 1.0}})
    plain, _, _, _ = one_round("fp32", 2, 9000, outer_optimizer="sgd", outer_lr=1.0, outer_momentum=0.0)
    assert torch.equal(all_kept, plain)


@pytest.mark.parametrize("codec", ["int4", "topk"])
def test_error_feedback_delivers_everything_in_the_end(codec):
    """The same small change at each round: what one round loses, a later one brings."""

    def drift(feedback):
        def body(index, own):
            model = torch.nn.Linear(64, 64, bias=False)
            model.weight.data.zero_()
            outer = outer_loop(
                model,
                [],
                own,
                method="local_sgd",
                sync_every=1,
                codec=codec,
                error_feedback=feedback,
                **(SPARSE if codec == "topk" else {}),
            )
            outer.join()
            change = torch.linspace(-1, 1, 64 * 64).view(64, 64) ** 3
            for _ in range(60):
                model.weight.data += change
                outer.step()
            return (model.weight.detach() - 60 * change).abs().mean() / (60 * change).abs().mean()

        return run_sites(2, body)[0]

    assert drift(True) < 0.1
    assert drift(True) < 0.5 * drift(False)


@pytest.mark.parametrize("weighting", ["tokens", "site"])
def test_what_was_lost_comes_back_with_the_weight_of_the_round_that_brings_it(weighting):
    """Top-k against a loop: m = D + e; sent = top(m); e = m - sent; the mean is of w sent over w."""
    sites, size, rounds, kept = 3, 12, 9, 2
    generator = torch.Generator().manual_seed(3)
    changes = torch.randn(rounds, sites, size, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 2000, (rounds, sites), generator=generator).tolist()
    shares = [[0.5, 3.0, 7.0]] * rounds if weighting == "site" else tokens

    def body(index, own):
        model = torch.nn.Linear(size, 1, bias=False)
        model.weight.data.zero_()
        outer = outer_loop(
            model,
            [],
            own,
            method="local_sgd",
            sync_every=1,
            codec="topk",
            settings={"topk": {"density": kept / 4096}},
            weighting=weighting,
            weight=shares[0][index],
            outlier_threshold=0.0,
        )
        outer.join()
        history = []
        for change, told in zip(changes, tokens):
            model.weight.data -= change[index].float()
            outer.step(tokens=told[index])
            history.append(model.weight.detach().flatten().clone())
        return history

    results = run_sites(sites, body)
    theta, errors = torch.zeros(size, dtype=torch.float64), torch.zeros(sites, size, dtype=torch.float64)
    for step, (change, weights) in enumerate(zip(changes, shares)):
        total = torch.zeros(size, dtype=torch.float64)
        for site in range(sites):
            whole = change[site] + errors[site]
            sent = torch.zeros_like(whole)
            places = whole.abs().topk(kept).indices
            sent[places] = whole[places]
            errors[site] = whole - sent
            total += weights[site] * sent
        theta -= total / sum(weights)
        for history in results:
            torch.testing.assert_close(history[step].double(), theta, rtol=1e-4, atol=1e-5)


class Uneven(torch.nn.Module):
    """Blocks in which an element is 1, 0.1, 0.02 or 0.005 of the largest."""

    SHARES = (1.0, 0.1, 0.02, 0.005)

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(numel))
        self.shares = torch.tensor(self.SHARES).repeat(-(-numel // 4))[:numel]


@pytest.mark.parametrize("idle", [None, 0, 1], ids=["all contribute", "first sits out", "second sits out"])
@pytest.mark.parametrize(
    "codec, sites, numel",
    [
        ("int4", 2, 5000),
        pytest.param("int4", 8, 5000, marks=pytest.mark.slow),
        ("int8", 3, 700),
        ("int4", 5, 300),
    ],
)
def test_nothing_is_lost_neither_of_contributions_nor_of_their_sum(codec, sites, numel, idle):
    """What has arrived and what the sites still owe is what they gave, after every round."""
    rounds, largest = 12, 0.01

    def body(index, own):
        model = Uneven(numel)
        outer = outer_loop(
            model, [], own, method="local_sgd", sync_every=1, codec=codec, error_feedback=True, bucket_mib=0.004,
            weighting="site", weight=0.0 if index == idle else 1.0, outlier_threshold=0.0,
        )  # fmt: skip
        outer.join()
        gave, seen = torch.zeros(numel, dtype=torch.float64), []
        generator = torch.Generator().manual_seed(index)
        for _ in range(rounds):
            change = largest * model.shares * torch.randn(numel, generator=generator)
            gave += change.double() * (index != idle)
            model.weight.data += change
            outer.step()
            (owed,) = outer._exchange.writer.error_feedback._residuals.values()
            seen.append((gave.clone(), owed.double(), model.weight.detach().double().clone()))
        return seen

    results = run_sites(sites, body)
    contributors = sites - (idle is not None)
    for of_round in zip(*results):
        gave, owed = (sum(each[place] for each in of_round) for place in (0, 1))
        arrived = of_round[0][2] * contributors
        # Owed are pseudo-gradients: start minus end.
        torch.testing.assert_close(arrived - owed, gave, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "codec, sites",
    [("int4", 2), ("int8", 3), *(pytest.param(each, 8, marks=pytest.mark.slow) for each in ("int4", "int8"))],
)
def test_small_elements_go_their_whole_way_in_the_end(codec, sites):
    """At 2% (0.5%) of their block's largest, int4 (int8) has no level for them in any single round."""
    rounds = 80

    def body(index, own):
        model, generator = Uneven(2048), torch.Generator().manual_seed(index)
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1, codec=codec, outlier_threshold=0.0)
        outer.join()
        for _ in range(rounds):
            # Sites do not reach a level in the same round.
            model.weight.data += model.shares * (1 + torch.randn(2048, generator=generator))
            outer.step()
        return [
            (model.weight.detach()[place::4].mean() / (rounds * share)).item()
            for place, share in enumerate(model.SHARES)
        ]

    for shares in run_sites(sites, body):
        assert shares == pytest.approx([1.0] * 4, abs=0.1)


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=repr)
def test_dithered_values_are_right_on_average_and_code_without_loss(codec):
    values = torch.tensor([1.0, 0.3, 0.02, -0.001, 0.0]).repeat(256 * 2000 // 5 + 1)[: 256 * 2000]
    dithered = values.clone()
    codec.dither(dithered, 3)
    decoded = decoded_of(codec, encoded(codec, dithered), len(values))
    torch.testing.assert_close(decoded, dithered, rtol=1e-6, atol=0)
    for place in range(5):
        step = 1.0 / codec.levels
        assert dithered[place::5].mean().item() == pytest.approx(values[place].item(), abs=4 * step / 2 / 100_000**0.5)
    again = values.clone()
    codec.dither(again, 4)
    assert not torch.equal(again, dithered)
    zeros = torch.zeros(256)
    codec.dither(zeros, 1)
    assert not zeros.any()


@pytest.mark.parametrize("codec", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_rows_of_tables_go_their_whole_way_too(codec):
    """Their sums are coded by an owner that need not hold the row."""
    sites, rounds, rows, width = 4, 60, 8, 300
    shares = torch.tensor(Uneven.SHARES).repeat(rows * width // 4).view(rows, width)

    def body(index, own):
        model = torch.nn.Module()
        model.table, model.rest = torch.nn.Embedding(rows - 2, width), torch.nn.Linear(2, 2)
        model.table.weight.data.zero_()
        held = torch.tensor([row for row in range(rows) if row not in (index, index + 1)])  # each lacks two
        outer = SemiSync.Config(
            method="local_sgd",
            sync_every=1,
            scopes=[ScopeConfig(name="rows", parameters=["table.*"], shared="sparse_rows", codec=codec)],
            outlier_threshold=0.0,
        ).build(
            model_parts=[model],
            optimizers=[],
            manager=own,
            site=SiteOptions(ranks=SiteRanks(alone=True), token_rows=TokenRowMap(held, rows)),
        )
        outer.join()
        generator = torch.Generator().manual_seed(index)
        for _ in range(rounds):
            change = shares[held] * (1 + torch.randn(rows - 2, width, generator=generator))
            model.table.weight.data += change
            outer.step()
        moved = model.table.weight.detach() / (rounds * shares[held])
        return [moved.flatten()[place::4].mean().item() for place in range(3)], dict(
            zip(held.tolist(), model.table.weight)
        )

    results = run_sites(sites, body)
    for moved, tables in results:
        assert moved == pytest.approx([1.0] * 3, abs=0.1)
        assert all(torch.equal(row, results[0][1][place]) for place, row in tables.items() if place in results[0][1])
