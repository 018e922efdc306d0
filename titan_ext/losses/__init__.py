"""Losses beside torchtitan's, by the names of ``[loss] name``.

A loss is one file with a class that derives from ``TokenLoss`` and registers itself; README.md has an example.
"""

from titan_ext.losses import adapt
from titan_ext.losses.inner_step import InnerStep
from titan_ext.losses.registry import LOSSES, register_loss
from titan_ext.losses.token_loss import TokenLoss
from titan_ext.losses.tokens import Tokens

__all__ = ["LOSSES", "InnerStep", "TokenLoss", "Tokens", "adapt", "register_loss"]
