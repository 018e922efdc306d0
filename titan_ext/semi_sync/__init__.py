"""The outer loop between sites: methods as sync plans on one engine.

Depends on torch and on a small manager protocol (``torchft.manager.Manager`` has it), not on
torchtitan, so it serves any PyTorch training loop.
"""

from titan_ext.semi_sync.commit_log import Commit, CommitLog
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.engine import SemiSync
from titan_ext.semi_sync.ledger import Ledger, RoundRecord
from titan_ext.semi_sync.manager import ReplicaManager
from titan_ext.semi_sync.methods import method_names, register_method
from titan_ext.semi_sync.outer_optimizer import outer_optimizer_names, register_outer_optimizer
from titan_ext.semi_sync.plan import PARAMETERS, SyncPlan, SyncRow
from titan_ext.semi_sync.row_ids import RowIds
from titan_ext.semi_sync.scopes import ScopeConfig
from titan_ext.semi_sync.site import SiteRanks

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
