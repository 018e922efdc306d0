"""Variant D's forward and backward against a standard decoder of as many blocks as D applies."""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.graph import saved_tensors_hooks

from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.abbie.train import build_model, compile_blocks, loss_of
from titan_ext.experiments.abbie.variants import Settings
from titan_ext.experiments.text import Batch

_D, _STANDARD = "d_prev", "standard"
_PASSES_A_TURN = 4
# The first passes compile.
_WARM_UP = 2


def speeds(settings: Settings, turns: int) -> Iterator[dict[str, Any]]:
    """Rows of figures, without and with compile: the standard decoder, then D with its ratios to it.

    Where blocks do not compile on this machine there is one row with the ``error``.
    """
    yield from compare(settings, turns, compiled=False)
    try:
        yield from compare(settings, turns, compiled=True)
    except TorchDynamoException as error:
        yield {"compiled": True, "error": str(error).strip().splitlines()[0]}


def compare(settings: Settings, turns: int, *, compiled: bool) -> list[dict[str, Any]]:
    """The rows of both decoders, which take turns; a ratio is the median over neighbouring turns.

    Args:
        settings: those of the comparison.
        turns: of each decoder.
        compiled: whether their blocks are.
    """
    ours = _Passes(settings, _D, compiled)
    theirs = _Passes(settings, _STANDARD, compiled, n_layers=ours.applied_blocks)
    for each in (theirs, ours):
        each.take(_WARM_UP)
    pairs = [(theirs.take(_PASSES_A_TURN), ours.take(_PASSES_A_TURN)) for _ in range(turns)]
    memory = theirs.memory()
    return [
        {
            "variant": variant,
            "compiled": compiled,
            **passes.size(),
            "tokens_per_second": round(median(pair[place] for pair in pairs)),
            "speed_ratio": round(median(pair[place] / pair[0] for pair in pairs), 4),
            "memory_bytes": passes.memory(),
            "memory_ratio": round(passes.memory() / memory, 4),
        }
        for place, (variant, passes) in enumerate(((_STANDARD, theirs), (_D, ours)))
    ]


class _Passes:
    """Forward and backward of one model on one batch."""

    def __init__(self, settings: Settings, variant: str, compiled: bool, **sizes: int) -> None:
        self._model = build_model(settings, variant, 0, **sizes)
        if compiled:
            compile_blocks(self._model)
        shape = (settings.batch, settings.length)
        tokens = torch.randint(VOCABULARY, shape, device=settings.device)
        positions = torch.arange(settings.length, device=settings.device).expand(shape)
        self._batch = Batch(tokens, tokens, positions)

    @property
    def applied_blocks(self) -> int:
        """Blocks that a token passes, repetitions counted."""
        config = self._model.config
        return len(config.layers) + (config.iterations.train - 1) * config.body_layers

    def size(self) -> dict[str, int]:
        """``applied_blocks``, ``parameters``, and floating-point ``operations`` of training on a token."""
        length = self._batch.inputs.shape[1]
        parameters, operations = self._model.config.get_nparams_and_flops(self._model, length)
        return {"applied_blocks": self.applied_blocks, "parameters": parameters, "operations": operations}

    def take(self, count: int) -> float:
        """Tokens per second of so many passes, each forward and backward."""
        self._wait()
        started = time.perf_counter()
        for _ in range(count):
            self._model.zero_grad()
            loss_of(self._model, self._batch).backward()
        self._wait()
        return count * self._batch.inputs.numel() / (time.perf_counter() - started)

    def memory(self) -> int:
        """Bytes of parameters, their gradients, and what the forward pass keeps for the backward pass."""
        parameters = {each.untyped_storage().data_ptr(): each.nbytes for each in self._model.parameters()}
        kept: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            loss_of(self._model, self._batch)
        activations = sum(size for place, size in kept.items() if place not in parameters)
        return 2 * sum(parameters.values()) + activations

    def _wait(self) -> None:
        if self._batch.inputs.device.type != "cpu":
            torch.accelerator.synchronize()
