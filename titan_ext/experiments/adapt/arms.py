"""What is compared: how samples weigh, whose anchors they are compared with, and whether sites meet."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from titan_ext.experiments.runs import BySite

SOURCES = ("own", "other", "off_topic", "noise")
"""What a site's stream is mixed of: text of its own target, of the other sites' targets, of no target, and noise."""
UNIFORM, ORACLE = "uniform", "oracle"
PLAIN, STANDARDIZED, STALE, BM25 = "adapt", "standardized", "standardized_stale", "bm25"
# Runs are of hundreds of steps: moments over a hundred of them would be those of another model. The decay was chosen in
# shorter runs of the first seed.
_STANDARDIZED = {"standardize": True, "center": True, "standardize_decay": 0.9}
ADAPT: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {},
    STANDARDIZED: _STANDARDIZED,
    STALE: _STANDARDIZED,
    BM25: {"score": "bm25"},
}
"""Settings of ADAPT by name; what they leave out is the loss's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One of what is compared."""

    weighting: str
    """``UNIFORM``, ``ORACLE``, which counts the anchors' sources alone, or one of ``ADAPT``."""
    together: bool = False
    """Whether the sites train one model by DiLoCo; otherwise each trains its own."""
    shared: bool = False
    """Whether the anchors of a site are those of all sites."""


_ANCHORED = (PLAIN, STANDARDIZED, ORACLE)
ARMS = {
    **{name: Arm(weighting=name) for name in (UNIFORM, *ADAPT, ORACLE)},
    "diloco_uniform": Arm(weighting=UNIFORM, together=True),
    **{f"diloco_{name}_own": Arm(weighting=name, together=True) for name in _ANCHORED},
    **{f"diloco_{name}_shared": Arm(weighting=name, together=True, shared=True) for name in _ANCHORED},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs share."""

    corpus: str
    """Folder with a folder for each language; empty for made-up languages."""
    targets: str
    """Comma-separated languages, one a site."""
    off_topic: str
    """A language that is no target."""
    own_share: float
    """Of a site's sequences that are of its own target; the other sources share the rest evenly."""
    dim: int
    layers: int
    steps: int
    """Inner steps; a multiple of ``sync_every``."""
    batch: int
    length: int
    sync_every: int
    anchors_every: int
    """Inner steps between two readings of the anchors; a divisor of ``sync_every``, so that each round has one after it."""
    device: str

    def refresh_every(self, weighting: str) -> int:
        """Inner steps between two readings of the anchors."""
        return self.sync_every if weighting == STALE else self.anchors_every

    @property
    def names(self) -> list[str]:
        """The targets."""
        return self.targets.split(",")

    @property
    def languages(self) -> list[str]:
        """All of them."""
        return [*self.names, self.off_topic]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result(BySite):
    """What a run came to; the losses are those of the sites' targets."""

    weights: list[list[float | None]]
    """For each ``sync_every`` steps the mean weight of each of ``SOURCES``, over the sites; empty without ADAPT."""
    tokens_sha256: str
    seconds: float


def described(arm: str) -> object:
    """What a run of an arm depends on besides settings, as JSON values."""
    return [asdict(ARMS[arm]), ADAPT.get(ARMS[arm].weighting)]
