"""State that must be equal to the bit although each site computes it: threads, hardware and kernels that round otherwise."""

import threading
from dataclasses import dataclass

import pytest
import torch

from tests.semi_sync.methods import reference
from tests.semi_sync.methods.test_methods import SIZE, START, Flat, inner_step
from tests.semi_sync.sites import outer_loop, run_sites
from titan_ext.optim import DeMo, LowRankAdamW
from titan_ext.optim.exact import ExactSGD
from titan_ext.semi_sync.state.outer_optimizers import Sgd, register_outer_optimizer

SITES = 3
_here = threading.local()


class OtherHardware(ExactSGD):
    """Rounds otherwise at every site, by a unit in the last place or two."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                bits = parameter.view(torch.int32)
                generator = torch.Generator().manual_seed(_here.site * 1000 + _here.count)
                bits += torch.randint(-1, 2, bits.shape, generator=generator, dtype=torch.int32)
        _here.count += 1


@register_outer_optimizer("other_hardware")
@dataclass(frozen=True, kw_only=True)
class OtherSgd(Sgd):
    def create(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        return OtherHardware(parameters, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="diloco", sync_every=4),
        dict(method="diloco", sync_every=4, num_fragments=2),
        dict(method="diloco", sync_every=4, codec="bf16"),
    ],
    ids=["diloco", "fragments", "bf16"],
)
def test_a_site_whose_outer_step_rounds_otherwise_goes_on_contributing(settings, caplog):
    """Every round brings the work of all sites: the first attempt is refused, the second has it."""

    def body(site, own):
        _here.site, _here.count = site, 0
        model, records = Flat(START), []
        loop = outer_loop(model, [], own, outer_optimizer="other_hardware", on_round=records.append, **settings)
        loop.join()
        for step in range(1, 25):
            model.set(inner_step(site, step, model.values().tolist()))
            loop.step()
        loop.finish()
        return records

    for records in run_sites(SITES, body):
        committed = [record for record in records if record.committed]
        assert all(record.participants == SITES for record in committed)
        assert len(committed) >= 5
        refused = [record.error for record in records if not record.committed]
        assert refused and all("shared state" in error for error in refused)
    assert "keeping this site's work" in caplog.text


def test_the_work_that_is_kept_is_the_sites_whole_work():
    """Against the equations: after a refusal the round is tried again one step later, with what all did meanwhile."""
    period, steps = 4, 21

    def body(site, own):
        _here.site, _here.count = site, 0
        model, rounds = Flat(START), []
        loop = outer_loop(model, [], own, method="diloco", sync_every=period, outer_optimizer="other_hardware")
        loop.join()
        for step in range(1, steps + 1):
            model.set(inner_step(site, step, model.values().tolist()))
            before = loop.rounds
            loop.step()
            if loop.rounds > before:
                rounds.append((step, torch.cat([v.reshape(-1) for _, v in sorted(loop.global_parameters().items())])))
        return rounds

    results = run_sites(SITES, body)
    theta, velocity = list(START), [0.0] * SIZE
    local = [list(START) for _ in range(SITES)]
    committed = dict(results[0])
    assert [step for step, _ in results[0]] == [4, 9, 13, 17, 21]
    for step in range(1, steps + 1):
        local = [inner_step(site, step, local[site]) for site in range(SITES)]
        if step not in committed:
            continue
        delta = reference.mean([[t - x for t, x in zip(theta, each)] for each in local], [1.0] * SITES)
        velocity = [0.9 * v + d for v, d in zip(velocity, delta)]
        theta = [t - 0.7 * (d + 0.9 * v) for t, d, v in zip(theta, delta, velocity)]
        local = [list(theta) for _ in range(SITES)]
        for rounds in results:
            torch.testing.assert_close(
                dict(rounds)[step].double(), torch.tensor(theta, dtype=torch.float64), rtol=0, atol=2e-5
            )


WIDE = 40_000
"""Elements enough for kernels to share them among threads."""


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for layer, shape in zip(self.layers, [(600, 300), (WIDE,)]):
            layer.weight = torch.nn.Parameter(torch.randn(shape, generator=generator))

    def take_gradients(self, site: int, step: int) -> None:
        generator = torch.Generator().manual_seed(100 * step + site)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) + parameter.detach()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


THREADED = {
    "diloco": (adamw, dict(method="diloco", sync_every=2)),
    "heavy ball, by tokens": (adamw, dict(method="diloco", sync_every=2, nesterov=False, weighting="tokens")),
    "adam": (adamw, dict(method="diloco", sync_every=2, outer_optimizer="adam")),
    "torch's adam": (adamw, dict(method="diloco", sync_every=2, outer_optimizer="adam", outer_reading="torch")),
    "adagrad": (adamw, dict(method="diloco", sync_every=2, outer_optimizer="adagrad")),
    "torch's adagrad": (adamw, dict(method="diloco", sync_every=2, outer_optimizer="adagrad", outer_reading="torch")),
    "yogi": (adamw, dict(method="diloco", sync_every=2, outer_optimizer="yogi")),
    "int8": (adamw, dict(method="diloco", sync_every=2, codec="int8")),
    "topk": (adamw, dict(method="diloco", sync_every=2, codec="topk")),
    "trimmed mean": (adamw, dict(method="diloco", sync_every=2, aggregation="trimmed_mean")),
    "local adam": (adamw, dict(method="local_adam", sync_every=2)),
    "lordo": (lambda p: LowRankAdamW(p, lr=0.01, rank=32), dict(method="lordo", sync_every=2)),
    "lordo, iterated": (
        lambda p: LowRankAdamW(p, lr=0.01, rank=32, power_iterations=2),
        dict(method="lordo", sync_every=2),
    ),
    "lordo, nesterov": (
        lambda p: LowRankAdamW(p, lr=0.01, rank=32),
        dict(method="lordo", sync_every=2, outer_optimizer="sgd"),
    ),
    "demo": (lambda p: DeMo(p, lr=0.01, beta=0.9), dict(method="demo")),
}


@pytest.mark.parametrize("name", THREADED)
def test_sites_of_one_and_of_two_threads_hold_the_same_bits_and_all_contribute(name):
    build, settings = THREADED[name]
    sites = 5 if name == "trimmed mean" else 3

    def body(site, own):
        torch.ones(WIDE).sum()  # a thread's first kernel gives it the process's number
        torch.set_num_threads(1 + site % 2)
        model, records = Wide(), []
        optimizer = build(model.parameters())
        loop = outer_loop(model, optimizer, own, outlier_threshold=0.0, on_round=records.append, **settings)
        loop.join()
        for step in range(1, 7):
            model.take_gradients(site, step)
            optimizer.step()
            loop.step(tokens=1000 + 77 * site)
        contributed = [record.participants for record in records]
        return torch.get_num_threads(), contributed, loop.shared_state_sha256(), loop._exchange.lineage.checksum

    threads, contributed, digests, checksums = zip(*run_sites(sites, body))
    assert set(threads) == {1, 2}
    assert all(set(each) == {sites} for each in contributed)
    assert len(set(digests)) == 1 and len(set(checksums)) == 1
