"""From logits to a token, and from tokens to text."""

from collections.abc import Sequence

import torch
from torchtitan.components.tokenizer import BaseTokenizer


class Sampler:
    """Draws the next token; the same seed and logits give the same tokens.

    Args:
        vocabulary: ids of the tokenizer; a model may have rows for more, which no text has trained.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from so many of the most likely tokens; None: from all.
        top_p: draw from the fewest of the most likely tokens whose probabilities reach this sum.
        seed: of the draws.
    """

    def __init__(
        self,
        vocabulary: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._vocabulary = vocabulary
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """The token for logits ``[V]``."""
        logits = logits[: self._vocabulary].float().cpu()
        if self._temperature == 0:
            return int(logits.argmax())
        ordered, tokens = logits.sort(descending=True, stable=True)
        probabilities = torch.softmax(ordered[: self._top_k] / self._temperature, dim=0)
        # Those whose predecessors have not reached the sum: the first is always among them.
        probabilities *= probabilities.cumsum(0) - probabilities < self._top_p
        return int(tokens[torch.multinomial(probabilities, 1, generator=self._generator)])


class TextStream:
    """The text of tokens as they come; a character waits until all of its bytes are there.

    Args:
        tokenizer: that the tokens are of.
        prompt: tokens that go before; some tokenizers leave out the blank of a text's first word.
    """

    def __init__(self, tokenizer: BaseTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = [*prompt]
        self._before = len(tokenizer.decode(self._tokens)) if prompt else 0
        self.text = ""
        """All text so far, without the prompt's."""

    def push(self, token: int) -> str:
        """The text that a token adds."""
        self._tokens.append(token)
        return self._show(self._decoded().rstrip("\N{REPLACEMENT CHARACTER}"))

    def flush(self) -> str:
        """What is left, bytes that make no character included."""
        return self._show(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._tokens)[self._before :]

    def _show(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new
