"""How the sites of a quorum authenticate each other, over a store that anybody may read and write.

Each site publishes its ``MemberInfo`` with a fresh nonce and, for each member that it finds there, a proof: an HMAC
with the secret over its own info and the other's nonce. Once all have proven that they hold the secret, or the time is
over, the first site that is ready writes the membership decision: the infos of those it has authenticated, signed. All
others follow it, so that no two of them believe in different groups.

What an earlier quorum left in the store, or what is replayed from one, names other nonces and proves nothing.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.distributed import Store

from titan_ext.replica.membership.shared_secret import Secret

_POLL_SECONDS = 0.02
_MAX_ENTRY_BYTES = 2**20
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class MemberInfo:
    """What one site of a quorum publishes about itself."""

    nonce: str
    replica_id: str
    step: int
    """torchft's step: a site behind the highest receives the state."""
    store: str
    """``host:port`` of the site's store."""
    manager: str
    """URL of its manager server."""
    was_admitted: bool
    """Whether it has been admitted to a group before."""
    region: str = ""
    """Path of its region: whoever is behind takes the state from the nearest."""
    expected_sites: int = 0
    """Sites that it would rather wait for while nobody has been admitted before."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "MemberInfo":
        """Raises ValueError or TypeError if the text is no member info."""
        info = cls(**json.loads(text))
        for name, kind in cls.__annotations__.items():
            if type(getattr(info, name)) is not kind:
                raise ValueError(f"member info: {name} must be of type {kind.__name__}")
        return info


@dataclass(frozen=True)
class MembershipDecision:
    """Who takes part.

    Args:
        members: the admitted sites by their rank in the lighthouse's quorum.
        group_id: a number that all of them know and nobody has used before.
    """

    members: dict[int, MemberInfo]
    group_id: int

    @property
    def waits_for(self) -> int:
        """Sites that those who begin together wait for; 0 if they are enough, or are waited for themselves.

        All find the same, since all compute it from the same infos.
        """
        expected = max(info.expected_sites for info in self.members.values())
        begins = not any(info.was_admitted for info in self.members.values())
        return expected if begins and len(self.members) < expected else 0


@dataclass
class _Authentication:
    """What one site has found out about the others, by their rank."""

    proofs: dict[int, list[str]] = field(default_factory=dict)
    """The other's nonce and this site's proof for it."""
    authenticated: dict[int, MemberInfo] = field(default_factory=dict)
    unauthenticated: dict[int, MemberInfo] = field(default_factory=dict)
    """Those whose proof is of another secret."""


class AdmissionProtocol:
    """One site's part in one run of the protocol.

    Args:
        store: shared by the sites of the quorum; not trusted.
        own: this site's info.
        replica_ids: of the quorum, in the order of the ranks.
        secret: what the sites prove to hold.
        unresponsive: replica ids that did not answer before; they get a tenth of the time.
    """

    def __init__(
        self,
        store: Store,
        own: MemberInfo,
        replica_ids: Sequence[str],
        secret: Secret,
        unresponsive: Collection[str] = (),
    ) -> None:
        self._store = store
        self._own = own
        self._rank = replica_ids.index(own.replica_id)
        self._replica_ids = replica_ids
        self._secret = secret
        self._unresponsive = {rank for rank, replica_id in enumerate(replica_ids) if replica_id in unresponsive}
        self._state = _Authentication()
        # Sites with another secret decide among themselves, under a key of their own.
        self._decision_key = f"decision/{secret.proof('key')[:16]}"

    @property
    def unauthenticated(self) -> Mapping[int, MemberInfo]:
        """Sites that hold another secret, by rank; their infos are not to be believed."""
        return self._state.unauthenticated

    def run(self, seconds: float) -> MembershipDecision:
        """Wait for the others' proofs, ``seconds`` at most, and return who takes part.

        Raises:
            RuntimeError: the store failed, or the others decided without this site.
        """
        started = time.monotonic()
        self._publish()
        while True:
            decision = self._parse_decision(self._read(self._decision_key))
            # Also when there is a decision: a site that it leaves out finds the reason in the others' proofs.
            missing = self._read_members()
            if decision is not None and self._includes_own(decision):
                return decision
            timeout = seconds / 10 if missing <= self._unresponsive else seconds
            if not missing or time.monotonic() - started > timeout:
                return self._decide()
            time.sleep(_POLL_SECONDS)

    # -- infos and proofs --------------------------------------------------------------------

    def _publish(self) -> None:
        entry = {"member": self._own.to_json(), "proofs": self._state.proofs}
        self._store.set(f"member/{self._rank}", json.dumps(entry))

    def _read_members(self) -> set[int]:
        """Check what the others published and publish proofs for them; returns the ranks that gave none yet."""
        state = self._state
        others = set(range(len(self._replica_ids))) - {self._rank}
        before = dict(state.proofs)
        for rank in others - state.authenticated.keys() - state.unauthenticated.keys():
            self._read_member(rank)
        if state.proofs != before:
            self._publish()
        return others - state.authenticated.keys() - state.unauthenticated.keys()

    def _read_member(self, rank: int) -> None:
        try:
            entry = json.loads(self._read(f"member/{rank}"))
            text = entry["member"]
            info = MemberInfo.from_json(text)
            nonce, proof = entry["proofs"].get(str(self._rank), ("", ""))
        except _MALFORMED:
            return
        if info.replica_id != self._replica_ids[rank]:
            return
        if self._state.proofs.get(rank, [""])[0] != info.nonce:
            self._state.proofs[rank] = [info.nonce, self._secret.proof("member", self._own.to_json(), info.nonce)]
        if nonce != self._own.nonce:
            return  # no proof yet, or one of an earlier quorum
        holds_secret = self._secret.proves(proof, "member", text, nonce)
        (self._state.authenticated if holds_secret else self._state.unauthenticated)[rank] = info

    # -- the decision ------------------------------------------------------------------------

    def _decide(self) -> MembershipDecision:
        """Write the decision, unless another site was faster: then follow that one's."""
        members = {self._rank: self._own, **self._state.authenticated}
        proposal = self._sign({str(rank): members[rank].to_json() for rank in sorted(members)})
        current = self._read(self._decision_key)
        for _ in self._replica_ids:  # each of them can be faster once
            decision = self._parse_decision(current)
            if decision is not None and self._includes_own(decision):
                return decision
            if decision is not None and not self._is_outdated(decision):
                raise RuntimeError("the other sites decided who takes part before this one had answered them")
            # Compare-and-set: of two sites that write at once, exactly one succeeds and the other follows it.
            current = self._store.compare_set(self._decision_key, current, proposal).decode(errors="replace")
            if current == proposal:
                return self._parse_decision(proposal)
        raise RuntimeError("the quorum's store does not keep what is written to it")

    def _sign(self, members: dict[str, str]) -> str:
        body = json.dumps(members)
        return json.dumps({"members": body, "proof": self._secret.proof("decision", body)})

    def _parse_decision(self, text: str) -> MembershipDecision | None:
        """The decision, if a holder of the secret has signed it."""
        try:
            entry = json.loads(text)
            body = entry["members"]
            if not self._secret.proves(entry["proof"], "decision", body):
                return None
            members = {int(rank): MemberInfo.from_json(info) for rank, info in json.loads(body).items()}
        except _MALFORMED:
            return None
        group_id = int.from_bytes(self._secret.key("group", body)[:7], "big")
        return MembershipDecision(dict(sorted(members.items())), group_id)

    def _includes_own(self, decision: MembershipDecision) -> bool:
        return decision.members.get(self._rank) == self._own

    def _is_outdated(self, decision: MembershipDecision) -> bool:
        """Whether it is of an earlier quorum: a site in it has published another info since."""
        return any(decision.members.get(rank, info) != info for rank, info in self._state.authenticated.items())

    def _read(self, key: str) -> str:
        if not self._store.check([key]):
            return ""
        value: Any = self._store.get(key)
        return value.decode(errors="replace") if len(value) <= _MAX_ENTRY_BYTES else ""
