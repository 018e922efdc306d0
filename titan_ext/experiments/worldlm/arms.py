"""What is compared: one model for all sites, some layers of each site's own, and each site alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titan_ext.experiments.runs import BySite
from titan_ext.semi_sync import ScopeConfig, SemiSyncConfig

LOCAL, CENTRALISED = "local", "centralised"
FEDAVG, FEDPER, WORLDLM, SWAPPED, UNROUTED = (
    "fedavg",
    "fedper",
    "worldlm",
    "worldlm_swapped",
    "worldlm_swapped_unrouted",
)
DIFFERENCES, SWAPPED_DIFFERENCES, UNROUTED_DIFFERENCES = (
    "worldlm_differences",
    "worldlm_differences_swapped",
    "worldlm_differences_swapped_unrouted",
)
_KEY_BLOCKS = 0.3
_DIFFERENCES: dict[str, Any] = {"compared": "differences"}
LITTLE_NOISE, MUCH_NOISE = "little_noise", "much_noise"
_NOISES: dict[str, dict[str, Any]] = {
    # An update of all parameters of the small model has a norm of about 10; the noise on it, one of 1.7 and of 17.
    LITTLE_NOISE: {"clip": 5.0, "noise": 0.001},
    MUCH_NOISE: {"clip": 5.0, "noise": 0.01},
}

_WORLDLM: dict[str, dict[str, Any]] = {
    WORLDLM: {},
    "worldlm_uniform": {"temperature": 1e9},
    "worldlm_fedatt": {"attention": "fedatt"},
    SWAPPED: {},
    UNROUTED: {"routing_share": 0.0},
    DIFFERENCES: _DIFFERENCES,
    SWAPPED_DIFFERENCES: _DIFFERENCES,
    UNROUTED_DIFFERENCES: _DIFFERENCES | {"routing_share": 0.0},
    **{f"worldlm_{name}": noise for name, noise in _NOISES.items()},
}
_FEDAVG_NOISED = {f"fedavg_{name}": {"key_blocks": 0.0, "keys": [], **noise} for name, noise in _NOISES.items()}
ARMS = (LOCAL, CENTRALISED, FEDAVG, "diloco", "hierarchical", FEDPER, *_WORLDLM, *_FEDAVG_NOISED)
SWAPPED_ARMS = (SWAPPED, UNROUTED, SWAPPED_DIFFERENCES, UNROUTED_DIFFERENCES)
"""In which the last sites of the first two federations have changed places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs share."""

    corpus: str
    """Folder with a folder for each language; empty for made-up languages."""
    federations: str
    """Languages, one a site, with a comma between sites and a slash between federations."""
    dim: int
    layers: int
    steps: int
    """Inner steps; a multiple of ``sync_every``."""
    batch: int
    length: int
    sync_every: int
    device: str

    @property
    def groups(self) -> list[list[str]]:
        """The languages of each federation."""
        return [group.split(",") for group in self.federations.split("/")]

    @property
    def languages(self) -> list[str]:
        """Of the sites."""
        return [language for group in self.groups for language in group]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result(BySite):
    """What a run came to."""

    bytes_sent: int
    """By all sites."""
    tokens_sha256: str
    seconds: float


def regions(arm: str, settings: Settings) -> list[str]:
    """Of each site."""
    found = [f"f{place}" for place, group in enumerate(settings.groups) for _ in group]
    if arm in SWAPPED_ARMS:
        first, second = len(settings.groups[0]) - 1, len(settings.groups[0]) + len(settings.groups[1]) - 1
        found[first], found[second] = found[second], found[first]
    return found


def outer_loop(arm: str, settings: Settings) -> SemiSyncConfig:
    """Of an arm with more than one model."""
    every = settings.sync_every
    shared: dict[str, Any] = {"sync_every": every, "outlier_threshold": 0.0}
    if arm in _WORLDLM or arm in _FEDAVG_NOISED:
        own: Mapping[str, Any] = {"federations": 1, "key_blocks": _KEY_BLOCKS, **_WORLDLM.get(arm, {})}
        own = _FEDAVG_NOISED.get(arm, own)
        config = SemiSyncConfig(
            method="worldlm", outer_optimizer="average", topology="regions", settings={"worldlm": dict(own)}, **shared
        )
    elif arm == "hierarchical":
        config = SemiSyncConfig(method="local_sgd", topology="regions", region_sync_every=max(1, every // 4), **shared)
    elif arm == FEDPER:
        last = max(1, round(_KEY_BLOCKS * settings.layers))
        patterns = [f"layers.{block}.*" for block in range(settings.layers - last, settings.layers)]
        personal = ScopeConfig(name="personal", parameters=[*patterns, "lm_head.*"], shared="local")
        config = SemiSyncConfig(method="local_sgd", scopes=[personal], **shared)
    else:
        config = SemiSyncConfig(method={FEDAVG: "local_sgd"}.get(arm, arm), **shared)
    return config
