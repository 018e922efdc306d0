"""How the ranks of one site exchange with those of another: rank by rank, or through a leader."""

from titan_ext.semi_sync.pairing.by_leader import ByLeader
from titan_ext.semi_sync.pairing.by_rank import ByRank
from titan_ext.semi_sync.pairing.led_manager import LedManager
from titan_ext.semi_sync.pairing.shards import SiteShards

Pairing = ByRank | ByLeader

__all__ = ["ByLeader", "ByRank", "LedManager", "Pairing", "SiteShards"]
