"""What a data source is, and what its turn in a round begins with."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A set of data with a model update of its own in a round: Photon's client."""

    name: str
    """Under which its place in the data and its inner optimizer's states are kept; unique at its site."""
    weight: float = 1.0
    """Its weight in a round's mean under ``weighting = "site"``, times the site's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A source is about to train."""

    source: str
    skip_steps: int | None = None
    """Inner steps' worth of its data, from the beginning, that go before; None: it goes on where this site left it."""
