"""The outer loop between sites: methods as sync plans on one engine.

Depends on torch and on a small manager protocol (``torchft.manager.Manager`` serves), not on torchtitan, so it serves
any PyTorch training loop.
"""

from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.engine import SemiSync
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.options import SiteOptions
from titan_ext.semi_sync.plan.components import method_names
from titan_ext.semi_sync.plan.plan import SyncPlan
from titan_ext.semi_sync.plan.resolve import fill_defaults, resolve
from titan_ext.semi_sync.plan.rule import PARAMETERS, Apply, SyncRule, Wire
from titan_ext.semi_sync.plan.scopes import ScopeConfig
from titan_ext.semi_sync.plan.weighting import SiteWeighting, register_weighting
from titan_ext.semi_sync.round.commit_log import Commit, CommitLog
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.outer_optimizers import OuterOptimizer, register_outer_optimizer
from titan_ext.semi_sync.state.synced_parameters import Average, OuterStep
from titan_ext.semi_sync.wire.aggregations import ElementwiseAggregation, WholeAggregation, register_aggregation
from titan_ext.semi_sync.wire.codecs import Codec, register_codec
from titan_ext.semi_sync.wire.ledger import Ledger, RoundRecord
from titan_ext.semi_sync.wire.manager import ReplicaManager
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap

__all__ = [
    "PARAMETERS",
    "Apply",
    "Average",
    "Codec",
    "Commit",
    "CommitLog",
    "ElementwiseAggregation",
    "Ledger",
    "MethodContext",
    "OuterOptimizer",
    "OuterStep",
    "ReplicaManager",
    "RoundRecord",
    "ScopeConfig",
    "SemiSync",
    "SemiSyncConfig",
    "SiteOptions",
    "SiteRanks",
    "SiteWeighting",
    "SyncPlan",
    "SyncRule",
    "TokenRowMap",
    "WholeAggregation",
    "Wire",
    "fill_defaults",
    "method_names",
    "register_aggregation",
    "register_codec",
    "register_method",
    "register_outer_optimizer",
    "register_weighting",
    "resolve",
]
