"""A model as benchmarks train it: whole, in fp32, from a seed."""

import torch
from torchtitan.models.common.decoder import Decoder

from titan_ext.models.attention import use_packed_attention


def initialised(config: Decoder.Config, seed: int, device: str) -> Decoder:
    """The model of a config, with parameters drawn from the seed.

    Args:
        config: the model's; its attention becomes one that trains without an accelerator.
        seed: of the parameters.
        device: where it lies in the end; it is drawn on the CPU, to the same values everywhere.
    """
    use_packed_attention(config)
    model = config.build()
    torch.manual_seed(seed)
    with torch.no_grad():
        model.init_weights()
    return model.to(device)
