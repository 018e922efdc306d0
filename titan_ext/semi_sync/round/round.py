"""The values that the phases of a round hand on: launch, contribution, sum, result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from titan_ext.semi_sync.round.agreement import Verdict
from titan_ext.semi_sync.round.contributions import Contributions
from titan_ext.semi_sync.round.site_status import SiteStatus
from titan_ext.semi_sync.state.moment_ages import Ages
from titan_ext.semi_sync.state.synced_state import SyncedState


class Role(Enum):
    """What a site is in a round."""

    MEMBER = "member"
    """It exchanges, and its contribution counts."""
    JOINING = "joining"
    """It has not taken part yet and learns the round from the members."""
    HEALED = "healed"
    """It fell behind and takes a member's shared state."""
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
    step_time_ms: int = 0
    """What an inner step takes it."""
    done: bool = False
    """Whether this site has nothing to contribute any more."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a site puts into a round."""

    rules: tuple[int, ...]
    weight: float
    """0 contributes nothing; the buffer is zero then."""
    buffer: torch.Tensor
    """fp32: the messages of the rules one after the other, multiplied by the weight. The reduction overwrites it."""
    norms: list[float]
    """Norm of this site's update for each guarded rule."""
    is_finite: bool = True
    """Whether what the site meant to contribute was; a NaN or an infinity is left out."""


@dataclass(frozen=True, slots=True)
class Sum:
    """What came back."""

    rules: tuple[int, ...]
    buffer: torch.Tensor
    """fp32: weighted sums over the sites of the rules' messages. The same memory as the contribution's."""
    weight: float
    """This site's own weight in it."""
    own_is_finite: bool
    """Whether what this site meant to contribute was."""
    contributions: Contributions
    """What all sites put in."""
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)
    """By rule: what the reduction took away from this site's contribution, as if that had weight 1."""
    ages: Ages | None = None
    """How many steps the moments stand for that the sites put in."""
    without_partner: frozenset[int] = frozenset()
    """Rules for which this site had nobody to exchange with."""
    seconds: float = 0.0
    """Of the reduction."""

    def parts(self, states: Sequence[SyncedState]) -> list[tuple[int, torch.Tensor]]:
        """Rule index and its slice of the buffer."""
        return parts_of(self.buffer, self.rules, states)


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
    adopted: Mapping[int, list[torch.Tensor]] = field(default_factory=dict)
    """By rule: what newcomers take over from the sites that hold it."""
    healed: bool = False
    """Whether this site has taken in a peer's shared state."""
    retry_after_steps: int = 0
    """Inner steps of the slowest member until a site that has fallen silent counts as dead."""
    seconds_quorum: float = 0.0
    seconds_waited: float | None = None
    """Of quorum and reduction, for which the inner steps stood still; None: for all of it."""

    @property
    def rules(self) -> tuple[int, ...]:
        """The rules of the round: those that travelled, or that this site meant to exchange."""
        return self.sum.rules if self.sum is not None else self.launch.rules

    @property
    def contributors(self) -> list[int]:
        """Ranks of the sites that contributed."""
        return self.sum.contributions.contributors if self.sum is not None else []


def parts_of(
    buffer: torch.Tensor, rules: Sequence[int], states: Sequence[SyncedState]
) -> list[tuple[int, torch.Tensor]]:
    """Rule index and its slice of a buffer in which the rules' messages lie one after the other."""
    sizes = [states[index].numel for index in rules]
    return list(zip(rules, buffer.split(sizes), strict=True)) if rules else []


# -- a reduced round in a checkpoint ---------------------------------------------------------------


def describe(result: RoundResult, states: Sequence[SyncedState]) -> dict[str, Any]:
    """A reduced round without its tensors, as JSON values."""
    return {
        "rules": [states[index].key for index in result.sum.rules],
        "step": result.launch.step,
        "weight": result.sum.weight,
        "tokens": result.launch.tokens,
        "weights": result.sum.contributions.weights,
        "table": [(site.name, site.tokens) for site in result.verdict.table],
    }


def in_flight_tensors(result: RoundResult | None, states: Sequence[SyncedState]) -> dict[str, dict[str, torch.Tensor]]:
    """Reduced values of every rule that can be in flight, zeros where nothing is, for a checkpoint.

    It is loaded into the tensors of a fresh object, so the keys may not depend on the moment.
    """
    parts = dict(result.sum.parts(states)) if result is not None else {}
    return {
        state.key: state.named_message(parts.get(index, torch.zeros(state.numel, device=state.tensors.device)))
        for index, state in enumerate(states)
        if state.rule.delay
    }


def restored(
    description: Mapping[str, Any], tensors: Mapping[str, Any], states: Sequence[SyncedState], device: torch.device
) -> RoundResult:
    """The round that ``describe`` and ``in_flight_tensors`` told of."""
    keys = [state.key for state in states]
    rules = tuple(keys.index(key) for key in description["rules"])
    step, weights = description["step"], description["weights"]
    table = [
        SiteStatus(name=name, tokens=tokens, fingerprint=0, step=step, rules=list(rules))
        for name, tokens in description["table"]
    ]
    buffer = torch.empty(sum(states[index].numel for index in rules), device=device)
    for index, part in parts_of(buffer, rules, states):
        states[index].fill_message(part, tensors[keys[index]])
    weight, tokens = description["weight"], description["tokens"]
    return RoundResult(
        launch=Launch(role=Role.MEMBER, rules=rules, step=step, weight=weight, tokens=tokens),
        role=Role.MEMBER,
        sites=len(table),
        verdict=Verdict(table, list(rules), step),
        sum=Sum(rules, buffer, weight, True, Contributions(weights, [[] for _ in weights])),
    )
