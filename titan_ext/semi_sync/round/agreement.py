"""What a round exchanges is agreed before anything travels.

Two sites that reduced different rows, or the same ones in another order, would mix unrelated
tensors without any error; two runs that meet at one lighthouse would mix models. So the sites first
lay their standings side by side, and each finds from the same table the same answer. A site that is
joining abstains and learns the round from the others.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from titan_ext.semi_sync.round.site_status import Position, Standing, table_of
from titan_ext.semi_sync.wire.manager import ReplicaManager


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome: the rows of the round and the inner step it belongs to, or why there is none."""

    table: list[Standing]
    """All sites of the quorum by their ranks."""
    rows: list[int]
    clock: int
    problem: str | None = None
    """Why nothing can be exchanged."""
    refused: bool = False
    """The problem is one of this site itself that trying again does not mend."""
    diverged: bool = False
    """This site's shared state is not that of the others."""
    meet_at: int = 0
    """Inner step from which the sites can agree that now are at different points."""

    @property
    def newcomers(self) -> bool:
        """Whether some site abstained: one that joins, or that fell behind."""
        return any(site.rows is None for site in self.table)


def agree(manager: ReplicaManager, own: Standing) -> Agreement:
    """Agree on a round over all sites of the current quorum; the manager keeps errors of the wire.

    Returns:
        The members' rows and clock; no rows and the latest clock if every site abstained.
    """
    table = table_of(manager, own)
    if manager.errored() is not None:
        return Agreement(table, [], own.clock)
    own = table[manager.participating_rank()]  # of a site with a leader the leader's
    strangers = _other_origin(table)
    if strangers:
        problem = _told_origins(table)
        return Agreement(table, [], own.clock, problem, refused=own in strangers)
    refusal = _other_settings(own, table) or _one_name_twice(table) or _other_run(own, table)
    if refusal is not None:
        return Agreement(table, [], own.clock, refusal, refused=True)
    members = [site for site in table if site.rows is not None]
    if not members:
        return Agreement(table, [], max(site.clock for site in table))
    if len({(site.clock, *site.rows) for site in members}) > 1:
        problem = f"the sites are at different points of the schedule (we: inner step {own.clock})"
        return Agreement(table, [], own.clock, problem, meet_at=max(site.clock for site in members) + 1)
    strays = _strays(members)
    if strays:
        problem = f"the shared state of {_names(strays)} is not that of the others"
        return Agreement(table, [], own.clock, problem, diverged=own in strays)
    return Agreement(table, members[0].rows, members[0].clock)


def _other_settings(own: Standing, table: Sequence[Standing]) -> str | None:
    others = [site for site in table if site.fingerprint != own.fingerprint]
    return f"the sites differ in [semi_sync], model or layout (we and {_names(others)})" if others else None


def _one_name_twice(table: Sequence[Standing]) -> str | None:
    for name, count in Counter(site.name for site in table if site.name).items():
        if count > 1:
            return f'{count} sites of the quorum are named "{name}"'
    return None


def _other_run(own: Standing, table: Sequence[Standing]) -> str | None:
    """Shared states of different origin never meet; a site that has none yet may take either."""
    others = [site for site in table if site.run not in (0, own.run)]
    if own.run == 0 or not others:
        return None
    theirs = "; ".join(f"{site.name or 'another site'}: {described(site.run, site.position)}" for site in others)
    return (
        f"two runs meet at one lighthouse (we: {described(own.run, own.position)}; {theirs}); give each its own "
        "lighthouse, or remove the checkpoints of the one that is not meant"
    )


def _other_origin(table: Sequence[Standing]) -> list[Standing]:
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


def _told_origins(table: Sequence[Standing]) -> str:
    told = ", ".join(
        f"{site.name or 'a site without name'}: "
        + (f"loaded model {site.origin:016x}" if site.origin else "random initialisation")
        for site in table
    )
    return (
        f"the sites do not start from one model ({told}); load the same one at all of them (checkpoint.initial_load_path), "
        "or none at any"
    )


def described(run: int, position: Position) -> str:
    """A run and how far it is, for people."""
    generation = f" of generation {position.generation}" if position.generation else ""
    return f"run {run:016x}, round {position.round}{generation}"


def _strays(members: Sequence[Standing]) -> list[Standing]:
    """Members whose shared state differs from that of most, of the first where there is no majority."""
    stated = [site for site in members if site.checksum and site.position == members[0].position]
    if not stated:
        return []
    sums = Counter(site.checksum for site in stated)
    right = max(sums, key=lambda each: sums[each])  # of equals the first: the order of the table
    return [site for site in stated if site.checksum != right]


def _names(sites: Sequence[Standing]) -> str:
    return ", ".join(site.name or "a site without name" for site in sites)
