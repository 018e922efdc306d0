"""One site of the benchmark of boxed rounds: real gradient steps of a small model, at a pace that the site does not know."""

import logging
import os
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed import TCPStore

from titan_ext.replica import Replica, ReplicaConfig
from titan_ext.semi_sync import SemiSync, SiteOptions

RANDOM = "random"
"""The arm in which each site takes a random part of the steps of each round."""
_WIDTH = 64
_BATCH = 8


@dataclass(frozen=True, slots=True)
class Arm:
    """How rounds are boxed."""

    name: str
    box: Literal["steps", "speed"]
    """``semi_sync.round_box``."""
    sync_every: int


class PacedSite:
    """A site that trains a small network on data of its own.

    Args:
        arm: what is measured.
        site: index of this site.
        sites: how many there are.
        lighthouse: URL of the lighthouse.
        step_seconds: how long an inner step lasts at least.
    """

    def __init__(self, arm: Arm, site: int, sites: int, lighthouse: str, step_seconds: float) -> None:
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._arm, self._step_seconds = arm, step_seconds
        self._model = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH))
        self._inner = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._data = torch.Generator().manual_seed(site + 1)
        self._random = random.Random(site + 1)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
        name = f"site{site}"
        replica = Replica(ReplicaConfig(lighthouse=lighthouse, min_sites=sites), site=name, rank=0, world_size=1)
        config = SemiSync.Config(method="local_sgd", sync_every=arm.sync_every, round_box=arm.box, weighting="tokens")
        self._outer = config.build(
            model_parts=[self._model], optimizers=self._inner, manager=replica, site=SiteOptions(name=name)
        )

    def rounds(self, count: int) -> list[dict[str, float]]:
        """After a first round, ``count`` more."""
        self._outer.join(loaded=False)
        self._round()
        return [self._round() for _ in range(count)]

    def _round(self) -> dict[str, float]:
        """One round: ``steps`` and ``tokens`` of the site, its ``seconds`` and those that it ``waited`` for others."""
        steps, started = self._arm.sync_every, time.perf_counter()
        allowed = self._random.randint(1, steps) if self._arm.name == RANDOM else steps
        taken, busy = 0, 0.0
        for _ in range(steps):
            tokens = 0
            if taken < allowed and not self._outer.sits_out:
                busy += self._inner_step()
                taken, tokens = taken + 1, _BATCH
            self._outer.step(tokens=tokens)
        assert self._outer.ledger.last.committed, f"round not committed: {self._outer.ledger.last.error}"
        seconds = time.perf_counter() - started
        return {"steps": taken, "tokens": taken * _BATCH, "seconds": seconds, "waited": seconds - busy}

    def checksum(self) -> str:
        """Of the shared parameters."""
        return self._outer.shared_state_sha256()

    def _inner_step(self) -> float:
        started = time.perf_counter()
        inputs = torch.randn(_BATCH, _WIDTH, generator=self._data)
        loss = (self._model(inputs) - inputs.roll(1, dims=1)).square().mean()
        self._inner.zero_grad()
        loss.backward()
        self._inner.step()
        time.sleep(max(0.0, self._step_seconds - (time.perf_counter() - started)))
        return time.perf_counter() - started
