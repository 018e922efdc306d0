"""FoMoE (arXiv 2606.19025): each site holds some of the experts, and skips the others in its own training.

The router chooses among all experts at every site. A token's choice of an expert that is not at the site is skipped:
nothing is computed for it and nothing added, and the weights of the token's other experts stay as they are. (The paper's
abstract says no more than that; there is no code.) Held experts are rows of the sites' shared tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.moe import MoE, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.errors import InvalidValue

PATTERN = "*.routed_experts.inner_experts.*"
"""Names of the parameters that have a row for each expert."""


def held_experts(total: int, copies: int, index: int, sites: int) -> tuple[int, ...]:
    """The experts of a site: expert ``e`` is at sites ``e``, ``e + 1`` … ``e + copies - 1``, counted around.

    Args:
        total: experts of a layer.
        copies: sites that hold each.
        index: the site's place among the sites, from 0.
        sites: of the run.
    """
    return tuple(expert for expert in range(total) if (index - expert) % sites < copies)


class HeldTokens(AllToAllTokenDispatcher):
    """Sends tokens to the experts that the site holds; a choice of any other, with an id beyond theirs, is dropped."""

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        pass

    def _local_reorder(
        self, x_TD: torch.Tensor, topk_scores_TK: torch.Tensor, topk_expert_ids_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As torchtitan's, whose order has the choices to be dropped at its end."""
        chosen = int((topk_expert_ids_TK < self.num_experts).sum())
        routed, tokens, scores = super()._local_reorder(x_TD, topk_scores_TK, topk_expert_ids_TK)
        return routed[:chosen], tokens[:chosen], scores[:chosen]


class HeldExperts(RoutedExperts):
    """The routed experts of a layer of which the site holds some; takes the router's choice among all of them."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        held: tuple[int, ...]
        """Ids of the experts at this site, in the order of their rows."""
        total: int
        """Experts of the layer, at all sites."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # torchtitan sizes the router's counts and bias by it, and those are of all experts.
        self.inner_experts.num_experts = config.total
        self._held = config.held
        self._total = config.total

    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> torch.Tensor:
        """As torchtitan's, of the experts that are here."""
        held, rows = (each.to(x_BLD.device) for each in self._maps)
        counts = num_local_tokens_per_expert_E[held]
        return super().forward(x_BLD, topk_scores_BLK, rows[topk_expert_ids_BLK], counts)

    @cached_property
    def _maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the held experts, and for each of all experts its row, or one beyond the rows."""
        with torch.device("cpu"):
            held = torch.tensor(self._held)
            rows = torch.full((self._total,), len(self._held))
            rows[held] = torch.arange(len(self._held))
        return held, rows


def hold(spec: ModelSpec, copies: int, index: int, sites: int) -> ModelSpec:
    """The model of one site, whose layers hold the site's share of the experts.

    Args:
        spec: of a decoder with mixtures of experts.
        copies: sites that hold each expert.
        index: the site's place among the sites.
        sites: of the run.

    Raises:
        InvalidValue: the model has no experts that can be shared out.
    """
    mixtures = [moe for _, moe, _, _ in spec.model.traverse(MoE.Config)]
    if not isinstance(spec.model, Decoder.Config) or not mixtures:
        raise InvalidValue("fomoe.sites_per_expert", copies, "must be 0: the model has no experts")
    for moe in mixtures:
        experts, dispatcher = moe.routed_experts.inner_experts, moe.routed_experts.token_dispatcher
        if type(dispatcher) is not AllToAllTokenDispatcher.Config:
            raise InvalidValue("fomoe.sites_per_expert", copies, 'needs model.moe_comm_backend = "standard"')
        if moe.num_experts * copies % sites:
            problem = f"{moe.num_experts} experts x {copies} cannot be shared out evenly over {sites} sites"
            raise InvalidValue("fomoe.sites_per_expert", copies, problem)
        held = held_experts(moe.num_experts, copies, index, sites)
        draw = {name: _rows_of(init, held, moe.num_experts) for name, init in (experts.param_init or {}).items()}
        moe.routed_experts = HeldExperts.Config(
            **{each.name: getattr(moe.routed_experts, each.name) for each in fields(RoutedExperts.Config)}
            | {
                "inner_experts": replace(experts, num_experts=len(held), param_init=draw),
                "token_dispatcher": HeldTokens.Config(num_experts=len(held), top_k=dispatcher.top_k),
            },
            held=held,
            total=moe.num_experts,
        )
    return spec


def _rows_of(init: Callable[[torch.Tensor], Any], held: tuple[int, ...], total: int) -> Callable[[torch.Tensor], None]:
    """Draw all experts and keep the held ones: an expert begins alike wherever it is, and all else as if all were here."""

    def draw(tensor: torch.Tensor) -> None:
        whole = tensor.new_empty(total, *tensor.shape[1:])  # of a sharded tensor: whole at every rank
        init(whole)
        with torch.no_grad():
            tensor.copy_(torch.stack([whole[expert] for expert in held]))

    return draw


def row_widths(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Elements of an expert in each parameter that has a row for each.

    Args:
        shapes: of all parameters by name.
    """
    inside = PATTERN.strip("*")
    return {name: shape[1:].numel() for name, shape in shapes.items() if inside in name}
