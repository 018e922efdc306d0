"""The lighthouse of a rehearsal: who is alive, and who takes part in the next round; torchft's rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from titan_ext.lab.network import Network
from titan_ext.lab.simulation import Signal, Simulation

HEARTBEAT_BYTES = 300.0
QUORUM_BYTES = 1000.0
"""Of a call and what acknowledges its answer, headers included."""


@dataclass(eq=False, slots=True)
class Member:
    """A life of a site: from its start to its end."""

    site: int
    name: str
    died_at: float | None = None
    heard_at: float = -math.inf
    """When its latest heartbeat came."""
    quorum: Quorum | None = None
    """The last one it took part in."""


@dataclass(eq=False, slots=True)
class Quorum:
    """Who takes part in a round."""

    members: list[Member]
    is_new: bool
    """Whether they have to connect to each other."""


@dataclass(slots=True)
class _Asking:
    member: Member
    answer: Signal
    since: float = field(default=0.0)


class Lighthouse:
    """Brings quorums about.

    Args:
        simulation: whose time passes.
        network: that carries the heartbeats.
        min_sites: that a quorum needs.
        expected_sites: that the first one waits for.
        heartbeat_interval_seconds: between two heartbeats of a site.
        heartbeat_timeout_seconds: without one, after which a site counts as dead.
        join_timeout_seconds: that a quorum waits for a site that is alive.
        formed: called with each quorum before its members learn of it.
    """

    def __init__(
        self,
        simulation: Simulation,
        network: Network,
        *,
        min_sites: int,
        expected_sites: int,
        heartbeat_interval_seconds: float,
        heartbeat_timeout_seconds: float,
        join_timeout_seconds: float,
        formed: Callable[[Quorum], None],
    ) -> None:
        self.longest_silence = 0.0
        """Seconds between two heartbeats of a living site, where they came."""
        self._simulation, self._network = simulation, network
        self._min_sites, self._expected = min_sites, expected_sites
        self._interval, self._heartbeat = heartbeat_interval_seconds, heartbeat_timeout_seconds
        self._join = join_timeout_seconds
        self._formed = formed
        self._known: list[Member] = []
        self._asking: list[_Asking] = []
        self._last: Quorum | None = None
        self._must_connect = False

    def hear(self, member: Member) -> None:
        """A site sends heartbeats from now on."""
        self._known.append(member)
        member.heard_at = self._simulation.now
        self._beat(member)

    def lose(self, member: Member) -> None:
        """A site sends none any more, which shows after the time-out."""
        member.died_at = self._simulation.now
        self._asking = [each for each in self._asking if each.member is not member]
        self._simulation.at(member.heard_at + self._heartbeat, self._try)

    def connect_anew(self) -> None:
        """The next quorum's members connect to each other, even if they are the same."""
        self._must_connect = True

    def ask(self, member: Member) -> Signal:
        """Ask for the next quorum; the signal comes with ``member.quorum``."""
        self._heard(member)
        asking = _Asking(member, Signal(self._simulation), self._simulation.now)
        self._asking.append(asking)
        self._try()
        self._simulation.after(self._join, self._try)
        return asking.answer

    def _beat(self, member: Member) -> None:
        if member.died_at is None:
            late = self._network.seconds_to_lighthouse(member.site, HEARTBEAT_BYTES)
            self._simulation.after(late, lambda: self._heard(member), recurs=True)
            self._simulation.after(self._interval, lambda: self._beat(member), recurs=True)
            self._try()  # somebody may have become silent

    def _heard(self, member: Member) -> None:
        if member.heard_at > -math.inf:
            self.longest_silence = max(self.longest_silence, self._simulation.now - member.heard_at)
        member.heard_at = self._simulation.now

    def _try(self) -> None:
        asking = (each.member for each in self._asking if self._is_alive(each.member))
        members = sorted(asking, key=lambda member: member.name)
        if not members or not self._may_form(members):
            return
        is_new = self._must_connect or self._last is None or self._last.members != members
        self._must_connect = False
        quorum = self._last = Quorum(members, is_new)
        self._formed(quorum)
        answered = [each for each in self._asking if each.member in members]
        self._asking = [each for each in self._asking if each.member not in members]
        for each in answered:
            each.member.quorum = quorum
            each.answer.set()

    def _may_form(self, members: list[Member]) -> bool:
        if len(members) < (self._min_sites if self._last is not None else max(self._min_sites, self._expected)):
            return False
        if self._last is not None and all(member in members for member in self._last.members):
            return True
        self._known = [member for member in self._known if member.died_at is None or self._is_alive(member)]
        alive = sum(self._is_alive(member) for member in self._known)
        if 2 * len(members) <= alive:
            return False
        first = min(each.since for each in self._asking)
        return len(members) == alive or self._simulation.now - first >= self._join

    def _is_alive(self, member: Member) -> bool:
        return self._simulation.now - member.heard_at < self._heartbeat
