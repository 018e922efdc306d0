"""One token after another: with a cache, without one, and with as many iterations as each token needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from titan_ext.inference.cache import KeyValueCache, use_cache
from titan_ext.inference.model import logits_of
from titan_ext.models.abbie.model import AbbieModel

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder

# Tokens of a prompt that are read together: their logits, which nobody needs, take memory.
_TOGETHER = 512


class Decoding(ABC):
    """A sequence that grows.

    Args:
        model: in evaluation mode.
        iterations: of a model that iterates; None for any other.
    """

    def __init__(self, model: "Decoder", iterations: int | None) -> None:
        self._model = model
        self._iterations = iterations
        self._device = next(model.parameters()).device
        self.iterations_run: list[int] = []
        """Iterations of each ``step``."""

    @abstractmethod
    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens of which nothing is predicted."""

    @abstractmethod
    def step(self, token: int) -> torch.Tensor:
        """Append a token; returns the logits ``[V]`` of the next."""

    def _inputs(self, tokens: Sequence[int], first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their positions from ``first`` on, each int64 ``[1, L]``."""
        positions = torch.arange(first, first + len(tokens), device=self._device)
        return torch.tensor([list(tokens)], device=self._device), positions[None]


class Uncached(Decoding):
    """Every step computes the whole sequence again."""

    def __init__(self, model: "Decoder", iterations: int | None) -> None:
        super().__init__(model, iterations)
        self._tokens: list[int] = []

    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens of which nothing is predicted."""
        self._tokens += tokens

    @torch.no_grad()
    def step(self, token: int) -> torch.Tensor:
        """Append a token; returns the logits ``[V]`` of the next."""
        self._tokens.append(token)
        self.iterations_run.append(self._iterations or 1)
        return logits_of(self._model, *self._inputs(self._tokens, 0), iterations=self._iterations)[0, -1]


class Cached(Decoding):
    """Every step computes its token only; the cache has what the tokens before it left.

    Args:
        model: in evaluation mode; ``use_cache`` is called on it.
        iterations: of a model that iterates; None for any other.
        capacity: tokens of the sequence at most.
    """

    def __init__(self, model: "Decoder", iterations: int | None, capacity: int) -> None:
        super().__init__(model, iterations)
        use_cache(model)
        self._cache = KeyValueCache(capacity)
        self._length = 0

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens of which nothing is predicted."""
        for start in range(0, len(tokens), _TOGETHER):
            self._append(tokens[start : start + _TOGETHER], self._logits)

    @torch.no_grad()
    def step(self, token: int) -> torch.Tensor:
        """Append a token; returns the logits ``[V]`` of the next."""
        self.iterations_run.append(self._iterations or 1)
        return self._append([token], self._logits)

    def _append(
        self, tokens: Sequence[int], forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        logits = forward(*self._inputs(tokens, self._length))
        self._length += len(tokens)
        return logits[0, -1]

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return logits_of(self._model, tokens, positions, self._cache, self._iterations)


class EarlyExit(Cached):
    """Each step iterates until its token's latent state has settled.

    The state has settled when the relative change from one iteration to the next falls below a tolerance. It is the
    change of the state's direction, which is all that the blocks' norms let through: under AbbIE's variant D the norm
    itself doubles with every iteration.

    Tokens that are read go through all iterations. In the iterations that a token has not run, later tokens see its
    keys and values of the last one that it ran, which is what further iterations of a settled state would have left.

    Args:
        model: in evaluation mode; ``use_cache`` is called on it.
        tolerance: relative change, from 0 (never stops early) to 2 (always stops after one iteration).
        most: iterations at most.
        capacity: tokens of the sequence at most.
    """

    def __init__(self, model: AbbieModel, tolerance: float, most: int, capacity: int) -> None:
        super().__init__(model, most, capacity)
        self._tolerance = tolerance
        self._most = most

    @torch.no_grad()
    def step(self, token: int) -> torch.Tensor:
        """Append a token; returns the logits ``[V]`` of the next."""
        return self._append([token], self._logits_of_settled)

    def _logits_of_settled(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        model, cache = self._model, self._cache
        start = model.head_forward(tokens, positions, cache)
        state = model.first_state(start, positions)
        for iteration in range(self._most):
            output = model.body_forward(state, start, positions, cache, iteration=iteration)
            following = model.next_state(output, state, start, last=False)
            if iteration + 1 == self._most or relative_change(state, following) < self._tolerance:
                break
            state = following
        cache.repeat_last(iteration, self._most, model.config.body)
        self.iterations_run.append(iteration + 1)
        return model.tail_forward(model.next_state(output, state, start, last=True), positions, cache)


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Distance between two states scaled to norm 1, from 0 to 2; of one token each, ``[1, 1, D]``."""
    first, second = (F.normalize(state.float().flatten(), dim=0) for state in (before, after))
    return torch.dist(first, second).item()


def generate(
    decoding: Decoding,
    prompt: Sequence[int],
    choose: Callable[[torch.Tensor], int],
    max_tokens: int,
    end: int | None = None,
) -> Iterator[int]:
    """Continue a prompt.

    Args:
        decoding: an empty sequence.
        prompt: at least one token.
        choose: from the logits ``[V]`` to the next token.
        max_tokens: tokens at most.
        end: the token that ends the text; it is not given out.
    """
    *before, token = prompt
    decoding.read(before)
    for _ in range(max_tokens):
        token = choose(decoding.step(token))
        if token == end:
            return
        yield token
