"""How far a site has read its corpus, whoever of its ranks and loader workers has read what.

A reader's cursor means nothing to another number of readers. The documents of an epoch have one
order for all of them, of which each reads every n-th; so the first document that is not finished
tells where any number of readers can go on.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from titan_ext.data.packing import Cursor

WINDOW = 1 << 40
"""Numbers that documents of a window of a remote corpus may have."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The first document of an epoch that is not finished, of all documents of the site in reading order."""

    epoch: int
    document: int
    piece: int
    """The first piece of it that is not finished."""
    offset: int
    """Tokens of that that were used as inputs."""

    @classmethod
    def of(cls, states: Iterable[Mapping[str, Any]]) -> "Progress | None":
        """The progress of readers by their ``PackedTextDataset.state_dict``; None if their places are not positions.

        What faster readers have read beyond the slowest comes again.
        """
        found = []
        for state in states:
            if not isinstance(state["place"], int | None):
                return None
            document = 0 if state["place"] is None else state["place"] * state["shards"] + state["shard"]
            found.append((state["epoch"], document, state.get("piece", 0), state["offset"]))
        return cls(*min(found))

    def cursor(self, shard: int, shards: int) -> Cursor:
        """Where reader ``shard`` of ``shards`` goes on."""
        place = max(0, -((shard - self.document) // shards))
        is_first = place * shards + shard == self.document
        return Cursor(self.epoch, place, self.offset, self.piece) if is_first else Cursor(self.epoch, place)

    def __str__(self) -> str:
        window, document = divmod(self.document, WINDOW)
        return f"document {document} of {f'window {window} of ' if window else ''}epoch {self.epoch}"

    def shared_among(self, before: int, now: int) -> "Progress":
        """The same part of an epoch where the corpus is dealt to ``now`` sites instead of ``before``."""
        return replace(self, document=self.document * before // now, piece=0, offset=0)


def reader_states(state: Any) -> Iterator[Mapping[str, Any]]:
    """The states of the datasets inside those of torchdata's loaders, with or without workers."""
    if isinstance(state, Mapping) and "shards" in state:
        yield state
    elif isinstance(state, Mapping | list):
        for part in state.values() if isinstance(state, Mapping) else state:
            yield from reader_states(part)
