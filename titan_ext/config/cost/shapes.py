"""Shapes of a configured model, without its memory."""

from typing import Any

import torch

from titan_ext.semi_sync.state.views import kept_buffers


def buffer_shapes(config: Any) -> dict[str, torch.Size]:
    """Shape of each buffer that the sites share, by name; every rank holds the whole of it."""
    with torch.device("meta"):
        model = config.model_spec.model.build()
    buffers = {name: module.get_buffer(key) for name, (module, key) in kept_buffers(model).items()}
    return {name: buffer.shape for name, buffer in buffers.items() if buffer.is_floating_point()}


def parameter_shapes(config: Any) -> dict[str, torch.Size]:
    """Shape of each parameter of the whole model by name, without memory; tied ones once."""
    with torch.device("meta"):
        model = config.model_spec.model.build()
    return {name: parameter.shape for name, parameter in model.named_parameters()}
