"""ADAPT, online reweighting of training samples: arXiv 2605.05227 (ICLR 2026).

A sample's weight multiplies its loss: a sigmoid of how close the model's own representation of it is to that of some
anchors. The hidden states are those of the training pass; only the anchors take passes of their own.

Shapes: B batch, L sequence, D width of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import CompileConfig

from titan_ext.data.loader import open_feed
from titan_ext.losses.adapt.anchors import encoded, first_texts, packed
from titan_ext.losses.adapt.bm25 import Bm25
from titan_ext.losses.adapt.config import AdaptConfig
from titan_ext.losses.adapt.score import Centroid, MovingMoments
from titan_ext.losses.adapt.similarity import NEUTRAL, gate, pooled, samples, sums
from titan_ext.losses.adapt.statistics import Statistics
from titan_ext.losses.inner_step import InnerStep
from titan_ext.losses.registry import register_loss
from titan_ext.losses.token_loss import TokenLoss, whole
from titan_ext.losses.tokens import Tokens

_LEAST_DEVIATION = 1e-6
_LEAST_TOTAL = 1e-12


@register_loss("adapt")
class Adapt(TokenLoss):
    """Weighs samples by their similarity to anchors; see ``AdaptConfig``."""

    @dataclass(kw_only=True, slots=True)
    class Config(AdaptConfig):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        super().__init__(config, compile_config=compile_config)
        self.config = config
        self._reading_anchors = False
        self._next_refresh, self._synced = 0, False
        self._bm25: Bm25 | None = None

    def attach(self, step: InnerStep) -> None:
        """Read the anchors' texts, and for BM25 the site's first documents."""
        super().attach(step)
        config, device = self.config, step.device
        self._block = None if config.unit == "document" else config.block_length or step.seq_len
        self._statistics = Statistics(step.sources, step.width if config.center else 0, device)
        self._normaliser = torch.zeros((), dtype=torch.float64, device=device)
        self._centroid = Centroid(step.width, config.center, device)
        self._moments = MovingMoments(config.standardize_decay, device)
        self._since_sync = torch.zeros(2, dtype=torch.float64, device=device)
        """Tokens, and their weights, since the last round."""
        anchors = first_texts(open_feed(config.corpora()["anchors"]), config.max_anchors)
        if config.score == "bm25":
            self._learn_terms(anchors)
        else:
            tokens = encoded(step.tokenizer, anchors, step.seq_len)
            self._anchors = packed(tokens, step.seq_len, step.reader, step.readers, step.rows)

    def _learn_terms(self, anchors: list[str]) -> None:
        config, step = self.config, self._step

        def terms(text: str) -> list[int]:
            return step.tokenizer.encode(text, add_bos=False, add_eos=False)[: step.seq_len]

        some = zip(step.documents(), range(config.bm25_documents), strict=False)
        documents = [found for text, _ in some if (found := terms(text))]
        self._bm25 = Bm25.of(
            documents, map(terms, anchors), vocabulary=step.vocabulary, k1=config.bm25_k1, b=config.bm25_b
        ).to(step.device)
        known = torch.stack([self._bm25.score(torch.tensor(each, device=step.device)) for each in documents])
        self._moments.mean.copy_(known.mean())
        self._moments.deviation.copy_(known.std(correction=0))

    # -- weights -------------------------------------------------------------------------------------

    def weights(self, hidden: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Each token's weight, that of its sample, fp32 ``[B, L]``."""
        return torch.stack([self._weights(states, tokens.row(row)) for row, states in enumerate(hidden)])

    def _weights(self, hidden: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Of one sequence: ``[L]`` from ``[L, D]``."""
        sample, place = samples(tokens.positions, self._block)
        learnt = sums(tokens.labels != IGNORE_INDEX, sample)
        score = self._scores(hidden, tokens.inputs, sample, place, learnt)
        weight = self._gate(score, sums(torch.ones_like(sample), sample))
        self._statistics.add(weight, score, learnt)
        self._statistics.add_sources(weight[sample], tokens.source)
        if self.config.aggregation == "tokens":
            return weight[sample]
        self._normaliser.add_(((learnt > 0) * (weight if self.config.aggregation == "zsum" else 1.0)).sum())
        return (weight / learnt.clamp_min(1))[sample]

    def _scores(
        self,
        hidden: torch.Tensor,
        inputs: torch.Tensor,
        sample: torch.Tensor,
        place: torch.Tensor,
        learnt: torch.Tensor,
    ) -> torch.Tensor:
        if self._bm25 is not None:
            return self._bm25.scores(inputs, sample)
        embedding = pooled(hidden, sample, place + 1)
        if self.config.center:
            self._statistics.add_embeddings(embedding * (learnt > 0)[:, None])
        return self._centroid.score(embedding)

    def _gate(self, score: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Weights ``[L]`` of samples of so many tokens."""
        config = self.config
        if config.standardize or config.score == "bm25":
            score = (score - self._moments.mean) / (self._moments.deviation + _LEAST_DEVIATION)
        weight = torch.where(size < config.min_tokens, NEUTRAL, gate(score, config.temperature))
        return weight.clamp(config.min_weight, config.max_weight)

    def rescale(self, global_valid_tokens: torch.Tensor) -> float | None:
        """From a sum over the number of tokens to the aggregation that is asked for."""
        if self.config.aggregation == "tokens":
            return None
        total = self._step.sum_over_site(self._normaliser).item()
        self._normaliser.zero_()
        return global_valid_tokens.item() / (1.0 if self.config.aggregation == "sum" else max(total, _LEAST_TOTAL))

    # -- anchors -------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        """Have the model read the anchors anew where that is due."""
        synced = self._synced and self.config.refresh_after_sync
        if self._bm25 is not None or (step < self._next_refresh and not synced):
            return
        self._centroid.begin()
        self._reading_anchors = True
        self._step.read(self._anchors)
        self._reading_anchors = False
        self._centroid.end(self._step.sum_over_site(self._centroid.local))
        self._next_refresh, self._synced = step + self.config.refresh_every, False

    def __call__(
        self, pred: torch.Tensor, labels: torch.Tensor, global_valid_tokens: torch.Tensor | None = None, **inputs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss; while anchors are read, their embeddings are summed instead."""
        if not self._reading_anchors:
            return super().__call__(pred, labels, global_valid_tokens, **inputs)
        tokens = Tokens.unpack(labels)
        for row, hidden in enumerate(whole(pred)):
            self._centroid.read(hidden, tokens.positions[row], tokens.labels[row] != IGNORE_INDEX)
        return pred.new_zeros((), dtype=torch.float32), {}

    # -- over the steps ------------------------------------------------------------------------------

    def forget(self) -> None:
        """Drop the step's statistics and the sum of its weights."""
        super().forget()
        self._normaliser.zero_()

    def counts(self) -> torch.Tensor:
        """The step's statistics."""
        return self._statistics.local

    def settle(self, total: torch.Tensor) -> None:
        """Take the site's statistics of the step."""
        statistics = self._statistics
        statistics.settle(total)
        self._since_sync.add_(torch.stack([statistics.total("tokens"), statistics.total("weighted_tokens")]))
        if self.config.center:
            self._centroid.count(statistics.embeddings, statistics.total("samples"))
        if self.config.standardize:
            self._moments.add(*statistics.mean_and_variance("score"))

    def after_sync(self) -> None:
        """The parameters have jumped."""
        self._synced = True
        self._since_sync.zero_()

    def report(self) -> dict[str, float]:
        """Weights and scores of the last step's samples; see ``Statistics``."""
        return super().report() | self._statistics.report()

    @property
    def outer_weight(self) -> float | None:
        """Mean weight of the site's tokens since the last round, if that is to count."""
        if not self.config.scale_outer_weight:
            return None
        tokens, weighted = self._since_sync.tolist()
        return weighted / tokens if tokens else 1.0

    def state_dict(self) -> dict[str, Any]:
        """The centroid itself: the model of a resume is newer than the one that read the anchors."""
        counters = {"next_refresh": self._next_refresh, "synced": self._synced}
        return self._centroid.state | self._moments.state | {"since_sync": self._since_sync} | counters

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for name, value in self.state_dict().items():
            if isinstance(value, torch.Tensor):
                value.copy_(state[name])
        self._next_refresh, self._synced = state["next_refresh"], state["synced"]
        if self.config.standardize:
            self._moments.restore()
