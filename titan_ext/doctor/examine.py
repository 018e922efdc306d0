"""Puts the checks of a site together."""

import json
import os
import tomllib
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from titan_ext.doctor.finding import Finding, Level, ok
from titan_ext.doctor.ladder import Timing, check_ladder
from titan_ext.doctor.machine import check_address, check_machine, check_memory, check_pauses
from titan_ext.doctor.peers import Links, check_lighthouse, check_members, check_region_lighthouse, meet
from titan_ext.errors import UserError
from titan_ext.replica.address import lighthouse_url
from titan_ext.replica.membership.lighthouse_page import read_lighthouse_page
from titan_ext.replica.membership.shared_secret import load_secret
from titan_ext.semi_sync.round.differences import InCommon, as_text

_ALIVE_SECONDS = 10.0


def brief(site: Any) -> list[Finding]:
    """What costs nothing to look at."""
    replica, outer = site.config.replica, site.config.semi_sync
    return [*check_machine(site), *check_ladder(replica, Timing(bucket_bytes=outer.bucket_mib * 2**20))]


def examine_site(site: Any, links: Links | None) -> list[Finding]:
    """All about this site; ``links`` is what was found between it and the others."""
    findings = [*check_machine(site), *check_memory(site)]
    findings += check_ladder(site.config.replica, timing_of(site, links))
    if links is not None:
        findings += [*check_pauses(links.round_trip_seconds), *links.findings]
    return findings


def timing_of(site: Any, links: Links | None) -> Timing:
    """What the site's timeouts have to outlast."""
    from titan_ext.config.cost.cost import site_cost
    from titan_ext.config.outer_loop import plan_of

    outer = site.config.semi_sync
    bucket = outer.bucket_mib * 2**20
    if outer.method == "none":
        return Timing(bucket_bytes=bucket)
    plan, cost = plan_of(site.config), site_cost(site)
    return Timing(
        bucket_bytes=min(bucket, cost.round_bytes) or bucket,
        round_bytes=cost.round_bytes,
        round_steps=min((rule.period for rule in plan.rules), default=None),
        step_seconds=_step_seconds(Path(site.config.dump_folder) / "metrics.jsonl"),
        overlaps=any(rule.delay for rule in plan.rules),
        bits_per_second=links.bits_per_second if links is not None else None,
        round_trip_seconds=links.round_trip_seconds if links is not None else None,
    )


def examine_links(site: Any, file: str, wait_seconds: float) -> Links:
    """The lighthouse, the address that the site advertises, and the ways to the other sites."""
    from titan_ext.replica.manager import advertised_address

    replica = site.config.replica
    if site.config.semi_sync.method == "none":
        return Links([ok("lighthouse", "not needed: the site trains alone")])
    try:
        lighthouse = lighthouse_url(replica.lighthouse)
        host = advertised_address(replica, lighthouse)
    except UserError as error:
        is_named = replica.lighthouse or os.environ.get("TORCHFT_LIGHTHOUSE")
        level = Level.PROBLEM if is_named else Level.NOTE
        why = "nothing between the sites could be looked at"
        return Links([Finding("lighthouse", level, str(error), why, "--lighthouse URL")])
    from urllib.parse import urlsplit

    findings = check_address(host, urlsplit(lighthouse).hostname or "")
    try:
        page = read_lighthouse_page(lighthouse)
    except OSError as error:
        return Links([*findings, _silent(lighthouse, error)])
    names = _names(file) or [site.name]
    findings += [*check_lighthouse(page, names, site.name), *check_region_lighthouse(replica.region_lighthouse)]
    alive = page.alive(_ALIVE_SECONDS)
    if alive:
        links = check_members(alive, site.name)
    else:
        links = meet(lighthouse, site, host, _in_common(site), names, load_secret(replica.secret_file), wait_seconds)
    return Links([*findings, *links.findings], links.bits_per_second, links.round_trip_seconds)


def examine_lighthouse(site: Any, file: str) -> list[Finding]:
    """Whether the lighthouse that is named answers, and who uses it; nothing where none is named."""
    named = site.config.replica.lighthouse or os.environ.get("TORCHFT_LIGHTHOUSE")
    if named is None or site.config.semi_sync.method == "none":
        return []
    try:
        url = lighthouse_url(site.config.replica.lighthouse)
        return check_lighthouse(read_lighthouse_page(url), _names(file) or [site.name], "")
    except UserError as error:
        return [Finding("lighthouse", Level.PROBLEM, str(error), "no site can join without it", "--lighthouse URL")]
    except OSError as error:
        return [_silent(url, error)]


def _silent(lighthouse: str, error: OSError) -> Finding:
    what = f"{lighthouse} does not answer: {getattr(error, 'reason', error)}"
    mend = "titan-ext lighthouse, where all sites reach it, and [replica] lighthouse = its address"
    return Finding("lighthouse", Level.PROBLEM, what, "no site can join without it", mend)


def _in_common(site: Any) -> InCommon:
    """What has to be equal at all sites, as far as the configuration tells."""
    from titan_ext.config.common import beside_outer_loop, shared_tokens
    from titan_ext.config.outer_loop import plan_of
    from titan_ext.config.resolved import site_tokenizer
    from titan_ext.semi_sync.plan.resolve import settings_by_key

    config = site.config
    own = {"model": f"{site.model.name} {site.model.flavor}", "semi_sync.pairing": config.semi_sync.pairing}
    return InCommon(
        plan=plan_of(config).fingerprint(),
        tensors={},
        settings=as_text(beside_outer_loop(config) | shared_tokens(config, site_tokenizer(config)) | own),
        behind_plan=as_text(settings_by_key(config.semi_sync)),
    )


def _names(file: str) -> list[str]:
    """Of all sites of a file, which need not be on this machine."""
    path = Path(file)
    found = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text(encoding="utf-8"))
    return [each["name"] for each in found.get("site", []) if isinstance(each, dict) and "name" in each]


def _step_seconds(metrics: Path) -> float | None:
    """What an inner step took in an earlier run of the site, the first ones aside; None where there is none."""
    from titan_ext.instruments.lines import LineFollower, LocalFile, number

    try:
        steps = [each for each in LineFollower(LocalFile(metrics)).poll() if each.get("kind") == "step"][-200:]
    except OSError:
        return None
    pauses = [
        after["time"] - before["time"]
        for before, after in pairwise(steps)
        if all(number(each.get(key)) is not None for each in (before, after) for key in ("time", "step"))
        and after["step"] == before["step"] + 1
    ]
    return median(pauses) if pauses else None
