"""Cross-entropy with a weight for each token, on whole and on vocabulary-parallel logits.

Shapes: B batch, L sequence, V vocabulary (or this rank's share of it), T = B L.
"""

from collections.abc import Callable
from typing import Any

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.components import loss as torchtitan_loss
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size

PLAIN_METRIC = "cross_entropy_mean"
"""Name of the loss without weights; its ending tells the chunked loss to add it up."""

_Sums = tuple[torch.Tensor, torch.Tensor]


class WeightedCrossEntropy(torchtitan_loss.CrossEntropyLoss):
    """torchtitan's cross-entropy; with weights, each token's part is multiplied by its own.

    Weights of 1 give the bits of torchtitan's loss and gradients.
    """

    def __init__(
        self, config: torchtitan_loss.CrossEntropyLoss.Config, *, compile_config: CompileConfig | None = None
    ) -> None:
        self.fn: Callable[..., Any] = weighted_sums
        self._maybe_compile(compile_config)
        self._weighted = self.fn
        super().__init__(config, compile_config=compile_config)  # makes ``fn`` the plain loss

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        **inputs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss over ``global_valid_tokens``; with ``weights`` ``[B, L]`` also what it is without them."""
        if weights is None:
            return super().__call__(pred, labels, global_valid_tokens, **inputs)
        with spmd.no_typecheck():
            loss, plain = self._weighted(pred, labels, weights, self.global_vocab_size)
            return loss / global_valid_tokens, {PLAIN_METRIC: plain.detach() / global_valid_tokens}


def weighted_sums(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, global_vocab_size: int | None
) -> _Sums:
    """Sums over tokens of the negative log-likelihood, with weights and without.

    Args:
        logits: ``[B, L, V]``.
        labels: int64 ``[B, L]``.
        weights: fp32 ``[B, L]``, without a gradient.
        global_vocab_size: rows of the whole vocabulary.
    """
    labels, weights = labels.flatten(), weights.flatten()
    if isinstance(logits, DTensor):
        return _parallel(logits.to_local(), labels, weights, logits.device_mesh.get_group("tp"), logits.shape[-1])
    if spmd_mesh_size("tp") > 1:
        return _parallel(logits, labels, weights, current_spmd_mesh().get_group("tp"), global_vocab_size)
    each = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="none", ignore_index=IGNORE_INDEX)
    return _summed(each * weights, labels), _summed(each, labels)


def _parallel(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, group: Any, global_vocab_size: int
) -> _Sums:
    """As ``weighted_sums``, of this rank's columns ``[B, L, V]``."""
    each = torchtitan_loss._LossParallelCrossEntropy.apply(
        logits.flatten(0, 1).float(), labels, group, global_vocab_size, "none"
    )
    return (each * weights).sum(), each.sum()


def _summed(each: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of ``[T]`` in the order in which the plain loss adds: the kernel is the same, so the bits are."""
    ignored = torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, 0)
    return F.nll_loss(-each[:, None], ignored, reduction="sum", ignore_index=IGNORE_INDEX)
