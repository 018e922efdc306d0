"""The inner optimizer's states of each source of a site, where they outlast a round: Photon's stateful clients."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from titan_ext.semi_sync.state.views import ModelView, like, local_tensor, materialize_state


class InnerStates:
    """States of the sources that do not train at the moment, in host memory.

    Args:
        view: the model and its optimizers on this rank.
        sources: names of the sources, for which there is room from the start.
    """

    def __init__(self, view: ModelView, sources: list[str]) -> None:
        self._view = view
        for optimizer in view.optimizers:
            materialize_state(optimizer)
        self._kept = {
            source: {name: {key: _room(value) for key, value in state.items()} for name, state in self._states()}
            for source in sources
        }

    @torch.no_grad()
    def keep(self, source: str) -> None:
        """Take the optimizers' states as those of a source."""
        for name, state in self._states():
            for key, value in state.items():
                kept = self._kept[source][name][key]
                kept.copy_(local_tensor(value)) if isinstance(value, torch.Tensor) else kept.fill_(value)

    @torch.no_grad()
    def give(self, source: str) -> None:
        """Put a source's states into the optimizers; of one that has never trained they are as before the first step."""
        for name, state in self._states():
            for key, value in state.items():
                kept = self._kept[source][name][key]
                if isinstance(value, torch.Tensor):
                    local_tensor(value).copy_(kept)
                else:
                    state[key] = type(value)(kept.item())

    def checkpoint_state(self) -> dict[str, Any]:
        """By source, parameter and key, with global shapes."""
        own = dict(self._states())
        return {
            source: {
                name: {key: _shaped(own[name][key], value) for key, value in state.items()}
                for name, state in kept.items()
            }
            for source, kept in self._kept.items()
        }

    @torch.no_grad()
    def load_checkpoint_state(self, saved: Mapping[str, Any]) -> None:
        """Restore what ``checkpoint_state`` returned, of the sources that there still are."""
        for source, kept in self._kept.items():
            for name, state in kept.items():
                for key, value in state.items():
                    if key in saved.get(source, {}).get(name, {}):
                        value.copy_(local_tensor(saved[source][name][key]))

    def _states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, parameter in self._view.parameters.items():
            for optimizer in self._view.optimizers:
                if parameter in optimizer.state:
                    yield name, optimizer.state[parameter]


def _room(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(local_tensor(value), device="cpu")
    return torch.zeros((), dtype=torch.float64)


def _shaped(own: Any, kept: torch.Tensor) -> torch.Tensor:
    """The kept shard as the DTensor that the optimizer's own is."""
    return like(own, kept) if isinstance(own, torch.Tensor) else kept
