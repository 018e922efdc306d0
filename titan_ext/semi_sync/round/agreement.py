"""What a round exchanges is agreed before anything travels.

Two sites that reduced different rules, or the same ones in another order, would mix unrelated tensors without any
error; two runs that meet at one lighthouse would mix models. So each site first tells the others its status, and each
finds from the same table the same answer. A site that is joining abstains and learns the round from the others.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from titan_ext.semi_sync.round.site_status import Position, SiteStatus


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
        """Whether every site abstained."""
        return all(site.rules is None for site in self.table)

    def name(self, rank: int) -> str:
        """Of the site with this rank in the quorum."""
        return (self.table[rank].name if rank < len(self.table) else "") or f"#{rank}"

    def steps_until_forgotten(self, heartbeat_seconds: float) -> int:
        """Inner steps that the slowest site takes until the lighthouse has forgotten one that died.

        From one table, so that all sites come to one step.
        """
        slowest = max(site.step_time_ms for site in self.table)
        return math.ceil(1000 * heartbeat_seconds / slowest) if slowest else 0


def agree(table: Sequence[SiteStatus], rank: int) -> Verdict:
    """What the sites of a quorum exchange. Pure: equal tables lead to equal rounds.

    Args:
        table: the statuses of all sites.
        rank: this site's place among them.

    Returns:
        The members' rules and step; no rules and the latest step if every site abstained.
    """
    table, own = list(table), table[rank]
    strangers = _other_origin(table)
    if strangers:
        return Verdict(table, [], own.step, _describe_origins(table), refused=own in strangers)
    others = _differing(own, table)
    if others:
        problem = f"the sites differ in [semi_sync], model, layout or last step (we and {_names(others)})"
        return Verdict(table, [], own.step, problem, refused=True, settings_differ=True)
    refusal = _one_name_twice(table) or _other_run(own, table)
    if refusal is not None:
        return Verdict(table, [], own.step, refusal, refused=True)
    members = [site for site in table if site.rules is not None]
    if not members:
        return Verdict(table, [], max(site.step for site in table))
    if len({(site.step, *site.rules) for site in members}) > 1:
        problem = f"the sites are at different points of the schedule (we: inner step {own.step})"
        return Verdict(table, [], own.step, problem, resync_step=max(site.step for site in members) + 1)
    diverged = _diverged(members)
    if diverged:
        problem = f"the shared state of {_names(diverged)} is not that of the others"
        return Verdict(table, [], own.step, problem, diverged=own in diverged, states_differ=True)
    return Verdict(table, members[0].rules, members[0].step)


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
    stated = [site for site in members if site.checksum and site.position == members[0].position]
    if not stated:
        return []
    sums = Counter(site.checksum for site in stated)
    right = max(sums, key=lambda each: sums[each])  # of equals the first: the order of the table
    return [site for site in stated if site.checksum != right]


def _names(sites: Sequence[SiteStatus]) -> str:
    return ", ".join(site.name or "a site without name" for site in sites)
