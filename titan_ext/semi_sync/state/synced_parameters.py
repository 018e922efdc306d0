"""Parameters with a global copy: the mean or an outer optimizer's step moves it, the local ones follow."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from titan_ext.optim.rounding import copy_randomly
from titan_ext.semi_sync.plan.rule import PARAMETERS, Apply, SyncRule
from titan_ext.semi_sync.state.outer_optimizers import OuterOptimizer, work_on
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, Guarded, StateFacts, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState

_PIECE = 2**22  # elements whose difference is formed at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Average(Apply):
    """The weighted mean becomes the value: of an optimizer's state, or of the parameters' global copy."""

    adds_up: ClassVar[bool] = True
    keeps_late_work: ClassVar[bool] = True

    mixing: float = 0.0
    """Share of the local parameters kept when the mean is applied (Streaming DiLoCo's alpha); 0 takes the global ones."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """Parameters keep a global copy, states do not."""
        kind = SyncedParameters if rule.state == PARAMETERS else SyncedState
        return kind(rule, tensors, options)


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterStep(Apply):
    """An outer optimizer takes the mean pseudo-gradient as the gradient of the global copy."""

    adds_up: ClassVar[bool] = True
    keeps_late_work: ClassVar[bool] = True

    optimizer: OuterOptimizer
    mixing: float = 0.0
    """As that of ``Average``."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """Parameters with a global copy and the optimizer's state."""
        return SyncedParameters(rule, tensors, options)


def average_or_step(optimizer: OuterOptimizer | None, mixing: float = 0.0) -> Average | OuterStep:
    """How parameters take what comes back: by the mean where there is no outer optimizer."""
    return Average(mixing=mixing) if optimizer is None else OuterStep(optimizer=optimizer, mixing=mixing)


class ValuesWithGlobalCopy(SyncedState):
    """Keeps the last committed global value in fp32.

    Args:
        rule: the plan's rule; its ``apply`` says which outer optimizer takes the mean and what of the local value stays.
        tensors: what it covers on this rank.
        options: an outer optimizer of the user's own.
    """

    facts = StateFacts(copies=1, equal_at_all_sites=True)

    value_key = "global"
    """Key of the global values in shared state and checkpoints; another where they are the site's own."""

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        optimizer: OuterOptimizer | None = getattr(rule.apply, "optimizer", None)
        self._mixing: float = getattr(rule.apply, "mixing", 0.0)
        # The mean of values is exact for one site and cheaper. A late result must not undo the steps taken meanwhile, a
        # codec's error must be one of the difference, not of the value, and so must that of a narrow local copy.
        lossy = tensors.narrow or not rule.wire.codec.lossless
        self.sends_difference = optimizer is not None or rule.delay > 0 or lossy
        self.global_flat = tensors.empty()
        self.global_parts = tensors.split(self.global_flat)
        tensors.read(self.global_flat)
        self._average = RunningAverage(tensors, self.global_flat) if options.running_average else None
        self.outer: Optimizer | None = None
        if options.own_outer is not None and self.elements:
            self.outer = options.own_outer
            work_on(self.outer, [tensors.view.parameters[name] for name in self.names], self.global_parts)
        elif optimizer is not None and self.elements:
            self.outer = optimizer.build(self.global_parts)

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """The values, or the pseudo-gradient: what was written to the local copy minus what it is now."""
        locals_ = self.tensors.locals()
        if not self.sends_difference or any(local.device != out.device for local in locals_):
            super().write(out, step)
            locals_ = self.tensors.split(out)
        if self.sends_difference:
            for part, written, local in zip(self.tensors.split(out), self._written(), locals_, strict=True):
                torch.sub(written, local.to(out), out=part)

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Move the global copy, then the local parameters."""
        if not self.elements:
            return
        mean = of.mean(total)
        if of.update_factor != 1.0:
            self.scale_update(mean, of.update_factor)
        self.move_global(mean)
        if self._average is not None:
            self._average.add(self.global_flat)
        self.mix_into_local(of.step)

    def scale_update(self, mean: torch.Tensor, factor: float) -> None:
        """Multiply a mean contribution's update (fp32 ``[elements]``, in place); of values the distance to the global."""
        if self.sends_difference:
            mean.mul_(factor)
        else:
            mean.sub_(self.global_flat).mul_(factor).add_(self.global_flat)

    @torch.no_grad()
    def move_global(self, mean: torch.Tensor) -> None:
        """The outer step on a mean contribution (fp32 ``[elements]``, overwritten)."""
        if self.outer is None:
            self.global_flat.sub_(mean) if self.sends_difference else self.global_flat.copy_(mean)
            return
        for part, gradient in zip(self.global_parts, self.tensors.split(mean), strict=True):
            part.grad = gradient
        self.outer.step()
        for part in self.global_parts:
            part.grad = None

    @torch.no_grad()
    def mix_into_local(self, step: int) -> None:
        """The local parameters follow the global copy, but for the share of their own that the rule keeps."""
        if self._mixing == 0.0:
            self.reset_local_to_global()
            return
        for place, (local, part) in enumerate(zip(self.tensors.locals(), self.global_parts, strict=True)):
            mixed = torch.lerp(part, local.to(part), self._mixing)
            copy_randomly(local, mixed.to(local.device), self.seed(step, place))

    def start_from_local(self) -> bool:
        """The parameters become the global copy."""
        if self._average is not None:
            self.tensors.refresh(self._average.parts)
        return self.tensors.refresh(self.global_parts)

    def global_values(self) -> list[torch.Tensor]:
        """The global copy."""
        return self.global_parts

    def reset_local_to_global(self) -> None:
        """Drop local work."""
        self.tensors.write(self.global_parts)

    def shared_state(self) -> NamedState:
        """Global values, the outer optimizer's state, and the running average where there is one."""
        averages = [{}] * len(self.names) if self._average is None else self._average.shared_state()
        return {
            name: {self.value_key: part, **self.outer_state(part), **average}
            for name, part, average in zip(self.names, self.global_parts, averages, strict=True)
        }

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take another site's global copy, and its values as our own parameters.

        Local work since the last commit is dropped: the members may have averaged it already, and
        counting it twice would be worse than losing it.
        """
        self.load(self.shared_state(), state)
        self.reset_local_to_global()

    def correct_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Another site's global copy and outer state; what was done since its commit goes on from there."""
        with self._keeping_work():
            self.load(self.shared_state(), state)

    def apply_beside_work(self, total: torch.Tensor, of: AppliedRound) -> None:
        """As ``apply``; what was done since the last commit goes on from the new global value."""
        locals_ = self.tensors.locals()
        own = [local.clone() for local in locals_]
        with self._keeping_work():
            self.apply(total, of)
            for local, value in zip(locals_, own, strict=True):
                local.copy_(value)

    @contextmanager
    def _keeping_work(self) -> Iterator[None]:
        """Within it the global copy changes; the local parameters then move as far as that has moved."""
        before = [written.clone() for written in self._written()]
        with torch.no_grad():
            yield
            for local, old, new in zip(self.tensors.locals(), before, self._written(), strict=True):
                local.add_((new - old).to(local))

    def load(self, own: Mapping[str, Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Tensors in place, and the outer optimizer's plain numbers."""
        super().load(own, state)
        for name, part in zip(self.names, self.global_parts, strict=True):
            for key, value in own.get(name, {}).items():
                if key.startswith("outer.") and not isinstance(value, torch.Tensor):
                    self.outer.state[part][key.removeprefix("outer.")] = state[name][key]

    def _written(self) -> list[torch.Tensor]:
        """What local work is measured from, fp32: the global values, as far as the local tensors hold them.

        The rounding of a narrow local copy is no work: taken for it, it would pull the global values back to what the
        copy can hold, at each sync. (Mixed values are rounded at random, so that theirs is nothing on average.)
        """
        if not self.tensors.narrow or self._mixing:
            return self.global_parts
        locals_ = self.tensors.locals()
        return [part.to(local.dtype).to(part) for local, part in zip(locals_, self.global_parts, strict=True)]

    def outer_state(self, part: torch.Tensor) -> dict[str, Any]:
        """What the outer optimizer keeps of a global part, by key."""
        return {} if self.outer is None else {f"outer.{key}": value for key, value in self.outer.state[part].items()}


class RunningAverage:
    """The mean of the global parameters over all rounds so far, equal at all sites.

    Args:
        tensors: the parameters on this rank.
        start: their global values before the first round, fp32 ``[elements]``.
    """

    def __init__(self, tensors: BoundTensors, start: torch.Tensor) -> None:
        self._flat = start.clone()
        self.parts = tensors.split(self._flat)
        self._rounds = torch.zeros((), device=start.device)

    @torch.no_grad()
    def add(self, values: torch.Tensor) -> None:
        """The global values (fp32 ``[elements]``) after one more round."""
        self._rounds += 1
        self._flat.add_(values.sub(self._flat).div_(self._rounds))

    def shared_state(self) -> list[dict[str, torch.Tensor]]:
        """For each parameter the average, and how many rounds it is of."""
        return [{"average": part, "rounds": self._rounds} for part in self.parts]


class SyncedParameters(ValuesWithGlobalCopy, Guarded):
    """Parameters with a global copy: a contribution is an update, which may be an outlier."""

    @torch.no_grad()
    def update_norm(self, contribution: torch.Tensor) -> float:
        """Of the pseudo-gradient, also where the values themselves are sent."""
        total = 0.0
        for part, base in zip(contribution.split(_PIECE), self.global_flat.split(_PIECE), strict=True):
            update = part if self.sends_difference else part - base
            total += torch.linalg.vector_norm(update).item() ** 2
        return total**0.5

    @torch.no_grad()
    def damp(self, contribution: torch.Tensor, factor: float, weight: float) -> None:
        """The pseudo-gradient shrinks; of values the distance to the global ones."""
        contribution.mul_(factor)
        if not self.sends_difference:
            contribution.add_(self.global_flat, alpha=weight * (1 - factor))
