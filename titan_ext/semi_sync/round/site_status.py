"""What each site tells the others of itself at the start of a round, and the table of all sites."""

from dataclasses import dataclass

import torch
from torch.distributed import ReduceOp

from titan_ext.semi_sync.wire.manager import ReplicaManager, wire_device

BITS = 62
"""Bits of a hash in the table: small enough to be no negative number of 64."""

NAME_BYTES = 64
MOST_RULES = 8 * BITS


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """How far a run has come. A generation begins where a run goes on from before its last commit."""

    generation: int = 0
    round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatus:
    """One site before a round."""

    name: str = ""
    """At most ``NAME_BYTES`` bytes; empty where sites have no names."""
    fingerprint: int
    """Equal at sites that may exchange."""
    run: int = 0
    """Which run its shared state belongs to; 0 if it has none yet."""
    origin: int = 0
    """Checksum of the loaded model that its run began from, or, without a run yet, that it is to begin from; 0 if
    that is a random initialisation."""
    salt: int = 0
    """What it adds to the name of a run that begins."""
    position: Position = Position()
    """The last commit its shared state contains."""
    known: Position = Position()
    """The last commit of the run that it remembers; later than ``position`` where an older checkpoint was loaded."""
    checksum: int = 0
    """Of the shared state; 0 where a method has none that is equal at all sites."""
    step: int
    """Inner steps taken."""
    rules: list[int] | None
    """Indices of the rules it is about to exchange; None to abstain and learn the round from the others."""
    tokens: int = 0
    """What it has trained on since its last commit."""
    step_time_ms: int = 0
    """Milliseconds that an inner step takes it; 0 if it has taken none yet."""
    done: bool = False
    """Whether its data has ended and it has nothing to contribute any more."""


def all_gather_status(manager: ReplicaManager, own: SiteStatus) -> list[SiteStatus]:
    """The status of every site of the quorum, in the order of their ranks; ``own`` alone after an error.

    One all-reduce, to which every site adds a line that the others leave empty.
    """
    sites = manager.num_participants()
    table = torch.zeros(sites, _WORDS, dtype=torch.int64)
    table[manager.participating_rank()] = torch.tensor(_pack(own), dtype=torch.int64)
    table = table.to(wire_device(manager))
    if sites > 1:
        manager.allreduce(table, reduce_op=ReduceOp.SUM).wait()
    if manager.errored() is not None:
        return [own]
    return [_unpack(line) for line in table.tolist()]


_NUMBERS = 13
_RULE_WORDS = MOST_RULES // BITS
_NAME_WORD = 7  # bytes in a word
_NAME_WORDS = -(-NAME_BYTES // _NAME_WORD)
_WORDS = _NUMBERS + _RULE_WORDS + _NAME_WORDS


def _pack(own: SiteStatus) -> list[int]:
    rules = [0] * _RULE_WORDS
    for rule in own.rules or []:
        rules[rule // BITS] |= 1 << (rule % BITS)
    name = own.name.encode().ljust(_NAME_WORDS * _NAME_WORD, b"\0")
    return [
        own.fingerprint,
        own.run,
        own.origin,
        own.salt,
        own.position.generation,
        own.position.round,
        own.known.generation,
        own.known.round,
        own.checksum,
        own.step,
        own.tokens,
        own.step_time_ms,
        int(own.rules is None) | int(own.done) << 1,
        *rules,
        *(int.from_bytes(name[start : start + _NAME_WORD], "big") for start in range(0, len(name), _NAME_WORD)),
    ]


def _unpack(line: list[int]) -> SiteStatus:
    fingerprint, run, origin, salt, *positions, checksum, step, tokens, step_time_ms, flags = line[:_NUMBERS]
    generation, round_, known_generation, known_round = positions
    words = line[_NUMBERS : _NUMBERS + _RULE_WORDS]
    name = b"".join(word.to_bytes(_NAME_WORD, "big") for word in line[_NUMBERS + _RULE_WORDS :])
    rules = [index * BITS + bit for index, word in enumerate(words) for bit in range(BITS) if word >> bit & 1]
    return SiteStatus(
        name=name.rstrip(b"\0").decode(errors="replace"),
        fingerprint=fingerprint,
        run=run,
        origin=origin,
        salt=salt,
        position=Position(generation, round_),
        known=Position(known_generation, known_round),
        checksum=checksum,
        step=step,
        rules=None if flags & 1 else rules,
        tokens=tokens,
        step_time_ms=step_time_ms,
        done=bool(flags & 2),
    )
