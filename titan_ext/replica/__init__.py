"""Membership between sites over torchft: addresses, quorum, and the transport of shared state.

``Replica`` is imported when it is first asked for: how a process ends is in this package too, and must not wait for torch.
"""

from typing import TYPE_CHECKING, Any

from titan_ext.replica.config import ReplicaConfig

if TYPE_CHECKING:
    from titan_ext.replica.manager import Replica

__all__ = ["Replica", "ReplicaConfig"]


def __getattr__(name: str) -> Any:
    if name != "Replica":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from titan_ext.replica.manager import Replica

    return Replica
