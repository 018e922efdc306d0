"""SparsyFed (arXiv 2504.05153, ICLR 2025): sites exchange sparse models.

Before it contributes, a site sets all but the largest weights of its matrices to zero, by one threshold for all of them
(section 3.2); what is left is averaged. The model is to have linear layers under a power (``[[model.converters]]`` with
``name = "power_linear"``), in which a weight of zero stays zero until a mean brings it back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from titan_ext.errors import InvalidValue
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state.synced_parameters import SyncedParameters
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors
from titan_ext.semi_sync.wire.nonzero import NonzeroSum

_LOW_BITS = 16
_FLOAT_BITS = 31  # of a magnitude; ordered as the numbers are


@dataclass(frozen=True, kw_only=True)
class SparsyFedSettings:
    """``[semi_sync.sparsyfed]``.

    Raises:
        ValueError: the sparsity is outside its range.
    """

    sparsity: float = 0.95
    """Share of the weights of ``parameters`` that are zero in a contribution, from 0 to below 1."""

    parameters: list[str] = field(
        default_factory=lambda: ["layers.*.attention.*.weight", "layers.*.feed_forward.*.weight"]
    )
    """Patterns of the parameters that are pruned, all by one threshold; of these, matrices. Others travel whole."""

    reset_moments: bool = True
    """Whether what the inner optimizer keeps of a weight is set to zero where a round leaves the weight at zero: old moments
    would bring it back to life."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity = {self.sparsity}: must be from 0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseAverage(Apply):
    """The mean of pruned parameters."""

    needs_fp32 = True
    prunes = True
    sparsity: float
    parameters: tuple[str, ...]
    reset_moments: bool

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """Parameters that are pruned before they are sent."""
        return SparseParameters(rule, tensors, options)


class SparseParameters(SyncedParameters):
    """Sends the values of pruned parameters, and takes their mean.

    Raises:
        ValueError: the parameters are kept in less than fp32, so that differences would have to travel.
    """

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        assert isinstance(rule.apply, SparseAverage)
        if tensors.narrow:
            raise InvalidValue(
                "method", "sparsyfed", "must be another where parameters are kept in less than fp32 (training.dtype)"
            )
        self._settings, self._site = rule.apply, options.site
        self._pruned = [
            len(shape) > 1 and any(fnmatchcase(name, pattern) for pattern in rule.apply.parameters)
            for name, shape in zip(tensors.names, tensors.shapes, strict=True)
        ]
        own = sum(shape.numel() for shape, pruned in zip(tensors.shapes, self._pruned, strict=True) if pruned)
        self._total, held = self._site.sum(torch.tensor([own, self.elements])).tolist()
        if held and not self._total and not rule.scope:
            raise InvalidValue("sparsyfed.parameters", list(rule.apply.parameters), "must match a matrix of the model")
        density = 1 - rule.apply.sparsity * own / max(1, self.elements)
        self.reduction = NonzeroSum(rule.wire.bucket_elements, density)

    def _matrices(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of what is pruned of a flat message, on this rank."""
        return [part for part, pruned in zip(self.tensors.split(flat), self._pruned, strict=True) if pruned]

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """The parameters, pruned. A collective over the site."""
        super().write(out, step)
        matrices = self._matrices(out)
        keep = round((1 - self._settings.sparsity) * self._total)
        least = self._magnitude_of_rank(matrices, keep)
        for part in matrices:
            part.masked_fill_(part.abs() < least, 0.0)
        self._measure(matrices)

    def _magnitude_of_rank(self, matrices: list[torch.Tensor], keep: int) -> float:
        """The ``keep``-th largest magnitude over all ranks of the site, exactly; infinity for none.

        A magnitude's bits are ordered as it is: the upper ones are counted first, then the lower ones of the magnitudes
        that have the upper ones sought.
        """
        if keep == 0:
            return float("inf")
        bits = [part.abs().view(torch.int32).view(-1) for part in matrices]
        upper, above = _place(self._counted([each >> _LOW_BITS for each in bits], _FLOAT_BITS - _LOW_BITS), keep)
        lower_bits = [(each & (2**_LOW_BITS - 1))[each >> _LOW_BITS == upper] for each in bits]
        lower, _ = _place(self._counted(lower_bits, _LOW_BITS), keep - above)
        return torch.tensor((upper << _LOW_BITS) + lower, dtype=torch.int32).view(torch.float32).item()

    def _counted(self, values: Iterable[torch.Tensor], bits: int) -> torch.Tensor:
        counts = torch.zeros(2**bits, dtype=torch.int64)
        for each in values:
            counts += torch.bincount(each, minlength=2**bits).cpu()
        return self._site.sum(counts)

    def _measure(self, matrices: list[torch.Tensor]) -> None:
        """Shares of the weights: of the mean that this site had, of what it sends, and of what has grown again."""
        found = torch.zeros(3, dtype=torch.int64)
        for sent, received in zip(matrices, self._matrices(self.global_flat), strict=True):
            alive, before = sent != 0, received != 0
            found += torch.stack([before.sum(), alive.sum(), (alive & ~before).sum()]).cpu()
        names = ("density_received", "density_sent", "regrown")
        self.measures = {
            name: int(count) / max(1, self._total) for name, count in zip(names, self._site.sum(found), strict=True)
        }

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """The mean; of weights that it leaves at zero the inner optimizer forgets what it knows."""
        super().apply(total, of)
        if not self._settings.reset_moments:
            return
        view = self.tensors.view
        for name, part, pruned in zip(self.names, self.global_parts, self._pruned, strict=True):
            for key in view.shared_states(name) if pruned else ():
                (state,) = view.tensors(key, [name])
                if state.shape == part.shape:
                    state.masked_fill_((part == 0).to(state.device), 0.0)


def _place(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the ``rank``-th largest of what was counted, and how many are in larger ones."""
    larger = counts.flip(0).cumsum(0).flip(0) - counts
    place = int(((larger < rank) & (larger + counts >= rank)).nonzero()[0])
    return place, int(larger[place])


@register_method(
    "sparsyfed",
    settings=SparsyFedSettings,
    fixed={
        "outer_optimizer": "average",
        "codec": "fp32",
        "aggregation": "mean",
        "num_fragments": 1,
        "fragment_sync_delay": 0,
        "fragment_update_alpha": 0.0,
    },
    sync_every=32,
    outer_optimizer="average",
)
def sparsyfed(context: MethodContext) -> list[SyncRule]:
    """One rule: the threshold is that of the whole model."""
    settings: SparsyFedSettings = context.settings
    apply = SparseAverage(
        sparsity=settings.sparsity, parameters=tuple(settings.parameters), reset_moments=settings.reset_moments
    )
    return [SyncRule(period=context.sync_every, offset=context.spacing, wire=context.wire, apply=apply)]
