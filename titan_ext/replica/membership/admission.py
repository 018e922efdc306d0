"""Decides for its site with which of the sites of a quorum it goes on."""

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from hashlib import sha256

from torch.distributed import Store, TCPStore
from torchft._torchft import QuorumResult
from torchft.process_group import create_store_client

from titan_ext.replica.membership.admission_protocol import Card, Meeting
from titan_ext.replica.membership.shared_secret import NO_SECRET, Secret, fresh_nonce

logger = logging.getLogger(__name__)

_MEETINGS = "titan_ext/meeting/"
_GROUPS = "torchft/"  # where torchft's manager lets the ranks of a quorum find each other


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What came of a quorum, for all ranks of the site."""

    cards: list[Card] = field(default_factory=list)
    """The admitted sites by their ranks among themselves."""
    group: int = -1
    """Number of their group, never used before."""
    own: int = 0
    """This site's rank among them."""
    waits_for: int = 0
    """Sites that are to be here before these begin; 0: no more."""
    strangers: list[str] = field(default_factory=list)
    """Names of the sites that hold another secret."""
    problem: str | None = None
    """Why there is no group this time."""
    final: bool = False
    """Whether trying again cannot help."""

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Decision":
        """What another rank of the site wrote."""
        values = json.loads(text)
        return cls(**values | {"cards": [Card(**card) for card in values["cards"]]})


class Doorkeeper:
    """The part of a site's rank 0 in admitting the others and being admitted.

    Args:
        store: the site's own store.
        store_address: ``host:port`` under which the other sites reach it.
        manager_address: URL of the site's manager server.
        secret: what sites prove to hold; None: everybody is admitted.
        min_sites: as many make a group that counts.
        seconds: how long to wait for those that have not answered.
        expected: sites that a run waits for when it begins, and for how many seconds.
    """

    def __init__(
        self,
        store: TCPStore,
        *,
        store_address: str,
        manager_address: str,
        secret: Secret | None,
        min_sites: int,
        seconds: float,
        expected: tuple[int, float] = (0, 0.0),
    ) -> None:
        self._store = store
        self._store_address = store_address
        self._manager_address = manager_address
        self._secret = secret or NO_SECRET
        self._min_sites = min_sites
        self._seconds = seconds
        self._expected, self._patience = expected
        self._began = time.monotonic()
        self._met = False
        self._turned_away = False
        self._refused: set[str] = set()
        self._silent: set[str] = set()

    def decide(self, quorum: QuorumResult, step: int) -> Decision:
        """Meet the other sites of the quorum.

        Args:
            quorum: what the lighthouse said.
            step: torchft's step of this site.
        """
        own = Card(
            nonce=fresh_nonce(),
            replica_id=quorum.replica_ids[quorum.replica_rank],
            step=step,
            store=self._store_address,
            manager=self._manager_address,
            met=self._met,
            expects=self._expected if time.monotonic() < self._began + self._patience else 0,
        )
        try:
            meeting = Meeting(self._meeting_place(quorum), own, quorum.replica_ids, self._secret, self._silent)
            verdict = meeting.hold(self._seconds)
        except RuntimeError as error:
            return Decision(problem=f"the sites of the quorum did not meet: {error}")
        absent = {place: each for place, each in enumerate(quorum.replica_ids) if place not in verdict.cards}
        self._silent = {replica_id for place, replica_id in absent.items() if place not in meeting.strangers}
        for replica_id in absent.values():
            self._tell_refused(replica_id)
        if len(verdict.cards) == 1 and meeting.strangers and not self._met:
            turned_away = self._turn_away(list(meeting.strangers.values()))
            if turned_away is not None:
                return turned_away
        self._met |= len(verdict.cards) >= self._min_sites and not verdict.waits_for
        return Decision(
            cards=list(verdict.cards.values()),
            group=verdict.group,
            own=list(verdict.cards).index(quorum.replica_rank),
            waits_for=verdict.waits_for,
            strangers=_names(meeting.strangers.values()),
        )

    def _meeting_place(self, quorum: QuorumResult) -> Store:
        # Ids of quorums begin again with a lighthouse that was restarted.
        words = json.dumps([quorum.quorum_id, quorum.max_step, quorum.replica_ids])
        place = f"{_MEETINGS}{sha256(words.encode()).hexdigest()[:32]}/"
        for key in self._store.list_keys():
            if key.startswith((_MEETINGS, _GROUPS)) and not key.startswith(place):
                self._store.delete_key(key)  # of meetings that are over since this site is here
        return create_store_client(f"{quorum.store_address}/{place}", timeout=timedelta(seconds=self._seconds))

    def _turn_away(self, strangers: list[Card]) -> Decision | None:
        """What becomes of a site that nobody has admitted yet and whom those who are here take for a stranger.

        Which side is wrong cannot be told from the proofs. One that has been running goes on in any
        case, so the one that comes gives way; of two that begin, each tries again.
        """
        running = any(card.met for card in strangers)
        if not running and self._turned_away:
            return None
        self._turned_away = True
        names = ", ".join(_names(strangers))
        held = "this site holds none" if self._secret is NO_SECRET else "they do not hold this site's secret"
        return Decision(problem=f"replica.secret_file: not admitted by {names}: {held}", final=running)

    def _tell_refused(self, replica_id: str) -> None:
        if replica_id in self._refused:
            return
        self._refused.add(replica_id)
        if replica_id in self._silent:
            reason = f"it gave no proof in time (replica.admission_timeout_seconds = {self._seconds:g})"
        else:
            reason = "it does not hold this site's secret (replica.secret_file)"
        logger.warning("site %s is refused: %s; its replica id is %r", _name(replica_id), reason, replica_id[:200])


def _names(cards: Iterable[Card]) -> list[str]:
    return sorted(_name(card.replica_id) for card in cards)


def _name(replica_id: str) -> str:
    """The site's name, safe to print whoever made it up."""
    return "".join(letter if letter.isprintable() else "?" for letter in replica_id.split(":")[0][:64])
