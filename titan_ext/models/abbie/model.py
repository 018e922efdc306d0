"""A decoder whose middle layers, the body, are applied several times with the same weights.

Parameters have the names and shapes of the standard decoder's, whatever the number of iterations.

Shapes: B batch, L sequence, D width of the residual stream.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn
from torchtitan.models.common.attention import AttentionMasksType

from titan_ext.errors import UserError
from titan_ext.models.abbie.iterations import Iterations
from titan_ext.models.abbie.pipeline import cut
from titan_ext.models.abbie.recurrence import Recurrence
from titan_ext.models.capabilities import Capabilities
from titan_ext.models.llama3.model import Llama3Model


class PerBlock(ABC):
    """In place of one attention mask for all blocks: something of its own for each application of a block.

    A key-value cache is one: what ``at`` returns reaches ``inner_attention`` as its ``attention_masks``.
    """

    @abstractmethod
    def at(self, iteration: int, layer: int) -> AttentionMasksType | None:
        """For the block ``layer`` in the body's ``iteration`` (from 0; 0 in head and tail)."""


Masks: TypeAlias = AttentionMasksType | PerBlock | None


class AbbieModel(Llama3Model):
    """Head and tail run once, the body ``iterations`` times: tail(body(… body(head(embed(tokens))))).

    The pieces (``head_forward``, ``first_state``, ``body_forward``, ``next_state``, ``tail_forward``) can be
    called one by one, so that a caller decides when to stop.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        loop_modules: ClassVar[tuple[str, ...]] = ()
        """Names of the modules besides blocks that every iteration uses."""
        head_layers: int
        """Blocks before the body."""
        body_layers: int
        """Blocks that are iterated; those after them are the tail."""
        recurrence: Recurrence = field(default_factory=Recurrence)
        """What an iteration takes from the one before."""
        iterations: Iterations = field(default_factory=Iterations)
        """How often the body is applied, in training and at evaluation."""
        fp32_residual: bool = False
        """Whether the residual stream stays in fp32 while the blocks compute in the parameters' type."""
        seed: int = 0
        """With the step's number it decides what is drawn; the run's ``debug.seed``."""

        @property
        def body(self) -> range:
            """Indices of the body's layers."""
            return range(self.head_layers, self.head_layers + self.body_layers)

        @property
        def body_modules(self) -> list[str]:
            """Names of the modules that every iteration uses."""
            return [*(f"layers.{index}" for index in self.body), *self.loop_modules]

        @property
        def varies_by_step(self) -> bool:
            """Whether two training steps may compute differently."""
            return self.iterations.sampling != "fixed"

        def update_from_config(self, *, config, **kwargs) -> None:
            """Take the run's seed besides what every decoder takes.

            Raises:
                UserError: CUDA graphs, which replay the first step, where steps differ.
            """
            Llama3Model.Config.update_from_config(self, config=config, **kwargs)
            training, debug = getattr(config, "training", None), getattr(config, "debug", None)
            self.seed = (getattr(debug, "seed", None) or 0) % 2**63
            if self.varies_by_step and training is not None and not training.disable_cuda_graphs:
                raise UserError(
                    "training.disable_cuda_graphs = false: must be true, for this model computes differently "
                    "from step to step and a CUDA graph replays the first"
                )

        def capabilities(self) -> Capabilities:
            """A body that is iterated, and that no stage of a pipeline may part."""
            once = self.iterations.evaluate == 1 and not self.recurrence.final_skip
            answers = Llama3Model.Config.capabilities(self)
            return replace(answers, iterations=self.iterations.evaluate, runs_once=once, cut=self.pipeline_stages)

        def pipeline_stages(self, parallelism: Any, parallel_dims: Any) -> list[list[str]]:
            """Module names of each pipeline stage; arguments and errors are those of ``pipeline.cut``."""
            return cut(self, parallelism, parallel_dims)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, each once, and floating-point operations of training on a token, each iteration counted.

            ``backprop_iterations`` takes nothing off.
            """
            parameters, operations = Llama3Model.Config.get_nparams_and_flops(self, model, seq_len)
            iterated = sum(
                each.numel() for name in self.body_modules for each in model.get_submodule(name).parameters()
            )
            # torchtitan's convention: 6 a parameter, and attention as if it were not causal.
            once = 6 * (iterated + 2 * self.body_layers * self.attention_width * seq_len)
            return parameters, operations + round((self.iterations.mean - 1) * once)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._step = 0

    def set_step(self, step: int) -> None:
        """Tell which training step comes, before it; it decides how many iterations are drawn."""
        self._step = step

    @property
    def num_iterations(self) -> int:
        """Iterations of a call that names no number: this step's in training, else those of evaluation."""
        iterations = self.config.iterations
        return iterations.at(self.config.seed, self._step) if self.training else iterations.evaluate

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_masks: Masks = None,
        *,
        iterations: int | None = None,
    ) -> torch.Tensor:
        """Logits (or hidden states, under a chunked loss), of a whole model or a pipeline stage.

        Args:
            tokens: int64 ``[B, L]``; on a later pipeline stage the stream ``[B, L, D]``.
            positions: int64 ``[B, L]``, each token's place in its document.
            attention_masks: one for all blocks, or a ``PerBlock``.
            iterations: applications of the body; by default ``num_iterations``.
        """
        h = self.head_forward(tokens, positions, attention_masks)
        if any(int(name) in self.config.body for name in self.layers):
            count = self.num_iterations if iterations is None else iterations
            h = self.iterate(h, count, positions, attention_masks)
        return self.tail_forward(h, positions, attention_masks)

    def head_forward(
        self, tokens: torch.Tensor, positions: torch.Tensor | None = None, attention_masks: Masks = None
    ) -> torch.Tensor:
        """Embedding and head: the latent ``[B, L, D]`` that the iterations start from."""
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        if self.config.fp32_residual:
            h = h.float()
        return self._blocks(range(self.config.head_layers), h, positions, attention_masks)

    def iterate(
        self,
        start: torch.Tensor,
        iterations: int,
        positions: torch.Tensor | None = None,
        attention_masks: Masks = None,
    ) -> torch.Tensor:
        """The tail's input ``[B, L, D]`` after so many iterations from the head's output ``start``."""
        state = self.first_state(start, positions)
        truncated = self.config.recurrence.backprop_iterations
        for iteration in range(iterations):
            output = self.body_forward(state, start, positions, attention_masks, iteration=iteration)
            if truncated is not None and iteration == iterations - truncated - 1:
                # The head's output that is added now is the next iteration's input: its gradient is not cut off.
                output, state = output.detach(), state.detach()
            state = self.next_state(output, state, start, last=iteration == iterations - 1)
        return state

    def first_state(self, start: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The state that the first iteration is given."""
        return start

    def body_forward(
        self,
        state: torch.Tensor,
        start: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_masks: Masks = None,
        *,
        iteration: int,
    ) -> torch.Tensor:
        """The body, once: ``iteration`` (from 0) only says which of a ``PerBlock``'s entries are meant."""
        return self._blocks(self.config.body, state, positions, attention_masks, iteration)

    def next_state(self, output: torch.Tensor, state: torch.Tensor, start: torch.Tensor, *, last: bool) -> torch.Tensor:
        """The state after an iteration: the tail's input if ``last``, else the next iteration's."""
        return self.config.recurrence.next_state(output, state, start, last=last)

    def tail_forward(
        self, state: torch.Tensor, positions: torch.Tensor | None = None, attention_masks: Masks = None
    ) -> torch.Tensor:
        """Tail, last norm and head of the vocabulary: logits, or hidden states under a chunked loss."""
        h = self._blocks(range(self.config.body.stop, len(self.config.layers)), state, positions, attention_masks)
        h = self.norm(h) if self.norm is not None else h
        if self._skip_lm_head or self.lm_head is None:
            return h
        return self.lm_head(h)

    def _blocks(
        self,
        indices: range,
        h: torch.Tensor,
        positions: torch.Tensor | None,
        attention_masks: Masks,
        iteration: int = 0,
    ) -> torch.Tensor:
        for name, block in self.layers.items():
            if int(name) in indices:
                each = attention_masks
                if isinstance(each, PerBlock):
                    each = each.at(iteration, int(name))
                h = block(h, each, positions)
        return h
