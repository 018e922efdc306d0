"""What a round exchanges is agreed before anything travels.

Two sites that reduced different rows, or the same ones in another order, would mix unrelated
tensors without any error. One small all-reduce at the start of a round makes that impossible: it
carries each site's plan, clock and rows twice, once negated, so that the maxima of both tell
whether all are equal. A site that is joining abstains and learns the round from the others.
"""

from dataclasses import dataclass

import torch
from torch.distributed import ReduceOp

from titan_ext.semi_sync.manager import ReplicaManager, wire_device

_BITS = 62  # rows a word can carry; negation must stay within int64
_ABSTAIN = -(2**62)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome: the rows of the round and the inner step it belongs to, or why there is none."""

    rows: list[int]
    clock: int
    newcomers: bool = False
    """Whether some site abstained: one that joins, or that fell behind."""
    problem: str | None = None


def agree(
    manager: ReplicaManager, *, fingerprint: int, clock: int, rows: list[int] | None, num_rows: int
) -> Agreement:
    """Agree on a round over all sites of the current quorum.

    Args:
        manager: with a quorum.
        fingerprint: non-negative number below 2**62 that equal plans and models share.
        clock: inner steps this site has taken.
        rows: indices of the rows it is about to exchange, or None to abstain.
        num_rows: rows in the plan.

    Returns:
        The members' rows and clock; no rows and the latest clock if every site abstained.
    """
    words = _pack(rows, num_rows)
    member = [clock, *words] if rows is not None else [_ABSTAIN] * (1 + len(words))
    negated = [-value for value in member] if rows is not None else member
    abstains = int(rows is None)
    header = torch.tensor([fingerprint, -fingerprint, clock, abstains, *member, *negated], dtype=torch.int64)
    header = header.to(wire_device(manager))
    manager.allreduce(header, reduce_op=ReduceOp.MAX).wait()
    highest, lowest, latest, newcomers, *rest = header.tolist()
    agreed, negated = rest[: len(member)], rest[len(member) :]
    if highest != -lowest:
        return Agreement([], clock, problem="the sites differ in [semi_sync], model or layout")
    if agreed[0] == _ABSTAIN:
        return Agreement([], latest)
    if any(high != -low for high, low in zip(agreed, negated, strict=True)):
        return Agreement([], clock, problem=f"the sites are at different points of the schedule (we: inner step {clock})")
    return Agreement(_unpack(agreed[1:]), agreed[0], bool(newcomers))


def _pack(rows: list[int] | None, num_rows: int) -> list[int]:
    words = [0] * -(-num_rows // _BITS)
    for row in rows or []:
        words[row // _BITS] |= 1 << (row % _BITS)
    return words


def _unpack(words: list[int]) -> list[int]:
    return [index * _BITS + bit for index, word in enumerate(words) for bit in range(_BITS) if word >> bit & 1]
