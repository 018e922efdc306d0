"""Whether this machine can hold all sites of a file at once, as far as their costs tell."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from titan_ext.config.cost.cost import SiteCost
from titan_ext.config.findings import Missing, Need


def lacking_capacity(file: str, costs: Mapping[str, tuple[Any, SiteCost]]) -> list[Missing]:
    """The accelerators and the memory that the sites take and this machine does not have.

    Args:
        file: for the wording.
        costs: each ``Site`` with its cost, by name.
    """
    ranks = sum(site.nodes.ranks_per_node for site, _ in costs.values())
    gpus = torch.cuda.device_count()
    found = []
    if not gpus:
        total = sum(site.nodes.ranks_per_node * (cost.memory_bytes + cost.host_bytes) for site, cost in costs.values())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if total > memory:
            found.append(
                f"no GPU here, and {_gib(memory)} of memory for {ranks} rank(s) that hold {_gib(total)} at least"
            )
    elif ranks > gpus:
        found.append(f"{gpus} GPU(s) here for the {ranks} ranks of the sites; start some elsewhere with --only SITE")
    else:
        room = min(torch.cuda.get_device_properties(index).total_memory for index in range(gpus))
        for site, cost in costs.values():
            if cost.memory_bytes > room:
                found.append(
                    f'site "{site.name}": {_gib(room)} a GPU here for ranks that hold {_gib(cost.memory_bytes)}'
                )
    return [Missing(f"{file}: {text}", "", Need.DEVICE) for text in found]


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
