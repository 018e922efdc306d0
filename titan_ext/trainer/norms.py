"""Norms of a site's inner steps by layer: of parameters, updates and gradients, of activations, and attention logits.

What belongs to layers adds up over the ranks that share them: squares and counts as a sum, attention logits as a maximum.

Shapes: B batch, L sequence, N heads, H head dimension.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torchtitan.models.common.attention import BaseAttention

from titan_ext.semi_sync.round.outer_norms import copies, layer_of
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.views import local_tensor

_QUERIES = 256
"""Queries of a batch's first sequence whose logits are looked at together."""


class ParameterNorms:
    """Norms of parameters, of what a step adds to them, and of gradients, by layer.

    Args:
        model_parts: this rank's parts of the model.
        site: its ranks.
    """

    def __init__(self, model_parts: Iterable[nn.Module], site: SiteRanks) -> None:
        self._named = [each for part in model_parts for each in part.named_parameters()]
        self._site = site
        self._before: list[torch.Tensor] | None = None
        self._gradients: dict[str, float] = {}

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep the parameters, and measure gradients; call when the gradient is there, before the optimizer's step."""
        self._before = [local_tensor(each).clone() for _, each in self._named]
        self._gradients = self._squares(
            None if each.grad is None else local_tensor(each.grad) for _, each in self._named
        )

    @torch.no_grad()
    def after_step(self) -> dict[str, dict[str, float]]:
        """Norms by what is measured and by layer, of the whole site. A collective over it."""
        if self._before is None:
            return {}
        own = [local_tensor(each) for _, each in self._named]
        squares = {
            "parameters": self._squares(own),
            "updates": self._squares(now - before for now, before in zip(own, self._before, strict=True)),
            "gradients": self._gradients,
        }
        self._before = None
        found: dict[str, dict[str, float]] = {what: {} for what in squares}
        for each in self._site.gather(squares):
            for what, layers in each.items():
                for layer, square in layers.items():
                    found[what][layer] = found[what].get(layer, 0.0) + square
        return {what: {layer: math.sqrt(each) for layer, each in layers.items()} for what, layers in found.items()}

    def _squares(self, tensors: Iterable[torch.Tensor | None]) -> dict[str, float]:
        known = [(*named, each) for named, each in zip(self._named, tensors, strict=True) if each is not None]
        norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for _, _, each in known]
        found: dict[str, float] = {}
        for (name, parameter, _), norm in zip(known, torch.stack(norms).tolist() if norms else (), strict=True):
            layer = layer_of(name)
            found[layer] = found.get(layer, 0.0) + norm**2 / copies(parameter)
        return found


class ActivationNorms:
    """Root mean squares of what each layer puts out, and the largest attention logit of each, while it listens.

    Args:
        model_parts: this rank's parts of the model, run eagerly.
        site: its ranks.
    """

    def __init__(self, model_parts: Iterable[nn.Module], site: SiteRanks) -> None:
        self._site = site
        self._hooks: list[Any] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._logits: dict[str, torch.Tensor] = {}
        self._layers = dict(_layers(model_parts))

    def listen(self) -> None:
        """Measure the passes from now on."""
        self._sums, self._logits = {}, {}
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_hook(lambda _, __, output, name=name: self._add(name, output)))
            attention = getattr(layer, "attention", None)
            if isinstance(attention, BaseAttention) and hasattr(attention, "inner_attention"):
                self._hooks.append(
                    attention.inner_attention.register_forward_pre_hook(
                        lambda _, inputs, named, name=name: self._look(name, inputs, named), with_kwargs=True
                    )
                )

    def stop_listening(self) -> None:
        """Leave the passes from now on alone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def take(self) -> dict[str, dict[str, float]]:
        """What was measured, by layer, of the whole site. A collective over it."""
        own = ({name: each.tolist() for name, each in kept.items()} for kept in (self._sums, self._logits))
        squares: dict[str, list[float]] = {}
        logits: dict[str, float] = {}
        for sums, highest in self._site.gather(tuple(own)):
            for name, each in sums.items():
                squares[name] = [mine + other for mine, other in zip(squares.get(name, [0, 0]), each, strict=True)]
            for name, value in highest.items():
                logits[name] = max(logits.get(name, -math.inf), value)
        roots = {name: math.sqrt(total / count) for name, (total, count) in squares.items()}
        return {"activations": _in_order(roots), "attention_logits": _in_order(logits)}

    def _add(self, name: str, output: Any) -> None:
        if _recomputing():
            return
        with torch.no_grad(), _disable_current_modes():
            self._add_squares(name, output)

    def _look(self, name: str, inputs: tuple, named: Mapping[str, Any]) -> None:
        if _recomputing():
            return
        with torch.no_grad(), _disable_current_modes():
            self._add_logit(name, inputs, named)

    def _add_squares(self, name: str, output: Any) -> None:
        own = local_tensor(output.detach()).float()
        seen = torch.stack([own.square().sum(), own.new_tensor(own.numel())]).double()
        self._sums[name] = self._sums[name] + seen if name in self._sums else seen

    def _add_logit(self, name: str, inputs: tuple, named: Mapping[str, Any]) -> None:
        query, key = (local_tensor(each.detach())[0] for each in inputs[:2])
        highest = max_logit(query, key, named.get("scale"))
        self._logits[name] = torch.maximum(self._logits[name], highest) if name in self._logits else highest


def _recomputing() -> bool:
    """Whether a backward pass is under way: activation checkpointing runs layers again in it.

    It compares what both runs compute, so what is measured in the first is also hidden from its modes.
    """
    return torch._C._current_graph_task_id() != -1


def max_logit(query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The largest scaled product of a query with a key at or before its place, whatever documents they are of.

    Args:
        query: ``[L, N, H]``.
        key: ``[L, heads of keys, H]``.
        scale: of the products; None: one over the root of H.
    """
    length, heads, width = query.shape
    keys = key.repeat_interleave(heads // key.shape[1], dim=1).permute(1, 2, 0).float()
    place = torch.arange(length, device=query.device)
    found = []
    for first in range(0, length, _QUERIES):
        some = query[first : first + _QUERIES].transpose(0, 1).float()
        later = place[None, :] > place[first : first + _QUERIES, None]
        found.append((some @ keys).masked_fill(later, -math.inf).max())
    return torch.stack(found).max() * (width**-0.5 if scale is None else scale)


def _layers(model_parts: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for part in model_parts:
        for number, layer in getattr(part, "layers", nn.ModuleDict()).items():
            yield f"layers.{number}", layer


def _in_order(values: Mapping[str, float]) -> dict[str, float]:
    return {name: values[name] for name in sorted(values, key=lambda name: int(name.rpartition(".")[2]))}
