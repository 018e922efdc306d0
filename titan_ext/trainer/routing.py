"""How evenly a model's routers use its experts, in numbers for each logged step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torchtitan.models.common.moe import MoE

from titan_ext.semi_sync.state.views import local_tensor

_KINDS = ("max_load", "min_load", "entropy", "idle_experts")


class RoutingStatistics:
    """The routed tokens of a step, counted before torchtitan balances the experts and sets the counts back."""

    def __init__(self, is_logged: Callable[[], bool]) -> None:
        """
        Args:
            is_logged: whether the step that is being taken is logged; equal at all ranks.
        """
        self._is_logged = is_logged
        self._latest: dict[str, float] = {}

    def observing(self, build: Callable[..., None] | None) -> Callable[..., None]:
        """A model spec's ``post_optimizer_build_fn`` that counts before what the spec's own one does at each step."""

        def post_optimizer_build(optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
            # Hooks run in the order of their registration, and torchtitan's own sets the counts to zero.
            optimizers.register_step_pre_hook(lambda *_: self._count(model_parts, parallel_dims))
            if build is not None:
                build(optimizers, model_parts, parallel_dims)

        return post_optimizer_build

    def metrics(self) -> dict[str, float]:
        """Of the last counted step, the worst layer's: ``routing/max_load`` and ``routing/min_load``, the tokens of the
        most and the least used expert in units of the mean, and ``routing/idle_experts``, those without any; and over
        all layers the mean of ``routing/entropy``, 1 where all experts are used alike and 0 where one is."""
        return self._latest

    @torch.no_grad()
    def _count(self, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        layers = list(_mixtures(model_parts))
        if self._is_logged():
            self._latest = _over_stages([balance(each) for each in _counts(layers, parallel_dims)], parallel_dims)
        for layer in layers:
            if layer.load_balance_coeff is None:
                layer.tokens_per_expert_E.zero_()  # torchtitan's hook does it for the others


def balance(tokens: torch.Tensor) -> dict[str, float]:
    """The statistics of one layer.

    Args:
        tokens: routed to each expert, ``[E]``.
    """
    total = tokens.sum().item()
    if not total:
        return {"max_load": 0.0, "min_load": 0.0, "entropy": 0.0, "idle_experts": float(len(tokens))}
    shares = tokens.double() / total
    entropy = -(shares * shares.clamp_min(torch.finfo(torch.float64).tiny).log()).sum().item()
    return {
        "max_load": shares.max().item() * len(tokens),
        "min_load": shares.min().item() * len(tokens),
        "entropy": entropy / math.log(len(tokens)) if len(tokens) > 1 else 1.0,
        "idle_experts": float((tokens == 0).sum().item()),
    }


def _mixtures(model_parts: list[nn.Module]) -> Iterator[MoE]:
    for part in model_parts:
        yield from (module for module in part.modules() if isinstance(module, MoE))


def _counts(layers: list[MoE], parallel_dims: Any) -> list[torch.Tensor]:
    """Tokens of the whole site that were routed to each expert, by layer of this rank. A collective over its stage."""
    if not layers:
        return []
    counts = torch.stack([local_tensor(layer.tokens_per_expert_E) for layer in layers])
    meshes = ["tp"] if parallel_dims.ep_enabled and parallel_dims.tp > 1 else []  # as torchtitan sums them
    for mesh in (parallel_dims.get_optional_mesh(name) for name in [*meshes, "loss"]):
        if mesh is not None:
            torch.distributed.all_reduce(counts, group=mesh.get_group())
    return list(counts.cpu())


def _over_stages(layers: list[dict[str, float]], parallel_dims: Any) -> dict[str, float]:
    """The whole model's numbers, of which a rank of a pipeline knows its stages'. A collective over the pipeline."""
    if parallel_dims.pp_enabled:
        mesh = parallel_dims.get_mesh("pp")
        gathered: list[Any] = [None] * mesh.size()
        torch.distributed.all_gather_object(gathered, layers, group=mesh.get_group())
        layers = [each for stage in gathered for each in stage]
    if not layers:
        return {}
    of = {kind: [each[kind] for each in layers] for kind in _KINDS}
    return {
        "routing/max_load": max(of["max_load"]),
        "routing/min_load": min(of["min_load"]),
        "routing/entropy": sum(of["entropy"]) / len(layers),
        "routing/idle_experts": max(of["idle_experts"]),
    }
