"""Scopes: parameters that stay at their site, and tables of which each site holds some rows (DEPT's SPEC and TRIM)."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, run_sites
from titan_ext.optim import QHAdamW
from titan_ext.semi_sync import ScopeConfig, SemiSync, SiteOptions, SiteRanks, TokenRowMap
from titan_ext.semi_sync.compat.torchft_manager import adapt_manager
from titan_ext.semi_sync.state.sparse_tables import SparseTable
from titan_ext.semi_sync.wire.codecs import CODECS
from titan_ext.semi_sync.wire.reductions import RoundFacts
from titan_ext.semi_sync.wire.sparse_reductions import SparseReduction, SparseTransfer

WIDTH = 3
TOTAL = 11
IDS = ([0, 2, 3, 7, 10, -1], [2, 3, 4, 5, 6, 7, 8], [0, 3, 10, -1])
BY_ROW = ScopeConfig(name="embeddings", parameters=["tok_embeddings.*", "lm_head.*"], shared="sparse_rows")
LOCAL = ScopeConfig(name="embeddings", parameters=["tok_embeddings.*", "lm_head.*"], shared="local")


class Model(nn.Module):
    """A body and two tables by vocabulary."""

    def __init__(self, rows: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.tok_embeddings = nn.Embedding(rows, WIDTH, _weight=torch.randn(rows, WIDTH, generator=generator))
        self.body = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, rows, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.randn(rows, WIDTH, generator=generator))
            for parameter in self.body.parameters():
                parameter.fill_(0.5)


def row_ids(index):
    return TokenRowMap(torch.tensor(IDS[index]), TOTAL)


def outer_of(model, own, index, *, optimizer=(), rows=None, **settings):
    options = {key: settings.pop(key) for key in ("on_round",) if key in settings}
    weight = settings.pop("weight", 1.0)
    return SemiSync.Config(**settings).build(
        model_parts=[model],
        optimizers=list(optimizer),
        manager=own,
        site=SiteOptions(name=f"site{index}", weight=weight, ranks=SiteRanks(alone=True), token_rows=rows),
        **options,
    )


def local_step(model, index, step):
    """A change that differs between sites, steps, parameters and rows."""
    generator = torch.Generator().manual_seed(1000 * index + step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


# -- the reduction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "bound"), [("fp32", 1e-6), ("bf16", 0.03), ("int8", 0.03), ("int4", 0.5)])
@pytest.mark.parametrize("bucket_elements", [1, 7, 10_000])
def test_rows_are_summed_over_the_sites_that_contribute_them(codec, bound, bucket_elements):
    weights = [1.0, 2.0, 0.0]
    built = CODECS.get(codec)()

    def body(index, own):
        own.register_state_dict_fn("nothing", lambda state: None, dict)
        own.start_quorum()
        rank = own.participating_rank()
        ids = row_ids(rank)
        reduction = SparseReduction(ids, WIDTH, built, bucket_elements)
        tables = torch.randn(2, ids.rows, WIDTH, generator=torch.Generator().manual_seed(rank)) * weights[rank]
        flat = torch.cat([tables.flatten(), (ids.ids >= 0) * weights[rank]])
        own_values, lost = flat.clone(), torch.empty_like(flat)
        reduction.reduce(adapt_manager(own), flat, RoundFacts(0, weights), lost)
        own.should_commit()
        return rank, own_values, flat, lost, reduction.take_traffic().sent

    found = {rank: rest for rank, *rest in run_sites(3, body)}
    whole = torch.zeros(2, TOTAL, WIDTH)
    numbers = torch.zeros(TOTAL)
    for rank in range(3):
        held = row_ids(rank).ids >= 0
        values = found[rank][0][: -len(IDS[rank])].view(2, -1, WIDTH)
        whole[:, row_ids(rank).held] += values[:, held]
        numbers[row_ids(rank).held] += weights[rank]
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for rank in range(3):
        held, ids = row_ids(rank).ids >= 0, row_ids(rank).held
        values = found[rank][1][: -len(IDS[rank])].view(2, -1, WIDTH)
        assert torch.allclose(values[:, held], whole[:, ids], atol=bound)
        assert torch.equal(found[rank][1][-len(IDS[rank]) :][held], numbers[ids])
        assert torch.equal(values[:, ~held], found[rank][0][: -len(IDS[rank])].view(2, -1, WIDTH)[:, ~held])
        for place, row in zip(held.nonzero().squeeze(1).tolist(), ids.tolist()):
            bits = values[:, place]
            assert torch.equal(seen.setdefault(row, bits), bits), "holders of a row see different bits"
        assert found[rank][2].abs().max() <= bound
    if codec == "fp32":
        _check_bytes(found, weights)


def _check_bytes(found, weights):
    """A row crosses the wire on its way to its owner, and back to every holder but the owner."""
    row_bytes = 4 * (2 * WIDTH + 1)
    for rank in range(3):
        to_owners = sum(row % 3 != rank for row in row_ids(rank).held.tolist()) if weights[rank] else 0
        to_holders = sum(row % 3 == rank for other in range(3) if other != rank for row in row_ids(other).held.tolist())
        assert found[rank][3] == row_bytes * (to_owners + to_holders) + 2 * 4


def test_a_transfer_takes_each_row_from_the_first_of_its_holders():
    places = [2.0, 0.0, 1.0]

    def body(_, own):
        own.register_state_dict_fn("nothing", lambda state: None, dict)
        own.start_quorum()
        rank = own.participating_rank()
        ids = row_ids(rank)
        flat = torch.full((ids.rows * WIDTH,), -0.0 if rank == 1 else float(rank))
        transfer = SparseTransfer(ids, WIDTH, CODECS.get("fp32")(), 5)
        transfer.reduce(adapt_manager(own), flat, RoundFacts(0, places))
        own.should_commit()
        return rank, flat.view(-1, WIDTH)

    for rank, table in run_sites(3, body):
        for row, values in zip(IDS[rank], table):
            holders = [site for site in (1, 2, 0) if row in IDS[site]] if row >= 0 else [rank]
            assert values.tolist() == [float(holders[0]) if holders[0] != 1 else 0.0] * WIDTH
            assert holders[0] != 1 or bool(torch.signbit(values).all())  # the very bits


# -- by row ------------------------------------------------------------------------------------------


class Reference:
    """TRIM in float64, from the equations: row means over holders, one outer step on the rows that have one."""

    def __init__(self, table, settings):
        self.values, self.momentum = table, torch.zeros_like(table)
        self.settings = settings

    def round(self, contributions, weights):
        """``contributions``: for each site its rows' ids and values."""
        total, count = torch.zeros_like(self.values), torch.zeros(TOTAL, dtype=torch.float64)
        for (ids, values), weight in zip(contributions, weights):
            for row, value in zip(ids, values):
                if row >= 0:
                    total[row] += weight * (self.values[row] - value)
                    count[row] += weight
        for row in range(TOTAL):
            if count[row] == 0:
                continue
            gradient = total[row] / count[row]
            if self.settings["method"] == "local_sgd":
                self.values[row] -= gradient
            else:
                self.momentum[row] = 0.9 * self.momentum[row] + gradient
                self.values[row] -= 0.7 * (gradient + 0.9 * self.momentum[row])


@pytest.mark.parametrize(
    "settings", [dict(method="local_sgd"), dict(method="diloco"), dict(method="diloco", codec="bf16")]
)
def test_row_means_equal_the_equations(settings):
    weights = [1.0, 3.0, 2.0]
    start = torch.randn(TOTAL, WIDTH, generator=torch.Generator().manual_seed(5))

    def body(index, own):
        model = Model(len(IDS[index]), seed=index)
        held = row_ids(index).ids >= 0
        with torch.no_grad():
            model.tok_embeddings.weight[held] = start[row_ids(index).held]
        outer = outer_of(
            model, own, index, rows=row_ids(index), sync_every=2, weighting="site", weight=weights[index],
            scopes=[BY_ROW], **settings,
        )  # fmt: skip
        outer.join()
        history = []
        for step in range(6):
            local_step(model, index, step)
            before = model.tok_embeddings.weight.detach().double().clone()
            padding = model.tok_embeddings.weight[~held].detach().clone()
            outer.step()
            history.append((before, model.tok_embeddings.weight.detach().clone(), padding))
        return history, outer.shared_state_sha256()

    results = run_sites(3, body)
    assert len({digest for _, digest in results}) == 1, "tables are not part of what all sites share"
    reference = Reference(start.double().clone(), settings)
    tolerance = 0.03 if "codec" in settings else 1e-5
    for step in (1, 3, 5):
        reference.round([(IDS[index], results[index][0][step][0]) for index in range(3)], weights)
        for index in range(3):
            held = row_ids(index).ids >= 0
            after = results[index][0][step][1]
            assert torch.allclose(after[held].double(), reference.values[row_ids(index).held], atol=tolerance)
        shared = [results[index][0][step][1][IDS[index].index(3)] for index in range(3)]
        assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], shared[2])


@pytest.mark.parametrize(
    "settings", [dict(method="local_sgd"), dict(method="diloco"), dict(method="diloco", outer_optimizer="adam")]
)
def test_all_rows_at_all_sites_are_the_whole_table(settings):
    """models.md 1(f) 5: TRIM with every V_k = V is GLOB, bit for bit (two sites, whose sums have one order)."""

    def run(scopes):
        def body(index, own):
            model = Model(TOTAL, seed=1)
            outer = outer_of(model, own, index, rows=TokenRowMap.all(TOTAL), sync_every=2, scopes=scopes, **settings)
            outer.join()
            for step in range(6):
                local_step(model, index, step)
                outer.step()
            return [parameter.detach().clone() for parameter in model.parameters()]

        return run_sites(2, body)

    for whole, by_row in zip(run([]), run([BY_ROW])):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole, by_row))


def test_disjoint_tables_keep_what_each_site_did():
    ids = ([0, 1], [2, 3])

    def body(index, own):
        model, alone = Model(2, seed=index), Model(2, seed=index)
        outer = outer_of(
            model,
            own,
            index,
            method="local_sgd",
            sync_every=1,
            scopes=[BY_ROW],
            rows=TokenRowMap(torch.tensor(ids[index]), 4),
        )
        outer.join()
        for step in range(3):
            local_step(model, index, step)
            local_step(alone, index, step)
            outer.step()
        return torch.equal(model.lm_head.weight, alone.lm_head.weight)

    assert run_sites(2, body) == [True, True]


def test_rows_without_a_contribution_stay_as_they_are():
    """A site whose contribution is left out is the only holder of a row: not even its momentum decays."""

    def body(index, own):
        model = Model(len(IDS[index]), seed=index)
        outer = outer_of(model, own, index, method="diloco", sync_every=1, scopes=[BY_ROW], rows=row_ids(index))
        outer.join()
        local_step(model, index, 0)
        outer.step()
        table = next(each for each in outer._states if isinstance(each, SparseTable))
        states = [table.global_flat.clone(), table.private_state()["lm_head.weight"]["outer.momentum_buffer"].clone()]
        local_step(model, index, 1)
        if index == 1:
            with torch.no_grad():
                model.body.weight[0, 0] = float("nan")
        outer.step()
        after = [table.global_flat, table.private_state()["lm_head.weight"]["outer.momentum_buffer"]]
        return states, [each.clone() for each in after], model.lm_head.weight.detach().clone()

    states, after, weight = run_sites(3, body)[1]
    only_mine = [place for place, row in enumerate(IDS[1]) if row not in IDS[0] and row not in IDS[2]]
    assert len(only_mine) == 4
    table = [flat[len(IDS[1]) * WIDTH :].view(-1, WIDTH) for flat in (states[0], after[0])]
    assert torch.equal(table[0][only_mine], table[1][only_mine])
    assert torch.equal(states[1][only_mine], after[1][only_mine])
    assert torch.equal(weight[only_mine], table[0][only_mine])
    others = [place for place in range(len(IDS[1])) if place not in only_mine]
    assert not torch.equal(table[0][others], table[1][others])


@pytest.mark.parametrize("settings", [dict(method="diloco"), dict(method="des_loc", outer_optimizer="average"), dict(method="diloco", fragment_sync_delay=1)])  # fmt: skip
def test_a_newcomer_gets_the_rows_that_others_hold_and_keeps_its_own(settings):
    newcomer_may_come = Meeting()

    def before(index):
        if index == 2:
            newcomer_may_come.wait()

    def body(index, own):
        model = Model(len(IDS[index]), seed=index)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        outer = outer_of(
            model, own, index, optimizer=[optimizer], rows=row_ids(index), sync_every=2, scopes=[BY_ROW], **settings
        )
        outer.join()
        states = []
        while outer.inner_step < 8:
            if index == 0 and outer.inner_step == 4:
                newcomer_may_come.arrive()
            if index < 2 and outer.inner_step == 4:
                wait_for_requests(own.lighthouse, 1)
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
            optimizer.step()
            outer.step()
            states.append(outer.inner_step)
        outer.finish()
        table = next(each for each in outer._states if isinstance(each, SparseTable))
        return (
            table.tensors.split(table.global_flat.clone()),
            [dict(value) for value in table.private_state().values()],
            states,
        )

    results = run_sites(3, body, min_sites=2, before=before)
    assert results[2][2][0] > 4
    for row in range(TOTAL):
        holders = [index for index in range(3) if row in IDS[index]]
        for table in range(2):
            values = [results[index][0][table][IDS[index].index(row)] for index in holders]
            assert all(torch.equal(values[0], each) for each in values)
            for key in results[0][1][table]:
                states = [results[index][1][table][key][IDS[index].index(row)] for index in holders]
                assert all(torch.equal(states[0], each) for each in states)


@pytest.mark.parametrize(
    ("method", "optimizer_of", "state", "share"),
    [
        ("local_adam", partial(torch.optim.AdamW, lr=0.01), "exp_avg", 0.1),
        ("mt_dao", partial(QHAdamW, lr=0.01, betas=(0.75, 0.99), omegas=(0.9,)), "exp_avg_0", 0.25),
    ],
)
def test_moments_follow_their_rows(method, optimizer_of, state, share):
    def body(index, own):
        model = Model(len(IDS[index]), seed=index)
        optimizer = optimizer_of(model.parameters())
        outer = outer_of(
            model, own, index, optimizer=[optimizer], rows=row_ids(index), method=method, sync_every=1, scopes=[BY_ROW]
        )
        outer.join()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(index + 1))
        optimizer.step()
        outer.step()
        return optimizer.state[model.tok_embeddings.weight][state].clone()

    for index, after in enumerate(run_sites(3, body)):
        for place, row in enumerate(IDS[index]):
            holders = [other for other in range(3) if row in IDS[other]] if row >= 0 else [index]
            expected = share * sum(other + 1 for other in holders) / len(holders)
            assert after[place].tolist() == pytest.approx([expected] * WIDTH)


# -- local -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["diloco", "des_loc", "local_adam"])
def test_local_tables_of_any_size_never_leave_their_site(method):
    """models.md 1(f) 1 to 3: bytes are those of the body, whatever the vocabulary."""

    def run(rows):
        def body(index, own):
            model, alone = Model(rows[index], seed=index), Model(rows[index], seed=index)
            records = []
            optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, alone)]
            outer = outer_of(
                model, own, index, optimizer=optimizers[:1], method=method, sync_every=2, scopes=[LOCAL],
                on_round=records.append,
            )  # fmt: skip
            outer.join()
            for _ in range(4):
                for each, optimizer in zip((model, alone), optimizers):
                    for parameter in each.parameters():
                        parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
                    optimizer.step()
                outer.step()
            same = all(
                torch.equal(ours, theirs)
                for name in ("tok_embeddings", "lm_head")
                for ours, theirs in zip(getattr(model, name).parameters(), getattr(alone, name).parameters())
            )
            shared = set(outer.shared_state()["states"]["params/0"])
            return same, shared, [record.bytes_sent for record in records], outer.shared_state_sha256()

        return run_sites(2, body)

    small, large = run((4, 5)), run((40, 7))
    for result in (*small, *large):
        assert result[0]
        assert result[1] == {"body.weight", "body.bias"}
    assert small[0][3] == small[1][3]
    assert small[0][2] == large[0][2] == large[1][2]
    assert small[0][2][0] == 4 * (WIDTH * WIDTH + WIDTH) * (3 if method == "local_adam" else 1)


# -- rounds ------------------------------------------------------------------------------------------


def test_sampled_sites_alone_are_averaged():
    """models.md 1(b): a uniform draw without replacement in each round, equal at all sites; clocks stay common."""

    def body(index, own):
        model = Model(4, seed=0)
        records = []
        outer = outer_of(
            model,
            own,
            index,
            method="local_sgd",
            sync_every=2,
            sites_per_round=2,
            sampling_seed=3,
            on_round=records.append,
        )
        outer.join()
        sat_out = []
        while outer.inner_step < 12:
            sat_out.append(outer.sits_out)
            if not outer.sits_out:
                local_step(model, index, outer.inner_step)
            outer.step(tokens=0 if outer.sits_out else 1)
        return sat_out, [sorted(record.contributors) for record in records], model.body.weight.detach().clone()

    results = run_sites(3, body)
    assert all(torch.equal(results[0][2], result[2]) for result in results)
    rounds = results[0][1]
    assert all(result[1] == rounds for result in results)
    assert all(len(contributors) == 2 for contributors in rounds)
    assert len({str(contributors) for contributors in rounds}) > 1
    for index, (sat_out, _, _) in enumerate(results):
        assert sat_out == [f"site{index}" not in contributors for contributors in rounds for _ in range(2)]


def test_the_inner_optimizer_forgets_after_each_round():
    def body(index, own):
        model = Model(4, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        outer = outer_of(
            model, own, index, optimizer=[optimizer], method="local_sgd", sync_every=2, reset_inner_optimizer=True
        )
        outer.join()
        seen = []
        for _ in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            outer.step()
            state = optimizer.state[model.body.weight]
            seen.append(
                (float(state["step"]), float(state["exp_avg"].abs().sum()), float(state["exp_avg_sq"].abs().sum()))
            )
        return seen

    for seen in run_sites(2, body):
        assert seen[0][0] == seen[2][0] == 1.0 and seen[0] == seen[2]
        assert seen[1] == seen[3] == (0.0, 0.0, 0.0)


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(scopes=[ScopeConfig(name="a", parameters=["nothing.*"])]), "fit no parameter"),
        (dict(scopes=[ScopeConfig(name="a", parameters=["*"])]), "no parameter is left"),
        (dict(scopes=[ScopeConfig(name="a", parameters=["body.*"], shared="sparse_rows")]), "token rows"),
        (dict(scopes=[LOCAL, LOCAL]), "a name of its own"),
        (dict(scopes=[ScopeConfig(name="a", parameters=["a"], sync_every=0)]), r"scopes\[0\]\.sync_every = 0"),
        (dict(scopes=[BY_ROW], aggregation="median"), "aggregation"),
        (dict(scopes=[BY_ROW], method="noloco"), 'shared = "sparse_rows"'),
        (dict(reset_inner_optimizer=True, method="des_loc"), "reset_inner_optimizer"),
        (dict(sites_per_round=2, num_fragments=2, sync_every=4), "sites_per_round"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        SemiSync.Config(**{"method": "diloco", **settings}).build(
            model_parts=[Model(4, seed=0)],
            optimizers=[],
            manager=None,
            site=SiteOptions(ranks=SiteRanks(alone=True)),
            register=False,
        )


def test_row_ids_are_checked():
    with pytest.raises(ValueError, match="same global row"):
        TokenRowMap(torch.tensor([1, 1]), 4)
    with pytest.raises(ValueError, match="from 0 to 3"):
        TokenRowMap(torch.tensor([4]), 4)
