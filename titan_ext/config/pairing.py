"""Which ranks of two sites exchange: ``semi_sync.pairing = "auto"`` made definite."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from titan_ext.config.binder import Binder
from titan_ext.config.headers import SitePlan
from titan_ext.config.layout import degrees_in

_CUTS_TABLES = ("data_parallel_shard_degree", "context_parallel_degree", "tensor_parallel_degree")
"""Degrees above 1 of which cut a table over ranks; -1 may come to that."""


def resolve_pairing(
    asked: Literal["auto", "rank", "leader"], plans: Sequence[SitePlan], default: Any, by_row: bool = False
) -> Literal["rank", "leader"]:
    """``rank`` where all sites have one parallel layout, else ``leader``.

    Every site comes to the same answer, for all read it from the whole file. Where the layout follows
    from the machine (no ``nproc``), sites count as alike.

    Args:
        asked: the setting.
        plans: all sites of the file.
        default: torchtitan's parallelism config with its defaults.
        by_row: tables are shared by row: ``leader`` unless no site cuts any.
    """
    if asked != "auto":
        return asked
    layouts = [_degrees(plan, default) for plan in plans]
    if by_row and any(layout[axis] != 1 for layout in layouts for axis in _CUTS_TABLES):
        return "leader"
    return "rank" if all(layout == layouts[0] for layout in layouts) else "leader"


def _degrees(plan: SitePlan, default: Any) -> dict[str, Any]:
    given = asdict(Binder(plan.settings).table(default, plan.settings.table("parallelism"), "parallelism"))
    return given | degrees_in(given, plan.header.nproc)
