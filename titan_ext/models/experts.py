"""Routed experts for a machine without an accelerator, where a model computes in fp32."""

from dataclasses import dataclass, fields

import torch
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, BaseEPTokenDispatcher
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.protocols.module import Module


class WideGptOssExperts(GptOssGroupedExperts):
    """gpt_oss's experts, which multiply in bfloat16 whatever they are given, with a result of the input's type."""

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """As torchtitan's."""
        return super().forward(x_RD, num_tokens_per_expert_E).type_as(x_RD)


def use_wide_experts(model_config: Module.Config) -> None:
    """Replace gpt_oss's experts by those that return the input's type, in place.

    Raises:
        ValueError: tokens travel to the experts in a way that only an accelerator can.
    """
    for name, experts, _, _ in model_config.traverse(RoutedExperts.Config):
        dispatcher = experts.token_dispatcher
        if isinstance(dispatcher, BaseEPTokenDispatcher.Config) and not isinstance(
            dispatcher, AllToAllTokenDispatcher.Config
        ):
            kind = type(dispatcher)._owner.__name__
            raise ValueError(f'{name} sends tokens by {kind}; model.moe_comm_backend = "standard" does not')
    for _, config, parent, name in list(model_config.traverse(GptOssGroupedExperts.Config)):
        values = {each.name: getattr(config, each.name) for each in fields(config) if each.init}
        setattr(parent, name, WideGptOssExperts.Config(**values))
