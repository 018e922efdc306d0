"""How the ranks of a site are spread over its nodes."""

from dataclasses import dataclass, replace

from titan_ext.config.layout import Layout
from titan_ext.config.pipeline import is_v_shaped
from titan_ext.config.sections import SiteHeader
from titan_ext.config.settings import Settings

NODE_KEYS = ("nproc", "nodes", "nproc_per_node", "rendezvous_port")
"""Keys of a site's table that say where its ranks are."""

DEFAULT_PORT = 29500
"""Where the nodes of a site meet unless ``rendezvous_port`` says otherwise."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of a site, each with the same number of its ranks: node k has those from k times that number on."""

    count: int = 1
    ranks_per_node: int = 1
    port: int | None = None
    """Of the site's store at node 0; None: a free one, for a site of one node."""
    logging_node: int = 0
    """The node with the rank that knows the loss, which writes ``metrics.jsonl`` and ``summary.json``."""


def settle_nodes(settings: Settings, header: SiteHeader) -> SiteHeader:
    """Check the keys of a site that place its ranks, and fill in ``nproc`` where the others tell it."""

    def refuse(key: str, problem: str) -> None:
        settings.refuse(settings.error(key, problem, getattr(header, key)))

    port, each = header.rendezvous_port, header.nproc_per_node
    if port is not None and not 0 < port < 65536:
        refuse("rendezvous_port", "must be a port from 1 to 65535")
        header = replace(header, rendezvous_port=None)
    if header.nodes < 1:
        refuse("nodes", "must be at least 1")
        header = replace(header, nodes=1)
    if each is not None and each < 1:
        refuse("nproc_per_node", "must be at least 1")
    elif each is not None and header.nproc not in (None, header.nodes * each):
        refuse(
            "nproc", f"must be {header.nodes * each}, the product of nodes ({header.nodes}) and nproc_per_node ({each})"
        )
    elif each is not None:
        header = replace(header, nproc=header.nodes * each)
    return header


def spread(settings: Settings, header: SiteHeader, layout: Layout, schedule: str) -> Nodes:
    """Where the ranks of a site are.

    Args:
        settings: for the wording of errors.
        header: of the site.
        layout: of the site.
        schedule: of its pipeline.

    Raises:
        UserError: the nodes would not have equally many ranks.
    """
    if layout.ranks % header.nodes:
        problem = f"must divide the site's {layout.ranks} rank(s), as many at each node"
        raise settings.error("nodes", problem, header.nodes)
    each = layout.ranks // header.nodes
    last_stage = 0 if is_v_shaped(schedule) else layout.ranks // layout.pipeline * (layout.pipeline - 1)
    port = header.rendezvous_port or (DEFAULT_PORT if header.nodes > 1 else None)
    return Nodes(header.nodes, each, port, last_stage // each)


def notes_on(nodes: Nodes, layout: Layout) -> list[str]:
    """What a user should know of a layout over nodes."""
    if nodes.ranks_per_node % layout.tensor == 0:
        return []
    return [
        f"tensor parallelism ({layout.tensor} ranks) spans nodes of {nodes.ranks_per_node} rank(s): it exchanges in every layer"
    ]
