"""A tokenizer whose ids are those of a site's own vocabulary (DEPT's TRIM and SPEC)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from titan_ext.data.tokenizers.traits import unknown_id
from titan_ext.data.tokenizers.vocabulary import Vocabulary

UNKNOWN_TEXT = "\N{REPLACEMENT CHARACTER}"


def has_unknown_row(base: BaseTokenizer, vocabulary: Vocabulary) -> bool:
    """Whether tokens outside the vocabulary, if there can be any, need a row that stands for no token of the base."""
    return len(vocabulary) < vocabulary.total and unknown_id(base) is None


class TrimmedTokenizer(BaseTokenizer):
    """Splits text as its base does, and numbers the tokens by their place in the site's vocabulary.

    A token outside the vocabulary becomes ``unknown_id``: the base's own unknown token where it has
    one, else a row of its own behind the vocabulary's. A vocabulary that holds every token needs none.

    Args:
        config: See ``Config``.
        tokenizer_path: Folder of the base's files.

    Raises:
        UserError: the file is not a vocabulary, or one of another tokenizer.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        base: BaseTokenizer.Config = field(default_factory=HuggingFaceTokenizer.Config)
        """The global tokenizer."""

        vocabulary_path: str = ""
        """File of the site's ``Vocabulary``."""

    def __init__(self, config: Config, *, tokenizer_path: str = "") -> None:
        super().__init__()
        self.base = config.base.build(tokenizer_path=tokenizer_path)
        """The global tokenizer."""
        self.vocabulary = Vocabulary.load(config.vocabulary_path)
        self.vocabulary.check(self.base, config.vocabulary_path)
        self._local = self.vocabulary.local_ids().numpy()
        self._global = self.vocabulary.ids.tolist()
        self.bos_id = self._local_id(getattr(self.base, "bos_id", None))
        self.eos_id = self._local_id(self.base.eos_id)
        self.pad_id = self._local_id(getattr(self.base, "pad_id", None))
        self._own_row = has_unknown_row(self.base, self.vocabulary)
        self.unknown_id = len(self.vocabulary) if self._own_row else self._local_id(unknown_id(self.base))

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        """Local ids of a text; arguments are the base's: ``text``, ``add_bos``, ``add_eos``."""
        local = self._local[np.asarray(self.base.encode(*args, **kwargs), np.int64)]
        return np.where(local < 0, self.unknown_id or 0, local).tolist()

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """The text of local ids; a row that stands for no token becomes U+FFFD."""
        pieces = groupby(token_ids, key=lambda token: token < len(self._global))
        return "".join(
            self.base.decode([self._global[token] for token in run], **kwargs) if held else UNKNOWN_TEXT * len([*run])
            for held, run in pieces
        )

    def get_vocab_size(self) -> int:
        """Rows that an embedding needs: the vocabulary, and the unknown token's where that has a row of its own."""
        return len(self.vocabulary) + self._own_row

    def _local_id(self, token: int | None) -> int | None:
        return None if token is None else int(self._local[token])
