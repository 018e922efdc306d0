"""The part of a global vocabulary that a site's documents use: V_k of DEPT (Iacob et al., ICLR 2025, A.2)."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.tokenizer import BaseTokenizer

from titan_ext.data.feed import Feed
from titan_ext.data.tokenizers.counting import count_tokens
from titan_ext.data.tokenizers.traits import fingerprint, row_count, special_ids
from titan_ext.error_text import unwritable
from titan_ext.errors import UserError
from titan_ext.files import write_whole


@dataclass(frozen=True, eq=False, slots=True)
class Vocabulary:
    """Ids of a global tokenizer that a site holds. A token's local id is its place among them.

    Raises:
        ValueError: the ids are not ascending, distinct and below the total, or the counts do not fit.
    """

    ids: torch.Tensor
    """``[n]`` int64, ascending and distinct."""
    total: int
    """Ids of the global tokenizer."""
    counts: torch.Tensor
    """``[total]`` int64: occurrences of each global id in what was read."""
    tokenizer: str
    """sha256 of the global tokenizer's tokenizer.json, or "byte"."""

    def __post_init__(self) -> None:
        edges = torch.tensor([-1, self.total])
        if self.ids.ndim != 1 or not bool((torch.cat([edges[:1], self.ids, edges[1:]]).diff() > 0).all()):
            raise ValueError(f"ids must be ascending, distinct and from 0 to {self.total - 1}")
        if self.counts.shape != (self.total,) or bool((self.counts < 0).any()):
            raise ValueError(f"counts must be {self.total} numbers, none negative")

    def __len__(self) -> int:
        return len(self.ids)

    def local_ids(self) -> torch.Tensor:
        """``[total]`` int64: the local id of each global one, -1 for those that the site does not hold."""
        local = torch.full((self.total,), -1, dtype=torch.int64)
        local[self.ids] = torch.arange(len(self))
        return local

    def row_ids(self, rows: int) -> torch.Tensor:
        """``[rows]`` int64: the global id of each row of a table, -1 for those that stand for none.

        Raises:
            ValueError: the table has fewer rows than the vocabulary.
        """
        if rows < len(self):
            raise ValueError(f"a table of {rows} rows is too small for a vocabulary of {len(self)}")
        return torch.cat([self.ids, torch.full((rows - len(self),), -1, dtype=torch.int64)])

    def share_outside(self, counts: torch.Tensor) -> float:
        """Share of tokens, counted as ``[total]``, that are outside the vocabulary; 0 of none."""
        outside = int(counts.sum()) - int(counts[self.ids].sum())
        return outside / max(int(counts.sum()), 1)

    def check(self, tokenizer: BaseTokenizer, path: str | Path) -> None:
        """Make sure that this is a vocabulary of the tokenizer.

        Args:
            tokenizer: the global tokenizer.
            path: the vocabulary's file, for the message.

        Raises:
            UserError: it is one of another tokenizer, or lacks special tokens of this one.
        """
        found, total = fingerprint(tokenizer), row_count(tokenizer)
        if (self.tokenizer, self.total) != (found, total):
            raise UserError(
                f"vocabulary = {str(path)!r}: was made for another tokenizer ({self.tokenizer[:12]}, {self.total} ids) "
                f"than the site's ({found[:12]}, {total} ids); delete it, or name one made for the site's"
            )
        missing = sorted(set(special_ids(tokenizer)) - set(self.ids.tolist()))
        if missing:
            raise UserError(f"vocabulary = {str(path)!r}: lacks special tokens of the tokenizer: {missing[:8]}")

    def save(self, path: str | Path) -> None:
        """Write one JSON file, whole or not at all; makes its folder.

        Raises:
            UserError: it cannot be written.
            RunError: its disk is full.
        """
        seen = self.counts.nonzero().flatten()
        content = {
            "tokenizer": self.tokenizer,
            "total": self.total,
            "ids": self.ids.tolist(),
            "seen": seen.tolist(),
            "counts": self.counts[seen].tolist(),
        }
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content) + "\n")
        except OSError as error:
            raise unwritable(f"vocabulary = {str(path)!r}", error) from None

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read what ``save`` has written.

        Raises:
            UserError: there is no such file, or it is not a vocabulary.
        """
        try:
            return _parse(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"vocabulary = {str(path)!r}: cannot be read: {error.strerror}") from None
        except KeyError as error:
            missing = f"has no key {error}"
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            missing = str(error).splitlines()[0]
        raise UserError(
            f"vocabulary = {str(path)!r}: not a vocabulary file ({missing}); 'titan-ext data vocab --out' makes one"
        )


def find_vocabulary(
    documents: Iterable[str] | Feed,
    tokenizer: BaseTokenizer,
    *,
    min_count: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Vocabulary:
    """The tokens that documents use, and the tokenizer's special ones; the same in whatever order they come.

    Args:
        documents: texts, or a feed, of which one epoch is read: those that the site trains on.
        tokenizer: the global tokenizer.
        min_count: occurrences below which a token is left out; from 1.
        progress: is given a line after every 16 MiB of text and at the end.

    Raises:
        UserError: no document holds any text, or one cannot be read.
        ValueError: ``min_count`` is below 1.
    """
    if min_count < 1:
        raise ValueError(f"min_count = {min_count}: must be at least 1")
    counts = count_tokens(documents, tokenizer, progress=progress)
    if not int(counts.sum()):
        raise UserError(f"data = {getattr(documents, 'name', '')!r}: no document holds any text for a vocabulary")
    held = counts >= min_count
    held[torch.tensor(special_ids(tokenizer), dtype=torch.int64)] = True
    return Vocabulary(held.nonzero().flatten(), len(counts), counts, fingerprint(tokenizer))


def _parse(content: Any) -> Vocabulary:
    if not isinstance(content, dict):
        raise TypeError("no JSON object")
    ids, seen, found = (_numbers(content, key) for key in ("ids", "seen", "counts"))
    counts = torch.zeros(content["total"], dtype=torch.int64)
    counts[seen] = found
    return Vocabulary(ids, content["total"], counts, str(content["tokenizer"]))


def _numbers(content: dict[str, Any], key: str) -> torch.Tensor:
    numbers = content[key]
    if not isinstance(numbers, list) or not all(type(each) is int for each in numbers):
        raise TypeError(f"{key} is not a list of whole numbers")
    return torch.tensor(numbers, dtype=torch.int64)
