"""Distillation from the received model, as PaFL uses it (arXiv 2305.02728; the loss is arXiv 1503.02531's)."""

from collections.abc import Mapping
from typing import ClassVar

from titan_ext.regularizers.regularizer import Regularizer, register_regularizer


@register_regularizer("distillation")
class Distillation(Regularizer):
    """Each token's loss is ``strength`` T^2 KL(received || own), at temperature T, plus the rest of 1 times its own.

    The divergence is summed over the vocabulary: a mean over it, as torch's default takes one, would vanish. The loss
    computes it (``titan_ext.losses``).
    """

    defaults: ClassVar[Mapping[str, float]] = {"strength": 0.95, "temperature": 6.0}
    teaches = True
    runs_passes = True
