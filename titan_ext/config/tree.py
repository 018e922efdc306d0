"""The tree of a run's sites as text: what each level averages, how often, and what travels."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from titan_ext.config.cost.cost import outer_rounds
from titan_ext.config.cost.outer_cost import OuterRounds
from titan_ext.config.render import bytes_text
from titan_ext.semi_sync.plan.regions import LEVELS, REGION


def render_tree(sites: Sequence[Any]) -> str | None:
    """A line for each level, region and site; None where a site has no region, or there is no outer loop.

    Args:
        sites: the ``Site`` objects of the run.
    """
    paths = {site.name: site.config.site.labels.get(REGION) for site in sites}
    outer = sites[0].config.semi_sync
    if outer.method == "none" or not all(paths.values()):
        return None
    tops = list(dict.fromkeys(path.split("/")[0] for path in paths.values() if path))
    lines = [f"tree of {len(sites)} site(s) in {len(tops)} region(s)"]
    lines.append(f"  between all: {outer.method} every {outer.sync_every} steps, {_across(sites[0], tops)}")
    if outer.region_sync_every is not None:
        own = sites[0].config.replica.region_lighthouse is not None
        where = "over its lighthouse" if own else "in the quorum of all sites unless it has a lighthouse"
        lines.append(f"  in a region: average of {outer.region_average} every {outer.region_sync_every} steps, {where}")
    rounds = outer_rounds(sites[0])
    for rule in rounds.plan.rules if rounds is not None else ():
        if rule.group in LEVELS:
            names = rule.group.removeprefix(f"{REGION}/")
            lines.append(f"  among sites of {names} name(s) in common: {rule.key} every {rule.period} steps")
    return "\n".join(lines + [f"  {line}" for line in _branches(sites, paths, "", "")])


def _across(site: Any, tops: Sequence[str]) -> str:
    """What crosses from one region to the others in a round."""
    if site.config.semi_sync.topology == "flat":
        return 'every site sending to every other (semi_sync.topology = "flat")'
    # A region of one site each: what is left is what travels between them.
    config = copy.copy(site.config)
    config.site = dataclasses.replace(config.site, regions=list(tops), place=0)
    rounds = outer_rounds(dataclasses.replace(site, config=config))
    assert rounds is not None
    return f"{bytes_text(_largest(rounds, inner=False))} a round out of each region, whose first site speaks for it"


def _largest(rounds: OuterRounds, *, inner: bool) -> int:
    """Bytes of the largest round: of the regions alone, or of all sites."""
    sizes = [
        each.site_bytes
        for each in rounds.launches()
        if all(key.startswith(f"{REGION}/") for key in each.rules) is inner
    ]
    return max(sizes, default=0)


def _branches(sites: Sequence[Any], paths: dict[str, Any], above: str, indent: str) -> list[str]:
    """The regions below a path, and the sites that are in it themselves."""
    depth = len(above.split("/")) if above else 0
    below = [path for path in paths.values() if path != above and (not above or path.startswith(f"{above}/"))]
    children: list[tuple[str, Any]] = [
        (path, None) for path in dict.fromkeys("/".join(path.split("/")[: depth + 1]) for path in below)
    ]
    children += [(site.name, site) for site in sites if paths[site.name] == above]
    lines = []
    for place, (name, site) in enumerate(children):
        last = place == len(children) - 1
        text = f"region {name}" if site is None else _site(site)
        lines.append(f"{indent}{'└' if last else '├'} {text}")
        if site is None:
            lines += _branches(sites, paths, name, indent + ("  " if last else "│ "))
    return lines


def _site(site: Any) -> str:
    rounds = outer_rounds(site)
    assert rounds is not None
    text = f"site {site.name}: sends {bytes_text(_largest(rounds, inner=False))} in a round of all"
    if site.config.semi_sync.region_sync_every is None:
        return text
    return f"{text}, {bytes_text(_largest(rounds, inner=True))} in one of its region"
