"""How the ranks of one site exchange with those of another: rank by rank, or through a leader."""

from titan_ext.semi_sync.site.by_leader import ByLeader
from titan_ext.semi_sync.site.by_rank import ByRank

Pairing = ByRank | ByLeader
