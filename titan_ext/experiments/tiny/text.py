"""Characters of a corpus, and windows of them: what each site of a tiny model trains on at each step."""

from functools import lru_cache

import numpy as np
import torch

from titan_ext.data import open_corpus
from titan_ext.data.feed import CorpusFeed, Selection
from titan_ext.data.order import Split
from titan_ext.errors import UserError

VOCABULARY = 96
"""Characters known: the 94 printable ones of ASCII and the space, and one for all others."""

_HOLDOUT = 0.05
_CODES = torch.full((256,), 0, dtype=torch.uint8)
_CODES[32:127] = torch.arange(1, VOCABULARY, dtype=torch.uint8)


class Windows:
    """Random windows of each site's own documents.

    Args:
        corpus: its name; the sites share its documents out.
        sites: how many.
        batch: windows of a site and step.
        length: characters of a window.
        seed: of the windows.

    Raises:
        UserError: the corpus cannot be read, or has too little text.
    """

    def __init__(self, corpus: str, sites: int, batch: int, length: int, seed: int) -> None:
        self._texts = [characters(corpus, "train", site, sites) for site in range(sites)]
        if min(map(len, self._texts)) <= length:
            raise UserError(f"--corpus {corpus}: too little text for {sites} sites")
        self._generators = [np.random.default_rng([seed, site]) for site in range(sites)]
        self._batch, self._inside = batch, torch.arange(length)

    def take(self, steps: int) -> torch.Tensor:
        """The windows of the next steps, int64 ``[steps, sites, batch, length]``."""
        return torch.stack([self._of_site(site, steps) for site in range(len(self._texts))], dim=1)

    def _of_site(self, site: int, steps: int) -> torch.Tensor:
        text, size = self._texts[site], (steps, self._batch)
        starts = self._generators[site].integers(len(text) - len(self._inside), size=size)
        return text[torch.from_numpy(starts).unsqueeze(-1) + self._inside].long()


def validation_windows(corpus: str, count: int, length: int) -> torch.Tensor:
    """Windows spread evenly over the documents that no site trains on, int64 ``[count, length]``.

    Raises:
        UserError: the corpus cannot be read, or has too little text.
    """
    text = characters(corpus, "validation", 0, 1)
    if len(text) <= length:
        raise UserError(f"--corpus {corpus}: too little text to measure on")
    starts = torch.linspace(0, len(text) - length - 1, count).long()
    return text[starts.unsqueeze(-1) + torch.arange(length)].long()


@lru_cache(maxsize=64)
def characters(corpus: str, split: Split, share: int, shares: int) -> torch.Tensor:
    """The characters of part ``share`` of ``shares`` of a split, uint8.

    Raises:
        UserError: the corpus cannot be read.
    """
    chosen = Selection(
        seed=0,
        shuffle=False,
        shuffle_buffer=1,
        split=split,
        holdout_fraction=_HOLDOUT,
        share_index=share,
        share_count=shares,
    )
    read = CorpusFeed(_corpus(corpus), chosen).read(0, None, 0, 1)
    content = b"\n".join(document.text.encode() for document in read)
    return _CODES[torch.frombuffer(bytearray(content or b"\n"), dtype=torch.uint8).int()]


@lru_cache(maxsize=2)
def _corpus(name: str):  # type: ignore[no-untyped-def]
    return open_corpus(name)
