"""A file's sites as a workload, also under other settings of the outer loop than the file's."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from titan_ext.config.cost.cost import outer_rounds
from titan_ext.config.cost.outer_cost import LaunchCost
from titan_ext.planner.prediction import Workload
from titan_ext.planner.step_time import tokens_per_step
from titan_ext.semi_sync.plan.resolve import fill_defaults


def workload(sites: Sequence[Any], tokens: int | None = None) -> Workload:
    """What the sites of a file are to do.

    Args:
        sites: all ``Site`` of a run.
        tokens: the budget; None: that of the file's steps.
    """
    trained = sites[0].config.semi_sync.sites_per_round or len(sites)
    per_step = sum(map(tokens_per_step, sites)) * min(trained, len(sites)) // len(sites)
    steps = sites[0].config.training.steps
    return Workload(
        sites=[site.name for site in sites],
        steps=steps,
        tokens_per_step=per_step,
        tokens=tokens if tokens is not None else steps * per_step,
        launches=_launches(sites),
        ranks={site.name: site.layout.ranks for site in sites},
    )


def with_settings(sites: Sequence[Any], **settings: Any) -> list[Any]:
    """The sites with other values of ``[semi_sync]``; what depends on them takes its default.

    Raises:
        ValueError: the settings do not go together.
    """
    changed = []
    for site in sites:
        config = copy.copy(site.config)
        given = replace(config.semi_sync, **settings)
        if "method" in settings and settings["method"] != config.semi_sync.method:
            fresh = dict.fromkeys(("outer_optimizer", "outer_lr", "outer_momentum", "nesterov", "error_feedback"))
            given = replace(given, **fresh)
        elif "codec" in settings:
            given = replace(given, error_feedback=None)
        config.semi_sync = fill_defaults(given)
        changed.append(replace(site, config=config))
    return changed


def _launches(sites: Sequence[Any]) -> list[LaunchCost]:
    """Those of the site that sends most."""
    rounds = [outer_rounds(site) for site in _different(sites)]
    launches = [each.launches() for each in rounds if each is not None]
    return max(launches, key=lambda found: sum(each.times * each.site_bytes for each in found), default=[])


def _different(sites: Sequence[Any]) -> list[Any]:
    """One site of each model and layout."""
    found: list[Any] = []
    for site in sites:
        if not any((site.model, site.layout) == (each.model, each.layout) for each in found):
            found.append(site)
    return found
