"""Replicas in rows of one tensor train as models of their own do, with the same optimizers and outer loop."""

import pytest
import torch
from torch import nn

from titan_ext.errors import UserError
from titan_ext.experiments.tiny.model import TinyModel
from titan_ext.experiments.tiny.stack import RowSettings, Stack, StackedRun
from titan_ext.experiments.tiny.text import VOCABULARY, Windows, characters, validation_windows
from titan_ext.optim import DeMo, LowRankAdamW, Muon, QHAdamW
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites

MODEL = TinyModel(VOCABULARY, dim=8, context=3, embedding=4)
SITES, STEPS, EVERY = 2, 9, 4


class Alone(nn.Module):
    """One replica, written out as a module of its own."""

    def __init__(self, flat: torch.Tensor) -> None:
        super().__init__()
        for name, each in MODEL.split(flat.clone()).items():
            self.register_parameter(name, nn.Parameter(each.clone()))

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.embed[column] for column in windows[:, :-1].T], dim=1) @ self.project
        x = x + torch.relu(normed(x) @ self.up) @ self.down
        return nn.functional.cross_entropy(normed(x) @ self.output, windows[:, -1])

    def group(self):
        return [{"params": list(self.parameters()), "param_names": [name for name, _ in self.named_parameters()]}]


def normed(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def windows_of(seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (STEPS, SITES, 5, 4), generator=torch.Generator().manual_seed(seed))


def trained_alone(config, make, windows, lr):
    models = [Alone(MODEL.initial(1)) for _ in range(SITES)]
    optimizers = [make(model.group(), lr=lr) for model in models]
    sites = InProcessSites(SITES)
    outer = sites.outer_loops(config, models, optimizers)
    for of_sites in windows:
        for model, optimizer, own in zip(models, optimizers, of_sites):
            optimizer.zero_grad()
            model.loss(own).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        sites.at_once(lambda site: outer[site].step())
    sent = outer[0].ledger.bytes_sent
    sites.at_once(lambda site: outer[site].finish())
    sites.close()
    return [torch.cat([each.detach().flatten() for each in model.parameters()]) for model in models], sent


def quasi_hyperbolic(groups, **settings):
    return QHAdamW(groups, betas=(0.9, 0.99, 0.95), omegas=(0.2, 0.7), **settings)


def low_rank(groups, **settings):
    return LowRankAdamW(groups, rank=2, betas=(0.9, 0.99), omega=0.9, **settings)


@pytest.mark.parametrize(
    "outer, make, elementwise",
    [
        ({"method": "mt_dao"}, quasi_hyperbolic, True),
        ({"method": "mt_dao"}, quasi_hyperbolic, False),
        ({"method": "lordo"}, low_rank, False),
        ({"method": "diloco", "num_fragments": 2, "fragment_sync_delay": 1}, torch.optim.AdamW, True),
        ({"method": "sparta", "settings": {"sparta": {"sparta_fraction": 0.1}}}, torch.optim.AdamW, True),
        ({"method": "noloco"}, torch.optim.AdamW, True),
        ({"method": "muloco", "codec": "fp32"}, Muon, False),
        ({"method": "muloco", "codec": "int4"}, Muon, False),
        ({"method": "demo", "sync_every": 1}, DeMo, False),
    ],
)
def test_stacked_runs_are_runs_of_their_own(outer, make, elementwise):
    """Two runs of different learning rates in one stack: both as if trained alone, and as many bytes."""
    config = SemiSyncConfig(**{"sync_every": EVERY, **outer})
    rates, windows = (1e-2, 3e-2), [windows_of(0), windows_of(1)]
    stack = Stack(MODEL, MODEL.initial(1).repeat(2 * SITES, 1))
    runs = [
        StackedRun(stack, place * SITES, SITES, RowSettings(lambda groups, lr=lr: make(groups, lr=lr), elementwise))
        for place, lr in enumerate(rates)
    ]
    for run in runs:
        run.synchronise(config)
    for step in range(STEPS):
        stack.backward(torch.cat([each[step] for each in windows]))
        for run in runs:
            run.step()
    # A step after the last sync, on text of their own.
    assert torch.equal(stack.flat[0], stack.flat[1]) == (config.method == "demo")
    for run, lr, own in zip(runs, rates, windows):
        expected, sent = trained_alone(config, make, own, lr)
        assert run.bytes_sent() == sent > 0
        run.close()
        for row, alone in zip(run.rows, expected):
            if config.codec == "fp32":
                torch.testing.assert_close(stack.flat[row], alone, rtol=1e-4, atol=2e-6)
            else:  # a last digit decides about a level, on another processor about another one
                moved = alone - MODEL.initial(1)
                assert (stack.flat[row] - alone).norm() < 0.05 * moved.norm()


def test_a_run_goes_on_from_the_state_of_another():
    """One replica trained on, then two that begin with its state: at equal text all stay equal."""
    settings = RowSettings(lambda groups: quasi_hyperbolic(groups, lr=1e-2), elementwise=True)
    windows = windows_of(2)[:, :1]
    first = Stack(MODEL, MODEL.initial(3).repeat(1, 1))
    run = StackedRun(first, 0, 1, settings)
    for own in windows[:5]:
        first.backward(own)
        run.step()
    second = Stack(MODEL, first.flat.repeat(2, 1))
    both = StackedRun(second, 0, 2, settings, run.state())
    for own in windows[5:]:
        first.backward(own)
        run.step()
        second.backward(own.repeat(2, 1, 1))
        both.step()
    torch.testing.assert_close(second.flat, first.flat.repeat(2, 1))


def test_validation_is_the_mean_over_windows():
    stack = Stack(MODEL, torch.stack([MODEL.initial(seed) for seed in range(3)]))
    windows = torch.randint(VOCABULARY, (700, 4))
    found = stack.validate([[1], [2, 0]], windows)
    means = [stack.flat[1], (stack.flat[2] + stack.flat[0]) / 2]
    assert found == pytest.approx([Alone(each).loss(windows).item() for each in means], rel=1e-5)


def test_text_is_that_of_the_site_and_never_of_the_validation(tmp_path):
    for place in range(40):
        (tmp_path / f"{place}.txt").write_text(f"{chr(97 + place % 26)}" * 50, encoding="utf-8")
    corpus = str(tmp_path)
    taken = [Windows(corpus, 2, 3, 4, seed).take(6) for seed in (0, 0, 1)]
    assert taken[0].shape == (6, 2, 3, 4) and torch.equal(taken[0], taken[1]) and not torch.equal(taken[0], taken[2])
    parts = [characters(corpus, "train", share, 2) for share in range(2)] + [characters(corpus, "validation", 0, 1)]
    assert sum(map(len, parts)) == 40 * 50 + 40 - 3
    assert validation_windows(corpus, 5, 4).shape == (5, 4)


def test_too_little_text_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8")
    with pytest.raises(UserError, match="too little text"):
        Windows(str(tmp_path), 1, 1, 400, 0)
