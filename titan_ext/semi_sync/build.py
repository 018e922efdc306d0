"""What the engine is made of, and how it is put together for one rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from titan_ext.semi_sync.binding import bind_rows, fingerprint_number, fingerprint_of, pair, reductions_of
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.methods.des_loc import with_half_lives
from titan_ext.semi_sync.plan.plan import SyncPlan
from titan_ext.semi_sync.plan.progress import Progress
from titan_ext.semi_sync.plan.sampling import Draw
from titan_ext.semi_sync.plan.schedule import Schedule
from titan_ext.semi_sync.round.commit_log import CommitLog
from titan_ext.semi_sync.round.exchange import Exchange
from titan_ext.semi_sync.round.healing import Healing
from titan_ext.semi_sync.round.in_flight import Flight
from titan_ext.semi_sync.round.lineage import Lineage
from titan_ext.semi_sync.round.site_status import MOST_ROWS, NAME_BYTES
from titan_ext.semi_sync.site.pairing import Pairing
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.checksum import SharedChecksum
from titan_ext.semi_sync.state.synced_state import SyncedRow
from titan_ext.semi_sync.state.token_row_map import RowIds
from titan_ext.semi_sync.state.views import ModelView, as_optimizers
from titan_ext.semi_sync.wire.manager import ReplicaManager


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of one rank's outer loop."""

    config: SemiSyncConfig
    """Resolved."""
    plan: SyncPlan
    view: ModelView
    site: SiteRanks
    rows: list[SyncedRow]
    """The plan's, bound to this rank."""
    pairing: Pairing
    manager: ReplicaManager
    lineage: Lineage
    healing: Healing
    checksum: SharedChecksum
    exchange: Exchange
    schedule: Schedule
    draw: Draw
    device: torch.device
    """Of a round's buffer."""
    flight: Flight = field(default_factory=Flight)
    progress: Progress = field(default_factory=Progress)


def assemble(
    config: SemiSyncConfig,
    *,
    model_parts: Iterable[nn.Module],
    optimizers: Any,
    manager: ReplicaManager | None,
    site: SiteRanks,
    site_name: str,
    commit_log: CommitLog | None,
    roll_back: bool,
    outer_optimizers: Sequence[Optimizer] | None,
    row_ids: RowIds | None,
    silence_seconds: float,
) -> Parts:
    """Put the parts together; arguments as those of ``SemiSync``. A collective over the site.

    Raises:
        ValueError: a setting is wrong, or a synced state does not exist.
    """
    config, plan = _planned(config, optimizers)
    if len(site_name.encode()) > NAME_BYTES:
        raise ValueError(f"site name {site_name!r}: must be at most {NAME_BYTES} bytes")
    draw = Draw(config, site_name)
    lineage = Lineage(site_name, commit_log, site, roll_back=roll_back)
    view = ModelView(model_parts, optimizers)
    rows = bind_rows(plan, config, view, site, outer_optimizers, row_ids)
    pairing, manager = pair(config, rows, view, site, manager)
    fingerprint = fingerprint_of(config, pairing.fingerprint(rows))
    device = _device(config, rows)
    exchange = Exchange(
        manager,
        rows,
        fingerprint=fingerprint_number(fingerprint),
        lineage=lineage,
        reductions=reductions_of(rows, config),
        pairing=pairing,
        gather=site.gather,
        guard=(config.outlier_threshold, config.outlier_action),
        device=device,
        silence=silence_seconds,
    )
    return Parts(
        config=config,
        plan=plan,
        view=view,
        site=site,
        rows=rows,
        pairing=pairing,
        manager=manager,
        lineage=lineage,
        healing=Healing(rows, lineage, manager, site, fingerprint),
        checksum=SharedChecksum(rows, site, pairing.speaks_for),
        exchange=exchange,
        schedule=Schedule(plan),
        draw=draw,
        device=device,
    )


def _planned(config: SemiSyncConfig, optimizers: Any) -> tuple[SemiSyncConfig, SyncPlan]:
    """Resolved settings and their plan."""
    config = config.resolved()
    if config.method == "none":
        raise ValueError('method = "none": there is no outer loop to build')
    if config.half_life_periods:
        config = with_half_lives(config, as_optimizers(optimizers)[0].param_groups[0]["betas"])
    plan = config.plan()
    if len(plan.rows) > MOST_ROWS:
        raise ValueError(f"{len(plan.rows)} rows in the plan: must be at most {MOST_ROWS} (fewer fragments)")
    return config, plan


def _device(config: SemiSyncConfig, rows: Sequence[SyncedRow]) -> torch.device:
    if config.global_device == "cpu":
        return torch.device("cpu")
    return next((row.device for row in rows if row.numel), torch.device("cpu"))
