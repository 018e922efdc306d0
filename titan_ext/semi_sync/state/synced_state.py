"""A rule of the plan bound to a rank's tensors: what it sends and how it takes what comes back.

``SyncedState`` is the interface of all kinds. Its plain form is the mean of an optimizer's state;
``synced_parameters.SyncedParameters`` keeps a global copy of parameters, and methods bring kinds of their own.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from titan_ext.optim.exact import divide_
from titan_ext.optim.rounding import copy_randomly, seed_of, shard_of
from titan_ext.semi_sync.plan.rule import PARAMETERS, SyncRule
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.moment_ages import Ages
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState, copy_into
from titan_ext.semi_sync.wire.reductions import Reduction
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap


@dataclass(frozen=True, slots=True)
class AppliedRound:
    """What a state learns of the round that brings it a sum."""

    step: int
    """Inner step of the launch, equal at all sites."""
    weight: float
    """This site's own weight in the sum; 0 if it only joins."""
    total_weight: float
    """Sum of the weights of all that contributed."""
    ages: Ages | None = None
    """How many steps the contributors' moments stand for, if the round has any."""
    update_factor: float = 1.0
    """What the mean update of the parameters is multiplied by."""

    def mean(self, total: torch.Tensor) -> torch.Tensor:
        """``total`` divided by the sum of the weights, in place, with the same bits at all sites."""
        return divide_(total, self.total_weight) if self.total_weight != 1.0 else total


@dataclass(frozen=True, kw_only=True, slots=True)
class BindOptions:
    """What only some kinds of states take when they are bound."""

    own_outer: Optimizer | None = None
    """An optimizer over the model's parameters to use instead of the rule's, see ``outer_optimizers.work_on``."""
    token_rows: TokenRowMap | None = None
    """The global row of each row of the site's tables; None takes tables that are whole everywhere."""
    running_average: bool = False
    """Whether parameters keep the running average of their global values over the rounds."""
    site: SiteRanks = field(default_factory=lambda: SiteRanks(alone=True))
    """The ranks of the site."""
    earlier: Sequence["SyncedState"] = ()
    """The states of the plan's rules before this one."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the sites of a round told each other before any values travel; equal at all of them."""

    numbers: Mapping[str, torch.Tensor]
    """By key of a state float64 ``[sites, tells]``; zeros of a site that contributes nothing."""
    weights: Sequence[float]
    """0 of a site that contributes nothing."""
    labels: Mapping[str, Sequence[int]]
    """By group key a number of each site's label."""
    rank: int
    """Of this site."""

    @property
    def contributors(self) -> list[int]:
        """Ranks of the sites that contribute."""
        return [rank for rank, weight in enumerate(self.weights) if weight > 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class StateFacts:
    """What holds of every state of a class."""

    copies: int = 0
    """Values of the size of the rule's parameters that it keeps, outer optimizer aside."""
    values_per_element: int = 1
    """A message is so many values of each parameter's shape, one parameter after the other each time, and then the
    state's ``plain_numbers``."""
    elementwise: bool = True
    """Whether sites that cut their tensors differently can exchange it."""
    equal_at_all_sites: bool = False
    """Whether its shared state is the same at all sites after each commit."""
    equal_in_group: bool = False
    """Whether its ``agreed_state`` is the same, after each commit, at all sites with the label of the rule's group."""
    averages: bool = True
    """Whether a mean replaces what it covers, so that an optimizer's state becomes that of all sites."""


class SyncedState:
    """The local part of one synced state of one fragment, possibly empty on this rank.

    Its mean over the sites replaces the local value.

    Args:
        rule: the plan's rule.
        tensors: what it covers on this rank.
        options: what only some kinds take.
    """

    facts = StateFacts()

    plain_numbers = 0
    """Numbers at a message's end that are equal on all ranks of a site."""

    sends_difference = False
    """Whether it sends differences to the global values in place of values: alike at sites that exchange."""

    takes_residual = False
    """Whether ``take_residual`` is to be called with what the reduction took away."""

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        self.rule = rule
        self.tensors = tensors
        self.key = rule.key
        """Its name in logs, shared state and checkpoints."""
        self.names = tensors.names
        """The parameters that it covers on this rank."""
        self.elements = tensors.elements
        """Of the local tensors."""
        self.averages_state = self.facts.averages and rule.state != PARAMETERS
        """Whether it replaces an optimizer's state by its mean."""
        self.reduction: Reduction | None = None
        """How the state is summed where that is not the way of the rule's wire."""
        self.measures: dict[str, float] = {}
        """Figures of the last contribution, for the ledger, by name."""

    @property
    def numel(self) -> int:
        """fp32 elements of its message."""
        return self.facts.values_per_element * self.elements + self.plain_numbers

    @property
    def feeds_back(self) -> bool:
        """Whether what the codec takes away goes into the next contribution."""
        return self.rule.wire.error_feedback and self.reduction is None

    def check(self) -> None:
        """Raise a ``RunError`` if what the rule was bound to is no longer as it was."""

    # -- a round ---------------------------------------------------------------------------------

    def write(self, out: torch.Tensor, step: int) -> None:
        """Fill ``out`` (fp32 ``[numel]``) with this site's contribution to the round of inner step ``step``."""
        self.tensors.read(out)

    def launched(self, finite: bool) -> None:
        """Called after ``write``, once all ranks know whether all of the site's contribution is finite and so counts."""

    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Take the weighted sum over the sites (fp32 ``[numel]``, overwritten)."""
        self.put(self.of_age(self.tensors.split(of.mean(total)), of), of.step)

    def apply_beside_work(self, total: torch.Tensor, of: AppliedRound) -> None:
        """As ``apply``, at a site whose work is to go into a later round; only kinds with a global copy can tell it."""
        self.apply(total, of)

    def put(self, values: Sequence[torch.Tensor], step: int) -> None:
        """Write fp32 values to the local tensors; what those cannot hold is kept on average, alike at all sites."""
        if not self.tensors.narrow:
            self.tensors.write(values)
            return
        for place, (local, value) in enumerate(zip(self.tensors.locals(), values, strict=True)):
            copy_randomly(local, value.to(local.device), self.seed(step, place))

    def seed(self, step: int, place: int) -> int:
        """Of the noise for the tensor at ``place`` in the round of inner step ``step``: equal at all sites."""
        shard = shard_of(self.tensors.view.tensor(self.names[place]))
        return seed_of(step, zlib.crc32(self.key.encode()), place, *shard)

    def of_age(self, means: Sequence[torch.Tensor], of: AppliedRound) -> Sequence[torch.Tensor]:
        """Means over sites of an optimizer's state, in place those of the step counts that the parameters then have."""
        if of.ages is not None and self.averages_state:
            for name, mean in zip(self.names, means, strict=True):
                factor = of.ages.settle(self.tensors.view, self.rule.state, name)
                if factor != 1.0:
                    mean.mul_(factor)
        return means

    def take_residual(self, residual: torch.Tensor) -> None:
        """Take back what the other sites could not read of a committed contribution (fp32 ``[numel]``)."""

    # -- what is global --------------------------------------------------------------------------

    def start_from_local(self) -> bool:
        """Take the parameters as they are now for what the run starts from, where the kind keeps a copy of them.

        Returns:
            Whether they differ, on this rank, from what they were when the rule was bound: a model was loaded.
        """
        return False

    def global_values(self) -> list[torch.Tensor]:
        """The last committed global value of each parameter, where the kind knows it."""
        return []

    def reset_local_to_global(self) -> None:
        """Drop local work, where there is something global to go back to."""

    def shared_state(self) -> NamedState:
        """What a joining site takes over: local tensors, not copies."""
        return {}

    def agreed_state(self) -> NamedState:
        """What of it is the same at all sites that share it: that of which a checksum tells."""
        return self.shared_state()

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over another site's shared state of the same shards.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """

    def correct_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the bits of another site that stands at the same commit, and keep local work since then.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        self.load(self.shared_state(), state)

    # -- checkpoints -----------------------------------------------------------------------------

    def private_state(self) -> NamedState:
        """What a checkpoint holds beside the shared state; it is this site's alone."""
        return {}

    def checkpoint_state(self) -> NamedState:
        """Shared and private state with global shapes (DTensors where the parameters are), for DCP."""
        shared, private = self.shared_state(), self.private_state()
        names = [name for name in self.names if name in shared or name in private]
        return self.tensors.with_global_shapes({name: shared.get(name, {}) | private.get(name, {}) for name in names})

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore what ``checkpoint_state`` returned; the local parameters are restored elsewhere.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        self.load(self.shared_state(), state)
        self.load(self.private_state(), state)

    def load(self, own: Mapping[str, Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy a saved or received state into our own tensors.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        copy_into(own, state)

    def named_message(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A message as parameters' shards by name, with global shapes.

        Raises:
            ValueError: its message is made of other things.
        """
        if self.numel != self.elements:
            raise ValueError(f"rule {self.key}: its message cannot be kept by parameter")
        return self.tensors.named(flat)

    def fill_message(self, flat: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``named_message``, into ``flat``."""
        self.tensors.fill_from_named(flat, parts)

    # -- what sites must have in common ----------------------------------------------------------

    def agreed_shape(self, shape: Sequence[int]) -> tuple[object, ...]:
        """What sites must have in common of a tensor of this shape."""
        return tuple(shape)


class Guarded:
    """A state whose contribution is an update, so that one far larger than the other sites' is an outlier."""

    def update_norm(self, contribution: torch.Tensor) -> float:
        """Euclidean norm, on this rank, of the update that ``write`` just wrote (fp32 ``[numel]``)."""
        raise NotImplementedError

    def damp(self, contribution: torch.Tensor, factor: float, weight: float) -> None:
        """Shrink the update in a contribution (fp32 ``[numel]``, multiplied by ``weight``) to ``factor``."""
        raise NotImplementedError


class Tells:
    """A state of which a site tells all others some numbers, and heeds theirs, before its values travel."""

    tells: int = 0
    """How many numbers: equal at all sites, and on all ranks of a site."""

    def telling(self) -> torch.Tensor:
        """What ``write`` found to tell: float64 ``[tells]``, equal on all ranks of the site."""
        raise NotImplementedError

    def heed(self, contribution: torch.Tensor, told: Told, weight: float) -> None:
        """Change what ``write`` wrote (fp32 ``[numel]``, multiplied by ``weight``) by what the sites told, in place."""
        raise NotImplementedError


class TakenFromPeers:
    """A state that a newcomer takes in a round, each value from any site that has it, instead of all from one member."""

    transfer: Reduction
    """How newcomers get the values."""

    def offered(self) -> list[torch.Tensor]:
        """Messages (fp32 ``[numel]``) with all that a newcomer takes over."""
        raise NotImplementedError

    def take_over(self, messages: Sequence[torch.Tensor]) -> None:
        """Take over what ``offered`` came to among all sites."""
        raise NotImplementedError
