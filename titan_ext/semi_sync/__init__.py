"""The outer loop between sites: methods as sync plans on one engine.

Depends on torch and on a small manager protocol (``torchft.manager.Manager`` has it), not on
torchtitan, so it serves any PyTorch training loop.
"""

from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.engine import SemiSync
from titan_ext.semi_sync.methods import method_names, register_method
from titan_ext.semi_sync.plan.plan import PARAMETERS, SyncPlan, SyncRow
from titan_ext.semi_sync.plan.scopes import ScopeConfig
from titan_ext.semi_sync.round.commit_log import Commit, CommitLog
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.outer_optimizers import outer_optimizer_names, register_outer_optimizer
from titan_ext.semi_sync.state.token_row_map import RowIds
from titan_ext.semi_sync.wire.ledger import Ledger, RoundRecord
from titan_ext.semi_sync.wire.manager import ReplicaManager

__all__ = [
    "PARAMETERS",
    "Commit",
    "CommitLog",
    "Ledger",
    "ReplicaManager",
    "RoundRecord",
    "RowIds",
    "ScopeConfig",
    "SemiSync",
    "SemiSyncConfig",
    "SiteRanks",
    "SyncPlan",
    "SyncRow",
    "method_names",
    "outer_optimizer_names",
    "register_method",
    "register_outer_optimizer",
]
