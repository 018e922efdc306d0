"""Sections that choose between classes of torchtitan: ``[loss]`` and ``[activation_checkpoint]``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import gcd
from typing import Any, Literal

from titan_ext.config.binder import Binder
from titan_ext.config.losses import outside_tables, own_table, registered_loss
from titan_ext.config.settings import Settings
from titan_ext.config.unknown import unknown_key
from titan_ext.errors import UserError, require

_CHUNKS = 8


@dataclass(kw_only=True, slots=True)
class LossSection:
    """``[loss]``: cross-entropy over the model's vocabulary."""

    name: str = "cross_entropy"
    """The loss: torchtitan's, or one that weighs tokens; with a dotted path, one of your own. Settings of one loss are in
    ``[loss.NAME]``. Validation always uses torchtitan's."""

    chunked: bool = True
    """Compute logits for a part of the sequence at a time: less memory, same loss."""

    num_chunks: int | None = None
    """Parts of the sequence; by default 8, or the largest power of two below that divides ``training.seq_len``."""

    z_loss: float = 0.0
    """Each token's loss also has this times the square of the log of its softmax's denominator, which keeps logits from
    drifting (PaLM, arXiv 2204.02311, section 5: 1e-4). Lines of the kind "loss" in metrics.jsonl say what it comes to."""

    unigram_documents: int = 0
    """The site's first documents, whose tokens' frequencies the loss is also measured against: lines of the kind "loss" in
    metrics.jsonl have ``unigram_ce`` and ``normalised_loss``, which can be compared between vocabularies (UNIGRAM-CE of
    DEPT, arXiv 2410.05021, section 4.3). 0: none."""

    by_source: bool = False
    """Whether the loss of each source's tokens is told: of each name in ``data.mix``, else of each file. Lines of the kind
    "loss" in metrics.jsonl have ``cross_entropy/NAME``."""

    def __post_init__(self) -> None:
        require(0 <= self.z_loss < math.inf, "z_loss", self.z_loss, "at least 0, and finite")
        require(self.unigram_documents >= 0, "unigram_documents", self.unigram_documents, "at least 0")


def bind_loss(
    settings: Settings, binder: Binder, base: Any, vocabulary: int, seq_len: int, taught: bool = False
) -> Any:
    """The loss config: torchtitan's chunked or plain cross-entropy, a ``TokenLoss``, or the flavor's own kind.

    Args:
        settings: of the site.
        binder: theirs.
        base: the flavor's loss.
        vocabulary: rows of the model.
        seq_len: tokens of a sequence.
        taught: whether another model's logits are to be compared with.
    """
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss

    from titan_ext.losses import TokenLoss

    wrapped = isinstance(base, ChunkedLossWrapper.Config) and type(base.loss_fn) is CrossEntropyLoss.Config
    if not wrapped and type(base) not in (BaseLoss.Config, CrossEntropyLoss.Config):
        return binder.section("loss", base)
    name, owner = registered_loss(settings, binder)
    table = outside_tables(settings, name)
    section = binder.table(LossSection(num_chunks=base.num_chunks if wrapped else None), table, "loss")
    inner = CrossEntropyLoss.Config(global_vocab_size=vocabulary)
    if owner is None and (section.z_loss or section.unigram_documents or section.by_source or taught):
        owner = TokenLoss
    if not section.chunked and owner is None:
        return inner
    chunks = section.num_chunks if settings.get("loss.num_chunks") is not None else None
    if chunks is None:
        chunks = gcd(section.num_chunks or _CHUNKS, seq_len)
    if chunks < 1 or seq_len % chunks:
        raise settings.error("loss.num_chunks", f"must divide training.seq_len ({seq_len})", chunks)
    if owner is None:
        return ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=inner)
    # One that sees hidden states applies the head itself: not chunked, to the whole sequence at once.
    common = {key: getattr(section, key) for key in ("z_loss", "unigram_documents", "by_source")}
    start = owner.Config(num_chunks=chunks if section.chunked else 1, loss_fn=inner, **common)
    return binder.table(start, own_table(settings, owner.Config, f"loss.{name}"), f"loss.{name}")


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
    known = _fields_by_mode(modes)
    for key in [key for key in rest if mode not in known.get(key, ())]:
        value = rest.pop(key)
        settings.refuse(_misplaced(settings, mode, key, value, known))
    if owner is None:
        return None
    return binder.table(base if type(base) is owner else owner, rest, "activation_checkpoint")


def _fields_by_mode(modes: Mapping[str, type | None]) -> dict[str, list[str]]:
    """The modes that each key belongs to."""
    known: dict[str, list[str]] = {}
    for mode, owner in modes.items():
        for each in fields(owner) if owner is not None else ():
            known.setdefault(each.name, []).append(mode)
    return known


def _misplaced(settings: Settings, mode: str, key: str, value: Any, known: Mapping[str, list[str]]) -> UserError:
    if key not in known:
        allowed = ["mode", *(each for each, modes in known.items() if mode in modes)]
        return unknown_key(settings, "activation_checkpoint", key, allowed, {})
    problem = f'has no meaning with mode = "{mode}", only with {" or ".join(known[key])}'
    return settings.error(f"activation_checkpoint.{key}", problem, value)
