"""What sites that exchange must have in common, and in what some of them differ, named by its configuration key."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import ReduceOp

from titan_ext.semi_sync.round.agreement import BITS, SiteStatus
from titan_ext.semi_sync.wire.manager import QuorumWire, wire_device

Values = Mapping[str, str]
"""Values as text by key."""


def as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings by key as text that is equal where they are."""
    return {key: json.dumps(value, default=str) for key, value in values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class InCommon:
    """What must be equal at sites that exchange."""

    plan: Values
    """Parts of the sync plan."""
    tensors: Values
    """What the sites' tensors come to."""
    settings: Values = field(default_factory=dict)
    """Other settings by their configuration key."""
    behind_plan: Values = field(default_factory=dict)
    """The settings that the plan was made of by their configuration key, to name a difference by."""
    behind_tensors: Values = field(default_factory=dict)
    """Those that make up the model and its layout."""

    def number(self) -> int:
        """A non-negative number below 2**62 that it shares with equal ones."""
        together = {"plan": dict(self.plan), "tensors": dict(self.tensors), "settings": dict(self.settings)}
        digest = hashlib.sha256(json.dumps(together, sort_keys=True).encode()).digest()
        return int.from_bytes(digest[:8], "big") % 2**BITS

    def encoded(self) -> bytes:
        """As bytes for the other sites."""
        parts = (self.plan, self.tensors, self.settings, self.behind_plan, self.behind_tensors)
        return json.dumps([dict(each) for each in parts]).encode()

    @staticmethod
    def decoded(data: bytes) -> "InCommon":
        """From what another site has encoded."""
        plan, tensors, settings, behind_plan, behind_tensors = json.loads(data)
        return InCommon(
            plan=plan, tensors=tensors, settings=settings, behind_plan=behind_plan, behind_tensors=behind_tensors
        )


def name_differences(manager: QuorumWire, own: InCommon, table: Sequence[SiteStatus]) -> str:
    """In what the sites of a quorum differ: each key with its values and the sites that have them.

    All sites of the quorum meet here, after statuses of which all know that they differ. Empty after an error.
    """
    messages = _all_gather_bytes(manager, own.encoded(), len(table))
    if messages is None:
        return ""
    names = [site.name or f"#{rank}" for rank, site in enumerate(table)]
    return differences([InCommon.decoded(message) for message in messages], names)


def differences(sites: Sequence[InCommon], names: Sequence[str]) -> str:
    """In what sites differ: each key with its values and the names of the sites that have them; empty if in nothing."""
    found = _differing([site.settings for site in sites], names)
    plan = _differing([site.plan for site in sites], names)
    tensors = _differing([site.tensors for site in sites], names)
    if plan:
        found += _differing([site.behind_plan for site in sites], names)
    if tensors:
        found += _differing([site.behind_tensors for site in sites], names)
    return "; ".join(found or plan + tensors)  # by themselves where no setting tells


def _differing(values: Sequence[Values], names: Sequence[str]) -> list[str]:
    lines = []
    for key in dict.fromkeys(key for each in values for key in each):
        sites: dict[str, list[str]] = {}
        for name, each in zip(names, values, strict=True):
            sites.setdefault(each.get(key, "not set"), []).append(name)
        if len(sites) > 1:
            lines.append(f"{key} is " + ", ".join(f"{value} at {', '.join(where)}" for value, where in sites.items()))
    return lines


def _all_gather_bytes(manager: QuorumWire, own: bytes, sites: int) -> list[bytes] | None:
    """The bytes of every site in the order of their ranks; None after an error."""
    rank = manager.participating_rank()
    lengths = torch.zeros(sites, dtype=torch.int64)
    lengths[rank] = len(own)
    lengths = lengths.to(wire_device(manager))
    manager.allreduce(lengths, reduce_op=ReduceOp.SUM).wait()
    if manager.errored() is not None:
        return None
    sizes = lengths.tolist()
    table = torch.zeros(sites, max(sizes), dtype=torch.int64)
    table[rank, : len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    table = table.to(wire_device(manager))
    manager.allreduce(table, reduce_op=ReduceOp.SUM).wait()
    if manager.errored() is not None:
        return None
    return [bytes(line[:size]) for line, size in zip(table.tolist(), sizes, strict=True)]
