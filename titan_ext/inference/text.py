"""Text that a site's model has not been trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import default_collate

from titan_ext.config.load import Site
from titan_ext.data.dataset import PackedTextDataset
from titan_ext.data.loader import TextDataLoader, open_feed
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.errors import UserError

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
"""({"input": [B, L], "positions": [B, L]}, labels [B, L]), all int64."""


@dataclass(frozen=True, slots=True)
class Text:
    """Packed sequences, and in words what they are."""

    description: str
    batches: list[Batch]

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(labels.numel() for _, labels in self.batches)


def evaluation_text(
    site: Site, corpus: str | None, tokens: int, batch_size: int, trained_with: Mapping[str, Any] | None = None
) -> Text:
    """The first tokens, in a fixed order, of the text to evaluate on.

    It is the corpus that the user names; else the run's validation data; else the documents that the site's training
    leaves out.

    Args:
        site: whose model is evaluated.
        corpus: as in ``data``; None for the site's own choice.
        tokens: at most; a last incomplete sequence is completed.
        batch_size: sequences of a batch; the last may have fewer.
        trained_with: the settings that the run recorded, which decide what it left out; None: the site's do.

    Raises:
        UserError: the site trains on all of its text and no other is named, or there is too little text.
    """
    config, description = _named(site, corpus) if corpus is not None else _held_out(site, trained_with)
    config.validate()
    length = site.config.training.seq_len
    feed = open_feed(config)
    dataset = PackedTextDataset(feed, build_tokenizer(site.tokenizer, site.vocabulary), length, infinite=False)
    dataset.check(batch_size=1, workers=0)
    sequences = list(islice(dataset, -(-tokens // length)))
    starts = range(0, len(sequences), batch_size)
    if feed.bad_records.count:
        description += f"; {feed.bad_records.count} documents left out (data.on_bad_record)"
    return Text(description, [default_collate(sequences[start : start + batch_size]) for start in starts])


def _named(site: Site, corpus: str) -> tuple[TextDataLoader.Config, str]:
    own = site.config.dataloader
    config = replace(own, dataset=corpus, split="auto", holdout_fraction=0.0, share_index=0, share_count=1)
    return config, f"{corpus}, all documents" + (" (the site trains on it)" if corpus == own.dataset else "")


def _held_out(site: Site, trained_with: Mapping[str, Any] | None) -> tuple[TextDataLoader.Config, str]:
    validator, own = site.config.validator, site.config.dataloader
    if validator.enable:
        return validator.dataloader, f"{validator.dataloader.dataset}, the run's validation data"
    held_out = own.held_out()
    if held_out is None:
        raise UserError(
            f'--corpus is missing: site "{site.name}" trains on all documents of its data ({own.dataset}); name '
            'other text, or hold some out of training with data.split = "train" and either data.holdout_fraction or '
            'files that are called "validation" or "test"'
        )
    for key in ("dataset", "split", "holdout_fraction"):
        now, then = getattr(own, key), (trained_with or {}).get("data", {}).get(key, getattr(own, key))
        if now != then:
            raise UserError(
                f"data.{key} = {now!r}: was {then!r} in training, so what it holds out may have been trained on; "
                "restore it, or name other text with --corpus"
            )
    part = f"{own.holdout_fraction:.2%} of the documents" if own.holdout_fraction else "the files of validation or test"
    return held_out, f'{own.dataset}, {part}, which data.split = "train" leaves out'
