"""The model as a site has received it, beside the one that it trains."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from titan_ext.semi_sync.state.views import canonical_name, local_tensor


class Received:
    """This rank's shards of the received parameters and of those that are trained.

    Parameters that are a site's own, which no round brings, are not among them.

    Args:
        model_parts: this rank's parts of the model.
        values: the received parameters by name; looked up anew at each use, for a round changes them in place.
        gradients: a gradient for each of the trained parameters of each of the first so many batches of the site's text,
            with the parameters as they are; a collective over the site.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        values: Callable[[], Mapping[str, torch.Tensor]],
        gradients: Callable[[int], Iterator[list[torch.Tensor | None]]],
    ) -> None:
        self._parts = model_parts
        named = [(canonical_name(name), each) for part in model_parts for name, each in part.named_parameters()]
        known = values()
        self._names = [name for name, each in named if each.requires_grad and name in known]
        self.parameters = [each for name, each in named if each.requires_grad and name in known]
        """Those that are trained and were received."""
        self._values, self._gradients = values, gradients

    def local_parameters(self) -> list[torch.Tensor]:
        """This rank's shard of each of ``parameters``, without a gradient."""
        return [local_tensor(each) for each in self.parameters]

    def values(self) -> list[torch.Tensor]:
        """The received shard of each of ``parameters``, where and as it is kept."""
        known = self._values()
        return [local_tensor(known[name]) for name in self._names]

    def gradients(self, batches: int) -> Iterator[list[torch.Tensor | None]]:
        """At the received model, a shard of a gradient for each of ``parameters``, batch by batch."""
        with self.loaded():
            yield from self._gradients(batches)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The received values in the place of the trained ones, for passes without a step."""
        trained = [each.clone() for each in self.local_parameters()]
        self._put(self.values())
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            local_tensor(parameter).copy_(value)
        # What an earlier pass has gathered is of other values.
        for part in self._parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
