"""The inner level of hierarchical averaging (HierFAVG, arXiv 1905.06641): the sites of a region become their mean."""

from dataclasses import dataclass

from titan_ext.semi_sync.plan.plan import Apply, SyncRule
from titan_ext.semi_sync.state.synced_state import BindOptions, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionAverage(Apply):
    """The local parameters become the mean over the site's region; what all sites share is left as it is.

    With plain SGD, every step, and sites weighted by their tokens, that is one step of the region's whole batch.
    """

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """The parameters themselves; the other level's rule keeps the global copy."""
        return SyncedState(rule, tensors, options)
