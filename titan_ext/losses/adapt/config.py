"""Settings of ADAPT: the readings of the paper that its sources leave open."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from titan_ext.data import TextDataLoader
from titan_ext.errors import require, require_one_of
from titan_ext.losses.token_loss import TokenLoss

AGGREGATIONS = ("tokens", "mean", "sum", "zsum")
_OFTEN = 4
"""Steps between two readings of the anchors, as ``titan-ext bench adapt`` measures standardised scores; at 16 they gain less."""
_CHOICES = {"score": ("representation", "bm25"), "unit": ("document", "block"), "aggregation": AGGREGATIONS}


@dataclass(kw_only=True, slots=True)
class AdaptConfig(TokenLoss.Config):
    """``[loss.adapt]``."""

    anchors: str = ""
    """The target texts, a corpus as in ``data.dataset``: one of all sites, or each site's own in ``[site.loss.adapt]``."""

    anchors_text_key: str = "text"
    """As ``data.text_key``, of the anchors."""

    max_anchors: int = 400
    """Anchors that are read, from the first on; each is cut to ``training.seq_len`` tokens."""

    score: Literal["representation", "bm25"] = "representation"
    """What a sample's weight comes from: its embedding by the model that is being trained, or BM25 of its tokens, which
    needs no model and never changes."""

    unit: Literal["document", "block"] = "document"
    """What a sample is: a document, or what of it is in a sequence; or a block of tokens, whatever documents it holds."""

    block_length: int = 0
    """Tokens of a block; 0 is ``training.seq_len``."""

    aggregation: Literal["tokens", "mean", "sum", "zsum"] = "tokens"
    """How weighted losses add up: each token's over the number of tokens ("tokens"); or each sample's mean over the number
    of samples ("mean"), over nothing ("sum"), over the sum of the weights ("zsum")."""

    temperature: float = 1.0
    """What the score is divided by before the sigmoid (tau)."""

    min_weight: float = 0.0
    """No sample weighs less."""

    max_weight: float = 1.0
    """No sample weighs more."""

    refresh_every: int = 100
    """Inner steps after which the anchors are read anew by the model."""

    refresh_after_sync: bool = True
    """Whether they are also read anew after each round of the outer loop."""

    standardize: bool = False
    """Whether the mean and standard deviation of recent scores are taken out of a score before the sigmoid. BM25 always
    takes out those of the documents that it knows."""

    standardize_decay: float = 0.99
    """Of the moving averages of ``standardize``, a step."""

    center: bool = False
    """Whether the mean embedding of the samples since the last reading of the anchors is taken out of all embeddings."""

    min_tokens: int = 0
    """A sample with fewer tokens weighs 0.5, which a score of 0 gives."""

    bm25_k1: float = 1.5
    """How soon a term's repetition stops to count."""

    bm25_b: float = 0.75
    """How much a sample's length counts, from 0 to 1."""

    bm25_documents: int = 1000
    """The site's first documents, which tell how rare terms and how high scores are."""

    scale_outer_weight: bool = False
    """Whether the site's weight in a round is multiplied by the mean weight of its tokens since the last one. AdamW's
    updates do not grow with the loss, so only this shifts influence between sites."""

    def __post_init__(self) -> None:
        for key, allowed in _CHOICES.items():
            require_one_of(key, getattr(self, key), allowed)
        for key, least in (("max_anchors", 1), ("refresh_every", 1), ("block_length", 0), ("bm25_documents", 1)):
            require(getattr(self, key) >= least, key, getattr(self, key), f"at least {least}")
        require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(0 <= self.min_weight, "min_weight", self.min_weight, "at least 0")
        require(self.max_weight > 0, "max_weight", self.max_weight, "above 0")
        limit = f"at least min_weight ({self.min_weight})"
        require(self.max_weight >= self.min_weight, "max_weight", self.max_weight, limit)
        decay = self.standardize_decay
        require(0 <= decay < 1, "standardize_decay", decay, "from 0 to below 1")
        require(self.bm25_k1 > 0, "bm25_k1", self.bm25_k1, "above 0")
        require(0 <= self.bm25_b <= 1, "bm25_b", self.bm25_b, "from 0 to 1")
        model_only = [key for key in ("standardize", "center") if getattr(self, key)]
        for key in model_only if self.score == "bm25" else ():
            require(False, key, True, 'false with score = "bm25"')

    def corpora(self) -> Mapping[str, Any]:
        """The anchors."""
        return {"anchors": TextDataLoader.Config(dataset=self.anchors, text_key=self.anchors_text_key, shuffle=False)}

    def notes(self, sync_every: int | None) -> list[str]:
        """Lines on settings that come to nothing, and where standardised scores go by anchors that are read rarely."""
        return self._without_effect(sync_every) + self._on_old_anchors(sync_every)

    def _without_effect(self, sync_every: int | None) -> list[str]:
        by_model = self.score == "representation"
        unread = {
            'unit is "document"': ("block_length",) if self.unit == "document" else (),
            "standardize is false": ("standardize_decay",) if not self.standardize else (),
            'score is "representation"': ("bm25_k1", "bm25_b", "bm25_documents") if by_model else (),
            'score is "bm25"': ("refresh_every", "refresh_after_sync") if not by_model else (),
        }
        defaults = {each.name: each.default for each in fields(self)}
        lines = {
            because: [key for key in keys if getattr(self, key) != defaults[key]] for because, keys in unread.items()
        }
        notes = [
            f"without effect, because loss.adapt.{because}: " + ", ".join(f"loss.adapt.{key}" for key in keys)
            for because, keys in lines.items()
            if keys
        ]
        if self.scale_outer_weight and sync_every is None:
            notes.append('without effect, because semi_sync.method is "none": loss.adapt.scale_outer_weight')
        return notes

    def _on_old_anchors(self, sync_every: int | None) -> list[str]:
        every = self.refresh_every
        if self.refresh_after_sync and sync_every is not None:
            every = min(every, sync_every)
        if not self.standardize or every <= _OFTEN:
            return []
        return [
            f"loss.adapt.standardize = true, with anchors that are read every {every} steps: scores before and after a "
            "reading are not alike, and while the model changes fast the weights of whole batches swing (effective_ratio in "
            f'lines of the kind "loss"); read them more often: refresh_every = {_OFTEN} with standardize_decay = 0.9'
        ]
