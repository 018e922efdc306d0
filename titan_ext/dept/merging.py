"""Rows of a global table from those of the sites that hold the same token."""

from collections.abc import Mapping, Sequence

import torch
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from titan_ext.data.tokenizers.bpe import BOS, EOS, PAD
from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
from titan_ext.data.tokenizers.trimmed import TrimmedTokenizer
from titan_ext.data.tokenizers.vocabulary import Vocabulary
from titan_ext.errors import UserError
from titan_ext.export.tokenizer_files import byte_alphabet

Tokens = Sequence[str | None]
"""The string of the token that each row of a table stands for; None for a row that stands for none."""


def tokens_of(config: BaseTokenizer.Config, assets: str) -> Tokens:
    """The tokens of a tokenizer by their ids.

    Two tokenizers mean the same token where its string is the same; of one tokenizer, strings are as good as ids.

    Args:
        config: the tokenizer's.
        assets: folder of its files; empty for "byte".

    Raises:
        UserError: a tokenizer whose tokens have no strings.
    """
    if isinstance(config, TrimmedTokenizer.Config):
        whole = tokens_of(config.base, assets)
        return [whole[token] for token in Vocabulary.load(config.vocabulary_path).ids.tolist()]
    if isinstance(config, ByteTokenizer.Config):
        return [*byte_alphabet(), BOS, EOS, PAD]
    tokenizer = config.build(tokenizer_path=assets)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UserError(f"tokenizer: the tokens of a {type(tokenizer).__name__} have no strings to be found by")
    ids = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for token, place in ids.items():
        tokens[place] = token
    return tokens


class RowMeans:
    """The mean of each token's rows over the sites that hold the token.

    Args:
        tokens: of the global tokenizer.
        tables: the global ones by name, each ``[rows, dim]``, with at least a row for each token.
    """

    def __init__(self, tokens: Tokens, tables: Mapping[str, torch.Tensor]) -> None:
        self._row = {token: row for row, token in enumerate(tokens) if token is not None}
        self._tables = tables
        self._sums = {name: torch.zeros_like(table, dtype=torch.float32) for name, table in tables.items()}
        rows = next(iter(tables.values())).shape[0]
        self.holders = torch.zeros(rows, dtype=torch.int64)
        """``[rows]``: sites that have been added and hold the row's token."""

    def add(self, tokens: Tokens, tables: Mapping[str, torch.Tensor]) -> None:
        """Count a site in.

        Args:
            tokens: of the site's tokenizer.
            tables: the site's, under the same names.
        """
        shared = [(own, self._row[token]) for own, token in enumerate(tokens) if token in self._row]
        own, ours = torch.tensor(shared, dtype=torch.int64).reshape(-1, 2).unbind(1)
        self.holders.index_add_(0, ours, torch.ones_like(ours))
        for name, total in self._sums.items():
            held = tables[name].detach()[own.to(tables[name].device)]
            total.index_add_(0, ours.to(total.device), held.to(total))

    @torch.no_grad()
    def write(self) -> None:
        """Put the means into the global tables; rows that no site holds stay as they are."""
        (held,) = self.holders.nonzero(as_tuple=True)
        for name, table in self._tables.items():
            rows = held.to(table.device)
            table[rows] = (self._sums[name][rows] / self.holders[held, None].to(table.device)).to(table.dtype)
