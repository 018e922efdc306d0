"""One site of the rejoin benchmark: it trains by torchft's DiLoCo or by ours, and may be killed on the way."""

import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from titan_ext.bench.sync_sites import TORCHFT, SyntheticModel
from titan_ext.replica import Replica, ReplicaConfig
from titan_ext.semi_sync import SemiSync, SiteOptions

OURS = "ours"
MIN_SITES = 2
"""Sites that a round needs."""

INNER = "inner"
"""Killed half-way between two rounds."""
REDUCE = "reduce"
"""Killed in a round, when it is to give its share of the pseudo-gradient."""

_TIMEOUT = timedelta(seconds=30)
_QUORUM_TIMEOUT = timedelta(seconds=60)
_FEW_VALUES = 4096  # what sites say to each other besides the pseudo-gradient is shorter


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the sites of both methods have in common."""

    sites: int
    parameters: float
    sync_every: int
    step_seconds: float
    """What an inner step takes."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A round as one site saw it."""

    time: float
    """When it was over, by ``time.monotonic``."""
    waited: float
    """Seconds that the inner loop stood still."""
    counted: list[float]
    """By site: its inner steps that the round added to the global parameters."""
    lost: float
    """Inner steps of this site that it took away and did not count."""


@dataclass(frozen=True, slots=True)
class _Membership:
    """Who a site is, and where it meets the others and its own ranks."""

    name: str
    lighthouse: str
    port: int


class Site:
    """A site whose inner steps add 1 to a parameter of its own, so that every step can be found again.

    Args:
        method: ``TORCHFT`` or ``OURS``.
        site: its index.
        lighthouse: URL of the lighthouse.
        settings: those of the run.
    """

    def __init__(self, method: str, site: int, lighthouse: str, settings: Settings) -> None:
        logging.disable(logging.ERROR)  # torchft reports each exception that a kill brings about
        sys.stderr = open(os.devnull, "w")  # its transport reports each request there
        torch.set_num_threads(1)
        self._build = _TorchftSync if method == TORCHFT else _TitanExtSync
        self._site, self._settings = site, settings
        self._model = SyntheticModel(settings.parameters)
        self._steps = self._model.weights[0].data.view(-1)[: settings.sites]
        self._steps.zero_()
        self._inner = torch.optim.SGD(self._model.parameters(), lr=1.0)  # without gradients it changes nothing
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._membership = _Membership(f"site{site}", lighthouse, self._store.port)

    def train(self, kill_where: str | None = None, kill_round: int = 0) -> list[Attempt]:
        """Join, and train until a round counts the last site again after one that did not.

        Args:
            kill_where: ``INNER`` or ``REDUCE``; None survives.
            kill_round: committed rounds after which that happens.
        """
        outer = self._build(self._membership, self._model, self._inner, self._settings.sync_every)
        attempts: list[Attempt] = []
        agreed = self._steps.clone()
        while not _is_back(attempts):
            doomed = kill_where if outer.rounds() == kill_round else None
            if doomed == INNER and self._steps[self._site] - agreed[self._site] >= self._settings.sync_every // 2:
                _die()
            outer.manager.dies = doomed == REDUCE
            time.sleep(self._settings.step_seconds)
            self._steps[self._site] += 1
            attempt = self._finish_step(outer, agreed)
            attempts += [] if attempt is None else [attempt]
        return attempts

    def _finish_step(self, outer: "_TorchftSync | _TitanExtSync", agreed: torch.Tensor) -> Attempt | None:
        """The optimizer's step and the round after it, if one is due.

        Args:
            outer: the outer loop.
            agreed: the inner steps by site in the last global parameters; replaced by those in the new ones.
        """
        before, quorums, rounds = self._steps.clone(), outer.manager.quorums, outer.rounds()
        started = time.monotonic()
        self._inner.step()
        outer.after_step()
        now = time.monotonic()
        if outer.manager.quorums == quorums:
            return None
        committed = outer.rounds() > rounds
        change = self._steps - agreed
        counted = change * outer.participants() if committed else torch.zeros_like(change)
        kept = counted if committed else change
        lost = max(0.0, float((before - agreed - kept)[self._site]))
        if committed:
            agreed.copy_(self._steps)
        return Attempt(now, now - started, [round(steps, 2) for steps in counted.tolist()], round(lost, 2))


def _is_back(attempts: list[Attempt]) -> bool:
    counted = [attempt.counted[-1] > 0.5 for attempt in attempts if any(attempt.counted)]
    return bool(counted) and counted[-1] and not all(counted)


class _Mortal:
    """What is added to both managers."""

    quorums = 0
    dies = False
    """In the next round, when it gives its share of the pseudo-gradient."""

    def start_quorum(self, **options: Any) -> None:
        self.quorums += 1
        super().start_quorum(**options)  # type: ignore[misc]  # both managers have it

    def die_in_a_reduction(self, tensor: torch.Tensor) -> None:
        if self.dies and tensor.numel() > _FEW_VALUES:
            _die()


class _MortalManager(_Mortal, Manager):
    def allreduce(self, tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        self.die_in_a_reduction(tensor)
        return super().allreduce(tensor, *arguments, **options)


class _MortalReplica(_Mortal, Replica):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        group, send = self.process_group, self.process_group.send

        def sending(tensors: list[torch.Tensor], *to: int) -> Any:
            self.die_in_a_reduction(tensors[0])
            return send(tensors, *to)

        group.send = sending  # type: ignore[method-assign,assignment]


class _TorchftSync:
    """torchft's DiLoCo with its HTTP transport; it runs on the optimizer's hooks."""

    def __init__(self, own: _Membership, model: SyntheticModel, inner: torch.optim.SGD, sync_every: int) -> None:
        self.manager = _MortalManager(
            pg=ProcessGroupGloo(timeout=_TIMEOUT),
            load_state_dict=model.load_state_dict,
            state_dict=model.state_dict,
            min_replica_size=MIN_SITES,
            use_async_quorum=False,
            init_sync=False,  # the sites start equal
            timeout=_TIMEOUT,
            quorum_timeout=_QUORUM_TIMEOUT,
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=own.port,
            lighthouse_addr=own.lighthouse,
            replica_id=own.name,
            hostname="127.0.0.1",
        )
        outer = torch.optim.SGD(model.parameters(), lr=1.0)
        DiLoCo(self.manager, [model], inner, outer, sync_every=sync_every, use_bucketization=True).__enter__()

    def after_step(self) -> None:
        pass

    def rounds(self) -> int:
        return self.manager.current_step()

    def participants(self) -> int:
        return self.manager.num_participants()


class _TitanExtSync:
    """Our engine with its own transport."""

    def __init__(self, own: _Membership, model: SyntheticModel, inner: torch.optim.SGD, sync_every: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(own.port)}
        config = ReplicaConfig(
            lighthouse=own.lighthouse,
            min_sites=MIN_SITES,
            timeout_seconds=_TIMEOUT.total_seconds(),
            quorum_timeout_seconds=_QUORUM_TIMEOUT.total_seconds(),
        )
        self.manager = _MortalReplica(config, site=own.name, rank=0, world_size=1)
        method = SemiSync.Config(
            method="diloco", sync_every=sync_every, outer_lr=1.0, outer_momentum=0.0, nesterov=False
        )
        self._outer = method.build(
            model_parts=[model],
            optimizers=inner,
            manager=self.manager,
            site=SiteOptions(heartbeat_timeout_seconds=config.heartbeat_timeout_seconds),
        )
        self._outer.join()

    def after_step(self) -> None:
        self._outer.step()

    def rounds(self) -> int:
        return self._outer.rounds

    def participants(self) -> int:
        return self._outer.ledger.last.participants


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
