"""Settings that must be equal at all sites of a run."""

import dataclasses
from typing import Any

from titan_ext.config.common import beside_outer_loop, shares_token_rows
from titan_ext.config.dept import own_vocabulary
from titan_ext.config.model import VOCABULARY
from titan_ext.config.settings import show
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.data.tokenizers.traits import token_rows
from titan_ext.errors import UserError

# What a site may choose for itself although it shares the outer loop's other settings.
_SITES_OWN = {"outer_state_device"}


_REASONS = {
    "parallelism": 'ranks are paired between sites (semi_sync.pairing = "leader" lets layouts differ)',
    "tokenizer": "they share embeddings, whose rows would stand for other tokens at each; give them one tokenizer, or each "
    'embeddings of its own (dept.variant, or [[semi_sync.scopes]] with shared = "local")',
}


def check_sites(file: str, sites: list) -> None:
    """Refuse sites that cannot exchange with each other.

    Args:
        file: the configuration file, for the wording.
        sites: the ``Site`` objects of the run.

    Raises:
        UserError: naming the two sites and what differs.
    """
    first = sites[0]
    for other in sites[1:]:
        for what, ours, theirs in _differences(first, other):
            raise UserError(
                f'{file}: sites "{first.name}" and "{other.name}" differ in {what}: {show(ours)} and {show(theirs)}; '
                + _REASONS.get(what.partition(".")[0], "model, outer loop and last step must be equal")
            )


def _differences(first: Any, other: Any) -> list[tuple[str, Any, Any]]:
    """Name and the two values of everything that must be equal and is not."""
    found = []
    if first.model.name != other.model.name or first.model.flavor != other.model.flavor:
        found.append(("model", f"{first.model.name} {first.model.flavor}", f"{other.model.name} {other.model.flavor}"))
    known = first.model.overrides.get(VOCABULARY) and other.model.overrides.get(VOCABULARY)
    # A tokenizer that is on another machine leaves its rows open.
    rows = set() if known and not own_vocabulary(first.config.dept) else {VOCABULARY}
    for key in sorted({*first.model.overrides, *other.model.overrides} - rows):
        found.append((f"model.{key}", first.model.overrides.get(key), other.model.overrides.get(key)))
    if first.config.semi_sync.pairing == "rank":
        found += [
            (f"parallelism.{axis} degree", getattr(first.layout, axis), getattr(other.layout, axis))
            for axis in ("replicate", "shard", "context", "tensor", "pipeline")
        ]
        own = {"data_parallel_shard_degree", "pipeline_parallel_microbatch_size"}
        found += _fields("parallelism", first, other, own)
    found += _fields("semi_sync", first, other, _SITES_OWN)
    if first.config.semi_sync.method != "none" and not any(ours != theirs for _, ours, theirs in found):
        ours, theirs = beside_outer_loop(first.config), beside_outer_loop(other.config)
        found += [(key, ours.get(key), theirs.get(key)) for key in {**ours, **theirs}]
    if _tokens_differ(first, other):
        found.append(("tokenizer", first.tokenizer, other.tokenizer))
    found += _fields("optimizer_switch", first, other, set())
    found += _fields("dept", first, other, set())
    found += _fields("fomoe", first, other, set())
    return [(what, ours, theirs) for what, ours, theirs in found if ours != theirs]


def _tokens_differ(first: Any, other: Any) -> bool:
    """Whether the rows of embeddings that two sites share stand for different tokens, as far as this machine can tell."""
    one, two = (first.tokenizer, first.vocabulary), (other.tokenizer, other.vocabulary)
    if one == two or first.config.semi_sync.method == "none" or not shares_token_rows(first.config):
        return False
    try:
        return token_rows(build_tokenizer(*one)) != token_rows(build_tokenizer(*two))
    except UserError:
        return False  # it is on another machine, or has been complained of


def _fields(section: str, first: Any, other: Any, own: set[str]) -> list[tuple[str, Any, Any]]:
    ours, theirs = getattr(first.config, section), getattr(other.config, section)
    names = [each.name for each in dataclasses.fields(ours) if each.name not in own]
    return [(f"{section}.{name}", getattr(ours, name), getattr(theirs, name)) for name in names]
