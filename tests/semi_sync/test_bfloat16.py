"""bfloat16 parameters: nothing is lost at a sync that fp32 would keep, and models train."""

import copy

import pytest
import torch

from tests.semi_sync.sites import outer_loop, run_sites
from titan_ext.errors import UserError
from titan_ext.optim import ADOPT, QHSGDM, DeMo, LowRankAdamW, Muon, QHAdamW

SITES, SIZE = 4, 64
ULP = 2.0**-7  # of bfloat16 between 1 and 2


def weights(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    for layer in model.layers:
        layer.weight = torch.nn.Parameter(torch.full((SIZE,), 1.25, dtype=dtype))
    return model


PLAIN = {"outer_lr": 1.0, "outer_momentum": 0.0, "nesterov": False}
AVERAGING = [
    dict(method="local_sgd", sync_every=1),
    dict(method="diloco", sync_every=1, **PLAIN),
    dict(method="local_sgd", sync_every=1, codec="int8"),
    dict(method="local_sgd", sync_every=1, aggregation="trimmed_mean", settings={"trimmed_mean": {"sites": 7}}),
    dict(method="diloco", sync_every=2, fragment_sync_delay=1, **PLAIN),
    dict(method="diloco", sync_every=2, num_fragments=2, **PLAIN),
]


@pytest.mark.parametrize("settings", AVERAGING, ids=lambda each: "-".join(map(str, each.values())))
def test_progress_under_half_a_unit_adds_up(settings):
    """One of four sites moves by one unit in the last place a round: a quarter of a unit is the mean."""
    trimmed = settings.get("aggregation") is not None
    steps = 16

    def body(site, own):
        model = weights()
        outer = outer_loop(model, [], own, outlier_threshold=0.0, **settings)
        outer.join()
        for step in range(steps):
            if trimmed or step % SITES == site:  # of the trimmed mean all move, by a quarter of a unit on average
                with torch.no_grad():
                    for layer in model.layers:
                        layer.weight += ULP
            outer.step()
        outer.finish()
        return [value.mean().item() for value in outer.global_parameters().values()], [
            layer.weight.detach().float() for layer in model.layers
        ]

    moves = steps if trimmed else steps / SITES
    for values, locals_ in run_sites(SITES, body):
        late, early = settings.get("fragment_sync_delay", 0), settings.get("num_fragments", 1) > 1
        for value, local in zip(values, locals_):
            # What a late landing overwrites was no part of its round; the first of two fragments lacks the last step.
            slack = moves / 2 + 0.3 if late else 0.27 if early else 0.02
            assert value == pytest.approx(1.25 + ULP * moves, abs=ULP * slack)
            assert value > 1.25 + ULP * (moves / 2 - 0.5)
            assert (local - value).abs().max() <= ULP * (1.3 if early else 0.501)


def one_site_of_each(settings):
    """A site of float32 and one of bfloat16: global values, local copies, and the checksum of what they share."""

    def body(site, own):
        model = weights(torch.bfloat16 if site else torch.float32)
        outer = outer_loop(model, [], own, described={"training.dtype": str(model.layers[0].weight.dtype)}, **settings)
        outer.join()
        for _ in range(4):
            with torch.no_grad():
                for layer in model.layers:
                    layer.weight += ULP * (2 + site)
            outer.step()
        outer.finish()
        values = list(outer.global_parameters().values())
        return values, [layer.weight.detach().clone() for layer in model.layers], outer._exchange.lineage.checksum

    return run_sites(2, body)


@pytest.mark.parametrize(
    "settings",
    [dict(method="local_sgd", sync_every=1, codec="int8"), dict(method="diloco", sync_every=2, **PLAIN)],
    ids=["int8", "diloco"],
)
def test_a_site_of_bfloat16_and_one_of_float32_share_one_global_copy(settings):
    """What travels and what is shared is fp32 at both; only the local copy of the one is rounded."""
    (first, exact, one), (second, rounded, other) = one_site_of_each(settings)
    assert one == other != 0
    for mine, theirs, local, coarse in zip(first, second, exact, rounded):
        assert mine.dtype == theirs.dtype == torch.float32 and torch.equal(mine, theirs) and torch.equal(mine, local)
        assert coarse.dtype == torch.bfloat16 and (coarse.float() - mine).abs().max() <= ULP
        assert mine.mean().item() == pytest.approx(1.25 + ULP * 10, abs=0.1 * ULP)


def test_where_the_one_would_send_values_and_the_other_differences_they_are_refused_by_name():
    with pytest.raises(UserError, match=r"training\.dtype is .*torch\.float32.* at .*torch\.bfloat16"):
        one_site_of_each(dict(method="local_sgd", sync_every=1))


def test_rounding_of_the_local_copy_is_no_pseudo_gradient():
    """Sites that do nothing contribute nothing, whatever the outer optimizer left between two bfloat16 numbers."""

    def body(site, own):
        model = weights()
        outer = outer_loop(model, [], own, method="diloco", sync_every=1)
        outer.join()
        with torch.no_grad():
            for layer in model.layers:
                layer.weight -= ULP  # once
        seen = []
        for _ in range(6):
            outer.step()
            seen.append(outer.global_parameters()["layers.0.weight"][0].item())
        return seen

    velocity, theta, want = 0.0, 1.25, []
    for delta in (ULP, 0, 0, 0, 0, 0):
        velocity = 0.9 * velocity + delta
        theta -= 0.7 * (delta + 0.9 * velocity)
        want.append(theta)
    for seen in run_sites(2, body):
        assert seen == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("method", ["sparta", "noloco", "eager_diloco"])
def test_methods_of_their_own_lose_nothing_either(method):
    settings = {
        "sparta": dict(sync_every=10**6, settings={"sparta": {"sparta_fraction": 1.0}}),
        "noloco": dict(sync_every=1, outer_lr=1.0, outer_momentum=0.0, settings={"noloco": {"gossip_gamma": 1.0}}),
        "eager_diloco": dict(sync_every=1, outer_optimizer="average"),
    }[method]
    steps = 64

    def body(site, own):
        model = weights()
        outer = outer_loop(model, [], own, method=method, outlier_threshold=0.0, **settings)
        outer.join()
        for step in range(steps):
            if step % SITES == site:
                with torch.no_grad():
                    for layer in model.layers:
                        layer.weight += ULP
            outer.step()
        outer.finish()
        return torch.cat([layer.weight.detach().float() for layer in model.layers])

    results = run_sites(SITES, body)
    mean = torch.stack(results).mean().item()
    assert mean == pytest.approx(1.25 + ULP * steps / SITES, abs=ULP * (2.5 if method == "eager_diloco" else 1.2))


def test_means_of_moments_are_kept_on_average():
    """A second moment that three of four sites let decay by less than a bfloat16 number can tell."""

    def body(site, own):
        model = weights()
        optimizer = QHAdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999), omegas=(1.0,))
        outer = outer_loop(model, optimizer, own, method="mt_dao", sync_every=1)
        outer.join()
        for _ in range(80):
            for layer in model.layers:
                layer.weight.grad = torch.full_like(layer.weight, 1.0 + 0.03 * site)
            optimizer.step()
            outer.step()
        return [optimizer.state[layer.weight]["exp_avg_sq"].double() for layer in model.layers]

    want = (1 - 0.999**80) * sum((1.0 + 0.03 * site) ** 2 for site in range(SITES)) / SITES
    results = run_sites(SITES, body)
    for seconds in results:
        assert all(torch.equal(mine, first) for mine, first in zip(seconds, results[0]))
        assert torch.cat(seconds).mean().item() == pytest.approx(want, rel=0.02)


OPTIMIZERS = {
    "qhadam": lambda p, lr: QHAdamW(p, lr=lr, betas=(0.9, 0.999), omegas=(1.0,)),
    "adopt": lambda p, lr: ADOPT(p, lr=lr, betas=(0.9, 0.999)),
    "qhsgdm": lambda p, lr: QHSGDM(p, lr=30 * lr, betas=(0.9,), omegas=(0.9,)),
    "muon": lambda p, lr: Muon(p, lr=lr, adamw_lr=1.0, betas=(0.9, 0.999)),
    "lowrank": lambda p, lr: LowRankAdamW(p, lr=2 * lr, betas=(0.9, 0.999), rank=4, omega=0.9),
    "demo": lambda p, lr: DeMo(p, lr=lr / 3, beta=0.99),
}
TRAINED = [
    ("qhadam", dict(method="local_sgd", sync_every=4)),
    ("qhadam", dict(method="diloco", sync_every=8)),
    ("qhadam", dict(method="diloco", sync_every=8, codec="int8", num_fragments=2)),
    ("qhadam", dict(method="diloco", sync_every=8, fragment_sync_delay=2, fragment_update_alpha=0.5)),
    ("qhadam", dict(method="mt_dao", sync_every=4)),
    ("adopt", dict(method="des_loc", sync_every=4)),
    ("qhsgdm", dict(method="local_sgd", sync_every=4)),
    ("muon", dict(method="muloco", sync_every=8)),
    ("lowrank", dict(method="lordo", sync_every=8)),
    ("demo", dict(method="demo")),
]


def trained(name: str, dtype: torch.dtype, settings: dict) -> float:
    """Loss of the global model after 160 small steps of two sites on a regression that a small net can learn."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 16, generator=generator)
    targets = (
        torch.tanh(inputs @ torch.randn(16, 32, generator=generator) / 4) @ torch.randn(32, 4, generator=generator) / 4
    )

    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.Tanh(), torch.nn.Linear(48, 4))

    def body(site, own):
        model = copy.deepcopy(net).to(dtype)
        optimizer = OPTIMIZERS[name](model.parameters(), 1e-3)
        outer = outer_loop(model, optimizer, own, **settings)
        outer.join()
        batches = torch.Generator().manual_seed(10 + site)
        for _ in range(160):
            chosen = torch.randint(0, 512, (32,), generator=batches)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(inputs[chosen].to(dtype)).float(), targets[chosen]).backward()
            optimizer.step()
            outer.step()
        outer.finish()
        whole = copy.deepcopy(net)
        whole.load_state_dict({key: value.detach().float() for key, value in outer.global_parameters().items()})
        return torch.nn.functional.mse_loss(whole(inputs), targets).item()

    first, second = run_sites(2, body)
    assert first == second
    return first


@pytest.mark.parametrize(
    "name, settings",
    [
        pytest.param(
            name,
            settings,
            id=f"{name}, {', '.join(map(str, settings.values()))}",
            marks=() if "codec" in settings or name in ("adopt", "muon", "lowrank") else pytest.mark.slow,
        )
        for name, settings in TRAINED
    ],
)
def test_bfloat16_trains_like_float32(name, settings):
    """Steps of 0.001 on weights of up to 0.25 are a half unit in the last place or less."""
    whole = trained(name, torch.float32, settings)
    narrow = trained(name, torch.bfloat16, settings)
    assert narrow == pytest.approx(whole, rel=0.15)


def test_an_optimizer_that_rounds_to_the_nearest_is_named(caplog):
    def body(site, own):
        model = weights()
        outer_loop(model, torch.optim.AdamW(model.parameters()), own, method="diloco")
        return caplog.text.count("AdamW keeps layers.0.weight in torch.bfloat16 and rounds to the nearest")

    assert run_sites(1, body) == [1]
