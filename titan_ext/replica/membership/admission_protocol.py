"""How the sites of a quorum admit each other, over a store that anybody may read and write.

Every site posts a card with a fresh nonce, and to each card it finds there an answer: the proof that
it holds the secret, over its own card and the other's nonce. Once all have answered, or the time is
over, the first site that is ready writes the verdict: the cards of those it admits, signed. All
others go by it, so that no two of them believe in different groups.

What lies in the store from an earlier meeting, or is replayed from it, names other nonces and counts
for nothing.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.distributed import Store

from titan_ext.replica.membership.shared_secret import Secret

_POLL_SECONDS = 0.02
_LONGEST_POST = 2**20
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One site before a quorum."""

    nonce: str
    replica_id: str
    step: int
    """torchft's step: who is behind the highest is given the state."""
    store: str
    """``host:port`` of the site's store."""
    manager: str
    """URL of its manager server."""
    met: bool
    """Whether it has been admitted before."""
    expects: int = 0
    """Sites that it would rather wait for while nobody has been admitted before."""

    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> "Card":
        """Raises ValueError or TypeError if it is none."""
        card = cls(**json.loads(text))
        for name, kind in cls.__annotations__.items():
            if type(getattr(card, name)) is not kind:
                raise ValueError(f"a card whose {name} is no {kind.__name__}")
        return card


@dataclass(frozen=True)
class Verdict:
    """Who takes part.

    Args:
        cards: of the admitted sites, by their place in the quorum.
        group: a number that all of them know and nobody has used before.
    """

    cards: dict[int, Card]
    group: int

    @property
    def waits_for(self) -> int:
        """Sites that those who begin together wait for; 0 if they are enough, or are waited for themselves.

        All find the same, since all go by the same cards.
        """
        expected = max(card.expects for card in self.cards.values())
        begins = not any(card.met for card in self.cards.values())
        return expected if begins and len(self.cards) < expected else 0


@dataclass
class _Answers:
    """What one site has found out about the others."""

    given: dict[int, list[str]] = field(default_factory=dict)
    """By place: the other's nonce and the proof for it."""
    proven: dict[int, Card] = field(default_factory=dict)
    strangers: dict[int, Card] = field(default_factory=dict)
    """Those that answered with the proof of another secret."""


class Meeting:
    """One site at one meeting.

    Args:
        store: where the sites of the quorum meet; not trusted.
        own: this site's card.
        members: replica ids of the quorum in the order of their ranks.
        secret: what they prove to hold.
        suspects: replica ids that said nothing before; a tenth of the time has to do for them.
    """

    def __init__(
        self, store: Store, own: Card, members: Sequence[str], secret: Secret, suspects: Collection[str] = ()
    ) -> None:
        self._store = store
        self._own = own
        self._place = members.index(own.replica_id)
        self._members = members
        self._secret = secret
        self._suspects = {place for place, each in enumerate(members) if each in suspects}
        self._answers = _Answers()
        # Sites with another secret agree among themselves; their verdict is none of ours.
        self._verdict_key = f"verdict/{secret.proof('place')[:16]}"

    @property
    def strangers(self) -> Mapping[int, Card]:
        """Sites that hold another secret, by place; their cards are not to be believed."""
        return self._answers.strangers

    def hold(self, seconds: float) -> Verdict:
        """Wait for the others' proofs, ``seconds`` at most, and return who takes part.

        Raises:
            RuntimeError: the store failed, or the others decided without this site.
        """
        started = time.monotonic()
        self._post()
        while True:
            verdict = self._read_verdict(self._read(self._verdict_key))
            # Also with a verdict: who is not in it learns from the answers why.
            silent = self._hear()
            if verdict is not None and self._includes_me(verdict):
                return verdict
            patience = seconds / 10 if silent <= self._suspects else seconds
            if not silent or time.monotonic() - started > patience:
                return self._decide()
            time.sleep(_POLL_SECONDS)

    # -- cards and answers -------------------------------------------------------------------

    def _post(self) -> None:
        self._store.set(
            f"card/{self._place}", json.dumps({"card": self._own.text(), "answers": self._answers.given})
        )

    def _hear(self) -> set[int]:
        """Take in what has been posted; returns the places of those that have answered neither right nor wrong."""
        answers = self._answers
        others = set(range(len(self._members))) - {self._place}
        given = dict(answers.given)
        for place in others - answers.proven.keys() - answers.strangers.keys():
            self._hear_one(place)
        if answers.given != given:
            self._post()
        return others - answers.proven.keys() - answers.strangers.keys()

    def _hear_one(self, place: int) -> None:
        try:
            posted = json.loads(self._read(f"card/{place}"))
            text = posted["card"]
            card = Card.parse(text)
            nonce, proof = posted["answers"].get(str(self._place), ("", ""))
        except _MALFORMED:
            return
        if card.replica_id != self._members[place]:
            return
        if self._answers.given.get(place, [""])[0] != card.nonce:
            self._answers.given[place] = [card.nonce, self._secret.proof("card", self._own.text(), card.nonce)]
        if nonce != self._own.nonce:
            return  # not yet, or from another meeting
        held = self._secret.proves(proof, "card", text, nonce)
        (self._answers.proven if held else self._answers.strangers)[place] = card

    # -- the verdict -------------------------------------------------------------------------

    def _decide(self) -> Verdict:
        cards = {self._place: self._own, **self._answers.proven}
        proposal = self._signed({str(place): cards[place].text() for place in sorted(cards)})
        current = self._read(self._verdict_key)
        for _ in self._members:  # each of them can be faster once
            verdict = self._read_verdict(current)
            if verdict is not None and self._includes_me(verdict):
                return verdict
            if verdict is not None and not self._is_outdated(verdict):
                raise RuntimeError("the other sites decided who takes part before this one had answered them")
            current = self._store.compare_set(self._verdict_key, current, proposal).decode(errors="replace")
            if current == proposal:
                return self._read_verdict(proposal)
        raise RuntimeError("the store of the meeting does not keep what is written there")

    def _signed(self, cards: dict[str, str]) -> str:
        body = json.dumps(cards)
        return json.dumps({"cards": body, "proof": self._secret.proof("verdict", body)})

    def _read_verdict(self, text: str) -> Verdict | None:
        try:
            posted = json.loads(text)
            body = posted["cards"]
            if not self._secret.proves(posted["proof"], "verdict", body):
                return None
            cards = {int(place): Card.parse(card) for place, card in json.loads(body).items()}
        except _MALFORMED:
            return None
        group = int.from_bytes(self._secret.key("group", body)[:7], "big")
        return Verdict(dict(sorted(cards.items())), group)

    def _includes_me(self, verdict: Verdict) -> bool:
        return verdict.cards.get(self._place) == self._own

    def _is_outdated(self, verdict: Verdict) -> bool:
        """Whether it is of an earlier meeting: it has a card of a site that now has another one."""
        return any(verdict.cards.get(place, card) != card for place, card in self._answers.proven.items())

    def _read(self, key: str) -> str:
        if not self._store.check([key]):
            return ""
        value: Any = self._store.get(key)
        return value.decode(errors="replace") if len(value) <= _LONGEST_POST else ""
