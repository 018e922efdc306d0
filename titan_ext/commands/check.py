"""``titan-ext check FILE.toml``: what a configuration comes to, and what it will cost."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from titan_ext.commands.command import Command

_DESCRIPTION = """\
Print each site's resolved settings with where every value comes from, and what the run will cost.
Settings can be overridden as in training: --training.steps 20, --semi_sync.sync_every=16 …
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which sites, and in what form."""
    parser.add_argument("file", metavar="FILE.toml")
    parser.add_argument("--site", metavar="NAME", help="only this site")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--all", action="store_true", help="also print the settings left at torchtitan's defaults")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, also where this machine lacks something that the file names, which is listed; mistakes raise ``UserError``.
    """
    from titan_ext.config.load import load_run, load_site

    overrides = list(getattr(args, "overrides", []) or [])
    if args.site is None:
        sites = load_run(args.file, overrides, needs=()).sites
    else:
        sites = [load_site(args.file, args.site, overrides, needs=())]
    _check_weights(sites)
    print(_as_json(args.file, sites) if args.json else _as_text(args.file, sites, args.all))
    return 0


def _check_weights(sites: list) -> None:
    """Look at the weights that training would start from, each folder once for each model."""
    from titan_ext.huggingface.fit import check_weights

    seen = []
    for site in sites:
        if site.weights is not None and (site.weights, site.model) not in seen:
            seen.append((site.weights, site.model))
            spec, quantised = site.config.model_spec, site.config.checkpoint.initial_load_in_hf_quantized
            check_weights(site.weights, spec.model, spec.state_dict_adapter, quantised=quantised)


def _as_text(file: str, sites: list, everything: bool) -> str:
    from titan_ext.config.cost.cost import site_cost
    from titan_ext.config.findings import counted, missing_lines
    from titan_ext.config.render import render_cost, render_site
    from titan_ext.config.tree import render_tree

    costs = {site.name: (site, site_cost(site)) for site in sites}
    missing = _missing(file, costs)
    verdict = f"{counted(len(missing), 'thing')} missing on this machine" if missing else "no mistakes found"
    blocks = [f"{file}: {len(sites)} site(s), {verdict}"]
    if missing:
        blocks.append("\n".join(missing_lines(missing)))
    data = [line for site in sites for line in site.data]
    if data:
        blocks.append("\n".join(data))
    blocks += [render_site(site, everything=everything) for site in sites]
    blocks += [render_cost(same, cost) for same, cost in _alike(costs)]
    if tree := render_tree(sites):
        blocks.append(tree)
    return "\n\n".join(blocks)


def _missing(file: str, costs: Mapping[str, tuple[Any, Any]]) -> list[Any]:
    """What this machine lacks for the sites, each once, the room for all of them included."""
    from titan_ext.config.checks.capacity import lacking_capacity
    from titan_ext.config.findings import TO_START

    found = {str(each): each for site, _ in costs.values() for each in site.missing if each.need in TO_START}
    return [*found.values(), *lacking_capacity(file, costs)]


def _alike(costs: Mapping[str, tuple[Any, Any]]) -> list[tuple[list, Any]]:
    """Sites of equal cost, and what it is."""
    from titan_ext.config.dept import describe_dept
    from titan_ext.config.fomoe import describe_fomoe

    found = [(site, (cost, (*describe_dept(site), *describe_fomoe(site)))) for site, cost in costs.values()]
    return [([site for site, own in found if own == each], each[0]) for each in dict.fromkeys(own for _, own in found)]


def _as_json(file: str, sites: list) -> str:
    from titan_ext.config.cost.cost import site_cost
    from titan_ext.config.resolved import dump_resolved

    costs = {site.name: (site, site_cost(site)) for site in sites}
    described = [
        {
            "name": site.name,
            "data": site.data,
            "notes": site.notes,
            "config": dump_resolved(site),
            "cost": asdict(cost),
        }
        for site, cost in costs.values()
    ]
    missing = [str(each) for each in _missing(file, costs)]
    return json.dumps({"file": file, "missing": missing, "sites": described}, indent=2, ensure_ascii=False)


COMMAND = Command(
    name="check",
    help="print the resolved settings of each site and what they will cost",
    description=_DESCRIPTION,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
