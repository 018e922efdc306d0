"""The proximal term of FedProx (arXiv 1812.06127, section 3.2): mu / 2 times the squared distance to the received model."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from titan_ext.regularizers.received import Received
from titan_ext.regularizers.regularizer import Regularizer, register_regularizer
from titan_ext.semi_sync.state.views import local_tensor


@register_regularizer("proximal")
class Proximal(Regularizer):
    """Adds ``strength`` times the distance to each gradient."""

    defaults: ClassVar[Mapping[str, float]] = {"strength": 0.01}

    @torch.no_grad()
    def add_gradients(self, received: Received) -> None:
        """``strength * (theta - received)``, shard by shard; a parameter without a gradient is none of the step's."""
        for place, (parameter, value) in enumerate(zip(received.parameters, received.values(), strict=True)):
            if parameter.grad is None:
                continue
            own, gradient = local_tensor(parameter), local_tensor(parameter.grad)
            distance = own.float() - value.to(own.device)
            gradient.add_(self.weighted(place, distance).to(gradient.dtype), alpha=self.settings["strength"])

    def weighted(self, place: int, distance: torch.Tensor) -> torch.Tensor:
        """The distance of parameter ``place``, each element by its importance."""
        return distance
