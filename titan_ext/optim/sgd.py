"""torch's SGD, which says what it lacks."""

import torch


class SGD(torch.optim.SGD):
    """As torch has it."""

    fused_takes_shards = False
    """Its fused form refuses sharded parameters."""
