"""Which run a site's shared state belongs to, how far it has come, and who may go on from there.

A run gets its name when sites without any state first agree on a start. The name travels with the
shared state and lies in every checkpoint, so that states of different origin never mix. A site whose
checkpoint is older than the last commit in its log is *behind*: if nobody in the quorum has a later
state, the sites wait for all that took part in that commit, and only then go on from what they have,
in a new generation. Later generations win over earlier ones, however many rounds those had.
"""

import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed import ReduceOp

from titan_ext.semi_sync.round.agreement import BITS, Position, SiteStatus, described
from titan_ext.semi_sync.round.commit_log import Commit, CommitLog
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.wire.manager import QuorumWire, ReplicaManager

logger = logging.getLogger(__name__)

_GENERATION_BIT = 32  # of the manager's step, by which torchft decides who heals whom
_ROUNDS = 2**_GENERATION_BIT - 1


class Lineage:
    """A site's place in its run.

    Args:
        name: of the site.
        log: where commits are recorded; None keeps no record. Only rank 0's is used.
        site: the ranks of the site.
        allow_rollback: go on from an older checkpoint even if a site of the last commit is missing.
    """

    def __init__(self, name: str, log: CommitLog | None, site: SiteRanks, *, allow_rollback: bool = False) -> None:
        self.name = name
        self.run = 0
        self.origin = 0
        """Checksum of the loaded model that the run began from; 0 for a random initialisation."""
        self.position = Position()
        self.checksum = 0
        self.group_checksums: tuple[int, ...] = ()
        """Of what only the sites of one label share, for each of the plan's groups."""
        self.contributed: dict[str, int] = {}
        """By site the last round of this generation that contains something of it."""
        self.commits: dict[str, int] = {}
        """By key of a rule how many rounds have brought it."""
        self._log = log
        self._site = site
        self._allow_rollback = allow_rollback
        self._last: Commit | None = None

    @property
    def run_name(self) -> str:
        """Hexadecimal."""
        return f"{self.run:016x}"

    def status_fields(self) -> dict[str, Any]:
        """The lineage's part of this site's status."""
        return {
            "name": self.name,
            "run": self.run,
            "origin": self.origin,
            "salt": secrets.randbits(BITS - 8),  # summed over the sites it must stay below 2**62
            "position": self.position,
            "known": self._known(),
            "checksum": self.checksum,
            "group_checksums": self.group_checksums,
        }

    def opening(
        self, manager: QuorumWire, table: Sequence[SiteStatus], wire: torch.device
    ) -> tuple[int, Position] | None:
        """Run and position from which sites that all just join may begin; None if they have to wait. A collective.

        Args:
            manager: with the quorum of the table.
            table: the statuses of all sites.
            wire: where a message has to lie for the manager.
        """
        run = next((site.run for site in table if site.run), 0)
        if not run:
            return sum(site.salt for site in table) or 1, Position()
        best = max(site.position for site in table if site.run == run)
        known = max(site.known for site in table if site.run == run)
        if known <= best:
            return run, best
        missing = self._missing(table)
        waiting = torch.tensor([float(bool(missing))], device=wire)
        manager.allreduce(waiting, reduce_op=ReduceOp.SUM).wait()
        if manager.errored() is not None or waiting.item():
            return None
        logger.warning(
            "%s is as far as any checkpoint goes, commits up to round %d are undone", described(run, best), known.round
        )
        return run, Position(known.generation + 1, best.round)

    def why_waiting(self, table: Sequence[SiteStatus]) -> str:
        """What the wait is for, in words."""
        missing = self._missing(table)
        if not missing:
            return "another site waits for one that has a later state than its own checkpoint"
        return (
            f"this site's checkpoint ({described(self.run, self.position)}) is older than its last commit (round "
            f"{self._last.round}); waiting for {', '.join(missing)}, which took part in it. If they are gone for good, "
            "restart with --replica.allow_rollback true"
        )

    def open(self, manager: ReplicaManager, run: int, position: Position) -> None:
        """Take the place that ``opening`` found, once the round is committed."""
        run = self._site.gather(run)[0]  # the salts of a site's ranks differ
        if not self.run:
            logger.info("%s begins", described(run, position))
        new_generation = position.generation != self.position.generation
        self.run, self.position = run, position
        if new_generation:
            self.contributed = {}
            counters = manager.state_dict()
            # Whoever still holds a state of an earlier generation counts as behind.
            counters["step"] = (position.generation << _GENERATION_BIT) | (counters["step"] & _ROUNDS)
            manager.load_state_dict(counters)

    def accepts(self, state: Mapping[str, Any]) -> str | None:
        """Why a peer's shared state must not be taken in; None if it may."""
        run, position = state["run"], _position(state)
        if self.run not in (0, run):
            return f"a peer sent the state of another run ({described(run, position)})"
        if run == self.run and position < self.position:
            return (
                f"a peer sent an older state ({described(run, position)}) than ours ({described(run, self.position)})"
            )
        return None

    def stands_with(self, state: Mapping[str, Any]) -> bool:
        """Whether a peer's shared state is of the very commit that this site's contains."""
        return bool(self.run) and (state["run"], _position(state)) == (self.run, self.position)

    def is_late_for(self, state: Mapping[str, Any]) -> bool:
        """Whether a peer's shared state is of a later commit of this run, and contains nothing that this site has done
        since the one that it stands at.

        A round that failed here alone may have been committed by the others: then they have this site's work already.
        """
        run, position = state["run"], _position(state)
        follows = bool(self.run) and run == self.run and position.generation == self.position.generation
        counted = state.get("contributed", {}).get(self.name, 0) > self.position.round
        return bool(self.name) and follows and position > self.position and not counted

    def missed(self, state: Mapping[str, Any], keys: Sequence[str]) -> dict[int, int]:
        """By place among the keys of rules how many commits of it a peer's shared state has more than this site's."""
        theirs = state.get("commits", {})
        more = {place: theirs.get(key, 0) - self.commits.get(key, 0) for place, key in enumerate(keys)}
        return {place: count for place, count in more.items() if count > 0}

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Stand where the peer stands whose shared state was taken in."""
        self._take_place(state)

    def commit(
        self,
        table: Sequence[SiteStatus],
        contributors: Sequence[int],
        step: int,
        checksum: int,
        of_groups: Mapping[str, int] | None = None,
        rules: Sequence[str] = (),
    ) -> None:
        """A round is committed: count it, and write it to the log.

        Args:
            table: the statuses of the round's sites.
            contributors: ranks of those that were averaged.
            step: inner step of the launch.
            checksum: of the shared state after it, 0 if there is none.
            of_groups: by group key of what the sites with this site's label share.
            rules: keys of those that it has brought.
        """
        self.group_checksums = tuple((of_groups or {}).values())
        self.position, self.checksum = Position(self.position.generation, self.position.round + 1), checksum
        names = [site.name or f"#{rank}" for rank, site in enumerate(table)]
        self.contributed |= {names[rank]: self.position.round for rank in contributors}
        self.commits |= {key: self.commits.get(key, 0) + 1 for key in rules}
        self._last = Commit(
            run=self.run_name,
            generation=self.position.generation,
            round=self.position.round,
            step=step,
            contributors=[names[rank] for rank in contributors],
            sites=names,
            tokens=sum(table[rank].tokens for rank in contributors),
            digest=f"{checksum:016x}" if checksum else None,
            group_digests={group: f"{each:016x}" for group, each in (of_groups or {}).items() if each},
        )
        if self._log is not None:
            self._log.append(self._last)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for shared state and checkpoint."""
        return {
            "run": self.run,
            "origin": self.origin,
            "generation": self.position.generation,
            "round": self.position.round,
            "contributed": dict(self.contributed),
            "commits": dict(self.commits),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them, and look up in rank 0's log what came after. A collective over the site."""
        self._take_place(state)
        own = self._log.last(self.run_name) if self._log is not None else None
        self._last = self._site.gather(own)[0]

    def _take_place(self, state: Mapping[str, Any]) -> None:
        # Checkpoints did not always tell what their run began from.
        self.run, self.origin, self.position = state["run"], state.get("origin", 0), _position(state)
        self.contributed = dict(state.get("contributed", {}))
        self.commits = dict(state.get("commits", {}))

    def _known(self) -> Position:
        """The last commit of this run that we remember."""
        if self._last is None or self._last.run != self.run_name:
            return self.position
        return max(self.position, Position(self._last.generation, self._last.round))

    def _missing(self, table: Sequence[SiteStatus]) -> list[str]:
        """Sites of our last commit that are not here, if we are behind it."""
        if self._known() <= self.position or self._allow_rollback:
            return []
        return sorted({*self._last.sites} - {site.name for site in table})


def _position(state: Mapping[str, Any]) -> Position:
    return Position(state["generation"], state["round"])
