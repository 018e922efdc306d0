"""A round from its launch to its result, and the one that is in flight while the inner loop goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum

import torch

from titan_ext.semi_sync.plan.weighting import NO_STANDING, Standing
from titan_ext.semi_sync.round.agreement import Verdict
from titan_ext.semi_sync.round.contributions import Sum


class Role(Enum):
    """What a site is in a round."""

    MEMBER = "member"
    """It exchanges, and its contribution counts."""
    JOINING = "joining"
    """It has not taken part yet and learns the round from the members."""
    HEALED = "healed"
    """It fell behind and takes a member's shared state."""
    LATE = "late"
    """It missed rounds, takes a member's shared state, and brings what it has done since an older one."""
    SITTING_OUT = "sitting out"
    """It was not sampled for the round and contributes nothing."""

    @property
    def abstains(self) -> bool:
        """Whether the site learns from the others what is exchanged."""
        return self in (Role.JOINING, Role.HEALED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a site means to do, when a round begins."""

    role: Role
    rules: tuple[int, ...] = ()
    """Indices of the rules that it means to exchange; none while joining."""
    step: int
    """Inner step of the launch."""
    weight: float
    """This site's weight in the mean."""
    tokens: int = 0
    """What it has trained on since its last commit."""
    work: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """For each of the rules tokens and inner steps since its last commit."""
    standing: Standing = NO_STANDING
    """How the model that it received serves it."""
    pace: tuple[int, int, int, int] = (0, 0, 0, 0)
    """What its inner steps take in a boxed round, as ``SiteStatus`` has it."""
    step_time_ms: int = 0
    """What an inner step takes it."""
    weights: Mapping[int, float] = field(default_factory=dict)
    """What it would weigh in a round of each of the plan's rules, where it may learn the rules only from the others."""
    staleness: Mapping[int, int] = field(default_factory=dict)
    """By rule commits that have gone by since this site's work began, but for the last one; those of 0 left out."""
    done: bool = False
    """Whether this site has nothing to contribute any more."""
    closes: bool = False
    """Whether it has taken its last inner step."""
    sources: int = 1
    """Data sources that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """A round that has been exchanged, before the vote."""

    launch: Launch
    role: Role
    """What the site turned out to be: a launch as a member may end as ``HEALED``."""
    sites: int
    """In the quorum."""
    verdict: Verdict
    sum: Sum | None = None
    """None where nothing was exchanged: all sites join, or an error came first."""
    taken_over: Mapping[int, list[torch.Tensor]] = field(default_factory=dict)
    """By rule: what newcomers take over from the sites that hold it."""
    healed: bool = False
    """Whether this site has taken in a peer's shared state."""
    retry_after_steps: int = 0
    """Inner steps of the slowest member until a site that has fallen silent counts as dead."""
    seconds_quorum: float = 0.0
    seconds_waiting: float = 0.0
    """Of those the ones until the lighthouse told who takes part."""
    seconds_waited: float | None = None
    """Of quorum and reduction, for which the inner steps stood still; None: for all of it."""

    @property
    def seconds_exchanged(self) -> float:
        """Of quorum and reduction."""
        return self.seconds_quorum + (self.sum.seconds if self.sum is not None else 0.0)

    @property
    def rules(self) -> tuple[int, ...]:
        """The rules of the round: those that travelled, or that this site meant to exchange."""
        return tuple(self.sum.parts) if self.sum is not None else self.launch.rules

    @property
    def keeps_work(self) -> bool:
        """Whether what this site has done is not in the round and goes into a later one, since it comes late."""
        return self.role is Role.LATE and self.sum is not None and self.sum.weight == 0 and self.sum.own_is_finite

    @property
    def contributors(self) -> list[int]:
        """Ranks of the sites that contributed."""
        return self.sum.contributions.contributors if self.sum is not None else []


class InFlightRound:
    """At most one round, on a thread of its own or already exchanged, until it is applied.

    Hazard: while its thread runs, no other collective between the sites may be issued from this rank.
    """

    def __init__(self) -> None:
        self.apply_at = 0
        """Inner step at which it is to be applied."""
        self._round: Future[RoundResult] | None = None
        self._pool: ThreadPoolExecutor | None = None

    @property
    def under_way(self) -> bool:
        """Whether there is a round that has not been applied."""
        return self._round is not None

    def start(self, run: Callable[[], RoundResult], apply_at: int) -> None:
        """Let ``run`` exchange on the thread."""
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="titan_ext-exchange")
        self._round, self.apply_at = self._pool.submit(run), apply_at

    def keep(self, result: RoundResult, apply_at: int) -> None:
        """Keep a round that has been exchanged."""
        self._round, self.apply_at = Future(), apply_at
        self._round.set_result(result)

    def due(self, step: int) -> bool:
        """Whether it has to be applied after inner step ``step``."""
        return self.under_way and step >= self.apply_at

    @property
    def has_arrived(self) -> bool:
        """Whether its exchange is over."""
        return self._round is not None and self._round.done()

    def peek(self) -> RoundResult | None:
        """The round, once its exchange is over; it stays under way."""
        return self._round.result() if self._round is not None else None

    def wait(self) -> RoundResult:
        """The round, once its exchange is over; it is under way no more."""
        result, self._round = self._round.result(), None
        return result

    def forget(self) -> None:
        """Drop a kept round."""
        self._round = None

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
