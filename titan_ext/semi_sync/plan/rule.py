"""A rule of the sync plan: one synced state of one fragment, how it travels, how it is applied, and when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, Literal

from titan_ext.semi_sync.wire.aggregations import Aggregation, Mean
from titan_ext.semi_sync.wire.codecs import Codec, Float32
from titan_ext.semi_sync.wire.reductions import Reduction

PARAMETERS = "params"
"""The synced state that is the model's parameters; any other name is an optimizer state's key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """How a rule's values travel between the sites."""

    codec: Codec = Float32()
    aggregation: Aggregation = Mean()
    """How the sites' contributions become one."""
    error_feedback: bool = False
    """Whether what the codec takes away is added to the site's next contribution."""
    bucket_bytes: int = 32 * 2**20
    """Largest message handed to the wire at once, as fp32 bytes before coding."""

    @property
    def bucket_elements(self) -> int:
        """fp32 elements of a bucket, at least 1."""
        return max(1, self.bucket_bytes // 4)

    def build_reduction(self) -> Reduction:
        """The reduction that this comes to."""
        return self.aggregation.build(self.codec, self.bucket_elements)


class Apply:
    """How what the sites exchanged becomes new values: a frozen dataclass whose fields are its settings.

    Subclasses say which class binds a rule to a rank's tensors; that class is the other half of the rule's meaning.
    """

    needs_fp32: ClassVar[bool] = False
    """Whether it cannot be had of parameters that are kept in less than fp32."""
    adds_up: ClassVar[bool] = False
    """Whether what several sources of a site send can be added up to what the site sends."""
    prunes: ClassVar[bool] = False
    """Whether small weights are left out, which is meant for models whose layers are under a power."""
    plain_sum: ClassVar[bool] = False
    """Whether, beside means and outer steps, it takes a plain sum over the sites, which may go through regions."""
    keeps_late_work: ClassVar[bool] = False
    """Whether a site's work since an older global value can be brought to a later round."""
    yields_to_all: ClassVar[bool] = False
    """Whether it is not needed beside a rule that averages the same parameters over all sites."""
    takes_gradients: ClassVar[bool] = False
    """Whether its time is when a step's gradients are there, before they are clipped."""
    keeps_private: ClassVar[bool] = False
    """Whether what it sends is noised, so that nothing else of a site may travel as it is."""

    def bind(self, rule: "SyncRule", tensors: Any, options: Any = None) -> Any:
        """The rule as a ``SyncedState`` of this rank.

        Args:
            rule: that this belongs to.
            tensors: the ``BoundTensors`` that the rule covers on this rank.
            options: the ``BindOptions``: what only some kinds take.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncRule:
    """One synced state of one fragment, with its own place in the schedule.

    The rule is launched after inner step ``t`` when ``t % period == offset % period``, and its result is applied
    ``delay`` inner steps later, before anything is launched at that step.

    Raises:
        ValueError: a number is outside its range.
    """

    period: int
    """Inner steps between two launches (the papers' K or H)."""

    apply: Apply
    """How the result becomes new values."""

    wire: Wire = Wire()
    """How values travel."""

    state: str = PARAMETERS
    """``params``, or the key of an optimizer state such as ``exp_avg``; of several with ``|`` between them a
    parameter's first counts."""

    required: Literal["all", "some", "none"] = "all"
    """Which trained parameters must have the state; those without are left out."""

    fragment: int = 0
    """Index of the fragment of the model that this rule covers."""

    offset: int = 0
    """Inner step, modulo the period, after which the rule is launched."""

    delay: int = 0
    """Inner steps between launch and application (Streaming DiLoCo's tau)."""

    scope: str = ""
    """Name of the scope whose parameters it covers; empty for those of no other scope."""

    group: str = ""
    """Key of the sites' label: only sites that have one label in common average it. Empty: all sites do."""

    name: str | None = None
    """Told apart by this from another rule of the same state and fragment."""

    retry: bool = True
    """After a round that was not committed: try again at the next inner step, or wait for the next launch."""

    final: bool = False
    """Launched once, after the last inner step, instead of by the period."""

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period = {self.period}: a sync period is at least 1 inner step")
        if not 0 <= self.delay <= self.period:
            raise ValueError(f"delay = {self.delay}: must lie between 0 and the period ({self.period})")

    @property
    def key(self) -> str:
        """Name of the rule in logs and checkpoints."""
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{self.name or self.state}/{self.fragment}"

    def due(self, step: int) -> bool:
        """Whether the rule is launched after inner step ``step`` (1 for the first step)."""
        return step > 0 and not self.final and (step - self.offset) % self.period == 0


def not_in_vain(rules: Sequence[SyncRule] | Mapping[int, SyncRule], launched: Sequence[int]) -> list[int]:
    """Rules that are launched together, without averages of regions where all sites average the same parameters."""
    by_all = averaged_by_all(rules, launched)
    return [index for index in launched if not rules[index].apply.yields_to_all or rules[index].fragment not in by_all]


def averaged_by_all(rules: Sequence[SyncRule] | Mapping[int, SyncRule], launched: Sequence[int]) -> set[int]:
    """Fragments of which rules that are launched together average the parameters over all sites."""
    return {rules[index].fragment for index in launched if rules[index].state == PARAMETERS and not rules[index].group}


def refuse_overlap(rule: SyncRule, other: SyncRule) -> None:
    """One round is in flight at a time: the commit vote is one per quorum.

    Launch times of two rules differ by every value congruent to the difference of their offsets
    modulo the greatest common divisor of their periods, so the smallest positive one decides.
    """
    divisor = gcd(rule.period, other.period)
    apart = (other.offset - rule.offset) % divisor
    if apart == 0 and rule.delay != other.delay:
        raise ValueError(
            f"sync plan: rules {rule.key} and {other.key} are launched together but applied "
            f"{rule.delay} and {other.delay} steps later"
        )
    if 0 < (apart or divisor) < rule.delay:
        raise ValueError(
            f"sync plan: rule {other.key} would be launched {apart or divisor} steps after rule {rule.key}, "
            f"which is applied only after {rule.delay}; lower the delay"
        )
