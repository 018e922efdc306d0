"""Sources on sites of one process: a small model, data that follows from the source and its place in it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from titan_ext.semi_sync import SemiSync, SemiSyncConfig
from titan_ext.semi_sync.sources.source import Source, Turn
from titan_ext.semi_sync.testing import InProcessSites

TOKENS = {"a": 3, "b": 8, "c": 5, "d": 2}


def batch(source: str, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch at a place in a source's data."""
    generator = torch.Generator().manual_seed(1000 * ord(source[-1]) + place)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)


def new_model(bias: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4, bias=bias), torch.nn.Tanh(), torch.nn.Linear(4, 2, bias=bias))


class Site:
    """A site's training loop: the data of whichever source has its turn, and a record of what it did."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer], rate: Callable[[int], float]) -> None:
        self.model = new_model()
        self.optimizer = optimizer(self.model.parameters())
        self.places: dict[str, int] = {}
        self.rate = rate
        self.turns: list[Turn] = []
        self.steps: list[tuple[str, int, int]] = []
        """Source, inner step before, place in its data, of each that was taken."""
        self.outer: SemiSync | None = None

    def serve(self, turn: Turn) -> None:
        self.turns.append(turn)
        if turn.skip_steps is not None:
            self.places[turn.source] = turn.skip_steps

    def inner_step(self, spoil: str = "") -> int:
        """One inner step if the site trains; returns its tokens."""
        outer = self.outer
        if outer.sits_out:
            return 0
        source = outer.source
        place = self.places.get(source, 0)
        self.steps.append((source, outer.inner_step, place))
        self.places[source] = place + 1
        inputs, targets = batch(source, place)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(outer.schedule_step)
        self.optimizer.zero_grad()
        ((self.model(inputs) - targets) ** 2).mean().backward()
        self.optimizer.step()
        if source == spoil:
            self.model[0].weight.data[0, 0] = float("nan")
        return TOKENS[source[-1]]


class Federation:
    """Sites with their sources, and the real outer loop."""

    def __init__(
        self,
        sources: Sequence[Sequence[str]],
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        rate: Callable[[int], float] = lambda step: 0.1 / (1 + step),
        weights: dict[str, float] | None = None,
        loaded: list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.sites = [Site(optimizer, rate) for _ in sources]
        self.network = InProcessSites(len(sources))
        options = [
            {
                "name": f"site{place}",
                "sources": [Source(name=name, weight=(weights or {}).get(name, 1.0)) for name in names],
                "serve": site.serve,
            }
            for place, (names, site) in enumerate(zip(sources, self.sites, strict=True))
        ]
        config = SemiSyncConfig(**{"method": "local_sgd", "sync_every": 4} | settings)
        self.loops = self.network.outer_loops(
            config,
            [site.model for site in self.sites],
            [[site.optimizer] for site in self.sites],
            options,
            before_join=None if loaded is None else lambda place, outer: self._load(place, outer, loaded[place]),
        )
        for site, outer in zip(self.sites, self.loops, strict=True):
            site.outer = outer

    def _load(self, place: int, outer: SemiSync, saved: dict[str, Any]) -> None:
        site = self.sites[place]
        site.model.load_state_dict(saved["model"])
        site.optimizer.load_state_dict(saved["optimizer"])
        site.places = dict(saved["places"])
        outer.load_state_dict(saved["outer"])

    def save(self) -> list[dict[str, Any]]:
        return [
            copy.deepcopy(
                {
                    "model": site.model.state_dict(),
                    "optimizer": site.optimizer.state_dict(),
                    "places": site.places,
                    "outer": site.outer.state_dict(),
                }
            )
            for site in self.sites
        ]

    def run(self, rounds: int, spoil: str = "") -> "Federation":
        """All sites train until they have committed so many rounds."""
        last = rounds * self.loops[0].plan.round_period

        def act(place: int) -> None:
            site = self.sites[place]
            while site.outer.inner_step < last:
                site.outer.step(site.inner_step(spoil))

        self.network.at_once(act)
        return self

    def step(self, place: int) -> None:
        """One inner step of one site, which must not end a round."""
        self.sites[place].outer.step(self.sites[place].inner_step())

    def end(self) -> dict[str, torch.Tensor]:
        """The global parameters, which all sites share."""
        digests = {outer.shared_state_sha256() for outer in self.loops}
        assert len(digests) == 1
        self.network.close()
        return {name: value.clone() for name, value in self.loops[0].global_parameters().items()}
