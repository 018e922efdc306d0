"""The processes of a run on this machine: which sites, which of their nodes, on which cores and GPUs."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_ext.launcher.node import Node
from titan_ext.launcher.placement import (
    assign_resources,
    available_cores,
    free_port,
    torchrun_command,
    visible_gpus,
)
from titan_ext.launcher.supervisor import Job


@dataclass(frozen=True, slots=True)
class NodeOfSite:
    """What runs under one torchrun: a site, or its part on one node."""

    site: Any
    """A ``Site``."""
    node: Node | None = None
    """None: the site has no other."""

    @property
    def name(self) -> str:
        """The site's name for what writes its metrics, which a launcher follows."""
        if self.node is None or self.node.rank == self.site.nodes.logging_node:
            return self.site.name
        return f"{self.site.name}, node {self.node.rank}"

    @property
    def is_followed(self) -> bool:
        """Whether the site's metrics are written here."""
        return self.name == self.site.name

    @property
    def log(self) -> Path:
        """Where its output goes: nodes may have one disk."""
        ending = f"_node{self.node.rank}" if self.node is not None and self.node.rank else ""
        return Path(self.site.config.dump_folder) / f"log{ending}.txt"


def all_nodes_here(sites: Sequence[Any]) -> list[NodeOfSite]:
    """Every node of every site on this machine, which meet on its loopback interface."""
    found = []
    for site in sites:
        count, port = site.nodes.count, free_port()
        nodes = [Node(rank, count, "127.0.0.1", port) for rank in range(count)] if count > 1 else [None]
        found += [NodeOfSite(site, node) for node in nodes]
    return found


def site_jobs(
    parts: Sequence[NodeOfSite],
    arguments: Callable[[str], Sequence[str]],
    *,
    grace_seconds: float,
    patience_seconds: float,
    environment: Mapping[str, str],
) -> list[Job]:
    """The torchrun of each site or node, with its share of this machine.

    Args:
        parts: what to start.
        arguments: of the ranks' program, by the site's name.
        grace_seconds: how long ranks that are told to leave may take.
        patience_seconds: how long the nodes of a site wait for each other.
        environment: what all ranks get on top.

    Raises:
        UserError: there are GPUs, but fewer than ranks.
    """
    assigned = assign_resources(
        {part.name: part.site.nodes.ranks_per_node for part in parts},
        cores=available_cores(),
        gpus=visible_gpus(os.environ),
        environment=os.environ,
    )
    jobs = []
    for part in parts:
        site = part.site
        command = torchrun_command(
            site.nodes.ranks_per_node,
            grace_seconds,
            *arguments(site.name),
            node=part.node,
            port=site.nodes.port if part.node is None else None,
            patience_seconds=patience_seconds,
        )
        # torchtitan warns if the rank that knows the loss is not among these.
        every_rank = {"LOG_RANK": ",".join(str(rank) for rank in range(site.nproc))}
        jobs.append(
            Job(
                name=part.name,
                command=command,
                environment={**assigned[part.name], **every_rank, **environment},
                log=part.log,
            )
        )
    return jobs
