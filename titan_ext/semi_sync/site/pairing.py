"""Who exchanges with whom."""

from titan_ext.semi_sync.site.by_leader import ByLeader
from titan_ext.semi_sync.site.by_rank import ByRank

Pairing = ByRank | ByLeader
