"""Rank 0 of a site decides, with the other sites of a quorum, which of them make a group."""

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from hashlib import sha256

from torch.distributed import Store, TCPStore
from torchft.process_group import create_store_client

from titan_ext.replica.membership.admission_protocol import AdmissionProtocol, MemberInfo, MembershipDecision
from titan_ext.replica.membership.shared_secret import NO_SECRET, Secret, fresh_nonce
from titan_ext.replica.torchft_internals import GROUP_KEYS, QuorumResult

logger = logging.getLogger(__name__)

_QUORUM_KEYS = "titan_ext/quorum/"


@dataclass(frozen=True, kw_only=True)
class AdmissionResult:
    """What came of a quorum, for all ranks of the site."""

    members: list[MemberInfo] = field(default_factory=list)
    """The admitted sites by their ranks among themselves."""
    group_id: int = -1
    """Number of their group, never used before."""
    own_rank: int = 0
    """This site's rank among them."""
    waits_for: int = 0
    """Sites that must be here before these begin; 0: no more."""
    unauthenticated: list[str] = field(default_factory=list)
    """Names of the sites that hold another secret."""
    problem: str | None = None
    """Why there is no group this time."""
    is_final: bool = False
    """Whether trying again cannot help."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "AdmissionResult":
        """What another rank of the site wrote."""
        values = json.loads(text)
        return cls(**values | {"members": [MemberInfo(**info) for info in values["members"]]})


class Admission:
    """Runs the admission protocol for a site, quorum after quorum.

    Args:
        store: the site's own store.
        store_address: ``host:port`` under which the other sites reach it.
        manager_address: URL of the site's manager server.
        secret: what sites prove to hold; None: everybody is admitted.
        min_sites: as many make a group that counts.
        seconds: how long to wait for those that have not answered.
        expected: sites that a run waits for when it begins, and for how many seconds.
        region: path of the site's region; empty where it has none.
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
        region: str = "",
    ) -> None:
        self._store = store
        self._store_address = store_address
        self._manager_address = manager_address
        self._secret = secret or NO_SECRET
        self._min_sites = min_sites
        self._seconds = seconds
        self._expected_sites, self._expected_seconds = expected
        self._region = region
        self._started = time.monotonic()
        self._was_admitted = False
        self._was_rejected = False
        self._refused: set[str] = set()
        self._unresponsive: set[str] = set()

    def decide(self, quorum: QuorumResult, step: int) -> AdmissionResult:
        """Run the protocol with the other sites of the quorum.

        Args:
            quorum: the lighthouse's.
            step: torchft's step of this site.
        """
        try:
            protocol = AdmissionProtocol(
                self._quorum_store(quorum),
                self._own_info(quorum, step),
                quorum.replica_ids,
                self._secret,
                self._unresponsive,
            )
            decision = protocol.run(self._seconds)
        except RuntimeError as error:
            return AdmissionResult(problem=f"the sites of the quorum did not meet: {error}")
        unauthenticated = protocol.unauthenticated
        self._refuse_others(quorum, decision, unauthenticated.keys())
        if len(decision.members) == 1 and unauthenticated and not self._was_admitted:
            rejection = self._rejection(list(unauthenticated.values()))
            if rejection is not None:
                return rejection
        self._was_admitted |= len(decision.members) >= self._min_sites and not decision.waits_for
        return AdmissionResult(
            members=list(decision.members.values()),
            group_id=decision.group_id,
            own_rank=list(decision.members).index(quorum.replica_rank),
            waits_for=decision.waits_for,
            unauthenticated=_names(unauthenticated.values()),
        )

    def _own_info(self, quorum: QuorumResult, step: int) -> MemberInfo:
        still_waits = time.monotonic() < self._started + self._expected_seconds
        return MemberInfo(
            nonce=fresh_nonce(),
            replica_id=quorum.replica_ids[quorum.replica_rank],
            step=step,
            store=self._store_address,
            manager=self._manager_address,
            was_admitted=self._was_admitted,
            region=self._region,
            expected_sites=self._expected_sites if still_waits else 0,
        )

    def _quorum_store(self, quorum: QuorumResult) -> Store:
        """A part of the quorum's store for this quorum alone; deletes earlier ones from this site's store."""
        # Ids of quorums begin again with a lighthouse that was restarted.
        identity = json.dumps([quorum.quorum_id, quorum.max_step, quorum.replica_ids])
        prefix = f"{_QUORUM_KEYS}{sha256(identity.encode()).hexdigest()[:32]}/"
        for key in self._store.list_keys():
            # This site has come to the next quorum, so that no rank of it reads these any more.
            if key.startswith((_QUORUM_KEYS, GROUP_KEYS)) and not key.startswith(prefix):
                self._store.delete_key(key)
        return create_store_client(f"{quorum.store_address}/{prefix}", timeout=timedelta(seconds=self._seconds))

    def _rejection(self, unauthenticated: list[MemberInfo]) -> AdmissionResult | None:
        """The result for a site that nobody has admitted yet and that holds another secret than all others here.

        Which side is wrong cannot be told from the proofs. A site that has been running goes on in any
        case, so the one that joins gives way; of two that begin, each tries again.
        """
        others_run = any(info.was_admitted for info in unauthenticated)
        if not others_run and self._was_rejected:
            return None
        self._was_rejected = True
        names = ", ".join(_names(unauthenticated))
        reason = "this site holds none" if self._secret is NO_SECRET else "they do not hold this site's secret"
        return AdmissionResult(problem=f"replica.secret_file: not admitted by {names}: {reason}", is_final=others_run)

    def _refuse_others(
        self, quorum: QuorumResult, decision: MembershipDecision, unauthenticated: Iterable[int]
    ) -> None:
        """Remember which sites did not answer, and log once of each site that it is refused."""
        absent = {rank: id_ for rank, id_ in enumerate(quorum.replica_ids) if rank not in decision.members}
        self._unresponsive = {replica_id for rank, replica_id in absent.items() if rank not in unauthenticated}
        for replica_id in absent.values():
            if replica_id in self._refused:
                continue
            self._refused.add(replica_id)
            if replica_id in self._unresponsive:
                reason = f"it gave no proof in time (replica.admission_timeout_seconds = {self._seconds:g})"
            else:
                reason = "it does not hold this site's secret (replica.secret_file)"
            logger.warning("site %s is refused: %s; its replica id is %r", _name(replica_id), reason, replica_id[:200])


def _names(infos: Iterable[MemberInfo]) -> list[str]:
    return sorted(_name(info.replica_id) for info in infos)


def _name(replica_id: str) -> str:
    """The site's name, safe to print whoever made it up."""
    return "".join(letter if letter.isprintable() else "?" for letter in replica_id.split(":")[0][:64])
