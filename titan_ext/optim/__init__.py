"""Optimizers that torch does not have, or not as sites need them. Nothing here imports torchtitan."""

from titan_ext.optim.adopt import ADOPT
from titan_ext.optim.demo import DeMo
from titan_ext.optim.low_rank import LowRankAdamW
from titan_ext.optim.muon import Muon
from titan_ext.optim.quasi_hyperbolic import QHADOPT, QHSGDM, QHAdamW
from titan_ext.optim.sgd import SGD
from titan_ext.optim.yogi import Yogi

__all__ = ["ADOPT", "DeMo", "LowRankAdamW", "Muon", "QHADOPT", "QHAdamW", "QHSGDM", "SGD", "Yogi"]
