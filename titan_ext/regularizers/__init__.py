"""What keeps a site's inner steps near the model that it has received, by the names of ``[[regularizer.phases]]``.

A regulariser is one file with a class that derives from ``Regularizer`` and registers itself; README.md has the settings.
"""

from titan_ext.regularizers import distillation, elastic, proximal
from titan_ext.regularizers.config import Phase, RegularizerConfig
from titan_ext.regularizers.received import Received
from titan_ext.regularizers.regularizer import REGULARIZERS, Regularizer, register_regularizer

__all__ = [
    "REGULARIZERS",
    "Phase",
    "Received",
    "Regularizer",
    "RegularizerConfig",
    "distillation",
    "elastic",
    "proximal",
    "register_regularizer",
]
