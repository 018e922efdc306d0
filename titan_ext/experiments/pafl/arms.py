"""What is compared: sites alone, sites together, and together near the received model."""

from collections.abc import Mapping
from dataclasses import dataclass

from titan_ext.experiments.runs import BySite
from titan_ext.regularizers import Phase

ALONE, TOGETHER = "alone", "federated"
ARMS = (ALONE, TOGETHER, "proximal", "ewc", "distillation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs share."""

    corpus: str
    """Folder with a folder for each language."""
    languages: str
    """Comma-separated, one for each site: the first has all of its documents."""
    shrink: int
    """Each next site has one in so many of the share before."""
    dim: int
    layers: int
    steps: int
    """Inner steps with rounds; a multiple of ``sync_every``."""
    adapt_steps: int
    """Inner steps of each site by itself after them."""
    batch: int
    length: int
    sync_every: int
    device: str

    @property
    def names(self) -> list[str]:
        """The languages."""
        return self.languages.split(",")

    @property
    def rounds(self) -> int:
        """Of a run."""
        return self.steps // self.sync_every

    @property
    def parts(self) -> list[int]:
        """One in how many of its language's documents each site has."""
        return [self.shrink**site for site in range(len(self.names))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result(BySite):
    """What a run came to: the losses are those of each site's own model alone, of the shared one together."""

    adapted: list[float | None]
    """As the losses, after the steps of each site by itself."""
    tokens_sha256: str
    seconds: float


def phases(arm: str, rounds: int) -> list[Phase]:
    """The arm's regularisers: the proximal term in all rounds, the others in the second half of them."""
    later: Mapping[str, int] = {} if arm == "proximal" else {"from_round": rounds // 2}
    return [] if arm in (ALONE, TOGETHER) else [Phase(name=arm, **later)]
