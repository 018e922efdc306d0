"""What a round exchanges is agreed before anything travels.

Two sites that reduced different rules, or the same ones in another order, would mix unrelated tensors without any
error; two runs that meet at one lighthouse would mix models. So each site first tells the others its status, and each
finds from the same table the same answer. A site that is joining abstains and learns the round from the others.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ReduceOp

from titan_ext.semi_sync.wire.manager import QuorumWire

BITS = 62
"""Bits of a hash in the table: small enough to be no negative number of 64."""

NAME_BYTES = 64
MOST_RULES = 8 * BITS
MOST_GROUPS = 8
"""Keys of labels by which a plan's rules are shared."""


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
    labels: tuple[int, ...] = ()
    """For each of the plan's groups the number of this site's label; at most ``MOST_GROUPS``."""
    group_checksums: tuple[int, ...] = ()
    """For each of them the checksum of what its sites alone share; 0 if it is not known."""
    step: int
    """Inner steps taken."""
    rules: list[int] | None
    """Indices of the rules it is about to exchange; None to abstain and learn the round from the others."""
    tokens: int = 0
    """What it has trained on since its last commit."""
    pace: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Where rounds are boxed: microseconds of its time model's terms (0 if unknown), and tokens of 1000 inner steps."""
    step_time_ms: int = 0
    """Milliseconds that an inner step takes it; 0 if it has taken none yet."""
    done: bool = False
    """Whether its data has ended and it has nothing to contribute any more."""
    sources: int = 1
    """Data sources that it has."""
    closes: bool = False
    """Whether it has taken its last inner step and waits for the others to come there, where sites train on."""
    late: bool = False
    """Whether it has just received the others' state and keeps work that began at an older commit."""
    ahead: bool = False
    """Whether it exchanges before its quorum is there: nobody can be healed in such a round."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome: the rules of the round and the inner step it belongs to, or why there is none."""

    table: list[SiteStatus]
    """All sites of the quorum by their ranks."""
    rules: list[int]
    """Those that the members mean to exchange; empty if every site is joining, or nothing is agreed."""
    step: int
    """Inner step of the round, that of the members; without an agreement this site's own."""
    problem: str | None = None
    """Why nothing can be exchanged."""
    refused: bool = False
    """The problem is one of this site itself that trying again does not mend."""
    diverged: bool = False
    """This site's shared state is not that of the others."""
    diverged_in_group: bool = False
    """What this site shares with the sites of a label is not theirs."""
    states_differ: bool = False
    """Some site's is not."""
    settings_differ: bool = False
    """The sites differ in what must be equal at sites that exchange."""
    resync_step: int = 0
    """Inner step from which the sites can agree that now are at different points."""
    opening: tuple[int, Position] | None = None
    """Run and position from which sites go on that have all just joined."""

    @property
    def newcomers(self) -> bool:
        """Whether some site abstained: one that joins, or that fell behind."""
        return any(site.rules is None for site in self.table)

    @property
    def all_join(self) -> bool:
        """Whether no site stands where a round could go on from."""
        return all(site.rules is None or site.late for site in self.table)

    def labels(self, groups: Sequence[str]) -> dict[str, list[int]]:
        """By group key the number of each site's label.

        Args:
            groups: the plan's.
        """
        return {group: [site.labels[place] for site in self.table] for place, group in enumerate(groups)}

    def name(self, rank: int) -> str:
        """Of the site with this rank in the quorum."""
        return (self.table[rank].name if rank < len(self.table) else "") or f"#{rank}"

    def steps_until_forgotten(self, heartbeat_seconds: float) -> int:
        """Inner steps that the slowest site takes until the lighthouse has forgotten one that died.

        From one table, so that all sites come to one step.
        """
        slowest = max(site.step_time_ms for site in self.table)
        return math.ceil(1000 * heartbeat_seconds / slowest) if slowest else 0


def agree(table: Sequence[SiteStatus], rank: int, in_step: bool = True, at_one_commit: bool = False) -> Verdict:
    """What the sites of a quorum exchange. Pure: equal tables lead to equal rounds.

    Args:
        table: the statuses of all sites.
        rank: this site's place among them.
        in_step: whether members come to a round at the same inner step.
        at_one_commit: whether nobody heals those of them who are behind, so that they have to stand at the same commit; so
            it is too where a site is ahead of its quorum.

    Returns:
        The members' rules and latest step; no rules and the latest step if every site abstained.
    """
    table, own = list(table), table[rank]
    elsewhere = _other_origin(table)
    if elsewhere:
        return Verdict(table, [], own.step, _describe_origins(table), refused=own in elsewhere)
    others = _differing(own, table)
    if others:
        problem = f"the sites differ in [semi_sync], model, layout or last step (we and {_names(others)})"
        return Verdict(table, [], own.step, problem, refused=True, settings_differ=True)
    refusal = _one_name_twice(table) or _other_run(own, table)
    if refusal is not None:
        return Verdict(table, [], own.step, refusal, refused=True)
    members = [site for site in table if site.rules is not None and not site.late]
    if not members:
        return Verdict(table, [], max(site.step for site in table))
    if len({(site.step if in_step else 0, *site.rules) for site in members}) > 1:
        problem = f"the sites are at different points of the schedule (we: inner step {own.step})"
        return Verdict(table, [], own.step, problem, resync_step=max(site.step for site in members) + 1)
    ahead = any(site.ahead for site in table)
    if ahead and len(members) < len(table):
        return Verdict(table, [], own.step, "a site is behind, and the round had begun before the quorum told so")
    if (at_one_commit or ahead) and len({site.position for site in members}) > 1:
        return Verdict(table, [], own.step, "the sites stand at different commits of the run")
    whole, in_group = _diverged(members), _diverged_from_group(members)
    diverged = whole or in_group
    if diverged:
        problem = f"the shared state of {_names(diverged)} is not that of the others"
        astray = not whole and own in in_group
        return Verdict(
            table, [], own.step, problem, diverged=own in diverged, diverged_in_group=astray, states_differ=True
        )
    return Verdict(table, members[0].rules, max(site.step for site in members))


def _other_origin(table: Sequence[SiteStatus]) -> list[SiteStatus]:
    """Sites whose loaded model would be lost, or whose random one would take the place of a loaded one.

    Where a run is under way, those about to join it that have loaded another model than it began from. Where all are
    about to begin, those that differ from most; all of them where there is no majority.
    """
    run = next((site for site in table if site.run), None)
    if run is not None:
        return [site for site in table if not site.run and site.origin not in (0, run.origin)]
    counts = Counter(site.origin for site in table).most_common()
    if len(counts) == 1:
        return []
    tie = counts[0][1] == counts[1][1]
    return [site for site in table if tie or site.origin != counts[0][0]]


def _describe_origins(table: Sequence[SiteStatus]) -> str:
    origins = ", ".join(
        f"{site.name or 'a site without name'}: "
        + (f"loaded model {site.origin:016x}" if site.origin else "random initialisation")
        for site in table
    )
    return (
        f"the sites do not start from one model ({origins}); load the same one at all of them "
        "(checkpoint.initial_load_path), or none at any"
    )


def _differing(own: SiteStatus, table: Sequence[SiteStatus]) -> list[SiteStatus]:
    """Sites that may not exchange with this one; where one site finds some, all do."""
    return [site for site in table if site.fingerprint != own.fingerprint]


def _one_name_twice(table: Sequence[SiteStatus]) -> str | None:
    for name, count in Counter(site.name for site in table if site.name).items():
        if count > 1:
            return f'{count} sites of the quorum are named "{name}"'
    return None


def _other_run(own: SiteStatus, table: Sequence[SiteStatus]) -> str | None:
    """Shared states of different origin never meet; a site that has none yet may take either."""
    others = [site for site in table if site.run not in (0, own.run)]
    if own.run == 0 or not others:
        return None
    theirs = "; ".join(f"{site.name or 'another site'}: {described(site.run, site.position)}" for site in others)
    return (
        f"two runs meet at one lighthouse (we: {described(own.run, own.position)}; {theirs}); give each its own "
        "lighthouse, or remove the checkpoints of the one that is not meant"
    )


def described(run: int, position: Position) -> str:
    """A run and how far it is, for people."""
    generation = f" of generation {position.generation}" if position.generation else ""
    return f"run {run:016x}, round {position.round}{generation}"


def _diverged(members: Sequence[SiteStatus]) -> list[SiteStatus]:
    """Members whose shared state differs from that of most, of the first where there is no majority."""
    return _unlike_most([(site, site.checksum) for site in members if site.position == members[0].position])


def _diverged_from_group(members: Sequence[SiteStatus]) -> list[SiteStatus]:
    """Members whose part of the shared state differs from that of most with their label."""
    groups: dict[tuple[int, int], list[tuple[SiteStatus, int]]] = {}
    for site in members:
        if site.position == members[0].position:
            for place, label in enumerate(site.labels):
                groups.setdefault((place, label), []).append((site, site.group_checksums[place]))
    return [site for stated in groups.values() for site in _unlike_most(stated)]


def _unlike_most(stated: Sequence[tuple[SiteStatus, int]]) -> list[SiteStatus]:
    sums = Counter(checksum for _, checksum in stated if checksum)
    if not sums:
        return []
    right = max(sums, key=lambda each: sums[each])  # of equals the first: the order of the table
    return [site for site, checksum in stated if checksum not in (0, right)]


def _names(sites: Sequence[SiteStatus]) -> str:
    return ", ".join(site.name or "a site without name" for site in sites)


# -- the table of statuses ---------------------------------------------------------------------------


def send_status(manager: QuorumWire, own: SiteStatus, wire: torch.device) -> Callable[[], list[SiteStatus]]:
    """Tell the other sites of the quorum this one's status.

    One all-reduce, to which every site adds a line that the others leave empty.

    Returns:
        waits for theirs: the status of every site, in the order of their ranks; ``own`` alone after an error.
    """
    sites = manager.num_participants()
    table = torch.zeros(sites, _WORDS, dtype=torch.int64)
    table[manager.participating_rank()] = torch.tensor(_pack(own), dtype=torch.int64)
    table = table.to(wire)
    work = manager.allreduce(table, reduce_op=ReduceOp.SUM) if sites > 1 else None

    def wait() -> list[SiteStatus]:
        if work is not None:
            work.wait()
        if manager.errored() is not None:
            return [own]
        return [_unpack(line) for line in table.tolist()]

    return wait


_NUMBERS = 19
_RULE_WORDS = MOST_RULES // BITS
_NAME_WORD = 7  # bytes in a word
_NAME_WORDS = -(-NAME_BYTES // _NAME_WORD)
_WORDS = _NUMBERS + 2 * MOST_GROUPS + _RULE_WORDS + _NAME_WORDS


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
        *own.pace,
        own.sources,
        int(own.rules is None) | int(own.done) << 1 | int(own.late) << 2 | int(own.closes) << 3 | int(own.ahead) << 4,
        len(own.labels),
        *_filled(own.labels),
        *_filled(own.group_checksums),
        *rules,
        *(int.from_bytes(name[start : start + _NAME_WORD], "big") for start in range(0, len(name), _NAME_WORD)),
    ]


def _filled(numbers: Sequence[int]) -> list[int]:
    return [*numbers, *[0] * (MOST_GROUPS - len(numbers))]


def _unpack(line: list[int]) -> SiteStatus:
    fingerprint, run, origin, salt, *positions, sources, flags, groups = line[:_NUMBERS]
    labels, line = line[_NUMBERS : _NUMBERS + 2 * MOST_GROUPS], line[2 * MOST_GROUPS :]
    generation, round_, known_generation, known_round, checksum, step, tokens, step_time_ms, *pace = positions
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
        labels=tuple(labels[:groups]),
        group_checksums=tuple(labels[MOST_GROUPS:][:groups]),
        step=step,
        rules=None if flags & 1 else rules,
        tokens=tokens,
        step_time_ms=step_time_ms,
        pace=(pace[0], pace[1], pace[2], pace[3]),
        done=bool(flags & 2),
        late=bool(flags & 4),
        closes=bool(flags & 8),
        ahead=bool(flags & 16),
        sources=sources,
    )
