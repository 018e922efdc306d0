"""Buffers, buckets, weights, optimizer states and hashes."""

import copy

import pytest
import torch

from tests.semi_sync.sites import outer_loop, run_sites
from titan_ext.semi_sync import PARAMETERS, Average, SyncRule, register_method


class Odd(torch.nn.Module):
    """Shapes that sit badly in any bucket: 0-dim, empty, larger than a bucket, straddling two."""

    def __init__(self, site: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(site)
        for index, shape in enumerate([(), (3,), (0, 4), (5, 5), (1,), (2, 3)]):
            value = torch.randn(shape, generator=generator)
            self.register_parameter(f"p{index}", torch.nn.Parameter(value))
        self.narrow = torch.nn.Parameter(torch.randn(4, generator=generator).bfloat16())


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 7, 39, 40, 41, 42, 10_000])
def test_every_bucket_size_averages_every_element(elements):
    def body(index, own):
        model = Odd(index)
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1, bucket_mib=4 * elements / 2**20)
        outer.join()
        for parameter, value in zip(model.parameters(), Odd(index).parameters()):
            parameter.data.copy_(value)
        outer.step()
        return [p.detach() for p in model.parameters()], outer.ledger.last, outer.shared_state_sha256()

    results = run_sites(2, body)
    for first, second, one, other in zip(results[0][0], results[1][0], Odd(0).parameters(), Odd(1).parameters()):
        want = ((one.float() + other.float()) / 2).to(one.dtype)
        # Differences travel where one of the tensors is narrower than fp32.
        torch.testing.assert_close(first, want, rtol=2**-7 if want.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        assert torch.equal(first, second)
    assert results[0][2] == results[1][2]
    numel = sum(p.numel() for p in Odd(0).parameters())
    assert results[0][1].bytes_sent == 4 * numel  # half of it out to be summed, the other half's sum back


def test_weighted_mean_over_three_sites():
    def body(index, own):
        model = torch.nn.Linear(1, 1, bias=False)
        outer = outer_loop(
            model, [], own, method="local_sgd", sync_every=2, weighting="site", weight=[1.0, 2.0, 5.0][index]
        )
        outer.join()
        model.weight.data.fill_(float(index + 1))
        outer.step()
        outer.step()
        return model.weight.item()

    assert run_sites(3, body) == pytest.approx([(1 + 4 + 15) / 8] * 3)


def test_optimizer_states_are_synced_states_like_any_other():
    @register_method("moments_for_test", sync_every=2, outer_optimizer="average")
    def moments(context):
        return [
            SyncRule(period=context.sync_every, apply=Average()),
            SyncRule(state="exp_avg", period=2 * context.sync_every, apply=Average()),
            SyncRule(state="exp_avg_sq", period=4 * context.sync_every, apply=Average()),
        ]

    def body(index, own):
        generator = torch.Generator().manual_seed(index)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        outer = outer_loop(model, optimizer, own, method="moments_for_test")
        outer.join()
        seen = []
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.randn(4, 3, generator=generator)).square().sum().backward()
            optimizer.step()
            local = {key: optimizer.state[model.weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
            local[PARAMETERS] = model.weight.detach().clone()
            outer.step()
            after = {key: optimizer.state[model.weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
            after[PARAMETERS] = model.weight.detach().clone()
            seen.append((local, after))
        return seen, optimizer.state[model.weight]["step"].item()

    (first, steps), (second, _) = run_sites(2, body)
    assert steps == 8
    for clock, ((before0, after0), (before1, after1)) in enumerate(zip(first, second), 1):
        for key, period in ((PARAMETERS, 2), ("exp_avg", 4), ("exp_avg_sq", 8)):
            if clock % period == 0:
                torch.testing.assert_close(after0[key], (before0[key] + before1[key]) / 2)
                assert torch.equal(after0[key], after1[key])
            else:
                assert torch.equal(before0[key], after0[key])


def test_state_that_the_optimizer_does_not_keep_is_named():
    @register_method("unknown_state_for_test", sync_every=2, outer_optimizer="average")
    def unknown(context):
        return [SyncRule(period=2, apply=Average()), SyncRule(state="exp_avgg", period=2, apply=Average())]

    def body(index, own):
        model = torch.nn.Linear(3, 2)
        with pytest.raises(ValueError, match=r"no state 'exp_avgg'.*exp_avg"):
            outer_loop(model, torch.optim.AdamW(model.parameters()), own, method="unknown_state_for_test")

    run_sites(1, body)


def test_streaming_equals_torchft_diloco_on_the_same_updates():
    """The same deterministic inner updates through torchft's own class and through ours."""
    from torchft.local_sgd import DiLoCo

    def inner(model, step, site):
        for index, parameter in enumerate(model.parameters()):
            parameter.data.mul_(1 - 0.01 * (site + 1)).add_(0.003 * ((step * 7 + index) % 5 - 2) * (site + 1))

    torch.manual_seed(3)
    original = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))

    def build():
        return copy.deepcopy(original)

    class Hooked(torch.optim.SGD):
        """Its step is the deterministic update; torchft hangs on its hooks."""

        def step(self, closure=None):
            inner(self.model, self.inner_step, self.site)

    def theirs(index, own, delay, alpha):
        model = build()
        optimizer = Hooked(model.parameters(), lr=0.1)
        optimizer.model, optimizer.site, optimizer.inner_step = model, index, 0
        outers = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in model]
        with DiLoCo(
            own, list(model), optimizer, outers, sync_every=6, fragment_sync_delay=delay, fragment_update_alpha=alpha
        ):
            for clock in range(1, 25):
                optimizer.inner_step = clock
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    def ours(index, own, delay, alpha):
        model = build()
        outer = outer_loop(
            model,
            [],
            own,
            method="diloco",
            sync_every=6,
            fragments=[["0"], ["1"]],
            fragment_sync_delay=delay,
            fragment_update_alpha=alpha,
        )
        outer.join()
        for clock in range(1, 25):
            inner(model, clock, index)
            outer.step()
        return [p.detach().clone() for p in model.parameters()]

    for delay, alpha in [(0, 0.0), (1, 0.0), (0, 0.5), (1, 0.5), (1, 1.0)]:
        want = run_sites(2, lambda index, own: theirs(index, own, delay, alpha))
        got = run_sites(2, lambda index, own: ours(index, own, delay, alpha))
        for site in range(2):
            for mine, torchft_value in zip(got[site], want[site]):
                torch.testing.assert_close(mine, torchft_value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"codec": "int8"}, {"fragment_sync_delay": 1}, {"outer_optimizer": "sgd"}])
def test_what_is_not_finite_stays_out_of_the_mean_and_is_healed_by_it(bad, settings, caplog):
    def body(index, own):
        model = torch.nn.Linear(3, 2, bias=False)
        model.weight.data.zero_()
        records = []
        outer = outer_loop(
            model,
            [],
            own,
            method="local_sgd",
            sync_every=2,
            on_round=records.append,
            **{"weighting": "tokens", **settings},
        )
        outer.join()
        for step in range(1, 7):
            model.weight.data += index + 1.0
            if index == 2 and step in (1, 2):
                model.weight.data[0, 0] = bad
            outer.step(tokens=index + 1)
        outer.finish()
        return model.weight.detach(), [record.participants for record in records], outer.shared_state_sha256()

    results = run_sites(3, body)
    assert len({digest for _, _, digest in results}) == 1
    for weight, participants, _ in results:
        assert torch.isfinite(weight).all()
        assert participants[0] == 2 and participants[-1] == 3
    assert "not finite" in caplog.text
