"""A checksum of the shared state, cheap enough for every commit, that does not depend on how a site cuts tensors."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from titan_ext.semi_sync.plan.rule import PARAMETERS
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.sparse_tables import SparseTable
from titan_ext.semi_sync.state.synced_state import SyncedState

_HALF = 2**32 - 1
_MASK = _HALF | _HALF << 64
"""Of a checksum's two halves; what their sums carry over lies between them."""
_PIECE = 2**17  # elements worked on at a time, so that they stay in a processor's cache
_BY_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


class SharedChecksum:
    """The checksum of all shared state that is equal at all sites; what has not changed is not read again.

    Args:
        states: the plan's rules bound to this rank.
        site: the ranks of the site.
        speaks_for: whether this rank counts a parameter's shard; of equal shards one rank does.
    """

    def __init__(self, states: Sequence[SyncedState], site: SiteRanks, speaks_for: Callable[[str], bool]) -> None:
        self._states = {"": [state for state in states if state.facts.equal_at_all_sites]}
        for state in states:
            if state.facts.equal_in_group:
                self._states.setdefault(state.rule.group, []).append(state)
        self._site = site
        self._speaks_for = speaks_for
        self._parts: dict[str, int] = {}

    def forget(self) -> None:
        """Everything has changed."""
        self._parts.clear()

    def after(self, changed: Collection[str], group: str = "") -> int:
        """Below 2**62, once the states of these keys have changed; 0 if nothing is equal at all sites. A collective.

        Args:
            changed: keys of states.
            group: of the label by which the states are shared; without one those that all sites share.
        """
        states = self._states.get(group, [])
        for state in states:
            if state.key in changed or state.key not in self._parts:
                self._parts[state.key] = state_checksum(state.agreed_state(), self._speaks_for)
        if not states:
            return 0
        total = sum(self._site.gather(sum(self._parts[state.key] for state in states))) & _MASK
        return _digest(f"{total:x}") >> 2 or 1


def model_checksum(states: Sequence[SyncedState], site: SiteRanks, speaks_for: Callable[[str], bool]) -> int:
    """A checksum below 2**62, and not 0, of the parameters that all sites share whole. A collective over the site.

    Args:
        states: the plan's rules bound to this rank.
        site: the ranks of the site.
        speaks_for: whether this rank counts a parameter's shard; of equal shards one rank does.
    """
    parameters = {
        name: {"value": tensor}
        for state in states
        if state.rule.state == PARAMETERS and not isinstance(state, SparseTable) and not state.rule.group
        for name, tensor in zip(state.names, state.tensors.locals(), strict=True)
    }
    total = sum(site.gather(state_checksum(parameters, speaks_for))) & _MASK
    return _digest(f"{total:x}") >> 2 or 1


def state_checksum(state: Mapping[str, Mapping[str, Any]], speaks_for: Callable[[str], bool]) -> int:
    """This rank's part of the checksum of a ``shared_state``; parts of ranks add up, under ``_MASK``.

    For each tensor the sum of its elements' bits and of their squares, as integers modulo 2**32: exact, in any order,
    and changed by any single difference. Two sites whose values differ by rounding are told apart; somebody
    who wants them to collide is not, for which there are the digests of the transport.

    Args:
        state: tensors and plain values by parameter and key.
        speaks_for: whether this rank counts a parameter's shard.
    """
    # Equal on all ranks are plain values and steps; which of them hold the parameter depends on the layout.
    counted = [
        (_label(name, key), value)
        for name, values in state.items()
        if speaks_for(name)
        for key, value in values.items()
        if isinstance(value, torch.Tensor) and value.dim()
    ]
    total = 0
    for device in {value.device for _, value in counted}:
        here = [(label, value) for label, value in counted if value.device == device]
        with torch.no_grad():
            # One transfer from a GPU for all tensors.
            sums = torch.stack([each for _, value in here for each in _sums(value)]).tolist()
        for (label, _), plain, squares in zip(here, sums[::2], sums[1::2], strict=True):
            total += (label * plain & _HALF) | (label * squares & _HALF) << 64
    return total & _MASK


def _sums(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the elements' bits and that of their squares; both wrap around at 2**32, in whatever order."""
    bits = value.detach().reshape(-1).view(_BY_SIZE[value.element_size()])
    # 32 bits, not 64: a processor multiplies and adds them three times as fast.
    pieces = (each.to(torch.int32) for each in (bits.split(_PIECE) if bits.device.type == "cpu" else [bits]))
    sums = [(piece.sum(dtype=torch.int32), (piece * piece).sum(dtype=torch.int32)) for piece in pieces]
    plain, squares = (torch.stack(each).sum(dtype=torch.int32) for each in zip(*sums, strict=True))
    return plain, squares


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") | 1


@lru_cache(maxsize=65536)
def _label(name: str, key: str) -> int:
    return _digest(f"{name}|{key}")
