"""Membership between sites over torchft: addresses, quorum, and the transport of shared state."""

from titan_ext.replica.config import ReplicaConfig
from titan_ext.replica.manager import Replica

__all__ = ["Replica", "ReplicaConfig"]
