"""The last round of methods whose sites differ until the end: the mean of the local parameters."""

import torch

from titan_ext.semi_sync.plan.plan import SyncRow
from titan_ext.semi_sync.state.synced_state import SyncedRow
from titan_ext.semi_sync.wire.reductions import AllReduce


class FinalMean(SyncedRow):
    """The mean replaces the local parameters, which are what a method without consensus calls global."""

    def __init__(self, row, names, view, config, device=None) -> None:
        super().__init__(row, names, view, config, device)
        self.reduction = AllReduce(int(config.bucket_mib * 2**18) or 1)  # no later round would make up for a loss

    def global_values(self) -> list[torch.Tensor]:
        """The local parameters."""
        return self.locals()


def final_rows(config) -> tuple[SyncRow, ...]:
    """One for each fragment."""
    return tuple(
        SyncRow(name="final", kind=FinalMean, fragment=fragment, period=1, final=True)
        for fragment in range(config.num_fragments)
    )
