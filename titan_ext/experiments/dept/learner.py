"""A site's model under DEPT's inner optimizer: AdamW, one cosine over the whole training, clipped gradients."""

from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from titan_ext.dept.plasticity import learning_rate_factor
from titan_ext.experiments.convergence.model import loss_of
from titan_ext.experiments.convergence.text import Batch

_BETAS, _CLIP_NORM = (0.9, 0.95), 1.0


class Learner:
    """A model and its inner optimizer.

    Args:
        model: on the device that its batches come to.
        lr: the highest learning rate.
        steps: of the whole training, which the learning rate follows whatever becomes of the optimizer's moments.
    """

    def __init__(self, model: nn.Module, *, lr: float, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=_BETAS, weight_decay=0.0, fused=True)
        self._rates = LambdaLR(self.optimizer, partial(learning_rate_factor, steps=steps))

    def step(self, batch: Batch) -> None:
        """One inner step."""
        loss_of(self.model, batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._rates.step()
