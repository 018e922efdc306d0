"""BM25 of a sample against anchors, from tokens alone (Robertson and Zaragoza 2009, with idf = ln(1 + (N - n + ½)/(n + ½))).

A query counts each of its terms as often as it has it, and the score over several queries is their mean, so all that
the queries are is one value for each token: its mean count times its idf.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Bm25:
    """Queries and what a corpus says of their terms."""

    terms: torch.Tensor
    """fp32 ``[vocabulary]``: idf times the mean count in a query."""
    mean_length: float
    """Tokens of a document of the corpus."""
    k1: float
    b: float

    @classmethod
    def of(cls, documents: Sequence[Any], queries: Iterable[Any], *, vocabulary: int, k1: float, b: float) -> "Bm25":
        """From tokens of documents and of queries, each a sequence of integers below ``vocabulary``."""
        containing, asked, count = np.zeros(vocabulary), np.zeros(vocabulary), 0
        for document in documents:
            containing[np.unique(np.asarray(document, np.int64))] += 1
        for query in queries:
            asked += np.bincount(np.asarray(query, np.int64), minlength=vocabulary)
            count += 1
        idf = np.log1p((len(documents) - containing + 0.5) / (containing + 0.5))
        length = sum(map(len, documents)) / max(1, len(documents))
        return cls(torch.from_numpy(idf * asked / max(1, count)).float(), length, k1, b)

    def to(self, device: torch.device) -> "Bm25":
        """The same on a device."""
        return replace(self, terms=self.terms.to(device))

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of one document, int64 ``[n]``: a scalar."""
        return self.scores(tokens, torch.zeros_like(tokens))[0]

    def scores(self, tokens: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The score of each sample, fp32 ``[L]``, 0 where there is none.

        Shapes do not depend on values, and nothing waits for the host.

        Args:
            tokens: int64 ``[L]``.
            sample: which sample each belongs to, int64 ``[L]``.
        """
        places = len(tokens)
        # How often its sample has each token: equal ones stand together once sorted.
        kind = sample * len(self.terms) + tokens
        ordered = kind.sort().values
        count = torch.searchsorted(ordered, kind, right=True) - torch.searchsorted(ordered, kind)
        length = torch.zeros(places, device=tokens.device).index_add_(0, sample, torch.ones_like(tokens).float())
        norm = self.k1 * (1 - self.b + self.b * length[sample] / max(self.mean_length, 1.0))
        # Each of the ``count`` equal tokens brings its part of their common term.
        part = self.terms[tokens] * (self.k1 + 1) / (count + norm)
        return torch.zeros(places, device=tokens.device).index_add_(0, sample, part)
