"""Attention over the constituents at each node of a tree of sites: from sketches to shares.

A node's value is the sum of its constituents' by their attention, and theirs is that of their constituents, so that each
node's value is a weighted sum over the sites below it: what has to travel is one sum for each level of the tree.
"""

from collections.abc import Callable, Sequence

import torch

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From a node's sketch ``[units, size]`` and its constituents' ``[constituents, units, size]`` to what the softmax takes of
each, ``[constituents, units]``."""


def cosine(temperature: float) -> Score:
    """The more a constituent's direction is that of the node, the more it counts."""

    def score(node: torch.Tensor, constituents: torch.Tensor) -> torch.Tensor:
        lengths = node.norm(dim=-1) * constituents.norm(dim=-1)
        products = (node * constituents).sum(-1)
        return torch.where(lengths > 0, products / lengths, 0.0) / temperature

    return score


def distance(temperature: float) -> Score:
    """The further a constituent is from the node, the more it counts (FedAtt, arXiv 1812.07108)."""

    def score(node: torch.Tensor, constituents: torch.Tensor) -> torch.Tensor:
        return (node - constituents).norm(dim=-1) / temperature

    return score


def shares(
    leaves: torch.Tensor,
    nodes: Sequence[torch.Tensor],
    labels: Sequence[Sequence[int]],
    contributors: Sequence[int],
    *,
    score: Score,
    step: float,
) -> torch.Tensor:
    """The share of each site's contribution in its node's new value at each level, float64 ``[levels, sites, units]``.

    At each node they add up to 1; that of a site that contributes nothing is 0.

    Args:
        leaves: sketches of the sites' own values, float64 ``[sites, units, size]``.
        nodes: for each level, the root first, the sketches of the values before the round of the node that each site
            belongs to, in the same shape.
        labels: for each level a number of each site's node.
        contributors: the sites that contribute.
        score: what attention goes by.
        step: share of the constituents' sum in a node's new value; the rest is its old one.
    """
    found = torch.zeros(len(nodes), *leaves.shape[:2], dtype=torch.float64)
    within = {site: torch.ones(leaves.shape[1], dtype=torch.float64) for site in contributors}
    # A node goes by the first site in it, and so does a site.
    first_of, values = {site: site for site in contributors}, {site: leaves[site] for site in contributors}
    for level in reversed(range(len(nodes))):
        members: dict[int, list[int]] = {}
        for site in contributors:
            members.setdefault(labels[level][site], []).append(site)
        nodes_first, nodes_values = {}, {}
        for sites in members.values():
            constituents = list(dict.fromkeys(first_of[site] for site in sites))
            theirs = torch.stack([values[each] for each in constituents])
            attention = torch.softmax(score(nodes[level][sites[0]], theirs), dim=0)
            for site in sites:
                within[site] = within[site] * attention[constituents.index(first_of[site])]
                found[level, site] = within[site]
                nodes_first[site] = sites[0]
            summed = (attention[..., None] * theirs).sum(0)
            nodes_values[sites[0]] = (1 - step) * nodes[level][sites[0]] + step * summed
        first_of, values = nodes_first, nodes_values
    return found
