"""A loss and the step that it believes to be in, without a trainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

from titan_ext.data import ByteTokenizer
from titan_ext.losses import InnerStep, TokenLoss, Tokens

VOCABULARY, WIDTH = 264, 16


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def inner_step(
    loss: TokenLoss,
    *,
    hidden: Callable[[torch.Tensor], torch.Tensor] | None = None,
    width: int = WIDTH,
    seq_len: int = 32,
    documents: tuple[str, ...] = (),
    sources: tuple[str, ...] = ("only",),
    sum_over_site: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    **changes: Any,
) -> InnerStep:
    """A step of one rank, whose model is ``hidden``: inputs ``[B, L]`` to states ``[B, L, width]``."""

    def read(tokens: Tokens) -> None:
        for first in range(0, len(tokens.inputs), 2):
            part = Tokens(*(getattr(tokens, name)[first : first + 2] for name in Tokens.__slots__))
            loss(hidden(part.inputs), part.pack())

    settings = dict(reader=0, readers=1, rows=2) | changes
    return InnerStep(
        device=torch.device("cpu"),
        width=width,
        vocabulary=VOCABULARY,
        seq_len=seq_len,
        tokenizer=ByteTokenizer(),
        sources=sources,
        documents=lambda: iter(documents),
        read=read,
        sum_over_site=sum_over_site,
        **settings,
    )


def batch(rows: int = 2, seq_len: int = 32, seed: int = 0, ignored: int = 5) -> Tokens:
    """Random documents, packed, with some labels ignored."""
    random = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randint(0, 256, (2, rows, seq_len), generator=random)
    labels.view(-1)[torch.randperm(labels.numel(), generator=random)[:ignored]] = -100
    begins = torch.rand(rows, seq_len, generator=random) < 0.15
    begins[:, 0] = True
    positions = torch.zeros_like(inputs)
    for row in range(rows):
        for place in range(1, seq_len):
            positions[row, place] = 0 if begins[row, place] else positions[row, place - 1] + 1
    source = begins.cumsum(1) % 2
    return Tokens(labels, inputs, positions, source, begins.cumsum(1), positions)


def head(seed: int = 0, width: int = WIDTH) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, VOCABULARY, bias=False)


def plain_loss(chunks: int, lm_head: nn.Module) -> ChunkedLossWrapper:
    return with_head(
        ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=CrossEntropyLoss.Config()).build(compile_config=None),
        lm_head,
    )


def with_head(loss: ChunkedLossWrapper, lm_head: nn.Module) -> ChunkedLossWrapper:
    loss.set_lm_head(lm_head)
    return loss


def results(
    loss: ChunkedLossWrapper, lm_head: nn.Module, states: torch.Tensor, labels: torch.Tensor
) -> list[torch.Tensor]:
    """The loss, and the gradients of head and hidden states."""
    lm_head.zero_grad()
    states = states.detach().requires_grad_()
    value, _ = loss(states, labels, torch.tensor(57))
    value.backward()
    return [value.detach(), lm_head.weight.grad.clone(), states.grad]
