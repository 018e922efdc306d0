"""What a site says of itself to the outer loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from titan_ext.semi_sync.round.clock import Clock
from titan_ext.semi_sync.round.commit_log import CommitLog
from titan_ext.semi_sync.round.round import InFlightRound
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.sources.source import Source, Turn
from titan_ext.semi_sync.wire.manager import ReplicaManager
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteOptions:
    """Who a site is, and what it chooses for itself; the plan holds what all sites share."""

    name: str = ""
    """Under which commits are recorded; no two sites of a run share one. At most 64 bytes."""
    weight: float = 1.0
    """Its weight under ``weighting = "site"``."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What it has in common with some of the others, by key, such as ``{"language": "de"}``; for scopes with
    ``shared = "group"``."""
    ranks: SiteRanks = field(default_factory=SiteRanks)
    """Its ranks; by default those of the default process group."""
    commit_log: CommitLog | None = None
    """Where commits are recorded; that of rank 0 counts."""
    allow_rollback: bool = False
    """Go on from a checkpoint older than the site's last commit even if a site that took part in it is missing."""
    token_rows: TokenRowMap | None = None
    """Which rows of the run's tables it holds, for scopes with ``shared = "sparse_rows"``."""
    scope_rows: Mapping[str, TokenRowMap] = field(default_factory=dict)
    """By scope, where its rows stand for something else than the others'."""
    heartbeat_timeout_seconds: float = 0.0
    """After which the lighthouse takes a site for dead. A round that breaks is tried again after about as long; until
    then a quorum would be waited for, and the inner loop goes on instead."""
    grace_seconds: float = 0.0
    """For which a round waits for a site that is alive and late (``replica.join_timeout_seconds``); 0: not known. With
    ``late_work = "keep"`` the site warns where it is shorter than the inner steps between two rounds."""
    norms_every: int = 0
    """Inner steps from one round whose norms are measured to the next, at least; 0: none is."""
    region_manager: Callable[[int], ReplicaManager | None] | None = None
    """Makes this rank's manager, as ``manager``, of a quorum of the site's region alone, over which its averages
    (``region_sync_every``) run then. Told how many sites the region has at present; called on every rank once the site has
    joined, for from then on the others of the region wait for it. None: they are rounds of the quorum of all sites."""
    pairing: Literal["rank", "leader"] = "rank"
    """Who exchanges with the other sites: each rank, or rank 0 for all."""
    outer_state_device: Literal["same", "cpu"] = "same"
    """Where the global copy, the outer optimizer's state and the buffers lie."""
    clock: Clock = field(default_factory=Clock)
    """What it takes time from."""
    measure_loss: Callable[[], float] | None = None
    """Mean loss, in nats a token, of the parameters as they are on the site's own held-out text, for weights by loss
    (``plan.weighting.needs_loss``). Called on all ranks, which get the same, after a round that was committed."""
    make_in_flight: Callable[[], InFlightRound] = InFlightRound
    """Makes what runs a round beside inner steps."""
    sources: Sequence[Source] = ()
    """Its data sources, which train one after the other in a round; none: the site is one itself. With
    ``source_placement = "pollen"`` those of the run, equal at all sites."""
    serve: Callable[[Turn], None] = lambda turn: None
    """Told of each source that is about to train, so that its data comes next."""
