"""Elastic weight consolidation (arXiv 1612.00796) towards the received model, as PaFL uses it (arXiv 2305.02728)."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from titan_ext.regularizers.proximal import Proximal
from titan_ext.regularizers.received import Received
from titan_ext.regularizers.regularizer import register_regularizer


@register_regularizer("ewc")
class ElasticWeightConsolidation(Proximal):
    """The proximal term with each element weighted by the diagonal of the Fisher information at the received model.

    The diagonal is the mean of the squared gradients of the first batches of the site's text, fp32, one element for each
    parameter of this rank. It is taken once a round, of the same batches: a resume finds the same.
    """

    defaults: ClassVar[Mapping[str, float]] = {"strength": 5000.0, "fisher_batches": 8}
    runs_passes = True

    def __init__(self, settings: Mapping[str, float]) -> None:
        super().__init__(settings)
        self._fisher: list[torch.Tensor] = []

    @torch.no_grad()
    def begin_round(self, received: Received) -> None:
        """Take the diagonal at the received model."""
        self._fisher = [torch.zeros_like(each, dtype=torch.float32) for each in received.local_parameters()]
        batches = int(self.settings["fisher_batches"])
        for gradients in received.gradients(batches):
            for total, gradient in zip(self._fisher, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.float(), gradient.float(), value=1 / batches)

    def weighted(self, place: int, distance: torch.Tensor) -> torch.Tensor:
        """The distance times the diagonal."""
        return distance * self._fisher[place]

    def end_round(self) -> None:
        """Free the diagonal."""
        self._fisher = []
