"""From a file's tables to the settings of each of its sites, before any of them is built."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_ext.config.binder import Binder, field_types
from titan_ext.config.findings import Findings
from titan_ext.config.flags import parse_flags
from titan_ext.config.nodes import settle_nodes
from titan_ext.config.regions import Regions, check_region, read_regions, region_settings
from titan_ext.config.sections import SiteConfig, SiteHeader
from titan_ext.config.settings import UNSET, Origin, Settings, hint
from titan_ext.config.source import read_file
from titan_ext.config.unknown import unknown_key, unknown_section
from titan_ext.errors import UserError
from titan_ext.semi_sync.plan.regions import REGION, level_labels, names_in_common

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_WEIGHTS = (1e-6, 1e6)
_SHARE = ("share_index", "share_count")
_ONLY_IN_SITE = ("name", "index", "count", REGION)


@dataclass(frozen=True, slots=True)
class SitePlan:
    """A site as the file describes it."""

    settings: Settings
    """With findings of its own: the complaints about the site."""
    header: SiteHeader
    site: SiteConfig
    notes: list[str] = field(default_factory=list)
    """What a user should know of the site beside the others, though it is no mistake."""


@dataclass(frozen=True, slots=True)
class KnownNames:
    """What may stand at the top of a file."""

    sections: Sequence[str]
    """Names of the sections."""

    homes: Mapping[str, list[str]]
    """Dotted keys by their last part, to say where a misplaced key belongs."""


def plan_sites(path: str, overrides: Sequence[str], known: KnownNames, findings: Findings) -> list[SitePlan]:
    """Merge file, site tables and flags, and check what can be known without building anything.

    Args:
        path: the TOML file.
        overrides: flags such as ``["--training.steps", "20"]``; they apply to every site.
        known: names that a file may use.
        findings: takes the complaints about the file: unknown section or key, no or two names …

    Raises:
        UserError: the file or a flag cannot be read at all.
    """
    tables = read_file(path)
    flags = parse_flags(overrides)
    whole = Settings(str(path), findings=findings)
    whole.merge({key: value for key, value in tables.items() if key not in ("site", REGION)}, Origin.FILE)
    regions = read_regions(whole, tables.get(REGION, []))
    for settings in regions.values():
        _check_names(Settings(str(path), findings=findings).merge(settings, Origin.FILE), known)
    sites = _site_tables(whole, tables)
    _check_names(whole, known)
    _check_names(Settings(str(path), findings=findings).merge(flags, Origin.FLAG), known)
    plans = []
    for place, table in enumerate(sites):
        plans.append(_plan(_of_regions(whole, regions, table), table, flags, place, len(sites), known))
        check_region(plans[-1].settings, plans[-1].header.region, regions)
    _check_unique(str(path), plans, findings)
    _share_out(plans)
    _count_labels(plans)
    return plans


def _of_regions(whole: Settings, regions: Regions, table: Mapping[str, Any]) -> Settings:
    """The file's settings with those of a site's regions over them."""
    settings = whole.copy()
    for each in region_settings(regions, table):
        settings.merge(each, Origin.FILE)
    return settings


def _site_tables(whole: Settings, tables: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tables of the sites, each with a name; one without any where the file has none."""
    sites = tables.get("site", [])
    if not isinstance(sites, list) or not all(isinstance(each, Mapping) for each in sites):
        whole.refuse(whole.error("site", "must be [[site]] tables, with double brackets, one for each site"))
        whole.findings.doubt("data", "tokenizer")
        sites = []
    named = []
    for place, table in enumerate(sites):
        name = table.get("name", UNSET)
        number = f"{whole.file}: [[site]] number {place + 1}"
        if name is UNSET:
            whole.refuse(UserError(f'{number}: name is missing; add name = "site{place}"'))
        elif not isinstance(name, str) or not _NAME.match(name):
            allowed = "letters, digits, '.', '_' and '-', starting with a letter or digit, at most 64"
            whole.refuse(UserError(f"{number}: name = {name!r}: must be {allowed}"))
        else:
            named.append(table)
            continue
        named.append({**table, "name": f"site{place}"})
    return named or [{}]


def _plan(whole: Settings, table: Mapping, flags: Mapping, place: int, count: int, known: KnownNames) -> SitePlan:
    settings = whole.copy()
    settings.site = table.get("name")
    settings.findings = Findings(doubtful=set(whole.findings.doubtful))
    own = Settings(whole.file, settings.site, findings=settings.findings).merge(table, Origin.SITE)
    _check_names(own, known, in_site=True)
    settings.merge(table, Origin.SITE).merge(flags, Origin.FLAG)
    settings.tree.pop("name", None)
    header = settle_nodes(settings, _header(settings, settings.site or SiteConfig().name))
    site = SiteConfig(
        name=header.name,
        index=place if header.index is None else header.index,
        count=count if header.count is None else header.count,
        weight=header.weight,
        labels={**header.labels, **({REGION: header.region} if header.region else {})},
    )
    _check_header(settings, site, count)
    return SitePlan(settings, header, site)


def _header(settings: Settings, name: str) -> SiteHeader:
    binder, types = Binder(settings), field_types(SiteHeader)
    given: dict[str, Any] = {"name": name}
    for key in types:
        if key in settings.tree:
            try:
                given[key] = binder.value(types[key], settings.tree[key], key)
            except UserError as error:
                settings.refuse(error)
    return SiteHeader(**given)


def _check_header(settings: Settings, site: SiteConfig, listed: int) -> None:
    def refuse(key: str, problem: str, value: Any) -> None:
        settings.refuse(settings.error(key, problem, value))

    lightest, heaviest = _WEIGHTS
    if not lightest <= site.weight <= heaviest:
        problem = f"must be from {lightest:g} to {heaviest:g}: what counts is how it compares with other sites'"
        refuse("weight", problem, site.weight)
    if site.count < listed:
        refuse("count", f"must be at least {listed}, the sites of this file", site.count)
    elif not 0 <= site.index < site.count:
        refuse("index", f"must be from 0 to {site.count - 1}", site.index)
    least = settings.get("replica.min_sites")
    least = least.literal() if hasattr(least, "literal") else least
    if isinstance(least, int) and not isinstance(least, bool) and least > site.count >= listed:
        refuse("replica.min_sites", f"must be at most {site.count}, the number of sites", least)


def _check_names(settings: Settings, known: KnownNames, in_site: bool = False) -> None:
    """Refuse unknown names at the top of a layer; what is inside sections is the binder's business."""
    header = [name for name in field_types(SiteHeader) if in_site or name not in _ONLY_IN_SITE]
    allowed = [*header, "dump_folder", "model", "data", *known.sections]
    for name, value in settings.tree.items():
        if name in allowed:
            continue
        if name in _ONLY_IN_SITE:
            settings.refuse(settings.error(name, "belongs in a [[site]] table", value))
        elif isinstance(value, Mapping):
            for error in unknown_section(settings, name, allowed, known.homes):
                settings.refuse(error)
        else:
            shown = allowed if in_site else [*allowed, "site", REGION]
            settings.refuse(unknown_key(settings, "", name, shown, known.homes))


def _check_unique(file: str, plans: Sequence[SitePlan], findings: Findings) -> None:
    seen: dict[str, int] = {}
    for plan in plans:
        # Names are folders, and some file systems do not tell A from a.
        folded = plan.site.name.lower()
        if folded in seen:
            where = f'{file}: site "{plan.site.name}": name = "{plan.site.name}"'
            taken = f"[[site]] number {seen[folded] + 1} has this name already; every site needs its own"
            findings.add(UserError(f"{where}: {taken}"))
        seen.setdefault(folded, plan.site.index)
    indices = [plan.site.index for plan in plans]
    for plan in plans:
        if indices.count(plan.site.index) > 1:
            findings.add(plan.settings.error("index", "two sites have this index", plan.site.index))


def _share_out(plans: Sequence[SitePlan]) -> None:
    """Sites on one corpus each take their part of it, unless they say which."""
    groups: dict[str, list[SitePlan]] = {}
    for plan in plans:
        data = plan.settings.get("data")  # no table at all is the binder's to refuse
        told = [key for key in _SHARE if isinstance(data, Mapping) and key in data]
        if len(told) == 1:
            problem = "share_index and share_count go together; set both or neither"
            plan.settings.refuse(plan.settings.error(f"data.{told[0]}", problem))
        elif isinstance(data, Mapping) and (corpus := _corpus(plan.settings, data)):
            groups.setdefault(corpus, []).append(plan)
    for dataset, group in groups.items():
        telling = [plan for plan in group if "share_index" in plan.settings.table("data")]
        for plan in [] if not telling else group:
            if plan not in telling:
                first = telling[0].site.name
                problem = f'is missing: site "{first}" says which part of {dataset!r} it takes, so all on it must'
                plan.settings.refuse(plan.settings.error("data.share_index", problem))
        if len(group) > 1 and len(telling) == len(group):
            _note_shares(dataset, group)
        if len(group) > 1 and not telling:
            for place, plan in enumerate(group):
                plan.settings.merge({"data": {"share_index": place, "share_count": len(group)}}, Origin.TITAN_EXT)


def _note_shares(dataset: str, plans: Sequence[SitePlan]) -> None:
    """Say which sites read the same part of a corpus, and which parts none of them reads."""
    first_of: dict[tuple[Any, ...], SitePlan] = {}
    for plan in plans:
        part = tuple(plan.settings.get(f"data.{key}") for key in _SHARE)
        first = first_of.setdefault(part, plan)
        if first is not plan:
            index, count = part
            plan.notes.append(f'reads part {index} of {count} of {dataset}, as site "{first.site.name}" does')
    counts = {count for _, count in first_of}
    if len(counts) == 1 and isinstance(count := counts.pop(), int):
        left = sorted({*range(count)} - {index for index, _ in first_of if isinstance(index, int)})
        if left:
            plans[0].notes.append(f"part {', '.join(map(str, left))} of {count} of {dataset} is read by no site")


def _with_levels(labels: Mapping[str, str]) -> dict[str, str]:
    return {**labels, **(level_labels(labels[REGION]) if REGION in labels else {})}


def _count_labels(plans: Sequence[SitePlan]) -> None:
    """Tell each site how many sites of the file have its labels."""
    labels = [_with_levels(plan.site.labels) for plan in plans]
    for plan, own in zip(plans, labels, strict=True):
        for key, label in own.items():
            plan.site.label_counts[key] = sum(each.get(key) == label for each in labels)
        in_order = sorted(plans, key=lambda each: each.site.name)
        paths = [other.site.labels.get(REGION) for other in in_order]
        plan.site.regions = [path for path in paths if path] if all(paths) else []
        plan.site.nearest = _nearest(plan, in_order)
        if plan.site.regions:
            plan.site.place = [other.site.name for other in in_order].index(plan.site.name)


def _nearest(plan: SitePlan, plans: Sequence[SitePlan]) -> list[str]:
    own = plan.site.labels.get(REGION, "")
    common = {other.site.name: names_in_common(own, other.site.labels.get(REGION, "")) for other in plans}
    near = [name for name, count in common.items() if count and name != plan.site.name]
    return sorted(near, key=lambda name: -common[name])


def _corpus(settings: Settings, data: Mapping[str, Any]) -> str | None:
    """What sites that read the same share out: a corpus, or data sources that do not move from site to site."""
    if isinstance(data.get("dataset"), str) and data["dataset"]:
        return str(data["dataset"])
    named = [data[key] for key in ("source", "sources") if data.get(key)]
    moves = settings.get("semi_sync.source_placement") == "pollen"
    return str(named) if named and not moves else None


def select(file: str, plans: Sequence[SitePlan], name: str | None) -> SitePlan:
    """The site called ``name``; the only one, if there is no name.

    Raises:
        UserError: no such site, or several to choose from.
    """
    names = [plan.site.name for plan in plans]
    if name is None and len(plans) == 1:
        return plans[0]
    if name is None:
        raise UserError(f"{file}: has {len(plans)} sites; choose one with --site NAME (one of {', '.join(names)})")
    if name not in names:
        raise UserError(f'{file}: no site "{name}"; {hint(name, names)}')
    return plans[names.index(name)]
