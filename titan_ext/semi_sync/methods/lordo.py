"""LoRDO (arXiv 2602.04396): low-rank moments travel, in a basis that comes from the averaged pseudo-gradient.

The inner optimizer is LowRankAdamW. Each sync averages parameters and moments in the old basis, takes the top singular
vectors of the averaged pseudo-gradient, and turns the moments into them (the order of optimizers without a paper's
listing: averages first, so that all moments share one basis). Singular vectors come out otherwise with another
number of threads or on other hardware, so one site computes them and sends them to all. With the optimizer's
``basis_from = "gradient"`` every site finds its own bases, which are then no shared state: LoRDO-Local, the baseline.
Error feedback stays at its site.

The first basis is unconfirmed: until the first sync it is some of the coordinates, the same at all sites, or with
``first_basis = "gradient"`` (which suits training from scratch) from the average of the first gradients.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from titan_ext.optim.low_rank import LowRankAdamW
from titan_ext.optim.low_rank_layout import like_basis, local_gradient
from titan_ext.optim.projection import coordinate_basis, projection
from titan_ext.semi_sync.methods.des_loc import NESTEROV
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state.outer_optimizers import OuterOptimizer
from titan_ext.semi_sync.state.synced_parameters import Average, SyncedParameters
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState
from titan_ext.semi_sync.state.views import like, local_tensor
from titan_ext.semi_sync.wire.collectives import Traffic
from titan_ext.semi_sync.wire.manager import QuorumWire
from titan_ext.semi_sync.wire.reductions import AllReduce, Reduction, RoundFacts, Turns

_NEVER_AGAIN = 2**62  # a period that no run reaches

ComputeBases = Callable[[torch.Tensor, float, torch.Tensor], None]
"""Takes the weighted sum of the sites' contributions and the sum of the weights; fills in the bases."""


@dataclass(frozen=True, kw_only=True)
class LordoSettings:
    """``[semi_sync.lordo]``.

    Raises:
        ValueError: the first basis is neither.
    """

    first_basis: Literal["coordinates", "gradient"] = "coordinates"
    """What bases are until the first sync: some of the coordinates, or from the average of the sites' first gradients,
    which takes an exchange after the first inner step."""

    def __post_init__(self) -> None:
        if self.first_basis not in ("coordinates", "gradient"):
            raise ValueError(f'first_basis = {self.first_basis!r}: must be "coordinates" or "gradient"')


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankAverage(Apply):
    """The mean of moments that have the shape of their basis."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """The moments."""
        return LowRankMoments(rule, tensors, options)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshBases(Apply):
    """The mean or an outer step moves the parameters; their change renews the bases of the inner optimizer."""

    optimizer: OuterOptimizer | None
    """None takes the mean itself."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedParameters:
        """Parameters with the bases of the inner optimizer."""
        return ParametersWithBases(rule, tensors, options)


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstBasesFromGradients(Apply):
    """The average of the gradients gives the bases of the inner optimizer."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """The gradients of the parameters that have a basis."""
        having = [name for name in tensors.names if tensors.view.keeps("basis", name)]
        return FirstBases(rule, BoundTensors(tensors.view, tensors.state, having, tensors.device), options)


class LowRankMoments(SyncedState):
    """Moments in the shape of their basis, not of their parameter."""

    facts = StateFacts(elementwise=False)


class BasisReduction(Reduction):
    """Sums what bases come from as usual, then has the first site send the bases that it computes of the sum.

    Args:
        reduction: the usual one.
        elements: of what it sums; what is left of a message are bases.
        compute: fills them in, from the sum.
    """

    cuts_anywhere = False

    def __init__(self, reduction: Reduction, elements: int, compute: ComputeBases) -> None:
        self._reduction, self._elements, self._compute = reduction, elements, compute
        self._of_bases = AllReduce(max(1, elements))

    def wire_bytes(self, numel: int, sites: int) -> int:
        bases = self._of_bases.wire_bytes(numel - self._elements, sites)
        return self._reduction.wire_bytes(self._elements, sites) + bases

    def turns(self, numel: int, sites: int) -> Turns:
        of_sum = self._reduction.turns(self._elements, sites)
        of_bases = self._of_bases.turns(numel - self._elements, sites)
        return replace(of_sum, before=of_sum.before + of_bases.hops)

    def scratch_elements(self, numel: int, sites: int) -> int:
        return max(self._reduction.scratch_elements(self._elements, sites), numel - self._elements)

    def reduce(
        self,
        manager: QuorumWire,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> None:
        summed, bases = values.split([self._elements, values.numel() - self._elements])
        lost = None if residual is None else residual.zero_()[: self._elements]
        self._reduction.reduce(manager, summed, of, lost)
        bases.zero_()
        if manager.participating_rank() == 0:
            # On all ranks of the site or on none, whatever they know of errors: making a matrix whole is a collective.
            self._compute(summed, math.fsum(of.weights), bases)
        self._of_bases.reduce(manager, bases, of)

    def take_traffic(self) -> Traffic:
        return self._reduction.take_traffic() + self._of_bases.take_traffic()


class SharedBases:
    """The bases that the outer loop gives, one after the other, each rank its shard.

    Args:
        tensors: parameters of which some may have a basis.
    """

    def __init__(self, tensors: BoundTensors) -> None:
        self._view = tensors.view
        self.names = [name for name in tensors.names if tensors.view.keeps("basis", name) and self._is_shared(name)]
        self._shapes = [basis.shape for basis in self.tensors()]
        self.numel = sum(shape.numel() for shape in self._shapes)

    def tensors(self) -> list[torch.Tensor]:
        """The optimizer's own."""
        return self._view.tensors("basis", self.names)

    def begin(self) -> None:
        """Begin with coordinates, whatever a site has come to by itself."""
        for name in self.names:
            optimizer, group = self._view.owner(name)
            if isinstance(optimizer, LowRankAdamW):
                parameter = self._view.parameters[name]
                optimizer.set_basis(parameter, coordinate_basis(min(parameter.shape), group["rank"]))

    @torch.no_grad()
    def compute(self, changes: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Fill ``out`` (fp32 ``[numel]``) with the bases of matrices (local shards). A collective over their meshes."""
        for name, part in zip(self.names, self._split(out), strict=True):
            parameter, change = self._view.parameters[name], changes[name]
            group = self._view.owner(name)[1]
            change = like(parameter, change.to(local_tensor(parameter).device))
            whole = projection(change, group["rank"], group["power_iterations"])
            part.copy_(local_tensor(like_basis(parameter, whole)))

    @torch.no_grad()
    def take(self, sent: torch.Tensor) -> None:
        """Turn the moments into the bases that were sent (fp32 ``[numel]``). A collective over the matrices' meshes."""
        for name, part in zip(self.names, self._split(sent), strict=True):
            parameter, optimizer = self._view.parameters[name], self._view.owner(name)[0]
            assert isinstance(optimizer, LowRankAdamW)
            stored = optimizer.state[parameter]["basis"]
            optimizer.set_basis(parameter, like(stored, part.to(local_tensor(stored).device)))

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat.split([shape.numel() for shape in self._shapes]) if self._shapes else ()
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _is_shared(self, name: str) -> bool:
        """Whether the outer loop gives the basis: it does unless the optimizer was told to find its own."""
        optimizer, group = self._view.owner(name)
        if optimizer is not None and group["basis_from"] is None:
            group["basis_from"] = "outer"
        return group.get("basis_from") != "gradient"


class ParametersWithBases(SyncedParameters):
    """Parameters whose averaged pseudo-gradient renews the bases of the inner optimizer."""

    facts = StateFacts(copies=1, elementwise=False, equal_at_all_sites=True)

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        self._bases = SharedBases(tensors)
        self._bases.begin()
        self.plain_numbers = self._bases.numel
        self.reduction = BasisReduction(rule.wire.build_reduction(), self.elements, self._compute)

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """Values or pseudo-gradient, and room for the bases."""
        values, bases = self._halves(out)
        super().write(values, step)
        bases.zero_()

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Move the parameters, then the bases. The moments' rules of the round come first."""
        summed, bases = self._halves(total)
        super().apply(summed, of)
        self._bases.take(bases)

    def update_norm(self, contribution: torch.Tensor) -> float:
        """Without the room for the bases."""
        return super().update_norm(self._halves(contribution)[0])

    def damp(self, contribution: torch.Tensor, factor: float, weight: float) -> None:
        """Without the room for the bases."""
        super().damp(self._halves(contribution)[0], factor, weight)

    def shared_state(self) -> NamedState:
        """Global values and the bases that all sites share."""
        shared = super().shared_state()
        for name, basis in zip(self._bases.names, self._bases.tensors(), strict=True):
            shared[name]["basis"] = basis
        return shared

    def checkpoint_state(self) -> NamedState:
        """Without the bases, which the inner optimizer's own checkpoint holds."""
        return self.tensors.with_global_shapes(super().shared_state())

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore what ``checkpoint_state`` returned."""
        self.load(super().shared_state(), state)

    def _halves(self, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        return flat.split([self.elements, self.plain_numbers])

    @torch.no_grad()
    def _compute(self, summed: torch.Tensor, weight: float, out: torch.Tensor) -> None:
        """The bases of the averaged pseudo-gradient, of which only the directions count."""
        changes = summed if self.sends_difference else self.global_flat * weight - summed
        self._bases.compute(dict(zip(self.names, self.tensors.split(changes), strict=True)), out)


class FirstBases(SyncedState):
    """The bases of the average of the first inner step's gradients; nothing else changes."""

    facts = StateFacts(elementwise=False, averages=False)

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        self._bases = SharedBases(tensors)
        self.plain_numbers = self._bases.numel
        self.reduction = BasisReduction(rule.wire.build_reduction(), self.elements, self._compute)

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """The gradients, and room for the bases.

        Raises:
            ValueError: a gradient is no longer there.
        """
        out.zero_()
        for name, part in zip(self.names, self.tensors.split(out[: self.elements]), strict=True):
            parameter = self.tensors.view.parameters[name]
            if parameter.grad is None:
                raise ValueError(
                    f'first_basis = "gradient": {name} has no gradient any more; call step() before zeroing gradients, '
                    'or take "coordinates"'
                )
            part.copy_(local_gradient(parameter))

    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Take the bases."""
        self._bases.take(total[self.elements :])

    def _compute(self, summed: torch.Tensor, weight: float, out: torch.Tensor) -> None:
        self._bases.compute(dict(zip(self.names, self.tensors.split(summed), strict=True)), out)


def _notes(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    if not any(group.get("basis_from") == "gradient" for group in groups):
        return []
    return ['optimizer.basis_from = "gradient": every site finds its own bases (LoRDO-Local, the baseline)']


@register_method(
    "lordo",
    settings=LordoSettings,
    outer=NESTEROV,
    fixed={"fragment_sync_delay": 0, "error_feedback": False},
    notes=_notes,
    sync_every=32,
    outer_optimizer="average",
    error_feedback=False,
)
def lordo(context: MethodContext) -> list[SyncRule]:
    """Parameters and all moments every K steps, the moments first."""
    moments, parameters = [], []
    for fragment in range(context.num_fragments):
        place: dict[str, Any] = {
            "fragment": fragment,
            "period": context.sync_every,
            "offset": context.staggered_offset(fragment),
            "wire": context.wire,
        }
        for state in ("low_exp_avg", "low_exp_avg_sq"):
            moments.append(SyncRule(state=state, required="some", apply=LowRankAverage(), **place))
        for state in ("exp_avg", "exp_avg_sq"):
            moments.append(SyncRule(state=state, required="none", apply=Average(), **place))
        parameters.append(SyncRule(apply=RefreshBases(optimizer=context.outer_optimizer), **place))
        if context.settings.first_basis == "gradient":
            once = place | {"period": _NEVER_AGAIN, "offset": 1, "name": "first_basis"}
            parameters.append(SyncRule(apply=FirstBasesFromGradients(), **once))
    return [*moments, *parameters]
