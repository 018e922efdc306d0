"""Parameter scopes: which parameters the sites share in full, by row, or not at all, each with settings of its own.

A parameter belongs to the first scope of which a pattern fits its name, or else to the rest of the model, which
``[semi_sync]`` itself speaks of. Optimizer states go where their parameter goes. A scope is only more rules of
the one sync plan; DEPT's variants (arXiv 2410.05021) are settings of one scope.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from titan_ext.semi_sync.plan.fragments import assign_by_bytes, assign_by_modules, matches
from titan_ext.semi_sync.plan.plan import SyncPlan

REST = ""
"""Name of the scope of all parameters that no other scope claims."""

_BLOCK = re.compile(r"(.*?)(\d+)\.")

OWN_KEYS = ("sync_every", "codec", "outer_optimizer", "outer_lr", "outer_momentum", "nesterov")
"""Keys of ``[semi_sync]`` that a scope may set for itself, beside ``settings``."""


@dataclass(kw_only=True)
class ScopeConfig:
    """Parameters that the sites share in a way of their own: a ``[[semi_sync.scopes]]`` table.

    Fields left at None are those of ``[semi_sync]``.
    """

    name: str
    """Told apart by this from other scopes."""

    parameters: list[str]
    """Patterns of names, with ``*`` and ``?``: ``tok_embeddings.*``."""

    shared: Literal["full", "group", "sparse_rows", "local"] = "full"
    """Every element with every site, or with the sites that have one label in common ("group"); each row of a table with
    the sites that hold it; or with nobody."""

    group: str | None = None
    """With ``shared = "group"``: "region", or a key of the sites' ``labels``, such as "language"."""

    sync_every: int | None = None
    """Inner steps between two syncs of the scope's parameters."""

    codec: str | None = None
    """How its values travel: a name as in ``[semi_sync]``."""

    outer_optimizer: str | None = None
    """What takes its averaged pseudo-gradient; one other than ``[semi_sync]``'s has settings of its own."""

    outer_lr: float | None = None
    """Learning rate of that."""

    outer_momentum: float | None = None
    """Momentum of that, where it is "sgd"."""

    nesterov: bool | None = None
    """Nesterov momentum in that."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of its codec or outer optimizer by name, in place of those of ``[semi_sync]``."""


def assign(sizes: Mapping[str, int], plan: SyncPlan) -> dict[str, tuple[str, int]]:
    """Scope and fragment of every parameter that is shared.

    Args:
        sizes: elements by name, of the whole model (every pipeline stage), in model order.
        plan: the method's plan.

    Raises:
        ValueError: a scope without a parameter, or fragments that do not fit.
    """
    homes: dict[str, tuple[str, int]] = {}
    left = dict(sizes)
    for scope in plan.scopes:
        blocks = last_blocks(sizes, scope.last_blocks)
        claimed = {name: left.pop(name) for name in list(left) if name in blocks or matches(name, scope.parameters)}
        if not claimed:
            raise ValueError(f"scopes ({scope.name}): {list(scope.parameters)} fit no parameter of the model")
        if scope.shared:
            homes |= dict.fromkeys(claimed, (scope.name, 0))
    if not left:
        raise ValueError("scopes: no parameter is left for the rest of the model")
    if plan.fragments is not None:
        assigned = assign_by_modules(left, plan.fragments)
    else:
        assigned = assign_by_bytes(left, plan.num_fragments, plan.own_fragment)
    return homes | {name: (REST, fragment) for name, fragment in assigned.items()}


def last_blocks(names: Iterable[str], share: float) -> set[str]:
    """Names of the parameters of the model's last blocks: those whose name begins as ``layers.7.`` does.

    Args:
        names: of all parameters of the model.
        share: of its blocks, rounded to whole ones; at least one, if it is above 0.

    Raises:
        ValueError: there are none.
    """
    if not share:
        return set()
    trunks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if found := _BLOCK.match(name):
            trunks.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(name)
    if not trunks:
        raise ValueError("scopes: the model has no numbered blocks, such as layers.0, of which to take the last")
    blocks = max(trunks.values(), key=len)
    last = sorted(blocks)[-max(1, round(share * len(blocks))) :]
    return set().union(*(blocks[number] for number in last))
