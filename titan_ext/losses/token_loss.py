"""The base of losses that see each token's document and the model's last hidden states.

Shapes: B batch, L sequence, D width of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CompileConfig

from titan_ext.data.tokenizers.counting import count_tokens
from titan_ext.data.tokenizers.unigram import Unigram
from titan_ext.losses.by_source import SourceLosses
from titan_ext.losses.cross_entropy import (
    DIVERGENCE_METRIC,
    PLAIN_METRIC,
    SOURCES_METRIC,
    Z_METRIC,
    WeightedCrossEntropy,
    own_columns,
)
from titan_ext.losses.inner_step import InnerStep
from titan_ext.losses.tokens import Tokens

_PARTS = ("cross_entropy", "z_squared", "unigram_ce", "divergence")
"""What is summed over the tokens without weights."""


class TokenLoss(ChunkedLossWrapper):
    """Cross-entropy in which ``weights`` says how much each token counts, on torchtitan's chunked loss.

    A loss derives from it, has a nested ``Config`` whose own fields are its settings, and overrides what it needs.
    Called with plain labels, as validation does, it is the plain loss. All hooks run at every rank of the site.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        loss_fn: CrossEntropyLoss.Config = field(default_factory=CrossEntropyLoss.Config)
        """Cross-entropy over the vocabulary."""

        z_loss: float = 0.0
        """As ``LossSection.z_loss``."""

        unigram_documents: int = 0
        """As ``LossSection.unigram_documents``."""

        by_source: bool = False
        """As ``LossSection.by_source``."""

        def corpora(self) -> Mapping[str, Any]:
            """``TextDataLoader.Config`` of each corpus that the loss reads, by the field that names it."""
            return {}

        def notes(self, sync_every: int | None) -> list[str]:
            """What a user should know of the settings, a line each.

            Args:
                sync_every: inner steps between rounds of the outer loop; None without one.
            """
            return []

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        super().__init__(config, compile_config=compile_config)
        self.loss_fn = WeightedCrossEntropy(config.loss_fn, compile_config=compile_config, z_loss=config.z_loss)
        self._z_loss, self._unigram_documents = config.z_loss, config.unigram_documents
        self._by_source: SourceLosses | None = None
        self._tells_sources = config.by_source
        self._teacher: torch.Tensor | None = None
        self.active = True
        """Whether calls are those of a step; others are plain and leave no trace."""

    def weights(self, hidden: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """How much each token counts: fp32 ``[B, L]``. Called without gradients.

        Args:
            hidden: what the head reads, after the last norm: ``[B, L, D]``.
            tokens: whose they are.
        """
        return torch.ones_like(tokens.labels, dtype=torch.float32)

    def attach(self, step: InnerStep) -> None:
        """Called once, when the model and the data are there."""
        self._step = step
        # In place from then on: a CUDA graph writes where it was captured.
        self._plain = torch.zeros(len(_PARTS), dtype=torch.float64, device=step.device)
        """Of this rank's tokens, each divided by the number of all tokens: see ``_PARTS``."""
        self._plain_of_site = torch.zeros_like(self._plain)
        if self._tells_sources:
            self._by_source = SourceLosses(step.corpora or step.sources, step.device)
            self.loss_fn.sources = self._by_source.count
        self._unigram: torch.Tensor | None = None
        if self._unigram_documents:
            counts = count_tokens(islice(step.documents(), self._unigram_documents), step.tokenizer)
            self._unigram = Unigram(counts).log_probabilities.to(step.device)

    def before_step(self, step: int) -> None:
        """Called before inner step ``step``, counted from 1."""

    def rescale(self, global_valid_tokens: torch.Tensor) -> float | None:
        """After the last backward pass of a step: what to multiply loss and gradients by; None for nothing."""
        return None

    def after_step(self) -> None:
        """Called after each inner step, before the outer loop's: sums over the site what its ranks have counted."""
        sources, own = self._counts_of_sources(), self.counts()
        total = self._step.sum_over_site(torch.cat([self._plain, sources, own]))
        plain, of_sources, own = total.split([len(self._plain), len(sources), len(own)])
        self._plain_of_site.copy_(plain)
        self._plain.zero_()
        if self._by_source is not None:
            self._by_source.settle(of_sources)
        self.settle(own)

    def forget(self) -> None:
        """Called where a step had no data, or its loss is not finite: drops what this rank has counted in it."""
        self._plain.zero_()
        self._counts_of_sources().zero_()
        self.counts().zero_()

    def _counts_of_sources(self) -> torch.Tensor:
        return self._plain.new_empty(0) if self._by_source is None else self._by_source.local

    def counts(self) -> torch.Tensor:
        """What this rank has counted in the step, fp64 ``[n]``, to be summed over the site; the tensor itself."""
        return self._plain.new_empty(0)

    def settle(self, total: torch.Tensor) -> None:
        """Take the site's sum of ``counts``; the next step counts anew."""

    def after_sync(self) -> None:
        """Called when the outer loop has changed the parameters."""

    def report(self) -> dict[str, float]:
        """Values of the last step for the log, by name."""
        cross_entropy, z_squared, unigram, divergence = self._plain_of_site.tolist()
        found = {"cross_entropy": cross_entropy}
        if self._z_loss:
            found["z_loss"] = self._z_loss * z_squared
        if self._unigram is not None:
            found |= {"unigram_ce": unigram, "normalised_loss": cross_entropy - unigram}
        if self.loss_fn.teaching is not None:
            found["divergence"] = divergence
        return found if self._by_source is None else found | self._by_source.report()

    @property
    def outer_weight(self) -> float | None:
        """Factor of the site's weight in the next round; None where the loss has no say in it."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, equal at all ranks of the site."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        **inputs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of hidden states ``[B, L, D]`` and packed ``Tokens`` ``[B, L, 6]``, or of plain labels ``[B, L]``."""
        if labels.dim() == 2:
            return super().__call__(pred, labels, global_valid_tokens, **inputs)
        tokens = Tokens.unpack(labels)
        if not self.active:
            return super().__call__(pred, tokens.labels, global_valid_tokens, **inputs)
        with torch.no_grad():
            weights = self.weights(whole(pred), tokens)
        taught = {} if self._teacher is None else {"teacher": self._teacher}
        self._teacher = None
        told = {} if self._by_source is None else {"source": self._by_source.places(tokens.source)}
        loss, metrics = super().__call__(pred, tokens.labels, global_valid_tokens, weights=weights, **taught, **told)
        if taught:
            self._plain[3].add_(metrics.pop(DIVERGENCE_METRIC))
        if self._by_source is not None:
            self._by_source.add(metrics.pop(SOURCES_METRIC), told["source"], tokens.labels, global_valid_tokens)
        self._plain[0].add_(metrics.pop(PLAIN_METRIC))
        if self._z_loss:
            self._plain[1].add_(metrics.pop(Z_METRIC))
        if self._unigram is not None:
            self._plain[2].add_(self._unigram_sum(tokens.labels) / global_valid_tokens)
        return loss, metrics

    @torch.no_grad()
    def learn_from(self, hidden: torch.Tensor) -> None:
        """Take what another model makes of the batch that is the next to come.

        Its logits are held whole until then, whatever the chunks.

        Args:
            hidden: what the head reads, ``[B, L, D]``, with the other model's head in place.
        """
        self._teacher, _, _ = own_columns(self.lm_head(hidden), self.loss_fn.global_vocab_size)

    def _unigram_sum(self, labels: torch.Tensor) -> torch.Tensor:
        learnt = labels != IGNORE_INDEX
        return -(self._unigram[torch.where(learnt, labels, 0)] * learnt).sum()


def whole(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states without a gradient, as a plain tensor; tensor parallelism has them whole on each rank."""
    hidden = hidden.detach()
    return hidden.full_tensor() if isinstance(hidden, DTensor) else hidden
