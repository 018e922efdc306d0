"""Models whose blocks matter, for the tests of decoding."""

import torch
from torch import nn

from tests.models.abbie_models import VOCABULARY, build

# Model and overrides by name; the second entry is the number of iterations, None for a model that does not iterate.
CASES = {
    "llama3": ({"name": "llama3"}, None),
    "standard": ({"flavor": "tiny-standard"}, 1),
    "D-2": ({}, 2),
    "D-4": ({}, 4),
    "D-input-4": ({"skip": "input"}, 4),
    "C-2": ({"skip": "none"}, 2),
    "C-4": ({"skip": "none"}, 4),
    "depth-2": ({"flavor": "tiny-depth"}, 2),
    "depth-4": ({"flavor": "tiny-depth"}, 4),
}


def lively(**overrides) -> nn.Module:
    """A model as initialised, but that its blocks write much to the residual stream: iterations then differ."""
    model = build(**overrides)
    for block in model.layers.values():
        block.attention.wo.weight.data *= 10
        block.feed_forward.w2.weight.data *= 10
    return model


def sequence(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
