"""``[[region]]`` tables: the tree of sites, and settings that the sites of a region have in common."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from titan_ext.config.sections import RegionHeader
from titan_ext.config.settings import Settings, hint
from titan_ext.semi_sync.plan.regions import MOST_LEVELS, REGION

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_ALLOWED = f"a path of at most {MOST_LEVELS} names of letters, digits, '.', '_' and '-', such as eu/de"

Regions = Mapping[str, Mapping[str, Any]]
"""By path the settings of a region, its parents' not among them."""


def read_regions(whole: Settings, tables: Any) -> Regions:
    """The ``[[region]]`` tables of a file; complaints go to its findings."""
    if not isinstance(tables, list) or not all(isinstance(each, Mapping) for each in tables):
        whole.refuse(whole.error("region", "must be [[region]] tables, with double brackets, one for each region"))
        return {}
    header = {each.name for each in fields(RegionHeader)}
    found: dict[str, Mapping[str, Any]] = {}
    for place, table in enumerate(tables):
        name, parent = table.get("name"), table.get("parent")
        key = f"region[{place}]"
        path = f"{parent}/{name}" if parent else name
        if not isinstance(name, str) or not _NAME.match(name):
            whole.refuse(whole.error(f"{key}.name", "must be letters, digits, '.', '_' and '-'", name))
        elif parent is not None and parent not in found:
            problem = f"no region above has this path; {hint(str(parent), list(found))}"
            whole.refuse(whole.error(f"{key}.parent", problem, parent))
        elif path in found:
            whole.refuse(whole.error(f"{key}.name", "two regions have this path", path))
        elif not is_path(path):
            whole.refuse(whole.error(f"{key}.name", f"must make {_ALLOWED}", path))
        else:
            found[path] = {key: value for key, value in table.items() if key not in header}
    return found


def is_path(region: str) -> bool:
    """Whether a text may be a site's region."""
    names = region.split("/")
    return len(names) <= MOST_LEVELS and all(map(_NAME.match, names))


def region_settings(regions: Regions, table: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The settings of the regions that a site's table names, the outermost first."""
    path = table.get(REGION)
    names = path.split("/") if isinstance(path, str) else []
    return [
        regions["/".join(names[:count])] for count in range(1, len(names) + 1) if "/".join(names[:count]) in regions
    ]


def check_region(settings: Settings, region: str | None, regions: Regions) -> None:
    """Refuse a site's region that is no path, or that the file's tables do not have."""
    if REGION in settings.table("labels"):
        problem = f"is a key of [[site]] itself: {REGION} = {settings.table('labels')[REGION]!r}"
        settings.refuse(settings.error(f"labels.{REGION}", problem))
    if region is not None and not is_path(region):
        settings.refuse(settings.error(REGION, f"must be {_ALLOWED}", region))
    elif region is not None and regions and region not in regions:
        settings.refuse(settings.error(REGION, f"no [[region]] has this path; {hint(region, list(regions))}", region))
