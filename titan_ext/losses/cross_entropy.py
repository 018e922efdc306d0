"""Cross-entropy with a weight for each token and a z-loss, on whole and on vocabulary-parallel logits.

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

from titan_ext.losses.vocabulary import log_partition, softened_divergence

PLAIN_METRIC, Z_METRIC, DIVERGENCE_METRIC = "cross_entropy_mean", "z_squared_mean", "divergence_mean"
SOURCES_METRIC = "cross_entropy_of_sources_mean"
"""Names of the losses without weights; their ending tells the chunked loss to add them up."""

_Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class WeightedCrossEntropy(torchtitan_loss.CrossEntropyLoss):
    """torchtitan's cross-entropy; with weights, each token's part is multiplied by its own.

    Weights of 1 give the bits of torchtitan's loss and gradients.

    Args:
        config: torchtitan's.
        compile_config: torchtitan's.
        z_loss: each token's loss also has this times the square of the log of its softmax's denominator (PaLM,
            arXiv 2204.02311, section 5).
    """

    def __init__(
        self,
        config: torchtitan_loss.CrossEntropyLoss.Config,
        *,
        compile_config: CompileConfig | None = None,
        z_loss: float = 0.0,
    ) -> None:
        self.fn: Callable[..., Any] = weighted_sums
        self._maybe_compile(compile_config)
        self._weighted = self.fn
        self._z_loss = z_loss
        self.teaching: tuple[float, float] | None = None
        """Share of the divergence from a teacher in each token's loss, and the temperature; None without a teacher."""
        self.sources = 0
        """How many sources are told apart where ``source`` is given."""
        super().__init__(config, compile_config=compile_config)  # makes ``fn`` the plain loss

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        teacher: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
        **inputs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss over ``global_valid_tokens``; with ``weights`` ``[B, L]`` also what its parts are without them.

        ``teacher`` has the logits of another model, this rank's columns ``[B, L, V]``, and ``source`` the number of each
        token's source ``[B, L]``, whose parts are told too; both are read only with ``weights``.
        """
        if weights is None:
            return super().__call__(pred, labels, global_valid_tokens, **inputs)
        with spmd.no_typecheck():
            taught = None if teacher is None else (teacher, *self.teaching)
            loss, plain, z, divergence, sources = self._weighted(
                pred, labels, weights, self.global_vocab_size, self._z_loss, taught, source, self.sources
            )
            parts = {PLAIN_METRIC: plain, Z_METRIC: z, DIVERGENCE_METRIC: divergence, SOURCES_METRIC: sources}
            metrics = {name: each.detach() / global_valid_tokens for name, each in parts.items() if each is not None}
            return loss / global_valid_tokens, metrics


def weighted_sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    global_vocab_size: int | None,
    z_loss: float = 0.0,
    taught: tuple[torch.Tensor, float, float] | None = None,
    source: torch.Tensor | None = None,
    sources: int = 0,
) -> _Sums:
    """Sums over tokens: of the loss with weights; without, of the negative log-likelihood, squared log Z and divergence,
    and of the first for each source ``[sources]``.

    Args:
        logits: ``[B, L, V]``.
        labels: int64 ``[B, L]``.
        weights: fp32 ``[B, L]``, without a gradient.
        global_vocab_size: rows of the whole vocabulary.
        z_loss: factor of the squared log Z in the loss; with 0 it is not computed (None).
        taught: a teacher's logits, the share of the divergence from them, and its temperature.
        source: int64 ``[B, L]``, numbers below ``sources``; None: sources are not told apart.
        sources: how many there are.
    """
    labels, weights = labels.flatten(), weights.flatten()
    own, group, columns = own_columns(logits, global_vocab_size)
    own = own.flatten(0, 1).float()
    if group is None:
        each = F.cross_entropy(own, labels, reduction="none", ignore_index=IGNORE_INDEX)
    else:
        each = torchtitan_loss._LossParallelCrossEntropy.apply(own, labels, group, columns, "none")

    def summed(values: torch.Tensor) -> torch.Tensor:
        return _summed(values, labels) if group is None else values.sum()

    mixed, plain, squares, divergence = each, summed(each), None, None
    if taught is not None:
        teacher, share, temperature = taught
        divergence = softened_divergence(teacher.flatten(0, 1).float(), own, group, temperature)
        divergence = divergence * (labels != IGNORE_INDEX)
        mixed = (1 - share) * each + share * divergence
    if z_loss:
        squares = log_partition(own, group).square() * (labels != IGNORE_INDEX)
        mixed = mixed + z_loss * squares
    by_source = None
    if source is not None:
        by_source = each.detach().new_zeros(sources).index_add(0, source.flatten(), each.detach())
    return summed(mixed * weights), plain, _sum(squares), _sum(divergence), by_source


def own_columns(logits: torch.Tensor, global_vocab_size: int | None) -> tuple[torch.Tensor, Any, Any]:
    """This rank's columns, the group that has the others (None where they are all), and how many there are in all."""
    if isinstance(logits, DTensor):
        return logits.to_local(), logits.device_mesh.get_group("tp"), logits.shape[-1]
    if spmd_mesh_size("tp") > 1:
        return logits, current_spmd_mesh().get_group("tp"), global_vocab_size
    return logits, None, logits.shape[-1]


def _sum(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.sum()


def _summed(each: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of ``[T]`` in the order in which the plain loss adds: the kernel is the same, so the bits are."""
    ignored = torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, 0)
    return F.nll_loss(-each[:, None], ignored, reduction="sum", ignore_index=IGNORE_INDEX)
