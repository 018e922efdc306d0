"""Sections that choose between classes of torchtitan: ``[loss]`` and ``[activation_checkpoint]``."""

from dataclasses import dataclass, fields
from math import gcd
from typing import Any, Literal

from titan_ext.config.binder import Binder
from titan_ext.config.settings import Settings, hint

_CHUNKS = 8


@dataclass(kw_only=True, slots=True)
class LossSection:
    """``[loss]``: cross-entropy over the model's vocabulary."""

    chunked: bool = True
    """Compute logits for a part of the sequence at a time: less memory, same loss."""

    num_chunks: int | None = None
    """Parts of the sequence; by default 8, or the largest power of two below that divides ``training.seq_len``."""


def bind_loss(settings: Settings, binder: Binder, base: Any, vocabulary: int, seq_len: int) -> Any:
    """torchtitan's loss config: chunked or plain cross-entropy, or the flavor's own kind."""
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss

    wrapped = isinstance(base, ChunkedLossWrapper.Config) and type(base.loss_fn) is CrossEntropyLoss.Config
    if not wrapped and type(base) not in (BaseLoss.Config, CrossEntropyLoss.Config):
        return binder.section("loss", base)
    section = binder.section("loss", LossSection(num_chunks=base.num_chunks if wrapped else None))
    inner = CrossEntropyLoss.Config(global_vocab_size=vocabulary)
    if not section.chunked:
        return inner
    chunks = section.num_chunks if settings.get("loss.num_chunks") is not None else None
    if chunks is None:
        chunks = gcd(section.num_chunks or _CHUNKS, seq_len)
    if chunks < 1 or seq_len % chunks:
        raise settings.error("loss.num_chunks", f"must divide training.seq_len ({seq_len})", chunks)
    return ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=inner)


def activation_modes() -> dict[str, type | None]:
    """Config classes of torchtitan's activation checkpointing by ``mode``."""
    from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC

    return {
        "none": None,
        "selective": SelectiveAC.Config,
        "full": FullAC.Config,
        "memory_budget": MemoryBudgetAC.Config,
    }


def bind_activation_checkpoint(settings: Settings, binder: Binder, base: Any) -> Any:
    """The policy that ``mode`` names, with that class's own fields; None for ``none``."""
    table = settings.table("activation_checkpoint")
    modes = activation_modes()
    given = next(mode for mode, owner in modes.items() if owner is (None if base is None else type(base)))
    mode = binder.value(Literal[tuple(modes)], table.get("mode", given), "activation_checkpoint.mode")
    rest = {key: value for key, value in table.items() if key != "mode"}
    owner = modes[mode]
    if owner is None:
        for key in rest:
            raise settings.error(f"activation_checkpoint.{key}", 'has no meaning with mode = "none"', rest[key])
        return None
    for key in rest:
        if key not in [each.name for each in fields(owner)]:
            allowed = ["mode", *(each.name for each in fields(owner))]
            problem = f'unknown key for mode = "{mode}"; {hint(key, allowed)}'
            raise settings.error(f"activation_checkpoint.{key}", problem)
    return binder.table(base if type(base) is owner else owner, rest, "activation_checkpoint")
