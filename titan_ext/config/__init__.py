"""Configuration: TOML files and flags onto torchtitan's own dataclasses.

The public names load on first use, so that the command line answers quickly and the trainer can
import ``titan_ext.config.sections`` without torchtitan.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Run": "load",
    "Site": "load",
    "load_run": "load",
    "load_site": "load",
    "load_to_start": "load",
    "check_outputs": "disk",
    "check_world_size": "layout",
    "dump_resolved": "resolved",
    "save_resolved": "resolved",
    "SiteCost": "cost.cost",
    "site_cost": "cost.cost",
    "SiteConfig": "sections",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
