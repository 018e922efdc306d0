"""A tokenizer without a file: the bytes of UTF-8."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchtitan.components.tokenizer import BaseTokenizer

BYTES = 256
BOS_ID, EOS_ID, PAD_ID = BYTES, BYTES + 1, BYTES + 2
VOCABULARY = BYTES + 3


class ByteTokenizer(BaseTokenizer):
    """Tokens 0 to 255 are the bytes of UTF-8; 256, 257 and 258 mark begin, end and padding.

    Args:
        config: Has no fields.
        tokenizer_path: Not used: torchtitan gives every tokenizer one.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config | None = None, *, tokenizer_path: str = "") -> None:
        super().__init__()
        self.bos_id = BOS_ID
        self.eos_id: int | None = EOS_ID
        self.pad_id = PAD_ID

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Tokens of a text; half a surrogate pair, which has no bytes, becomes a question mark."""
        tokens = list(text.encode("utf-8", errors="replace"))
        if add_bos:
            tokens.insert(0, BOS_ID)
        if add_eos:
            tokens.append(EOS_ID)
        return tokens

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens: marks are left out, and bytes that are not UTF-8 become U+FFFD."""
        return bytes(token for token in token_ids if token < BYTES).decode("utf-8", errors="replace")

    def get_vocab_size(self) -> int:
        """259."""
        return VOCABULARY
