"""How large a round's update is, and how far the sites' updates agree: measured while it is applied.

All from what a round has anyway: the sites tell each other the norms of their updates for the outlier guard, and the mean
update passes by. On shards; the one collective is a small one over the site.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch.distributed.tensor import DTensor, Replicate

from titan_ext.semi_sync.plan.regions import REGION
from titan_ext.semi_sync.round.contributions import Contributions
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.sparse_tables import SparseTable
from titan_ext.semi_sync.state.synced_parameters import SyncedParameters
from titan_ext.semi_sync.state.synced_state import SyncedState

UPDATE, MODEL = "pseudo_gradient", "model"
_DECAY = 0.99  # of the noise scale's two means
_LAYER = re.compile(r"(?:^|\.)(layers\.\d+)\.")

Squares = dict[str, dict[str, float]]
"""Squared norms by what is measured and by layer."""


@dataclass(slots=True)
class OuterNorms:
    """Norms of mean pseudo-gradient, outer optimizer's state and global parameters, cosine and noise scale.

    Args:
        states: the plan's rules bound to this rank.
        site: its ranks.
        every: inner steps from one measurement to the next, at least; 0 never measures.
    """

    states: Sequence[SyncedState]
    site: SiteRanks
    every: int
    _next_step: int = 0
    _squares: Squares | None = None
    _fields: dict[str, Any] = field(default_factory=dict)
    _noise: tuple[float, float] = (0.0, 0.0)
    """Running means of the noise's trace and of the squared gradient; the correction of their start cancels."""

    @torch.no_grad()
    def before_apply(self, parts: Collection[tuple[int, torch.Tensor]], total_weight: float, step: int) -> None:
        """Measure the mean update, before the outer optimizer takes it.

        Args:
            parts: rule index and weighted sum over the sites.
            total_weight: of the contributors.
            step: inner step of the round, equal on all ranks of the site.
        """
        self._fields, self._squares = {}, None
        inner_level = all(self.states[index].rule.name == REGION for index, _ in parts)
        if not self.every or step < self._next_step or inner_level:
            return
        self._next_step = step + self.every
        self._squares = {}
        for index, total in parts:
            state = self.states[index]
            if not _is_whole(state):
                continue
            if state.sends_difference:
                self._add(UPDATE, state, state.tensors.split(total), 1 / total_weight)
            else:
                pairs = zip(state.global_parts, state.tensors.split(total), strict=True)
                self._add(UPDATE, state, (base - part / total_weight for base, part in pairs))

    @torch.no_grad()
    def after_apply(self, rules: Sequence[int], contributions: Contributions) -> None:
        """Measure the state that the outer optimizer has left and the global parameters. A collective over the site."""
        if self._squares is None:
            return
        whole = [state for state in (self.states[index] for index in rules) if _is_whole(state)]
        for state in whole:
            self._add(MODEL, state, state.global_parts)
            kept = [state.outer_state(part) for part in state.global_parts]
            for key in kept[0] if kept else ():
                values = [each.get(key) for each in kept]
                if all(isinstance(each, torch.Tensor) and each.dim() for each in values):
                    self._add(key.removeprefix("outer."), state, values)
        by_layer = _sum(self.site.gather(self._squares))
        total = {what: sum(layers.values()) for what, layers in by_layer.items()}
        self._squares = None
        self._fields = {
            "norms": {what: math.sqrt(square) for what, square in total.items()},
            "norms_by_layer": {
                what: {layer: math.sqrt(each) for layer, each in layers.items()} for what, layers in by_layer.items()
            },
        }
        # Norms of updates that are no part of the total (tables by row) would not go with it.
        if UPDATE in total and all(len(norms) == len(whole) for norms in contributions.norms):
            self._fields |= self._agreement(contributions, total[UPDATE])

    def take(self) -> dict[str, Any]:
        """Fields of the round's record; none where the round was not measured."""
        fields, self._fields = self._fields, {}
        return fields

    def _agreement(self, contributions: Contributions, mean_square: float) -> dict[str, float]:
        told = [(contributions.weights[rank], contributions.norms[rank]) for rank in contributions.contributors]
        if len(told) < 2 or not all(norms for _, norms in told):
            return {}
        weights = [weight for weight, _ in told]
        squares = [sum(norm**2 for norm in norms) for _, norms in told]
        found = {}
        cosine = mean_cosine(weights, squares, mean_square)
        if cosine is not None:
            found["cosine"] = cosine
        if len(set(weights)) == 1:
            noise, signal = noise_and_signal(squares, mean_square)
            pairs = zip(self._noise, (noise, signal), strict=True)
            self._noise = tuple(_DECAY * before + (1 - _DECAY) * now for before, now in pairs)  # type: ignore[assignment]
            if self._noise[1] > 0:
                found["noise_scale"] = self._noise[0] / self._noise[1]
        return found

    def _add(self, what: str, state: SyncedState, tensors: Iterable[torch.Tensor], scale: float = 1.0) -> None:
        norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in tensors]
        layers = self._squares.setdefault(what, {})
        for name, norm in zip(state.names, torch.stack(norms).tolist() if norms else (), strict=True):
            layer = layer_of(name)
            layers[layer] = layers.get(layer, 0.0) + (scale * norm) ** 2 / copies(state.tensors.view.tensor(name))


def _is_whole(state: SyncedState) -> TypeGuard[SyncedParameters]:
    """Whether its sum is one of updates of whole parameters, each divided by one weight."""
    return isinstance(state, SyncedParameters) and not isinstance(state, SparseTable) and not state.rule.group


def copies(parameter: torch.Tensor) -> int:
    """Ranks of the site that hold the same values of the parameter."""
    if not isinstance(parameter, DTensor):
        return 1  # on one rank, or on pipeline stages of names of their own
    places = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in places if isinstance(placement, Replicate))


def layer_of(name: str) -> str:
    """``layers.3`` for whatever is in it, else the first part of a parameter's name."""
    found = _LAYER.search(name)
    return found[1] if found else name.split(".")[0]


def mean_cosine(weights: Sequence[float], squares: Sequence[float], mean_square: float) -> float | None:
    """The sites' cosine by pairs, each pair weighted by the product of its updates' weighted norms.

    From ``|sum w_k D_k|^2 = sum w_k^2 |D_k|^2 + sum_{i != j} w_i w_j <D_i, D_j>``, which needs no update itself.

    Args:
        weights: of the sites.
        squares: squared norms of their updates.
        mean_square: squared norm of the weighted mean update.
    """
    own = sum(weight**2 * square for weight, square in zip(weights, squares, strict=True))
    pairs = sum(weight * math.sqrt(square) for weight, square in zip(weights, squares, strict=True)) ** 2 - own
    return max(-1.0, min(1.0, (sum(weights) ** 2 * mean_square - own) / pairs)) if pairs > 0 else None


def noise_and_signal(squares: Sequence[float], mean_square: float) -> tuple[float, float]:
    """Estimates of the trace of the updates' covariance and of the squared norm of their expectation.

    Appendix A of An Empirical Model of Large-Batch Training (https://arxiv.org/abs/1812.06162), with the sites' updates
    in the place of gradients of small batches: their ratio is the simple noise scale, in updates of one site.

    Args:
        squares: squared norms of the updates of K sites of equal weight.
        mean_square: squared norm of their mean.
    """
    count, small = len(squares), sum(squares) / len(squares)
    return (small - mean_square) / (1 - 1 / count), (count * mean_square - small) / (count - 1)


def _sum(by_rank: Sequence[Mapping[str, Mapping[str, float]]]) -> Squares:
    found: Squares = {}
    for squares in by_rank:
        for what, layers in squares.items():
            own = found.setdefault(what, {})
            for layer, each in layers.items():
                own[layer] = own.get(layer, 0.0) + each
    return found
