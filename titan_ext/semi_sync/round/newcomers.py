"""From whom newcomers take what is nowhere whole but at the sites that hold it, such as rows of tables."""

from collections.abc import Sequence

from titan_ext.semi_sync.round.agreement import SiteStatus, Verdict


def places_of_givers(verdict: Verdict, groups: Sequence[str], group: str) -> list[float]:
    """The order in which newcomers take from sites, the first 0; below 0 a site that takes a group's values itself.

    Args:
        verdict: of the round that takes them in.
        groups: keys of the labels by which some rules are shared.
        group: the key of the values in question; empty where all sites share them.

    Returns:
        By rank; empty where all sites hold what the last commit left.
    """
    table, ranks = verdict.table, range(len(verdict.table))
    order = sorted(ranks, key=lambda rank: (table[rank].position, table[rank].rules is not None, -rank), reverse=True)
    places = [float(order.index(rank)) for rank in ranks]
    if not group:
        same = len({site.position for site in table}) == 1 and table[0].position.round > 0
        return [] if same else places
    labels, at = verdict.labels(groups)[group], groups.index(group)
    for rank in ranks:
        first = next(each for each in order if labels[each] == labels[rank])
        if rank != first and _lacks(table[rank], table[first], at):
            places[rank] = -1.0
    return places


def _lacks(site: SiteStatus, first: SiteStatus, group: int) -> bool:
    """Whether a site does not hold what the first of its group does."""
    if site.rules is not None:
        return False
    own, theirs = site.group_checksums[group], first.group_checksums[group]
    return site.position != first.position or site.position.round == 0 or (own != theirs and own != 0)
