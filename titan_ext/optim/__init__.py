"""Optimizers that torch does not have. Nothing here imports torchtitan."""

from titan_ext.optim.yogi import Yogi

__all__ = ["Yogi"]
