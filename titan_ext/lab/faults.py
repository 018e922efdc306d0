"""What goes wrong in a rehearsal, and when: from flags, from a seed, or from a recorded log."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from titan_ext.errors import UserError, one_of
from titan_ext.links.link import parse_seconds

FORM = "kill:SITE@120s[+30s], partition:A-B@100s+60s or slow:SITE@100s+5min*3"
_KINDS = ("kill", "partition", "slow")
_RECORDED = ("time", "kind", "site", "sites", "seconds", "factor")
_FAULT = re.compile(r"([a-z]+):(.+)@([^@+*]+)(?:\+([^+*]+))?(?:\*([0-9.]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault."""

    kind: str
    """"kill": the site is gone, and starts again later; "partition": nothing passes between two sites; "slow": a
    site's steps take longer."""
    at: float
    """Seconds since the start."""
    sites: tuple[int, ...]
    """One site, or the two of a partition."""
    seconds: float
    """How long it lasts; for a kill until the site starts again."""
    factor: float = 1.0
    """For "slow": how many times as long steps take."""


def parse_faults(texts: Sequence[str], sites: Sequence[str], restart_seconds: float) -> list[Fault]:
    """The faults of ``--fault`` flags.

    Raises:
        UserError: a flag cannot be read or names no site.
    """
    return [_parse(text, sites, restart_seconds) for text in texts]


def random_kills(
    mean_seconds: float, sites: Sequence[str], until: float, restart_seconds: float, seed: int
) -> list[Fault]:
    """Kills of every site with exponential times between them, until the end."""
    found = []
    for site in range(len(sites)):
        random, at = Random(f"{seed}/kills/{site}"), 0.0
        while (at := at + random.expovariate(1 / mean_seconds)) < until:
            found.append(Fault(kind="kill", at=at, sites=(site,), seconds=restart_seconds))
            at += restart_seconds
    return sorted(found, key=lambda fault: (fault.at, fault.sites))


def load_faults(path: str, sites: Sequence[str], restart_seconds: float) -> list[Fault]:
    """Faults that were recorded: JSONL with ``time`` (seconds), ``kind``, ``site`` or ``sites``, ``seconds``, ``factor``.

    Raises:
        UserError: the file cannot be read, or a line is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--faults {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                found.append(_recorded(json.loads(line), where, sites, restart_seconds))
            except json.JSONDecodeError:
                raise UserError(f"{where}: is not JSON") from None
    return found


def _parse(text: str, sites: Sequence[str], restart_seconds: float) -> Fault:
    where = f"--fault {text}"
    match = _FAULT.fullmatch(text)
    if match is None:
        raise UserError(f"{where}: must be {FORM}")
    kind, names, at, lasting, factor = match.groups()
    seconds = parse_seconds(lasting, where) if lasting else None
    parts = [names] if kind != "partition" else _two(names, sites)
    given = None
    if factor is not None:
        try:
            given = float(factor)
        except ValueError:
            raise UserError(f"{where}: *{factor} must be a number") from None
    return _make(where, kind, parts, parse_seconds(at, where), seconds, given, sites, restart_seconds)


def _two(names: str, sites: Sequence[str]) -> list[str]:
    """The two parts of ``A-B``, whose names may have hyphens."""
    cuts = [place for place, letter in enumerate(names) if letter == "-"]
    pairs = [[names[:cut], names[cut + 1 :]] for cut in cuts]
    return next((pair for pair in pairs if all(each in sites for each in pair)), [names])


def _recorded(line: Any, where: str, sites: Sequence[str], restart_seconds: float) -> Fault:
    if not isinstance(line, dict):
        raise UserError(f"{where}: must be an object with time, kind, site")
    for key in line:
        if key not in _RECORDED:
            raise UserError(f"{where}: {key}: {one_of(key, _RECORDED)}")
    if "site" in line and "sites" in line:
        raise UserError(f"{where}: has site and sites: must be one of them")
    names = line.get("sites", [line.get("site")])
    numbers = {key: line.get(key) for key in ("time", "seconds", "factor")}
    for key, value in numbers.items():
        needed = key == "time"
        if isinstance(value, bool) or (not isinstance(value, (int, float)) and (needed or value is not None)):
            raise UserError(f"{where}: {key} = {value!r}: must be a number")
        if value is not None and not math.isfinite(value):
            raise UserError(f"{where}: {key} = {value}: must be finite")
    if not isinstance(names, list):
        raise UserError(f"{where}: sites = {names!r}: must be a list of names")
    return _make(
        where,
        str(line.get("kind")),
        names,
        numbers["time"],
        numbers["seconds"],
        numbers["factor"],
        sites,
        restart_seconds,
    )


def _make(
    where: str,
    kind: str,
    names: Sequence[Any],
    at: float,
    seconds: float | None,
    factor: float | None,
    sites: Sequence[str],
    restart_seconds: float,
) -> Fault:
    if kind not in _KINDS:
        raise UserError(f"{where}: kind {kind}: {one_of(kind, _KINDS)}")
    for name in names:
        if name not in sites:
            raise UserError(f"{where}: site {name}: {one_of(name, sites)}")
    if len(set(names)) != (2 if kind == "partition" else 1):
        raise UserError(f"{where}: a {kind} is of {'two sites: A-B' if kind == 'partition' else 'one site'}")
    if seconds is None and kind != "kill":
        raise UserError(f"{where}: a {kind} ends: {FORM}")
    if (factor is None) == (kind == "slow"):
        raise UserError(f"{where}: {'slow needs a factor' if kind == 'slow' else 'only slow has a factor'}: {FORM}")
    if at < 0 or (seconds or 0) < 0 or (factor is not None and factor <= 0):
        raise UserError(f"{where}: times must be at least 0, and a factor above 0")
    return Fault(
        kind=kind,
        at=float(at),
        sites=tuple(sites.index(name) for name in names),
        seconds=restart_seconds if seconds is None else float(seconds),
        factor=1.0 if factor is None else float(factor),
    )
