"""Binding a plan to a rank: which of its parameters belong to which row, and what all sites must share."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch.optim import Optimizer

from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.plan.plan import PARAMETERS, SyncPlan, SyncRow
from titan_ext.semi_sync.plan.scopes import deal, settings_by_scope
from titan_ext.semi_sync.site.by_leader import ByLeader
from titan_ext.semi_sync.site.by_rank import ByRank
from titan_ext.semi_sync.site.leader_manager import LedManager
from titan_ext.semi_sync.site.pairing import Pairing
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.site.shards import SiteShards
from titan_ext.semi_sync.state.sparse_tables import reduce_by_row
from titan_ext.semi_sync.state.synced_parameters import GlobalRow
from titan_ext.semi_sync.state.synced_state import SyncedRow
from titan_ext.semi_sync.state.token_row_map import RowIds
from titan_ext.semi_sync.state.views import ModelView
from titan_ext.semi_sync.wire.manager import ReplicaManager
from titan_ext.semi_sync.wire.reductions import Reduction

# Settings that a site may choose for itself; all others must be equal at all sites.
_SITES_OWN = {"bucket_mib", "global_device", "pairing"}


def bind_rows(
    plan: SyncPlan,
    config: SemiSyncConfig,
    view: ModelView,
    site: SiteRanks,
    outer_optimizers: Sequence[Optimizer] | None = None,
    row_ids: RowIds | None = None,
) -> list[SyncedRow]:
    """Bind every row of the plan to the shards that this rank holds. A collective over the site.

    Fragments are cut from the whole model, so that every pipeline stage agrees on them; a rank may
    hold nothing of a fragment and still takes part in its rounds.

    Args:
        plan: the method's plan.
        config: resolved settings.
        view: this rank's tensors.
        site: the ranks whose tensors make up the model.
        outer_optimizers: the user's own, one for each fragment.
        row_ids: which rows of the run's tables this site holds, for scopes that are shared by row.

    Raises:
        ValueError: fragments or scopes that do not fit the model, or a state that no optimizer keeps.
    """
    sizes: dict[str, int] = {}
    for rank_sizes in site.gather(view.sizes()):
        sizes.update(rank_sizes)
    home = deal(sizes, config)
    settings = settings_by_scope(config)
    for row in plan.rows:
        view.check_state(row.state, row.required)
    device = torch.device("cpu") if config.global_device == "cpu" else None
    rows = []
    for row in plan.rows:
        names = [
            name
            for name, parameter in view.parameters.items()
            if home.get(name) == (row.scope, row.fragment)
            and (row.state == PARAMETERS or _has_state(view, row, name, parameter))
        ]
        own = {"own_outer": outer_optimizers[row.fragment]} if outer_optimizers and not row.scope else {}
        kind = kind_of(row)
        if kind.by_row:
            own = {"row_ids": row_ids or RowIds.all(0)}
        rows.append(kind(row, names, view, settings[row.scope], device, **own))
    for row in rows:
        if row.by_row:
            reduce_by_row(row, [name for name, place in home.items() if place[0] == row.row.scope], sizes)
    return rows


def _has_state(view: ModelView, row: SyncRow, name: str, parameter: torch.Tensor) -> bool:
    return parameter.requires_grad and view.keeps(row.state, name)


def reductions_of(rows: Sequence[SyncedRow], config: SemiSyncConfig) -> list[Reduction]:
    """For each row the reduction that its scope's settings name."""
    by_scope = {name: settings.build_reduction() for name, settings in settings_by_scope(config).items()}
    return [by_scope[row.row.scope] for row in rows]


def pair(
    config: SemiSyncConfig,
    rows: Sequence[SyncedRow],
    view: ModelView,
    site: SiteRanks,
    manager: ReplicaManager | None,
) -> tuple[Pairing, ReplicaManager]:
    """Who exchanges with whom, and the manager that every rank of the site then has. A collective over the site."""
    if config.pairing != "leader":
        return ByRank(rows, site), manager
    shards = SiteShards(view.parameters, site.group, alone=site.alone)
    return ByLeader(rows, shards, int(config.bucket_mib * 2**18)), LedManager(manager, shards)


def kind_of(row: SyncRow) -> type[SyncedRow]:
    """The class that binds a row."""
    return row.kind or (GlobalRow if row.state == PARAMETERS else SyncedRow)


def fingerprint_of(config: SemiSyncConfig, shared: Mapping[str, str]) -> dict[str, str]:
    """What must be equal at sites that exchange, by key, so that a mismatch can be named.

    Args:
        config: resolved settings.
        shared: what the pairing needs to be equal; described at any length.
    """
    settings = {key: repr(value) for key, value in asdict(config).items() if key not in _SITES_OWN}
    return settings | {
        key: value if len(value) <= 16 else hashlib.sha256(value.encode()).hexdigest()[:16]
        for key, value in shared.items()
    }


def fingerprint_number(fingerprint: Mapping[str, str]) -> int:
    """A non-negative number below 2**62 that equal fingerprints share."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The keys in which two fingerprints differ, with both values."""
    keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    return "; ".join(f"{key}: theirs {theirs.get(key)}, ours {ours.get(key)}" for key in keys)
