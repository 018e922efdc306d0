"""The sync plan: what a method exchanges, when, how it travels and how it is applied.

A method of the field is a table of rules. A rule carries all that the runtime needs, so nothing below the plan
sees the configuration, and two methods never differ in code that touches the wire.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from titan_ext.semi_sync.plan.box import Box
from titan_ext.semi_sync.plan.regions import LEVELS, REGION
from titan_ext.semi_sync.plan.rule import PARAMETERS, SyncRule, not_in_vain, refuse_overlap
from titan_ext.semi_sync.plan.weighting import SiteWeighting, Uniform

SOURCES_NEED = (
    "the method must exchange parameters alone, by their weighted mean or an outer step, all in one round without a delay "
    'and after the inner step, such as "local_sgd", or "diloco" without fragments, with round_box = "steps", and '
    "among all sites alike"
)
"""Of a plan, for sources that train in turn."""

LATE_WORK_NEEDS = (
    "the method must exchange parameters alone and with one period, after the inner step, by their weighted mean or an "
    'outer step, such as "local_sgd", "diloco" or "decoupled_diloco", among all sites alike, without sampled sites, '
    "several sources or tables shared by row"
)
"""Of a plan, for work of a site that comes late."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlierGuard:
    """What becomes of an update that is far larger than the other sites'."""

    threshold: float = 10.0
    """Times the median norm of the sites' updates above which one is an outlier, if at least three sites
    contribute; 0 lets everything pass."""
    action: Literal["clip", "drop"] = "clip"
    """Shrink the update to the threshold, or leave the site's whole contribution out of the round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lateness:
    """What becomes of a site that a round did not wait for."""

    keeps_work: bool = False
    """Whether it brings what it has done to a later round, instead of dropping it for the others' state."""
    exponent: float = 0.5
    """Of the discount by staleness."""
    trains_on: bool = False
    """Whether inner steps go on where a result is overdue, so that sites come to their rounds at different steps."""
    grace: float = 0.0
    """Share of its slack for which a site holds a round back."""

    def factor(self, staleness: int) -> float:
        """What a contribution's weight is multiplied by that has missed so many commits: ``(1 + staleness) ** -exponent``."""
        return (1.0 + staleness) ** -self.exponent


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSampling:
    """Which sites train in a round, where not all do."""

    sites_per_round: int | None = None
    """How many; None for all."""
    seed: int = 0
    period: int = 1
    """Inner steps of a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTraining:
    """How the sources of sites train (Photon, arXiv 2411.02908), where a site has several or not all train in a round."""

    per_round: int | None = None
    """How many of all sites' sources train in a round; None for all."""
    seed: int = 0
    """Of the samples."""
    optimizer: Literal["stateful", "stateless"] = "stateful"
    """Whether a source keeps the inner optimizer's states until its next turn, or begins each turn without any."""
    clock: Literal["run", "source", "round"] = "run"
    """Inner steps by which the learning rate goes: the run's, those that the source has taken, or those of the round."""
    reset_data: bool = False
    """Whether a source reads its data from the beginning in each turn."""
    placement: Literal["own", "pollen"] = "own"
    """Whether each site trains sources of its own, or all can train all, which are placed anew for each round."""

    @property
    def is_default(self) -> bool:
        """Whether a site with a single source trains as one without."""
        return self == SourceTraining(seed=self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScopePatterns:
    """Which parameters a scope claims; the first scope of which a pattern fits a name has the parameter."""

    name: str
    parameters: tuple[str, ...]
    shared: bool
    """False: they stay at their site, and no rule covers them."""
    last_blocks: float = 0.0
    """Share of the model's blocks, from the last one on, whose parameters it claims as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncPlan:
    """All that the sites of a run must have in common, beside their model and layout.

    Raises:
        ValueError: two rules share a key, or one would be launched while another is in flight.
    """

    rules: tuple[SyncRule, ...]
    """In the order in which they travel."""
    num_fragments: int = 1
    fragments: tuple[tuple[str, ...], ...] | None = None
    """Module names of each fragment; None deals layers evenly by size."""
    own_fragment: tuple[str, ...] = ()
    """Patterns of the parameters that are then a fragment by themselves."""
    scopes: tuple[ScopePatterns, ...] = ()
    sync_point: Literal["after_step", "before_step"] = "after_step"
    """Sync after the inner step, or between a step's gradient and the step."""
    weighting: SiteWeighting = field(default_factory=Uniform)
    """A site's weight in a round's mean."""
    outlier_guard: OutlierGuard = field(default_factory=OutlierGuard)
    sampling: SiteSampling = field(default_factory=SiteSampling)
    box: Box = field(default_factory=Box)
    """What ends a site's part of a round."""
    sources: SourceTraining = field(default_factory=SourceTraining)
    reset_inner_optimizer: bool = False
    """Set the inner optimizer's states to zero after each round."""
    topology: Literal["flat", "regions"] = "flat"
    """Whether values go from site to site, or through one site of each region."""
    lateness: Lateness = field(default_factory=Lateness)
    """What becomes of a site that a round did not wait for."""

    def __post_init__(self) -> None:
        keys = [rule.key for rule in self.rules]
        if len(set(keys)) != len(keys):
            raise ValueError(f"sync plan: two rules with one key among {keys}")
        scheduled = [rule for rule in self.rules if not rule.final]
        for rule in scheduled:
            for other in scheduled:
                refuse_overlap(rule, other)

    @property
    def round_period(self) -> int:
        """Inner steps of a round of the parameters, where all travel together."""
        return min(rule.period for rule in self.rules if not rule.final)

    @property
    def takes_sources(self) -> bool:
        """Whether a site can train several sources in turn: parameters alone travel, all at once and after the inner
        step, and what sources send adds up."""
        together = len({(rule.period, rule.offset) for rule in self.rules}) == 1 and self.sync_point == "after_step"
        return (together and self.box.kind == "steps" and not self.groups) and all(
            rule.state == PARAMETERS
            and not rule.delay
            and not rule.final
            and rule.apply.adds_up
            and rule.wire.aggregation.weighted
            for rule in self.rules
        )

    @property
    def keeps_late_work(self) -> bool:
        """Whether what a site has done since an older commit can be brought to a later round: parameters alone travel,
        each fragment in its turn, as updates of a global copy that all sites share."""
        in_turn = len({rule.period for rule in self.rules}) == 1 and self.sync_point == "after_step"
        apart = self.groups or self.sampling.sites_per_round is not None or not self.sources.is_default
        return (in_turn and not apart) and all(
            rule.state == PARAMETERS and not rule.final and rule.apply.keeps_late_work for rule in self.rules
        )

    @property
    def round_spacing(self) -> float:
        """Inner steps from one round to the next, where each fragment has its turn."""
        return self.round_period / len({(rule.offset - 1) % rule.period for rule in self.rules})

    def next_in_turn(self, commits: Mapping[str, int]) -> list[int]:
        """Indices of the rules of the fragment that has waited longest, where each has its turn.

        Args:
            commits: by key of a rule how many rounds have brought it: equal at sites that stand at one commit.
        """
        first_due = {(rule.offset - 1) % rule.period for rule in self.rules}
        by_turn = {
            turn: [index for index, rule in enumerate(self.rules) if (rule.offset - 1) % rule.period == turn]
            for turn in sorted(first_due)
        }
        return min(by_turn.values(), key=lambda rules: min(commits.get(self.rules[index].key, 0) for index in rules))

    def due(self, step: int) -> list[int]:
        """Indices of the rules to launch after inner step ``step``."""
        return not_in_vain(self.rules, [index for index, rule in enumerate(self.rules) if rule.due(step)])

    @property
    def groups(self) -> tuple[str, ...]:
        """Keys of the sites' labels by which some rules are shared."""
        levels = LEVELS if self.topology == "regions" else ()
        return tuple(sorted({rule.group for rule in self.rules if rule.group}.union(levels)))

    @property
    def region_rules(self) -> list[int]:
        """Indices of the rules by which the sites of a region average by themselves."""
        return [index for index, rule in enumerate(self.rules) if rule.name == REGION]

    @property
    def averages_gradients(self) -> bool:
        """Whether it is the gradients of each step that the sites of a region average."""
        return any(rule.apply.takes_gradients for rule in self.rules)

    def final(self) -> list[int]:
        """Indices of the rules to launch after the last inner step."""
        return [index for index, rule in enumerate(self.rules) if rule.final]

    def fingerprint(self) -> dict[str, str]:
        """All of it as text by key, so that a difference between two sites can be named."""
        described: dict[str, str] = {}
        for each in fields(self):
            if each.name != "rules":
                described |= _leaves(each.name, getattr(self, each.name))
        for rule in self.rules:
            described |= _leaves(f"rule {rule.key}", rule)
        return described


def short_hash(text: str) -> str:
    """64 bits of the SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _leaves(key: str, value: Any) -> dict[str, str]:
    """A value's parts as text that depends on nothing but what it says; dataclasses by class and field."""
    if is_dataclass(value) and not isinstance(value, type):
        found = {key: type(value).__name__}
        for each in fields(value):
            found |= _leaves(f"{key}.{each.name}", getattr(value, each.name))
        return found
    if isinstance(value, (tuple, list)):
        found = {key: f"{len(value)} of them"}
        for place, each in enumerate(value):
            found |= _leaves(f"{key}[{place}]", each)
        return found
    return {key: repr(value)}
