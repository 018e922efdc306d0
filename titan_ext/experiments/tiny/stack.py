"""Several runs of several sites, trained together: their replicas are the rows of one tensor.

Rows differ in parameters, text, learning rate and optimizer; what costs time, the call of each operation, is
paid once for all. Each run has the product's optimizer over its rows and, between its sites, the product's outer loop.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from titan_ext.experiments.tiny.model import TinyModel
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.state.views import materialize_state
from titan_ext.semi_sync.testing import InProcessSites

_CLIP_NORM = 1.0
# The gradients are views into one tensor on purpose.
warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
"""Makes an optimizer from its groups of parameters."""


class Stack:
    """Parameters and gradients of all replicas, ``[replicas, parameters]``.

    Args:
        model: of each.
        initial: flat parameters of each, ``[replicas, parameters]``; taken as the storage.
    """

    def __init__(self, model: TinyModel, initial: torch.Tensor) -> None:
        self.model = model
        self.flat = initial
        self.gradients = torch.zeros_like(initial)
        self._leaves = {name: nn.Parameter(each) for name, each in model.split(self.flat).items()}
        for name, gradient in model.split(self.gradients).items():
            self._leaves[name].grad = gradient

    def backward(self, windows: torch.Tensor) -> torch.Tensor:
        """Fill in the gradients of the replicas' windows, int64 ``[replicas, windows, context + 1]``, each replica's
        clipped at a norm of 1; returns their losses."""
        self.gradients.zero_()
        losses = self.model.losses(self._leaves, windows[..., :-1], windows[..., -1])
        losses.sum().backward()
        norms = torch.linalg.vector_norm(self.gradients, dim=1, keepdim=True)
        self.gradients.mul_((_CLIP_NORM / (norms + 1e-6)).clamp(max=1.0))
        return losses.detach()

    @torch.no_grad()
    def validate(self, runs: Sequence[Sequence[int]], windows: torch.Tensor) -> list[float]:
        """Loss of each run's mean replica on windows, int64 ``[count, context + 1]``, that are the same for all.

        Args:
            runs: the replicas of each run, by row.
        """
        parts = self.model.split(torch.stack([self.flat[list(rows)].mean(0) for rows in runs]))
        expanded = windows.expand(len(runs), *windows.shape)
        losses = [
            self.model.losses(parts, part[..., :-1], part[..., -1]).double() * part.shape[1]
            for part in expanded.split(512, dim=1)
        ]
        return (torch.stack(losses).sum(0) / len(windows)).tolist()


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How the optimizer of a run is made."""

    make: MakeOptimizer
    elementwise: bool
    """Whether it treats every number alike, so that one optimizer may take the steps of all sites at once."""


class StackedRun:
    """One run: some rows of a stack, their optimizers and, once there are several sites, their outer loops.

    Args:
        stack: that has the rows.
        first: the run's first row.
        sites: how many rows.
        settings: of the optimizer.
        state: by key what the optimizer's state of every replica begins with: flat ``[parameters]``, or the step count.
    """

    def __init__(
        self,
        stack: Stack,
        first: int,
        sites: int,
        settings: RowSettings,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.rows = range(first, first + sites)
        self._stack, self._settings = stack, settings
        here = slice(first, first + sites)
        self._flat = nn.Parameter(stack.flat[here])
        self._flat.grad = stack.gradients[here]
        self.models = [
            _Site(stack.model.split(stack.flat[row]), stack.model.split(stack.gradients[row])) for row in self.rows
        ]
        if settings.elementwise:
            self.optimizers = [settings.make([{"params": [self._flat], "param_names": ["all"]}])]
            self._begin(self.optimizers[0], self._flat, state)
        else:
            assert state is None, "only elementwise optimizers go on from a state"
            self.optimizers = [settings.make([each.group()]) for each in self.models]
        self._outer: list[Any] = []
        self._sites: InProcessSites | None = None
        self._every = 0
        """Steps between two at which a round may begin or be applied."""

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Groups of parameters of all its optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state(self, row: int = 0) -> dict[str, torch.Tensor]:
        """A copy of one replica's state of an elementwise optimizer, as the constructor takes it."""
        own = self.optimizers[0].state[self._flat]
        return {key: (value[row] if value.dim() else value).clone() for key, value in own.items()}

    def synchronise(self, config: SemiSyncConfig) -> None:
        """Put the outer loop between the sites, whose replicas are equal now."""
        self._sites = InProcessSites(len(self.rows))
        optimizers = self._of_sites() if self._settings.elementwise else self.optimizers
        self._outer = self._sites.outer_loops(config, self.models, optimizers)
        rules = [rule for rule in self._outer[0].plan.rules if not rule.final]
        self._every = gcd(*(steps for rule in rules for steps in (rule.period, rule.offset, rule.delay)))

    def step(self) -> None:
        """A step of the optimizers on the gradients that are there, and the exchange that is due."""
        for optimizer in self.optimizers:
            optimizer.step()
        if self._sites is None:
            return
        # Threads cost more than the step: only where a round begins or is applied, at which sites wait for each other, are
        # they needed. LoRDO may have one after the first step.
        step = self._outer[0].inner_step + 1
        if step == 1 or step % self._every == 0:
            self._sites.at_once(lambda site: self._outer[site].step())
        else:
            for outer in self._outer:
                outer.step()

    def bytes_sent(self) -> int:
        """By the outer loop's ledger, of a site."""
        return self._outer[0].ledger.bytes_sent if self._outer else 0

    def close(self) -> None:
        """End the outer loops."""
        if self._sites is not None:
            self._sites.at_once(lambda site: self._outer[site].finish())
            self._sites.close()

    def _begin(self, optimizer: Optimizer, flat: nn.Parameter, state: Mapping[str, torch.Tensor] | None) -> None:
        materialize_state(optimizer)
        for key, value in (state or {}).items():
            optimizer.state[flat][key].copy_(value)

    def _of_sites(self) -> list[Optimizer]:
        """For each site an optimizer whose state is that site's part of the one that takes the steps."""
        own = self.optimizers[0].state[self._flat]
        made = []
        for place, site in enumerate(self.models):
            optimizer = self._settings.make([site.group()])
            parts = {
                key: self._stack.model.split(value[place]) if value.dim() else dict.fromkeys(site.names, value)
                for key, value in own.items()
            }
            for name, parameter in site.named_parameters():
                optimizer.state[parameter] = {key: part[name] for key, part in parts.items()}
            made.append(optimizer)
        return made


class _Site(nn.Module):
    """A replica as a module, whose parameters and gradients are views of the stack's."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = list(parameters)
        for name, each in parameters.items():
            parameter = nn.Parameter(each)
            parameter.grad = gradients[name]
            self.register_parameter(name, parameter)

    def group(self) -> dict[str, Any]:
        """Its parameters as an optimizer's group."""
        return {"params": list(self.parameters()), "param_names": list(self.names)}
