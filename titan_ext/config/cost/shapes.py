"""Shapes of a configured model, without its memory."""

from typing import Any

import torch


def parameter_shapes(config: Any) -> dict[str, torch.Size]:
    """Shape of each parameter of the whole model by name, without memory; tied ones once."""
    with torch.device("meta"):
        model = config.model_spec.model.build()
    return {name: parameter.shape for name, parameter in model.named_parameters()}
