"""What is compared: how many of how many sources train in a round; what a run is given and returns."""

import re
from dataclasses import dataclass
from math import inf

from titan_ext.errors import UserError

DEFAULT = ("2of8", "4of8", "8of8", "4of32")
_ARM = re.compile(r"^([1-9]\d*)of([1-9]\d*)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs of a comparison share."""

    dim: int
    """Width of the model."""
    layers: int
    """Transformer blocks."""
    steps: int
    """Inner steps of the run; a multiple of ``sync_every``."""
    sites: int
    """Virtual sites that the sources are dealt to."""
    batch: int
    """Sequences that a source trains on in a step."""
    length: int
    """Tokens of a sequence."""
    sync_every: int
    """Inner steps of a round."""
    corpus: str
    """What the sources share out evenly."""
    languages: str
    """Folder with a folder for each language, among which the sources are dealt instead; empty: the corpus."""
    source_optimizer: str
    """Whether a source keeps its inner optimizer's states from turn to turn: "stateless" or "stateful"."""
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to."""

    steps: list[int]
    """Inner steps of the run at each measurement, one after each round."""
    losses: list[float | None]
    """Validation loss then, in nats a token; None where it is no number."""
    tokens: list[int]
    """That all sources have trained on by then."""
    turns: list[int]
    """Rounds in which each source has trained."""
    tokens_sha256: str
    """Hash of the validation text, which all runs share; what is trained on differs with participation."""
    seconds: float

    @property
    def loss(self) -> float:
        """The last; infinite for a run that diverged."""
        return inf if self.losses[-1] is None else self.losses[-1]


def parse_arm(name: str) -> tuple[int, int]:
    """Sources of a round and of the population: ``4of32`` is (4, 32).

    Raises:
        UserError: it is none, or more than there are.
    """
    match = _ARM.match(name)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"--arms {name}: must be KofN, K of N sources in each round, such as {DEFAULT[0]}")
    return int(match[1]), int(match[2])
