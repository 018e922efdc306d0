"""The merge of Decoupled DiLoCo (arXiv 2604.21428); for its rounds of a quorum of the sites see ``late_work``.

Fragments as in Streaming DiLoCo, sites weighed by ``tokens * (tokens / steps)``, and radial-directional averaging: of each
tensor the updates' directions and lengths are averaged apart, so that nearly orthogonal updates of many sites do not
shrink and the outer learning rate needs no retuning with their number. Embeddings and head take the weighted mean, and are
a fragment by themselves.

A site sends the direction of its update and, at the message's end, its length; the mean of directions is of any
length, and is given the mean of the lengths. Where the directions cancel out, nothing moves (the paper takes the plain
mean there, which cannot be had of what is sent).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from titan_ext.errors import InvalidValue
from titan_ext.optim.exact import divide_
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.fragments import matches
from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state.outer_optimizers import OuterOptimizer
from titan_ext.semi_sync.state.synced_parameters import SyncedParameters
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts
from titan_ext.semi_sync.state.tensors import BoundTensors

_DEGENERATE = 1e-12
_MOST_BITS = 20


@dataclass(frozen=True, kw_only=True)
class DecoupledSettings:
    """``[semi_sync.decoupled_diloco]``."""

    mean: list[str] = field(default_factory=lambda: ["tok_embeddings.*", "lm_head.*"])
    """Patterns of the parameters whose updates are averaged as they are, and which are a fragment by themselves where there
    are several and ``fragments`` does not list them; of all others directions and lengths are averaged apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RadialStep(Apply):
    """The outer step on updates whose directions and lengths were averaged apart."""

    keeps_late_work: ClassVar[bool] = True

    optimizer: OuterOptimizer | None
    """None takes the merged update itself."""
    mixing: float
    mean: tuple[str, ...]

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedParameters:
        """Parameters with a global copy."""
        return RadialParameters(rule, tensors, options)


class RadialParameters(SyncedParameters):
    """Sends for each tensor its update divided by its length, and at the end the lengths.

    Lengths are computed in whole numbers, so that every machine comes to the same bits. Where a site holds a shard several
    times, lengths are too large by one factor at all sites, which cancels out.
    """

    facts = StateFacts(copies=1, elementwise=False, equal_at_all_sites=True)

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        self.sends_difference = True
        self._site = options.site
        patterns = rule.apply.mean if isinstance(rule.apply, RadialStep) else ()
        self._is_radial = [not matches(name, patterns) for name in self.names]
        self.plain_numbers = len(self.names)
        self._update_norm = 0.0

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """Directions, and then lengths; of tensors that take the mean the update, and 0. A collective over the site."""
        values, lengths = out.split([self.elements, self.plain_numbers])
        super().write(values, step)
        self._update_norm = torch.linalg.vector_norm(values).item() if self.elements else 0.0
        parts = self.tensors.split(values)
        found = self._lengths(parts)
        lengths.zero_()
        for place, (part, length) in enumerate(zip(parts, found, strict=True)):
            if self._is_radial[place] and length > 0:
                divide_(part, length)
                lengths[place] = length

    def update_norm(self, contribution: torch.Tensor) -> float:
        """Of the update itself, not of what is sent."""
        return self._update_norm

    @torch.no_grad()
    def damp(self, contribution: torch.Tensor, factor: float, weight: float) -> None:
        """Shorten the lengths; of tensors that take the mean the update."""
        values, lengths = contribution.split([self.elements, self.plain_numbers])
        lengths.mul_(factor)
        for part, radial in zip(self.tensors.split(values), self._is_radial, strict=True):
            if not radial:
                part.mul_(factor)

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Give each mean direction the mean length, then step. A collective over the site."""
        values, lengths = of.mean(total).split([self.elements, self.plain_numbers])
        parts = self.tensors.split(values)
        found = self._lengths(parts)
        for part, length, wanted, radial in zip(parts, found, lengths.tolist(), self._is_radial, strict=True):
            if radial and length < _DEGENERATE:
                part.zero_()
            elif radial:
                divide_(part, length).mul_(wanted)
        if self.elements:
            self.move_global(values)
            self.mix_into_local(of.step)

    def named_message(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Directions by parameter, and lengths beside them."""
        values, lengths = flat.split([self.elements, self.plain_numbers])
        named = {f"{name}.length": length.clone() for name, length in zip(self.names, lengths, strict=True)}
        return self.tensors.named(values) | named

    def fill_message(self, flat: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``named_message``, into ``flat``."""
        values, lengths = flat.split([self.elements, self.plain_numbers])
        self.tensors.fill_from_named(values, parts)
        for place, name in enumerate(self.names):
            lengths[place] = parts[f"{name}.length"]

    def _lengths(self, parts: Sequence[torch.Tensor]) -> list[float]:
        """Euclidean length of each of the site's tensors, of which this rank holds ``parts``; rounded to fp32.

        Whole multiples of a power of two near the largest element are squared and summed: in any order the same.
        """
        own = {
            name: (float(part.abs().max()) if part.numel() else 0.0, part.numel())
            for name, part in zip(self.names, parts, strict=True)
        }
        largest: dict[str, float] = {}
        elements: dict[str, int] = {}
        for rank in self._site.gather(own):
            for name, (most, count) in rank.items():
                largest[name] = max(largest.get(name, 0.0), most)
                elements[name] = elements.get(name, 0) + count
        scales = {name: _exponent(most, elements[name]) for name, most in largest.items()}
        sums: dict[str, int] = {}
        squares = {name: _square_sum(part, scales[name]) for name, part in zip(self.names, parts, strict=True)}
        for rank_squares in self._site.gather(squares):
            for name, each in rank_squares.items():
                sums[name] = sums.get(name, 0) + each
        # A root of Python's is rounded once; the power of two is exact.
        return [_to_float32(math.ldexp(math.sqrt(sums[name]), -scales[name])) for name in self.names]


def _exponent(most: float, elements: int) -> int:
    """Of the power of two that brings values up to ``most`` to whole numbers whose squares' sum fits 62 bits."""
    if not 0 < most < math.inf:
        return 0
    bits = min(_MOST_BITS, (62 - max(1, elements).bit_length()) // 2)
    return bits - math.frexp(most)[1]


def _square_sum(part: torch.Tensor, exponent: int) -> int:
    if not part.numel() or not bool(torch.isfinite(part).all()):
        return 0  # what is not finite is left out of the round
    whole = torch.ldexp(part.double(), torch.tensor(exponent, device=part.device)).round_().to(torch.int64)
    return int((whole * whole).sum())


def _to_float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


@register_method(
    "decoupled_diloco",
    settings=DecoupledSettings,
    outer={"sgd": {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True}},
    own_fragment=lambda settings: settings.mean,
    sync_every=24,
    outer_optimizer="sgd",
    weighting="tokens_times_batch",
)
def decoupled_diloco(context: MethodContext) -> list[SyncRule]:
    """The rules of Streaming DiLoCo, applied by directions and lengths."""
    if not context.wire.codec.lossless:
        raise InvalidValue("codec", type(context.wire.codec).__name__, "must lose nothing: lengths travel too")
    apply = RadialStep(optimizer=context.outer_optimizer, mixing=context.mixing, mean=tuple(context.settings.mean))
    return [
        SyncRule(
            fragment=fragment,
            period=context.sync_every,
            offset=(fragment + 1) * context.spacing - context.delay,
            delay=context.delay,
            wire=context.wire,
            apply=apply,
        )
        for fragment in range(context.num_fragments)
    ]
